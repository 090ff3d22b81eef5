"""Checks the messages of a chat before llama.cpp gets them."""

from __future__ import annotations

from typing import Any

from ..api.errors import invalid, not_supported


def check_messages(messages: Any) -> list[dict[str, Any]]:
    """Returns the messages of a request (oaicompat_chat_params_parse); llama.cpp checks their tool calls itself.

    Raises:
        ApiError: the messages do not fit OpenAI's API, or contain images.
    """
    if messages is None:
        raise invalid("'messages' is required")
    if not isinstance(messages, list):
        raise invalid("Expected 'messages' to be an array")
    if not messages:
        raise invalid("'messages' must have at least one message")
    for message in messages:
        _check(message)
    return messages


def _check(message: Any) -> None:
    if not isinstance(message, dict):
        raise invalid("Failed to parse messages: Expected 'message' to be an object")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str):
        raise invalid("Failed to parse messages: Missing 'role'")
    if role != "assistant" and content is None:
        raise invalid("All non-assistant messages must contain 'content'")
    if role == "assistant" and content is None and not message.get("tool_calls"):
        raise invalid("Assistant message must contain either 'content' or 'tool_calls'!")
    if isinstance(content, list):
        for part in content:
            _check_part(part)
    elif content is not None and not isinstance(content, str):
        raise invalid("Expected 'content' to be a string or an array")


def _check_part(part: Any) -> None:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return
    for name in ("image", "audio", "video"):
        if isinstance(kind, str) and name in kind:
            raise not_supported(f"{name} input is not supported - hint: this server reads text only")
    raise invalid("unsupported content[].type")
