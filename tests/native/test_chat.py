"""llama.cpp's chat functions through our C API: what they return, and that nothing ends the process."""

from __future__ import annotations

import contextlib
import ctypes
import json
import threading
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import tiny
from support.chat_templates import HERMES

from kvcompose_gguf.errors import ConfigError
from kvcompose_gguf.native import chat_library
from kvcompose_gguf.native.chat_library import AnswerParser, ChatTemplate, Rendered
from kvcompose_gguf.native.sampler import Grammar

USER = {"role": "user", "content": "Hi"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def call(name: str, *arguments: Any) -> tuple[int, str]:
    out = ctypes.c_char_p()
    status = getattr(chat_library._load(), f"kvc_chat_{name}")(*arguments, ctypes.byref(out))
    return status, (out.value or b"").decode()


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("grammar_of_schema", [None]), ("grammar_of_schema", [b"{"]), ("body_of_messages", [b"[]"]), ("body_of_messages", [b"{}"]),
        ("body_of_responses", [b"3"]), ("body_of_responses", [None]), ("template_new", [None, b"", b"", 0, None]),
        ("template_new", [b"", b"", b"", 0, ctypes.byref(ctypes.c_void_p())]), ("template_caps", [None]),
        ("template_apply", [None, b"{}"]), ("parser_new", [b"{}", None]), ("parser_read", [None, b"", 1]),
        ("parser_new", [b'{"format": 99}', ctypes.byref(ctypes.c_void_p())]),
        ("parser_new", [b'{"parser": "no"}', ctypes.byref(ctypes.c_void_p())]), ("sampler_accept", [None, 0]),
    ],
)  # fmt: skip
def test_bad_arguments_are_a_status_and_a_message(name, arguments):
    status, message = call(name, *arguments)
    assert status == 1
    assert message


def test_a_result_needs_a_place():
    assert chat_library._load().kvc_chat_grammar_of_schema(b"{}", None) == 1


@pytest.mark.parametrize(
    "request_body",
    [
        {}, {"messages": [3]}, {"messages": [{"role": 3, "content": "a"}]}, {"messages": [USER], "tools": 3},
        {"messages": [USER], "tools": [{"type": "function", "function": {"name": 3}}]}, {"messages": [USER], "tool_choice": "x"},
        {"messages": [USER], "json_schema": {"type": 3}},
        {"messages": [USER], "reasoning_format": "loud"}, {"messages": [USER], "now": "x"}, {"messages": [USER], "grammar": 1},
    ],
    ids=json.dumps,
)  # fmt: skip
def test_requests_that_make_no_sense_are_refused(request_body):
    messages = request_body.pop("messages", [])
    template = ChatTemplate(HERMES)
    with pytest.raises(ConfigError):
        template.render(messages or [{"no": "role"}], **request_body)


#: words that llama.cpp looks for in bodies, and others
WORDS = st.sampled_from([
    "role", "content", "type", "text", "user", "assistant", "system", "tool", "tool_use", "tool_result", "id", "name", "input",
    "arguments", "function", "tools", "tool_calls", "input_schema", "parameters", "tool_choice", "thinking", "message", "output",
    "function_call", "function_call_output", "reasoning", "summary", "instructions", "image", "source", "x", "",
])  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=5),
    max_leaves=12,
)  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(
    body=st.dictionaries(WORDS, JSON, max_size=4),
    messages=st.lists(st.dictionaries(WORDS, JSON, max_size=5), max_size=3),
)
def test_no_body_ends_the_process(body, messages):
    template = ChatTemplate(HERMES)
    for use in (
        lambda: chat_library.body_of_messages({**body, "messages": messages}), lambda: chat_library.body_of_messages(body),
        lambda: chat_library.body_of_responses({**body, "input": messages}), lambda: chat_library.body_of_responses(body),
        lambda: template.render(messages, **body), lambda: template.render([{"role": "user", "content": "a", **body}]),
        lambda: template.render([USER], tools=messages), lambda: chat_library.grammar_of_schema(body),
        lambda: AnswerParser(Rendered(prompt="", applied=body)),
    ):  # fmt: skip
        with contextlib.suppress(ConfigError):
            use()


def test_what_is_no_json_is_refused():
    with pytest.raises(ConfigError, match="no JSON"):
        chat_library.grammar_of_schema({"a": object()})
    with pytest.raises(ConfigError, match="zero byte"):
        ChatTemplate("a\0b")


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, '<tool_call>\n{"name": "f", "arguments": ' + "[" * 100_000]
)
def test_nesting_that_would_end_the_stack_is_refused(text):
    rendered = ChatTemplate(HERMES).render([USER], tools=[TOOL])
    parser = AnswerParser(rendered)
    with pytest.raises(ConfigError, match="more than 256 nested brackets"):
        parser.deltas(text)
    assert parser.deltas("fine") == [{"content": "fine"}]  # it can still be used
    assert AnswerParser(Rendered(prompt="")).deltas(text) == [{"content": text}]  # nothing is nested in mere text


def test_nesting_that_a_program_may_have_is_read():
    rendered = ChatTemplate(HERMES).render([USER], tools=[TOOL])
    arguments = "[" * 200 + "]" * 200
    text = f'<tool_call>\n{{"name": "f", "arguments": {{"a": {arguments}}}}}\n</tool_call>'
    _, message = AnswerParser(rendered).end(text)
    assert json.loads(message["tool_calls"][0]["function"]["arguments"])["a"]


def test_a_grammar_that_begins_within_a_token_is_a_status(make_llama):
    """The word that lets it begin ends inside of a token, whose rest the grammar does not allow."""
    llama = make_llama(tiny.GQA)
    lazy = Grammar(llama.model, 'root ::= "ab"', patterns=["a"])
    byte = dict(zip("xac", tiny.of_bytes("xac"), strict=True))
    lazy.accept(byte["x"])
    lazy.accept(byte["a"])
    assert not lazy.allows(byte["c"])
    with pytest.raises(ConfigError, match="grammar"):
        lazy.accept(byte["c"])
    lazy.close()


def test_one_template_for_many_threads():
    template, texts = ChatTemplate(HERMES), []

    def render() -> None:
        for _ in range(20):
            texts.append(template.render([USER], tools=[TOOL]).prompt)

    threads = [threading.Thread(target=render) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(texts) == 80
    assert len(set(texts)) == 1


def test_the_time_that_a_template_sees_can_be_given():
    template = ChatTemplate("{{ strftime_now('%Y') }}")
    assert template.render([USER], now=0).prompt in ("1969", "1970")
