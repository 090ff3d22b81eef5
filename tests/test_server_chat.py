"""Messages into prompts and calls out of answers, without a model."""

from __future__ import annotations

import json

import pytest

from kvcompose_gguf import ConfigError
from kvcompose_gguf.server.chat import ChatTemplate, check_messages
from kvcompose_gguf.server.errors import ApiError
from kvcompose_gguf.server.tools import CallStream, call_schema, check_tools, parse_calls

TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}"
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
TIME = {"type": "function", "function": {"name": "time"}}
WITH_TOOLS = ChatTemplate("{% if tools %}<tool_call>{{ tools | tojson }}{% endif %}")


@pytest.mark.parametrize(("is_added", "begin"), [(True, ""), (False, "<s>")])
def test_a_prompt_begins_with_one_bos_whoever_adds_it(is_added, begin):
    messages = check_messages([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}])
    text = ChatTemplate(TEMPLATE, "<s>", "</s>", is_added).render(messages)
    assert text == begin + "[user] Hi</s>[assistant] Yes</s>"


def test_templates_may_not_reach_out_and_say_what_they_refuse():
    messages = check_messages([{"role": "user", "content": "Hi"}])
    for source, words in (
        ("{{ raise_exception('no system') }}", "no system"), ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"), ("{{ 1 / 0 }}", "zero"), ("{{ nothing.there }}", "undefined"),
    ):  # fmt: skip
        with pytest.raises(ApiError, match=words):
            ChatTemplate(source).render(messages)
    with pytest.raises(ConfigError, match="cannot be read"):
        ChatTemplate("{% if %}")


def test_templates_have_the_fields_extensions():
    source = (
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% endfor %}{{ {'a': '<é>'} | tojson }}{{ strftime_now('%Y') | length }}"
    )
    messages = check_messages([{"role": "user", "content": text} for text in ("one", "two")])
    assert ChatTemplate(source).render(messages) == 'one{"a": "<é>"}4'


def test_parts_are_one_text_and_calls_are_objects_again():
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "content": "3", "tool_call_id": "1"},
    ]  # fmt: skip
    first, second, third = check_messages(messages)
    assert first == {"role": "system", "content": "a\nb"}
    assert (second["content"], second["tool_calls"][0]["function"]["arguments"]) == ("", {"x": 1})
    assert third == {"role": "tool", "content": "3", "tool_call_id": "1"}


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
    [("x", None), ([3], None), ([{"type": "function"}], None), ([WEATHER], "maybe"), ([WEATHER], {"function": {"name": "other"}})],
)
def test_what_are_no_tools_is_refused(tools, choice):
    with pytest.raises(ApiError):
        check_tools(tools, choice, WITH_TOOLS)


def test_a_call_is_of_one_of_the_tools():
    assert call_schema([TIME])["properties"]["name"] == {"const": "time"}
    assert [schema["properties"]["name"]["const"] for schema in call_schema([TIME, WEATHER])["oneOf"]] == ["time", "weather"]


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
    message = parse_calls(text)
    got = [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in message.tool_calls]
    assert (message.content, got) == (content, calls)
    assert len({call["id"] for call in message.tool_calls}) == len(calls)


CALLS = (
    'Let me see. <tool_call>\n{"name": "weather", "arguments": {"city": "R\\"o}me", "days": [1, {"n": 2}]}}\n</tool_call>\n'
    '<tool_call>{"arguments": {"x": 1}, "name": "other"}</tool_call><tool_call>{"name": "cut", "arguments": {"a": '
)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_calls_come_while_they_are_written(size):
    stream, content, calls, n_deltas = CallStream(), "", {}, 0
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
