"""llama.cpp's chat templates, tool calls and JSON schemas (libkvc-chat, patches/src/common/kvc-chat.h)."""

from __future__ import annotations

import ctypes
import functools
import json
import sys
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import ConfigError, LibraryError, NativeError
from . import library

ABI = 1

_OK, _ARGUMENT = 0, 1

_HANDLE = ctypes.POINTER(ctypes.c_void_p)
_TEXT, _OUT = ctypes.c_char_p, ctypes.POINTER(ctypes.c_char_p)

#: the arguments of every function that returns a status
_ARGUMENTS: dict[str, list[Any]] = {
    "grammar_of_schema": [_TEXT, _OUT],
    "body_of_messages": [_TEXT, _OUT],
    "body_of_responses": [_TEXT, _OUT],
    "template_new": [_TEXT, _TEXT, _TEXT, ctypes.c_int32, _HANDLE, _OUT],
    "template_caps": [ctypes.c_void_p, _OUT],
    "template_apply": [ctypes.c_void_p, _TEXT, _OUT],
    "parser_new": [_TEXT, _HANDLE, _OUT],
    "parser_read": [ctypes.c_void_p, _TEXT, ctypes.c_int32, _OUT],
    "sampler_accept": [ctypes.c_void_p, ctypes.c_int32, _OUT],
}


@functools.cache
def _load() -> ctypes.CDLL:
    library.load()  # libllama, which this library uses
    file = {"win32": "kvc-chat.dll", "darwin": "libkvc-chat.dylib"}.get(sys.platform, "libkvc-chat.so")
    path = library.library_dir() / file
    try:
        lib = ctypes.CDLL(str(path))
        abi = lib.kvc_chat_abi()
    except (OSError, AttributeError) as error:
        raise LibraryError(f"{path} cannot be loaded: {error}: build the libraries again") from error
    if abi != ABI:
        raise LibraryError(f"{path} has ABI {abi}; this package needs {ABI}: build it again")
    for name, arguments in _ARGUMENTS.items():
        getattr(lib, f"kvc_chat_{name}").argtypes = arguments
    lib.kvc_chat_text_free.argtypes = [ctypes.c_void_p]
    for name in ("template_free", "parser_free"):
        free = getattr(lib, f"kvc_chat_{name}")
        free.argtypes, free.restype = [ctypes.c_void_p], None
    return lib


def _call(name: str, *arguments: Any) -> str:
    """Calls a function and returns its text; raises ConfigError or NativeError with its message."""
    lib, out = _load(), ctypes.c_char_p()
    status = getattr(lib, f"kvc_chat_{name}")(*arguments, ctypes.byref(out))
    text = (out.value or b"").decode("utf-8", "replace")
    lib.kvc_chat_text_free(ctypes.cast(out, ctypes.c_void_p))
    if status == _OK:
        return text
    raise (ConfigError if status == _ARGUMENT else NativeError)(text or f"kvc_chat_{name}: status {status}")


def _bytes(text: str) -> bytes:
    if "\0" in text:
        raise ConfigError("a text has a zero byte")
    return text.encode("utf-8", "replace")


def _json(value: Any) -> bytes:
    try:
        return _bytes(json.dumps(value, ensure_ascii=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"this is no JSON: {error}") from error


def grammar_of_schema(schema: Any) -> str:
    """Returns GBNF that matches the JSON texts of a JSON schema.

    Raises:
        ConfigError: the schema is invalid, or has something that llama.cpp does not convert.
    """
    return _call("grammar_of_schema", _json(schema))


def body_of_messages(body: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a body of Anthropic's Messages API as one of OpenAI's chat completions; raises ConfigError."""
    return dict(json.loads(_call("body_of_messages", _json(body))))


def body_of_responses(body: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a body of OpenAI's Responses API as one of its chat completions; raises ConfigError."""
    return dict(json.loads(_call("body_of_responses", _json(body))))


def sampler_accept(sampler: Any, token: int) -> None:
    """Tells a ``llama_sampler`` the next token; raises ConfigError if a grammar does not allow it."""
    _call("sampler_accept", sampler, token)


@dataclass(frozen=True, kw_only=True)
class Trigger:
    """What lets a lazy grammar begin: a token, a word, or a regular expression for a part or all of the text."""

    kind: int
    value: str
    token: int

    #: the kinds (common_grammar_trigger_type)
    TOKEN, WORD, PATTERN, PATTERN_FULL = range(4)


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """A chat as a prompt, and what its answer has to be (common_chat_params).

    Attributes:
        prompt: the prompt, with ``begin``.
        begin: the end of the prompt, with which the answer begins: a grammar and the parser expect it.
        grammar: GBNF for the answer; empty: it is free.
        triggers: what lets the grammar begin; empty: it holds from ``begin`` on.
        preserved: texts of control tokens that the parser needs to see.
        stops: texts that end the answer.
        thinking: the text that begins the model's thoughts, and those that end them; empty: it does not think.
        applied: all of this as llama.cpp returned it, for ``AnswerParser``.
    """

    prompt: str
    begin: str = ""
    grammar: str = ""
    triggers: tuple[Trigger, ...] = ()
    preserved: tuple[str, ...] = ()
    stops: tuple[str, ...] = ()
    thinking: tuple[str, ...] = ()
    applied: Mapping[str, Any] = field(default_factory=dict)


class ChatTemplate:
    """A chat template, as models contain it.

    Args:
        source: Jinja, ``"chatml"``, or the name of a format that llama.cpp has built in, if ``is_name``.
        bos, eos: texts of the tokens that begin and end a text.
        adds_bos: whether the tokenizer adds the BOS token, so that prompts must not begin with it.
    Raises:
        ConfigError: llama.cpp cannot read the template.
    """

    def __init__(self, source: str, bos: str = "", eos: str = "", adds_bos: bool = True, is_name: bool = False) -> None:
        self.source, self._is_name, self._handle = source, is_name, ctypes.c_void_p()
        texts = [_bytes(text) for text in (source, bos, eos)]
        try:
            _call("template_new", *texts, adds_bos, ctypes.byref(self._handle))
        except ConfigError as error:
            raise ConfigError(f"the chat template cannot be read: {error}") from error
        weakref.finalize(self, _load().kvc_chat_template_free, self._handle)

    @functools.cached_property
    def caps(self) -> dict[str, bool]:
        """What the template can do, with llama.cpp's names, e.g. ``supports_tools``."""
        return dict(json.loads(_call("template_caps", self._handle)))

    def render(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> Rendered:
        """Returns the prompt for messages in OpenAI's form.

        Args:
            options: fields of a request that decide the prompt, as kvc-chat.h names them, e.g. ``tools``.
        Raises:
            ConfigError: the template refuses the messages or fails with them, or an option is invalid.
        """
        request = {"messages": list(messages), **options, **({"use_jinja": False} if self._is_name else {})}
        try:
            out = json.loads(_call("template_apply", self._handle, _json(request)))
        except ConfigError as error:  # the template's own words are behind where it says them
            words = str(error).rsplit("\nError: ", 1)[-1].removeprefix("Jinja Exception: ")
            raise ConfigError(words) from error
        thinking = (out["thinking_start"], *out["thinking_ends"])
        return Rendered(
            prompt=out["prompt"], begin=out["generation_prompt"], grammar=out["grammar"],
            triggers=tuple(
                Trigger(kind=each["type"], value=each["value"], token=each["token"])
                for each in (out["grammar_triggers"] if out["grammar_lazy"] else ())
            ),
            preserved=tuple(out["preserved_tokens"]), stops=tuple(out["stops"]),
            thinking=thinking if all(thinking) and len(thinking) > 1 else (), applied=out,
        )  # fmt: skip


class AnswerParser:
    """Divides an answer into thoughts, content and tool calls while it is written.

    Args:
        rendered: the prompt that the answer follows.
        options: ``reasoning_format``, ``reasoning_in_content``, ``parse_tool_calls``, ``is_continuation``, ``echo``, as
            kvc-chat.h describes them.
    Raises:
        ConfigError: an option is invalid.
    """

    def __init__(self, rendered: Rendered, **options: Any) -> None:
        self._handle = ctypes.c_void_p()
        _call("parser_new", _json({**rendered.applied, **options}), ctypes.byref(self._handle))
        weakref.finalize(self, _load().kvc_chat_parser_free, self._handle)

    def deltas(self, answer: str) -> list[dict[str, Any]]:
        """Returns what an answer so far adds to OpenAI's message; raises ConfigError if it cannot be understood."""
        return list(self._read(answer, True)["deltas"])

    def end(self, answer: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Returns the last deltas, and the message of a whole answer; raises ConfigError as ``deltas`` does."""
        out = self._read(answer, False)
        return out["deltas"], out["message"]

    def _read(self, answer: str, is_partial: bool) -> dict[str, Any]:
        text = answer.replace("\0", "\N{REPLACEMENT CHARACTER}")
        return dict(json.loads(_call("parser_read", self._handle, _bytes(text), is_partial)))
