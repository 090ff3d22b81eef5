"""Thoughts, content and calls out of answers, without a model."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kvcompose_gguf.models.templates import ChatTemplate
from kvcompose_gguf.server.api.errors import ApiError
from kvcompose_gguf.server.api.grammars import check_grammar, grammar_of
from kvcompose_gguf.server.chat.message_stream import MessageStream
from kvcompose_gguf.server.chat.tools import BareCalls, CallStream, call_schema, check_tools
from kvcompose_gguf.support.reasoning import Thoughts, closed

WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
TIME = {"type": "function", "function": {"name": "time"}}
WITH_TOOLS = ChatTemplate("{% if tools %}<tool_call>{{ tools | tojson }}{% endif %}")


@pytest.mark.parametrize(
    ("tools", "choice", "want"),
    [
        (None, None, (0, "none")), ([], "auto", (0, "none")), ([WEATHER, TIME], None, (2, "auto")),
        ([WEATHER, TIME], "required", (2, "required")), ([WEATHER, TIME], "none", (2, "none")),
        ([WEATHER, TIME], {"type": "function", "function": {"name": "time"}}, (1, "required")),
    ],
)  # fmt: skip
def test_tools_and_choices(tools, choice, want):
    got, how = check_tools(tools, choice, WITH_TOOLS)
    assert (len(got), how) == want


@pytest.mark.parametrize(
    ("tools", "choice"),
    [
        ("x", None),
        ([3], None),
        ([{"type": "function"}], None),
        ([WEATHER], "maybe"),
        ([WEATHER], {"function": {"name": "other"}}),
    ],
)
def test_what_are_no_tools_is_refused(tools, choice):
    with pytest.raises(ApiError):
        check_tools(tools, choice, WITH_TOOLS)


def test_a_call_is_of_one_of_the_tools():
    assert call_schema([TIME])["properties"]["name"] == {"const": "time"}
    assert [schema["properties"]["name"]["const"] for schema in call_schema([TIME, WEATHER])["oneOf"]] == [
        "time",
        "weather",
    ]


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("plain text", "plain text", []),
        ('<tool_call>\n{"name": "f", "arguments": {"x": "é"}}\n</tool_call>', "", [("f", {"x": "é"})]),
        ('Let me see. <tool_call>{"name": "f"}</tool_call>', "Let me see.", [("f", {})]),
        ('<tool_call>{"name": "f", "parameters": {"x": 1}}', "", [("f", {"x": 1})]),
        ('<tool_call>{"name": "f"}</tool_call><tool_call>{"name": "g"}</tool_call>', "", [("f", {}), ("g", {})]),
        ("<tool_call>{broken</tool_call>", "<tool_call>{broken</tool_call>", []),
        ('<tool_call>["f"]</tool_call>', '<tool_call>["f"]</tool_call>', []),
        ('<tool_call>{"name": 3}</tool_call>', '<tool_call>{"name": 3}</tool_call>', []),
    ],
)
def test_calls_are_found_in_a_text(text, content, calls):
    message = MessageStream(Thoughts(""), CallStream()).whole(text)
    got = [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in message.tool_calls]
    assert (message.content, got) == (content, calls)
    assert len({call["id"] for call in message.tool_calls}) == len(calls)


CALLS = (
    'Let me see. <tool_call>\n{"name": "weather", "arguments": {"city": "R\\"o}me", "days": [1, {"n": 2}]}}\n</tool_call>\n'
    '<tool_call>{"arguments": {"x": 1}, "name": "other"}</tool_call><tool_call>{"name": "cut", "arguments": {"a": '
)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_calls_come_while_they_are_written(size):
    stream, content, n_deltas = CallStream(), "", 0
    calls: dict[int, Any] = {}
    pieces = [CALLS[i : i + size] for i in range(0, len(CALLS), size)]
    for deltas in [*map(stream.add, pieces), stream.end()]:
        for delta in deltas:
            content += delta.get("content", "")
            for call in delta.get("tool_calls", []):
                n_deltas += 1
                known = calls.setdefault(call["index"], {"arguments": ""})
                # a call's first piece has its name, the others only more arguments
                assert ("id" in call) == ("name" not in known) == ("name" in call["function"])
                known.update({"name": call["function"].get("name", known.get("name"))})
                known["arguments"] += call["function"]["arguments"]
    assert content == "Let me see. "
    assert [call["name"] for call in calls.values()] == ["weather", "other", "cut"]
    assert json.loads(calls[0]["arguments"]) == {"city": 'R"o}me', "days": [1, {"n": 2}]}
    assert json.loads(calls[1]["arguments"]) == {"x": 1}
    assert calls[2]["arguments"] == '{"a": '
    assert stream.n_calls == 3
    if size == 1:
        assert n_deltas > 40


@pytest.mark.parametrize("size", [1, 5, 100])
@pytest.mark.parametrize("text", ["plain", "a < b <tool", "<tool_call>no json</tool_call> and more", "<tool_call>open"])
def test_what_is_no_call_is_content(text, size):
    stream = CallStream()
    deltas = [d for i in range(0, len(text), size) for d in stream.add(text[i : i + size])] + stream.end()
    assert "".join(delta["content"] for delta in deltas) == text
    assert stream.n_calls == 0


def in_pieces(stream: MessageStream, text: str, size: int) -> tuple[str, str, list[Any]]:
    """Thoughts, content and calls of a text that comes ``size`` characters at a time."""
    deltas = [delta for i in range(0, len(text), size) for delta in stream.add(text[i : i + size])] + stream.end()
    assert all(delta for delta in deltas)
    return (
        "".join(delta.get("reasoning_content", "") for delta in deltas), "".join(delta.get("content", "") for delta in deltas),
        [call for delta in deltas for call in delta.get("tool_calls", [])],
    )  # fmt: skip


@pytest.mark.parametrize("size", [1, 2, 5, 1000])
@pytest.mark.parametrize(
    ("prompt", "text", "thoughts", "content"),
    [
        ("", "plain", "", "plain"), ("", "  plain <think>late</think>", "", "  plain <think>late</think>"),
        ("", "<think>\nI see. \n</think>\n\nYes. <b>", "I see.", "Yes. <b>"), ("", "<think>cut", "cut", ""),
        ("<|im_start|>assistant\n<think>\n", "a < b </think>yes", "a < b", "yes"), ("<think>", "no end </thin", "no end </thin", ""),
        ("", "<think></think>nothing", "", "nothing"), ("", "\n<think>x</think>y", "x", "y"), ("", "<thin", "", "<thin"),
        ("", "<|START_THINKING|>t<|END_THINKING|>c", "t", "c"), ("", "", "", ""),
    ],
)  # fmt: skip
def test_thoughts_are_beside_the_content_wherever_pieces_end(prompt, text, thoughts, content, size):
    assert in_pieces(MessageStream(Thoughts(prompt), None), text, size) == (thoughts, content, [])
    inline = in_pieces(MessageStream(Thoughts(prompt, is_wanted=False), None), text, size)
    assert inline == ("", text, [])


def test_thinking_that_has_begun_can_be_ended():
    assert closed("Hi<think>\n") == "Hi<think>\n</think>"
    assert closed("Hi") == "Hi"


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ('{"name": "weather", "parameters": {"city": "Rome"}}', "", [("weather", {"city": "Rome"})]),
        (' [{"name": "time", "arguments": {}}, {"name": "weather"}]', "", [("time", {}), ("weather", {})]),
        ("It is {warm}.", "It is {warm}.", []), ('{"name": "other"}', '{"name": "other"}', []), ("[1, 2]", "[1, 2]", []),
        ('{"name": "weather", "par', '{"name": "weather", "par', []), ("[" * 5000, "[" * 5000, []), ("", "", []), ("[]", "[]", []),
    ],
)  # fmt: skip
def test_a_call_may_be_the_whole_answer(text, content, calls, size):
    thoughts, got, found = in_pieces(MessageStream(Thoughts(""), BareCalls({"weather", "time"})), text, size)
    assert (thoughts, got) == ("", content)
    assert [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in found] == calls
    assert [call["index"] for call in found] == list(range(len(calls)))


def test_calls_after_thoughts():
    stream = MessageStream(Thoughts("<think>\n"), CallStream())
    said = stream.whole('Which one?\n</think>\n\n<tool_call>{"name": "time", "arguments": {"zone": 1}}</tool_call>')
    assert (said.reasoning, said.content, len(said.tool_calls), stream.n_calls) == ("Which one?", "", 1, 1)
    assert said.tool_calls[0]["function"] == {"name": "time", "arguments": '{"zone": 1}'}


def test_schemas_of_tools_have_references_of_their_own():
    point = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
    parameters = {
        "type": "object",
        "properties": {"at": {"$ref": "#/$defs/Point"}},
        "required": ["at"],
        "$defs": {"Point": point},
    }
    tools = [{"type": "function", "function": {"name": name, "parameters": parameters}} for name in ("a", "b")]
    grammar = grammar_of(call_schema(tools))
    check_grammar(grammar)
    schema = call_schema(tools)
    assert [one["properties"]["arguments"]["$ref"] for one in schema["oneOf"]] == ["#/$defs/0", "#/$defs/1"]
    assert schema["$defs"]["1"]["properties"]["at"]["$ref"] == "#/$defs/1/$defs/Point"
    assert '"\\"x\\""' in grammar


def test_what_follows_a_call_is_told():
    said = MessageStream(Thoughts(""), CallStream()).whole(
        '<tool_call>{"name": "f", "arguments": {}} and then\n\n<tool_call>{"name": "g", "arguments": {"x": 1}}</tool_call>\n\nDone.'
    )
    assert [call["function"]["name"] for call in said.tool_calls] == ["f", "g"]
    assert said.content == "and then\n\nDone."


def test_arguments_are_called_what_the_template_calls_them():
    assert ChatTemplate('{% if tools %}{"name": x, "parameters": {}}{% endif %}').names_parameters
    assert call_schema([TIME], "parameters")["required"] == ["name", "parameters"]
