"""Compression methods: one frozen dataclass per file, and one table of names.

A user's method is a subclass of ``Method``. Register it in the same table, or name it as ``module:attribute``.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
import re
from collections.abc import Callable
from typing import Any

from ..errors import ConfigError
from .base import Method

__all__ = ["METHODS", "Method", "make_method", "register"]

#: name -> factory, or its location "module:attribute", which is imported on first use
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
    "variant": "kvcompose_gguf.methods.variant:Variant",
    "random": "kvcompose_gguf.methods.random_tokens:RandomTokens",
    "compresskv": "kvcompose_gguf.methods.compresskv:CompressKV",
}


def register(name: str, factory: Callable[..., Method]) -> None:
    """Registers ``factory(**options)`` as ``name`` for ``make_method`` and the command line.

    Raises:
        ConfigError: the name is taken, empty, or contains one of ``:,=``.
    """
    if name in METHODS or not name or set(name) & set(":,="):
        raise ConfigError(f"name={name!r} is taken, empty, or contains one of ':,='")
    METHODS[name] = factory


def make_method(spec: str, **options: Any) -> Method:
    """Makes the method that a text such as ``"kvcompose,scoring=window,window=32"`` or ``"my_module:MyMethod"`` names.

    Args:
        spec: a name in ``METHODS`` or ``module:attribute``, followed by options. An option's value is a Python literal,
            which may contain commas, or else a text up to the next comma.
        options: further options, e.g. ``compression_ratio=0.75``.
    Raises:
        ConfigError: the method or an option does not exist, or an option is given twice or is out of range.
    """
    name, *pieces = spec.split(",")
    while pieces:
        key, value, pieces = _first_option(spec, pieces)
        if key in options:
            raise ConfigError(f"method={spec!r}: {key} is given twice")
        options[key] = value
    factory = METHODS.get(name, name)
    if isinstance(factory, str):
        factory = _import(factory)
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"method={spec!r} does not name a Python class or function: {error}") from error
    try:
        signature.bind(**options)
    except TypeError as error:
        raise ConfigError(f"method={spec!r}: {error}; its options are {', '.join(signature.parameters)}") from error
    method = factory(**options)
    if not isinstance(method, Method):
        raise ConfigError(f"method={spec!r} makes {method!r}, which is not a Method")
    return method


def _first_option(spec: str, pieces: list[str]) -> tuple[str, Any, list[str]]:
    """Returns name and value of the first option in ``pieces`` (``spec`` split at commas), and the remaining pieces."""
    key, is_pair, text = pieces[0].partition("=")
    if not is_pair:
        raise ConfigError(f"method={spec!r}: {pieces[0]!r} is not option=value")
    for n in range(1, len(pieces) + 1):
        with contextlib.suppress(ValueError, SyntaxError, TypeError):
            return key.strip(), ast.literal_eval(",".join([text, *pieces[1:n]]).strip()), pieces[n:]
    return key.strip(), text.strip(), pieces[1:]


def _import(place: str) -> Callable[..., Method]:
    if not re.fullmatch(r"\w+(\.\w+)*:\w+", place):
        raise ConfigError(f"method={place!r} is none of {', '.join(METHODS)}, nor module:attribute")
    module, _, attribute = place.partition(":")
    try:
        factory: Callable[..., Method] = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"method={place!r} cannot be imported: {error}") from error
    return factory


def __getattr__(name: str) -> Any:
    """Returns the classes of ``METHODS`` and ``Custom`` by name: ``from kvcompose_gguf.methods import SnapKV``."""
    for place in (*METHODS.values(), "kvcompose_gguf.methods.custom:Custom"):
        if isinstance(place, str) and place.endswith(f":{name}"):
            return _import(place)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
