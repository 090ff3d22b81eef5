"""Describes for OpenAPI the bodies whose fields are checked elsewhere: chats, and those that are turned into chats."""

from __future__ import annotations

from typing import Any


def _object(*required: str, **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(required)}


STRING = {"type": "string"}
PART = _object("type", "text", type={"const": "text"}, text=STRING)
CALL = _object(
    "function", id=STRING, type={"const": "function"}, function=_object("name", name=STRING, arguments=STRING)
)
MESSAGE = _object(
    "role", role={"enum": ["system", "developer", "user", "assistant", "tool"]},
    content={"anyOf": [STRING, {"type": "array", "items": PART}]}, tool_calls={"type": "array", "items": CALL},
    tool_call_id=STRING, name=STRING,
)  # fmt: skip
FUNCTION = _object("name", name=STRING, description=STRING, parameters={"type": "object"})
TOOL = _object("type", "function", type={"const": "function"}, function=FUNCTION)


CHOICES = [{"enum": ["auto", "none", "required"]}, _object("function", function=_object("name", name=STRING))]


def _body(*required: str, **properties: Any) -> dict[str, Any]:
    schema = {**_object(*required, **properties), "additionalProperties": True}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


N_TOKENS = {"type": "integer", "minimum": 1}
BLOCK = {
    "anyOf": [
        PART,
        _object("type", "id", "name", "input", type={"const": "tool_use"}, id=STRING, name=STRING, input={}),
    ]
}
#: bodies that llama.cpp turns into chats, for OpenAPI's description: Anthropic's messages and OpenAI's responses
MESSAGES_BODY = _body(
    "messages", "max_tokens", max_tokens=N_TOKENS, system=STRING, stream={"type": "boolean"},
    messages={"type": "array", "items": _object(
        "role", "content", role={"enum": ["user", "assistant"]},
        content={"anyOf": [STRING, {"type": "array", "items": BLOCK}]},
    )},
    tools={"type": "array", "items": _object("name", "input_schema", name=STRING, input_schema={"type": "object"})},
)  # fmt: skip
RESPONSES_BODY = _body(
    "input", max_output_tokens=N_TOKENS, instructions=STRING, stream={"type": "boolean"},
    input={"anyOf": [STRING, {"type": "array", "items": _object(
        "role", "content", role={"enum": ["user", "assistant", "system"]}, content=STRING
    )}]},
    tools={"type": "array", "items": _object(
        "type", "name", type={"const": "function"}, name=STRING, parameters={"type": "object"}
    )},
)  # fmt: skip
