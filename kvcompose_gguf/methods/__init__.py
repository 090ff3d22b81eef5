"""Compression methods: one frozen dataclass a file, one table of names.

A user's method is a subclass of ``Method`` that is registered the same way, or named as ``module:attribute``.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Callable
from typing import Any

from ..errors import ConfigError
from .base import Method

__all__ = ["METHODS", "Method", "make_method", "register"]

#: name -> factory, or where it is: "module:attribute", imported when it is first used
METHODS: dict[str, str | Callable[..., Method]] = {
    "kvcompose": "kvcompose_gguf.methods.kvcompose:KVCompose",
    "streaming-llm": "kvcompose_gguf.methods.streaming_llm:StreamingLLM",
    "observed-attention": "kvcompose_gguf.methods.observed_attention:ObservedAttention",
    "tova": "kvcompose_gguf.methods.tova:TOVA",
    "snapkv": "kvcompose_gguf.methods.snapkv:SnapKV",
    "pyramidkv": "kvcompose_gguf.methods.pyramidkv:PyramidKV",
    "knorm": "kvcompose_gguf.methods.knorm:KNorm",
    "keydiff": "kvcompose_gguf.methods.keydiff:KeyDiff",
    "expected-attention": "kvcompose_gguf.methods.expected_attention:ExpectedAttention",
    "kvzip": "kvcompose_gguf.methods.kvzip:KVzip",
    "unstructured": "kvcompose_gguf.methods.unstructured:Unstructured",
    "variant": "kvcompose_gguf.evaluation.variants:Variant",
    "random": "kvcompose_gguf.methods.random_tokens:RandomTokens",
    "compresskv": "kvcompose_gguf.methods.compresskv:CompressKV",
}


def register(name: str, factory: Callable[..., Method]) -> None:
    """Make ``factory(**options)`` known as ``name`` to ``make_method`` and the command line.

    Raises:
        ConfigError: the name is taken, or has a character that ``make_method`` reads as its own.
    """
    if name in METHODS or not name or set(name) & set(":,="):
        raise ConfigError(f"name={name!r} is taken, empty or has one of ':,='")
    METHODS[name] = factory


def make_method(spec: str, **options: Any) -> Method:
    """The method of a text such as ``"kvcompose,scoring=window,window=32"`` or ``"my_module:MyMethod"``.

    Args:
        spec: a name of ``METHODS`` or ``module:attribute``, and options that are read as Python literals or else as
            texts.
        options: more of them, e.g. ``compression_ratio=0.75``.
    Raises:
        ConfigError: there is no such method or option, or one is out of its range.
    """
    name, *pairs = spec.split(",")
    for pair in pairs:
        key, is_pair, text = pair.partition("=")
        if not is_pair:
            raise ConfigError(f"method={spec!r}: {pair!r} is not option=value")
        options[key.strip()] = _literal(text.strip())
    factory = METHODS.get(name, name)
    if isinstance(factory, str):
        factory = _import(factory)
    try:
        method = factory(**options)
    except TypeError as error:
        raise ConfigError(f"method={spec!r}: {error}") from error
    if not isinstance(method, Method):
        raise ConfigError(f"method={spec!r} makes {method!r}, which is not a Method")
    return method


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _import(place: str) -> Callable[..., Method]:
    module, is_place, attribute = place.partition(":")
    if not is_place:
        raise ConfigError(f"method={place!r} is none of {', '.join(METHODS)}, and no module:attribute")
    try:
        factory: Callable[..., Method] = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"method={place!r} cannot be imported: {error}") from error
    return factory


def __getattr__(name: str) -> Any:
    """Classes of ``METHODS`` by their names, and ``Custom``: ``from kvcompose_gguf.methods import SnapKV``."""
    for place in (*METHODS.values(), "kvcompose_gguf.methods.custom:Custom"):
        if isinstance(place, str) and place.endswith(f":{name}"):
            return _import(place)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
