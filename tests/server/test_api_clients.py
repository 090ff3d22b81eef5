"""The packages `anthropic` and `openai` on Anthropic's and OpenAI's newer APIs, and LiteLLM, over a real socket."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest
from support import tiny
from support.chat_templates import CALL, HERMES
from support.serving import TIMEOUT, running, saying, tiny_options

KEY = "sk-secret"
MESSAGES: Any = [{"role": "user", "content": "Hello, who are you?"}]
CITY: Any = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def address(tiny_model: Any) -> Iterator[str]:
    with running(tiny_options(tiny_model(tiny.GQA), chat_template=HERMES, api_keys=(KEY,))) as address:
        yield address


@pytest.fixture
def claude(address: str) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=address, api_key=KEY, max_retries=0, timeout=TIMEOUT)


@pytest.fixture
def client(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0, timeout=TIMEOUT)


def test_the_anthropic_package_asks_streams_and_counts(claude):
    options: Any = {"model": "tiny", "messages": MESSAGES, "max_tokens": 12, "extra_body": {"temperature": 0}}
    whole = claude.messages.create(**options)
    assert (whole.stop_reason, whole.usage.output_tokens) == ("max_tokens", 12)
    with claude.messages.stream(**options) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == final.content[0].text == whole.content[0].text
    assert (final.stop_reason, final.usage.output_tokens) == ("max_tokens", 12)
    counted = claude.messages.count_tokens(model="tiny", messages=MESSAGES).input_tokens
    assert counted == whole.usage.input_tokens + whole.usage.cache_read_input_tokens


def test_the_anthropic_package_uses_a_tool(claude):
    tools: Any = [{"name": "weather", "description": "Tells it.", "input_schema": CITY}]
    options: Any = {"model": "tiny", "messages": MESSAGES, "max_tokens": 120, "tools": tools}
    with saying(CALL):
        whole = claude.messages.create(**options, tool_choice={"type": "any"})
        with claude.messages.stream(**options, tool_choice={"type": "tool", "name": "weather"}) as stream:
            final = stream.get_final_message()
    for message in (whole, final):
        used = message.content[-1]
        assert (message.stop_reason, used.type, used.name, used.input) == (
            "tool_use",
            "tool_use",
            "weather",
            {"city": "Rome"},
        )
    result = {"type": "tool_result", "tool_use_id": used.id, "content": "warm"}
    turns = [*MESSAGES, {"role": "assistant", "content": final.content}, {"role": "user", "content": [result]}]
    options |= {"messages": turns, "max_tokens": 4}
    assert claude.messages.create(**options, tool_choice={"type": "none"}).content


def test_the_anthropic_package_understands_errors(claude, address):
    with pytest.raises(anthropic.BadRequestError, match="exceeds the available context size"):
        claude.messages.create(model="tiny", max_tokens=1, messages=[{"role": "user", "content": "x" * 3000}])
    with pytest.raises(anthropic.AuthenticationError):
        anthropic.Anthropic(base_url=address, api_key="wrong", max_retries=0).messages.create(
            model="tiny", max_tokens=1, messages=MESSAGES
        )


def test_the_openai_package_gets_responses_whole_and_streamed(client):
    options: Any = {"model": "tiny", "input": "Hello", "max_output_tokens": 12, "temperature": 0}
    whole = client.responses.create(**options)
    assert (whole.status, whole.usage.output_tokens) == ("incomplete", 12)
    with client.responses.stream(**options) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        final = stream.get_final_response()
    assert text == whole.output_text == final.output_text
    assert len(text) > 0


def test_the_openai_package_calls_a_tool_in_a_response(client):
    tools: Any = [{"type": "function", "name": "weather", "parameters": CITY, "strict": True}]
    options: Any = {"model": "tiny", "max_output_tokens": 120, "tools": tools, "tool_choice": "required"}
    with saying(CALL):
        whole = client.responses.create(**options, input="Hello")
        with client.responses.stream(**options, input="Hello") as stream:
            final = stream.get_final_response()
    for response in (whole, final):
        call = response.output[-1]
        assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", "weather", {"city": "Rome"})
    turns: Any = [
        {"role": "user", "content": "Hello"}, *[item.model_dump() for item in whole.output if item.type == "function_call"],
        {"type": "function_call_output", "call_id": whole.output[-1].call_id, "output": "warm"},
    ]  # fmt: skip
    assert client.responses.create(
        model="tiny", input=turns, tools=tools, tool_choice="none", max_output_tokens=4
    ).output


def test_the_openai_package_gets_json_in_a_response(client):
    form: Any = {"format": {"type": "json_schema", "name": "place", "schema": CITY, "strict": True}}
    answer = client.responses.create(model="tiny", input="Hello", text=form, max_output_tokens=80)
    assert json.loads(answer.output_text) == {"city": "Rome"}


@pytest.fixture
def litellm(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # otherwise it asks the network for prices
    return pytest.importorskip("litellm")


@pytest.mark.filterwarnings("ignore:Items? .* on TypedDict class:UserWarning")  # of its own classes
@pytest.mark.parametrize("provider", ["openai", "anthropic"])
def test_litellm_asks_streams_calls_tools_and_gets_json(litellm, address, provider):
    options: dict[str, Any] = {
        "model": f"{provider}/tiny", "api_key": KEY, "messages": MESSAGES, "temperature": 0, "num_retries": 0,
        "api_base": f"{address}/v1" if provider == "openai" else address,
    }  # fmt: skip
    whole = litellm.completion(**options, max_tokens=12)
    assert (whole.choices[0].finish_reason, whole.usage.completion_tokens) == ("length", 12)
    chunks = litellm.completion(**options, max_tokens=12, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    weather = {"type": "function", "function": {"name": "weather", "description": "Tells it.", "parameters": CITY}}
    with saying(CALL):
        answer = litellm.completion(**options, max_tokens=120, tools=[weather], tool_choice="required")
    (call,) = answer.choices[0].message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Rome"})
    if provider == "openai":
        form = {"type": "json_schema", "json_schema": {"name": "place", "schema": CITY, "strict": True}}
        answer = litellm.completion(**options, max_tokens=80, response_format=form)
        assert json.loads(answer.choices[0].message.content) == {"city": "Rome"}
