"""Anthropic's Messages API and OpenAI's Responses API, on a tiny model of random weights."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fastapi.testclient import TestClient
from support.chat_templates import CALL, HERMES
from support.serving import post, saying

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8, "temperature": 0}
ASKED: dict[str, Any] = {"input": "Hi", "max_output_tokens": 8, "temperature": 0}
CITY = {"type": "object", "properties": {"city": {"enum": ["Rome"]}}, "required": ["city"]}


def named_events(client: TestClient, path: str, **body: Any) -> list[dict[str, Any]]:
    """The events of a stream; each is named as its data are."""
    with client.stream("POST", path, json={**body, "stream": True}) as answer:
        assert answer.status_code == 200
        blocks = "".join(answer.iter_text()).split("\n\n")
    out = []
    for name, data in (block.split("\n") for block in blocks if block and not block.startswith(":")):
        out.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {out[-1]['type']}"
    return out


#
# Anthropic
#


def test_a_message_and_its_events_say_the_same(start):
    client = start(chat_template="chatml")
    body = post(client, "/v1/messages", **CHAT)
    assert (body["type"], body["role"], body["stop_reason"], body["stop_sequence"]) == (
        "message",
        "assistant",
        "max_tokens",
        None,
    )
    (block,) = body["content"]
    assert block["type"] == "text"
    n_input = post(client, "/v1/messages/count_tokens", **CHAT)["input_tokens"]
    usage = body["usage"]
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == n_input
    assert usage["output_tokens"] == 8
    found = named_events(client, "/v1/messages", **CHAT)
    kinds = [event["type"] for event in found]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(kinds[2:-3]) == {"content_block_delta"}
    assert "".join(event["delta"]["text"] for event in found[2:-3]) == block["text"]
    assert found[-2]["delta"] == {"stop_reason": "max_tokens", "stop_sequence": None}
    assert found[-2]["usage"] == {"output_tokens": 8}


def test_the_system_prompt_stops_and_our_own_fields_are_heard(start):
    client = start(chat_template="chatml")
    n_alone = post(client, "/v1/messages/count_tokens", **CHAT)["input_tokens"]
    n_more = post(client, "/v1/messages/count_tokens", **CHAT, system="Be brief.")["input_tokens"]
    assert n_more > n_alone
    text = post(client, "/v1/messages", **CHAT)["content"][0]["text"]
    stopped = post(client, "/v1/messages", **CHAT, stop_sequences=[text[2:4]])
    assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", text[2:4])
    assert "kv_compress" in post(client, "/v1/messages", 400, **CHAT, kv_compress=True)["error"]["message"]


def test_a_tool_is_used_in_anthropics_way(start):
    client = start(chat_template=HERMES)
    tools = [{"name": "weather", "input_schema": CITY}]
    options = {**CHAT, "max_tokens": 120, "tools": tools, "tool_choice": {"type": "any"}}
    with saying(f"Well. {CALL}"):
        body = post(client, "/v1/messages", **options)
        found = named_events(client, "/v1/messages", **options)
    used = body["content"][-1]
    assert (body["stop_reason"], used["type"], used["name"], used["input"]) == (
        "tool_use",
        "tool_use",
        "weather",
        {"city": "Rome"},
    )
    begun = next(
        event
        for event in found
        if event["type"] == "content_block_start" and event["content_block"]["type"] == "tool_use"
    )
    parts = [
        event["delta"]["partial_json"] for event in found if event.get("delta", {}).get("type") == "input_json_delta"
    ]
    assert json.loads("".join(parts)) == {"city": "Rome"}
    assert begun["content_block"]["name"] == "weather"
    opened, closed = (
        [event["index"] for event in found if event["type"] == f"content_block_{what}"] for what in ("start", "stop")
    )
    assert opened == closed == list(range(len(opened)))


#
# OpenAI's responses
#


def test_a_response_and_its_events_say_the_same(start):
    client = start(chat_template="chatml")
    body = post(client, "/v1/responses", **ASKED)
    assert (body["object"], body["status"], body["incomplete_details"]) == (
        "response",
        "incomplete",
        {"reason": "max_output_tokens"},
    )
    (item,) = body["output"]
    (part,) = item["content"]
    assert (item["type"], item["role"], part["type"]) == ("message", "assistant", "output_text")
    usage = body["usage"]
    assert usage["input_tokens"] == post(client, "/v1/responses/input_tokens", **ASKED)["input_tokens"]
    assert usage["total_tokens"] == usage["input_tokens"] + 8
    found = named_events(client, "/v1/responses", **ASKED)
    kinds = [event["type"].removeprefix("response.") for event in found]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", "completed"]
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    assert "".join(event["delta"] for event in found if event["type"] == "response.output_text.delta") == part["text"]
    assert found[-1]["response"]["output"][0]["content"][0]["text"] == part["text"]
    assert found[-1]["response"]["usage"]["output_tokens"] == 8


def test_a_tool_is_called_in_a_response(start):
    client = start(chat_template=HERMES)
    tools = [{"type": "function", "name": "weather", "parameters": CITY, "strict": True}]
    options = {
        **ASKED,
        "max_output_tokens": 120,
        "tools": tools,
        "tool_choice": {"type": "function", "name": "weather"},
    }
    with saying(CALL):
        body = post(client, "/v1/responses", **options)
    called = body["output"][-1]
    assert (body["status"], called["type"], called["status"]) == ("completed", "function_call", "completed")
    assert (called["name"], json.loads(called["arguments"])) == ("weather", {"city": "Rome"})
    answer = {"type": "function_call_output", "call_id": called["call_id"], "output": "warm"}
    turns = [{"role": "user", "content": "Hi"}, called, answer]
    post(client, "/v1/responses", **{**ASKED, "input": turns, "tools": tools})


@pytest.mark.parametrize("field", ["previous_response_id", "background", "conversation"])
def test_what_would_need_a_store_is_refused(start, field):
    error = post(start(), "/v1/responses", 400, **ASKED, **{field: "x" if field != "background" else True})["error"]
    assert "stores no responses" in error["message"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/messages", {}), ("/v1/messages", {"messages": "x"}), ("/v1/messages", {"messages": []}), ("/v1/responses", {}),
        ("/v1/responses", {"input": 3}), ("/v1/responses", {"input": "x", "temperature": "hot"}), ("/v1/messages", CHAT | {"tools": 3}),
        ("/v1/messages/count_tokens", {"messages": [{"role": "user"}]}), ("/v1/responses", {"input": [{"type": "item_reference"}]}),
    ],
)  # fmt: skip
def test_bodies_that_make_no_sense_are_errors_of_the_client(start, path, body):
    error = post(start(chat_template="chatml"), path, 400, **body)["error"]
    assert error["message"]
