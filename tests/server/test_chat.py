"""Messages and tools into prompts, without a model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from support.chat_templates import HERMES, THINKING

from kvcompose_gguf import ConfigError
from kvcompose_gguf.native import chat_formats
from kvcompose_gguf.native.chat_library import ChatTemplate, Trigger
from kvcompose_gguf.server.api.errors import ApiError
from kvcompose_gguf.server.api.schemas import ChatRequest
from kvcompose_gguf.server.chat.messages import check_messages
from kvcompose_gguf.server.chat.prompts import ChatPrompt, chat_prompt
from kvcompose_gguf.server.chat.tools import check_tools

TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}"
USER = {"role": "user", "content": "Hi"}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
TIME = {"type": "function", "function": {"name": "time"}}


def prompt_of(source: str, **body: Any) -> ChatPrompt:
    options = SimpleNamespace(reasoning=True, reasoning_format="auto")
    server: Any = SimpleNamespace(template=ChatTemplate(source), options=options)
    return chat_prompt(server, ChatRequest.model_validate({"messages": [USER], **body}))


@pytest.mark.parametrize(("is_added", "begin"), [(True, ""), (False, "<s>")])
def test_a_prompt_begins_with_one_bos_whoever_adds_it(is_added, begin):
    messages = check_messages([USER, {"role": "assistant", "content": "Yes"}])
    text = ChatTemplate(TEMPLATE, "<s>", "</s>", is_added).render(messages).prompt
    assert text == begin + "[user] Hi</s>[assistant] Yes</s>"


def test_templates_say_what_they_refuse_and_what_is_wrong_with_them():
    with pytest.raises(ConfigError, match="no system"):
        ChatTemplate("{{ raise_exception('no system') }}").render([USER])
    with pytest.raises(ConfigError, match="the chat template cannot be read: Unexpected token"):
        ChatTemplate("{% if %}")
    assert (
        "class" not in ChatTemplate("{{ messages.__class__.__mro__ }}").render([USER]).prompt
    )  # nothing of the program


def test_a_chat_that_a_template_refuses_is_an_error_of_the_client():
    with pytest.raises(ApiError, match="no system") as refused:
        prompt_of("{{ raise_exception('no system') }}")
    assert refused.value.code == 400


def test_templates_have_the_fields_extensions():
    source = (
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% endfor %}{{ {'a': '<é>'} | tojson }}{{ strftime_now('%Y') | length }}"
    )
    messages = [{"role": "user", "content": text} for text in ("one", "two")]
    assert ChatTemplate(source).render(messages).prompt == 'one{"a": "<é>"}4'


def test_parts_of_a_message_are_lines_and_calls_are_told_to_the_template():
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, USER,
        {"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "content": "3", "tool_call_id": "1"},
    ]  # fmt: skip
    text = prompt_of(HERMES, messages=messages).rendered.prompt
    assert text.startswith("<|im_start|>system\na\nb<|im_end|>\n")
    assert (
        '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call><|im_end|>\n<|im_start|>tool\n3<|im_end|>'
        in text
    )


def test_arguments_that_would_end_the_process_are_refused():
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "[" * 100_000}}
    with pytest.raises(ApiError, match="more than 256 nested brackets"):
        prompt_of(HERMES, messages=[USER, {"role": "assistant", "content": "", "tool_calls": [call]}, USER])


def test_llama_cpps_own_formats_have_names():
    assert {"llama3", "command-r", "chatml"} <= set(chat_formats.names())
    messages = [{"role": "system", "content": "Bö"}, USER]
    want = "<|start_header_id|>system<|end_header_id|>\n\nBö<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    named = ChatTemplate("llama3", is_name=True)
    assert named.render(messages, add_generation_prompt=False).prompt == want
    assert named.render(messages).prompt == want + "<|start_header_id|>assistant<|end_header_id|>\n\n"
    assert (
        ChatTemplate("chatml", is_name=True).render(messages).prompt == ChatTemplate("chatml").render(messages).prompt
    )


@pytest.mark.parametrize(
    ("body", "end", "is_continued"),
    [
        ({}, "<|im_start|>assistant\n", False), ({"add_generation_prompt": False}, "Hi<|im_end|>\n", False),
        ({"messages": [USER, {"role": "assistant", "content": "Wh"}]}, "</think>\n\nWh", True),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "<think>\n\n</think>\n\n", False),
        ({"reasoning_effort": "none"}, "<think>\n\n</think>\n\n", False),
    ],
)  # fmt: skip
def test_where_a_prompt_ends(body, end, is_continued):
    prompt = prompt_of(THINKING, **body)
    assert prompt.rendered.prompt.endswith(end)
    assert (prompt.is_continued, prompt.calls, prompt.is_constrained) == (is_continued, False, False)
    assert prompt.rendered.thinking == ("<think>", "</think>")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"messages": [{"role": "assistant", "content": "a"}] * 2}, "2 or more assistant"), ({"continue_final_message": True}, "both"),
        ({"chat_template_kwargs": {"enable_thinking": "no"}}, "invalid type"), ({"reasoning_format": "loud"}, "Unknown reasoning"),
        ({"response_format": {"type": "poem"}}, "response_format type"), ({"json_schema": {}, "grammar": 'root ::= "a"'}, "both"),
        ({"response_format": {"type": "json_schema"}}, "json_schema is needed"), ({"json_schema": {"type": 3}}, "schema"),
        ({"tools": [TIME], "grammar": 'root ::= "a"'}, "grammar constraints with tools"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [{"type": "function"}]}, USER]}, "Missing tool call"),
    ],
)  # fmt: skip
def test_chats_that_contradict_themselves_are_refused(body, words):
    with pytest.raises(ApiError, match=words) as refused:
        prompt_of(HERMES, **body)
    assert refused.value.code == 400


def test_what_a_chat_begins_with_whatever_the_user_says():
    system = {"role": "system", "content": "Be brief."}
    assert prompt_of(HERMES).opening == ""
    assert prompt_of(HERMES, messages=[system, USER]).opening == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
    )
    with_tools = prompt_of(HERMES, messages=[system, USER], tools=[TIME]).opening
    assert with_tools.startswith("<|im_start|>system\n# Tools")
    assert with_tools.endswith("<|im_start|>user\n")


#
# tools and schemas
#


@pytest.mark.parametrize(
    ("tools", "choice", "want"),
    [
        (None, None, (0, "none")), ([], "auto", (0, "none")), ([WEATHER, TIME], None, (2, "auto")),
        ([WEATHER, TIME], "required", (2, "required")), ([WEATHER, TIME], "none", (2, "none")),
        ([WEATHER, TIME], {"type": "function", "function": {"name": "time"}}, (1, "required")),
    ],
)  # fmt: skip
def test_tools_and_choices(tools, choice, want):
    got, how = check_tools(tools, choice, ChatTemplate(HERMES))
    assert (len(got), how) == want


@pytest.mark.parametrize(
    ("tools", "choice"),
    [
        ("x", None), ([3], None), ([{"type": "function"}], None), ([WEATHER], "maybe"), ([WEATHER], {"function": {"name": "other"}}),
        ([{"type": "function", "function": {"name": "f", "parameters": 3}}], None),
    ],
)  # fmt: skip
def test_what_are_no_tools_is_refused(tools, choice):
    with pytest.raises(ApiError):
        check_tools(tools, choice, ChatTemplate(HERMES))


def test_tools_without_a_place_in_the_template_are_an_error():
    with pytest.raises(ApiError, match="tools are not supported") as refused:
        check_tools([TIME], None, ChatTemplate(THINKING))
    assert refused.value.code == 501


def test_a_tool_may_be_called_or_has_to_be():
    may = prompt_of(HERMES, tools=[WEATHER, TIME])
    assert (may.calls, may.is_constrained) == (True, True)
    assert may.rendered.triggers == (Trigger(kind=Trigger.WORD, value="<tool_call>\n", token=-1),)
    assert may.rendered.preserved == ("<tool_call>", "</tool_call>")
    has_to = prompt_of(HERMES, tools=[WEATHER, TIME], tool_choice="required")
    assert has_to.rendered.triggers == ()
    assert has_to.rendered.grammar
    must_not = prompt_of(HERMES, tools=[WEATHER, TIME], tool_choice="none")
    assert (must_not.calls, must_not.is_constrained) == (False, False)


def test_a_schema_is_a_grammar_of_the_message_and_a_grammar_is_the_requests_own():
    schema = prompt_of(HERMES, response_format={"type": "json_schema", "json_schema": {"schema": {"enum": ["a", "b"]}}})
    assert schema.is_constrained
    assert '"\\"a\\""' in schema.rendered.grammar
    any_object = prompt_of(HERMES, response_format={"type": "json_object"})
    assert any_object.is_constrained
    own = prompt_of(HERMES, grammar='root ::= "a"')
    assert not own.is_constrained
