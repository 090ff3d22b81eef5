"""Thoughts, content and calls out of answers, without a model."""

from __future__ import annotations

import json
from typing import Any

import pytest
from support.chat_templates import HERMES, THINKING

from kvcompose_gguf.native.answer_stream import AnswerStream
from kvcompose_gguf.native.chat_library import AnswerParser, ChatTemplate, Rendered

USER = {"role": "user", "content": "Hi"}
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": CITY}},
    {"type": "function", "function": {"name": "time"}},
]


@pytest.fixture(scope="module")
def with_tools() -> Rendered:
    return ChatTemplate(HERMES).render([USER], tools=TOOLS)


def in_pieces(stream: AnswerStream, text: str, size: int) -> tuple[str, str, list[Any]]:
    """Thoughts, content and calls of a text that comes ``size`` characters at a time."""
    deltas = [delta for i in range(0, len(text), size) for delta in stream.add(text[i : i + size])] + stream.end()
    assert all(delta for delta in deltas)
    calls: list[Any] = []
    for delta in deltas:
        for call in delta.get("tool_calls", []):
            # a call's first piece has its name, the others only more arguments
            assert ("id" in call) == ("name" in call["function"]) == (call["index"] == len(calls))
            if "id" in call:
                calls.append([call["function"]["name"], ""])
            calls[call["index"]][1] += call["function"].get("arguments", "")
    return (
        "".join(delta.get("reasoning_content", "") for delta in deltas), "".join(delta.get("content", "") for delta in deltas),
        calls,
    )  # fmt: skip


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("plain text", "plain text", []), ("", "", []), ("a < b <tool", "a < b <tool", []), ("[1, 2]", "[1, 2]", []),
        ('<tool_call>\n{"name": "weather", "arguments": {"city": "é\\"]"}}\n</tool_call>', "", [["weather", '{"city": "é\\"]"}']]),
        ('Let me see. <tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>', "Let me see. ", [["time", "{}"]]),
        (
            '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>\n'
            '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>',
            "", [["weather", '{"city": "Rome"}'], ["time", "{}"]],
        ),
        ('<tool_call>\n{"name": "weather", "arguments": {"city": "Ro', "", [["weather", '{"city": "Ro']]),
        ("<tool_call>{broken</tool_call>", "<tool_call>{broken</tool_call>", []),
        ('<tool_call>["f"]</tool_call>', '<tool_call>["f"]</tool_call>', []),
        ("[" * 5000, "[" * 5000, []),
    ],
)  # fmt: skip
def test_calls_are_found_wherever_pieces_end(with_tools, text, content, calls, size):
    stream = AnswerStream(AnswerParser(with_tools))
    assert in_pieces(stream, text, size) == ("", content, calls)
    whole = AnswerStream(AnswerParser(with_tools)).whole(text)
    assert (
        whole["content"],
        [[call["function"]["name"], call["function"]["arguments"]] for call in whole.get("tool_calls", [])],
    ) == (content, calls)
    assert len({call["id"] for call in whole.get("tool_calls", [])}) == len(calls)
    assert stream.n_calls == len(calls)


def test_arguments_come_while_they_are_written(with_tools):
    stream = AnswerStream(AnswerParser(with_tools))
    text = '<tool_call>\n{"name": "weather", "arguments": {"city": "' + "x" * 50
    assert len([delta for character in text for delta in stream.add(character)]) > 40


@pytest.mark.parametrize("size", [1, 2, 5, 1000])
@pytest.mark.parametrize(
    ("text", "thoughts", "content"),
    [
        ("plain", "", "plain"), ("<think>\nI see.</think>\n\nYes. <b>", "I see.", "Yes. <b>"), ("<think>cut", "cut", ""),
        ("<think></think>nothing", "", "nothing"), ("", "", ""),
    ],
)  # fmt: skip
def test_thoughts_are_beside_the_content_wherever_pieces_end(text, thoughts, content, size):
    rendered = ChatTemplate(THINKING).render([USER], reasoning_format="auto")
    got = in_pieces(AnswerStream(AnswerParser(rendered, reasoning_format="auto")), text, size)
    assert got == (thoughts, content, [])
    rendered = ChatTemplate(THINKING).render([USER])
    assert in_pieces(AnswerStream(AnswerParser(rendered)), text, size) == ("", text, [])


@pytest.mark.parametrize(("echo", "first"), [(True, "I am well"), (False, " well")])
def test_a_message_that_is_continued_is_told_with_its_beginning_or_without(echo, first):
    said = [USER, {"role": "assistant", "content": "I am"}]
    rendered = ChatTemplate("chatml").render(said, continue_final_message=True, add_generation_prompt=False)
    stream = AnswerStream(AnswerParser(rendered, is_continuation=True, echo=echo))
    assert stream.add(" well") == [{"content": first}]
    stream.end()
    assert stream.message["content"] == "I am well"


def test_json_is_the_content_of_a_message_without_what_a_model_writes_around_it():
    rendered = ChatTemplate(HERMES).render([USER], json_schema={"type": "object"})
    message = AnswerStream(AnswerParser(rendered)).whole('{"a": [1, {}]}')
    assert json.loads(message["content"]) == {"a": [1, {}]}
