"""Messages into prompts, without a model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from kvcompose_gguf import ConfigError
from kvcompose_gguf.models.templates import ChatTemplate, TemplateError
from kvcompose_gguf.native import chat_formats
from kvcompose_gguf.server.api.errors import ApiError
from kvcompose_gguf.server.api.schemas import ChatRequest
from kvcompose_gguf.server.chat.completions import chat_prompt
from kvcompose_gguf.server.chat.messages import check_messages
from kvcompose_gguf.server.chat.templates import BuiltinTemplate

TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}"


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
        with pytest.raises(TemplateError, match=words):
            ChatTemplate(source).render(messages)
    with pytest.raises(ConfigError, match="cannot be read"):
        ChatTemplate("{% if %}")


def test_a_chat_that_a_template_refuses_is_an_error_of_the_client():
    server: Any = SimpleNamespace(
        template=ChatTemplate("{{ raise_exception('no system') }}"), options=SimpleNamespace(reasoning=True)
    )
    with pytest.raises(ApiError, match=r"^Failed to apply the chat template: no system$") as refused:
        chat_prompt(server, ChatRequest.model_validate({"messages": [{"role": "user", "content": "Hi"}]}))
    assert refused.value.code == 400


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


def test_parts_of_a_message_that_is_continued_are_paragraphs():
    parts = [{"type": "text", "text": "Wh"}, {"type": "text", "text": "ill"}]
    (message,) = check_messages([{"role": "assistant", "content": parts}])
    assert (message["content"], message["prefill"]) == ("Wh\nill", "Wh\n\nill")


def test_what_a_template_is_not_given_is_nothing():
    template = ChatTemplate("{{ functions + '!' }}{{ '?' + functions }}{{ a }}{% if d %}x{% endif %}")
    assert template.render([]) == "!?"


def test_llama_cpps_own_formats_have_names():
    assert {"llama3", "command-r", "chatml"} <= set(chat_formats.names())
    messages = [{"role": "system", "content": "Bö"}, {"role": "user", "content": "Hi"}]
    want = "<|start_header_id|>system<|end_header_id|>\n\nBö<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    assert BuiltinTemplate("llama3").render(messages, False) == want
    assert BuiltinTemplate("llama3").render(messages) == want + "<|start_header_id|>assistant<|end_header_id|>\n\n"
    assert BuiltinTemplate("chatml").render(messages) == ChatTemplate("chatml").render(messages)
