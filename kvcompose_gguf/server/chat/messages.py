"""Checks the messages of a chat, and makes those that templates take."""

from __future__ import annotations

import json
from typing import Any

from ..api.errors import invalid, not_supported


def check_messages(messages: Any) -> list[dict[str, Any]]:
    """Returns messages for a template, each with its content as one text (oaicompat_chat_params_parse).

    Raises:
        ApiError: the messages do not fit OpenAI's API, or contain images.
    """
    if messages is None:
        raise invalid("'messages' is required")
    if not isinstance(messages, list):
        raise invalid("Expected 'messages' to be an array")
    if not messages:
        raise invalid("'messages' must have at least one message")
    return [_checked(message) for message in messages]


def _checked(message: Any) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise invalid("Failed to parse messages: Expected 'message' to be an object")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str):
        raise invalid("Failed to parse messages: Missing 'role'")
    if role != "assistant" and content is None:
        raise invalid("All non-assistant messages must contain 'content'")
    calls = message.get("tool_calls") or []
    if role == "assistant" and content is None and not calls:
        raise invalid("Assistant message must contain either 'content' or 'tool_calls'!")
    if content is not None and not isinstance(content, (str, list)):
        raise invalid("Expected 'content' to be a string or an array")
    if not isinstance(calls, list):
        raise invalid("Failed to parse messages: Expected 'tool_calls' to be an array")
    out = {name: value for name, value in message.items() if name in ("name", "tool_call_id", "reasoning_content")}
    text = content if isinstance(content, str) else "\n".join(_part(part) for part in content or [])
    if role == "assistant" and isinstance(content, list):
        out["prefill"] = "\n\n".join(map(_part, content))  # llama-server joins continued parts so
    out |= {"role": "system" if role == "developer" else role, "content": text}
    return out | {"tool_calls": [_checked_call(call) for call in calls]} if calls else out


def _part(part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    for name in ("image", "audio", "video"):
        if isinstance(kind, str) and name in kind:
            raise not_supported(f"{name} input is not supported - hint: this server reads text only")
    raise invalid("unsupported content[].type")


def _checked_call(call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise invalid("Failed to parse messages: Missing tool call function or its name")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError) as error:
            raise invalid(f"Failed to parse messages: arguments of {function['name']} are not JSON: {error}") from error
    return {**call, "type": "function", "function": {"name": function["name"], "arguments": arguments}}
