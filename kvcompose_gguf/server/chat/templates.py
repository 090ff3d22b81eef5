"""Checks chat messages, and turns them into a prompt with one of llama.cpp's own templates."""

from __future__ import annotations

import ctypes
import json
import secrets
import string
from collections.abc import Mapping
from typing import Any

from ...native import library
from ..errors import ApiError, invalid


class BuiltinTemplate:
    """A chat format that llama.cpp has by name (llama_chat_apply_template), for example ``--chat-template llama3``."""

    has_tools = tags_calls = names_parameters = False

    def __init__(self, name: str) -> None:
        self.source = name

    @staticmethod
    def names() -> list[str]:
        """Returns the names of all formats."""
        llama_cpp = library.load()
        found = (ctypes.c_char_p * llama_cpp.llama_chat_builtin_templates(None, 0))()
        llama_cpp.llama_chat_builtin_templates(found, len(found))
        return [(name or b"").decode() for name in found]

    def render(
        self,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Returns the prompt, as ``ChatTemplate.render`` does. Ignores ``variables``."""
        llama_cpp = library.load()
        pairs = [
            tuple(message[name].encode("utf-8", "replace") for name in ("role", "content")) for message in messages
        ]
        chat = (llama_cpp.llama_chat_message * len(pairs))(*pairs)
        arguments = (self.source.encode(), chat, len(pairs), add_generation_prompt)
        size = llama_cpp.llama_chat_apply_template(*arguments, None, 0)
        if size < 0:
            raise ApiError(500, f"Failed to apply the chat template {self.source}")
        buffer = ctypes.create_string_buffer(size)
        llama_cpp.llama_chat_apply_template(*arguments, buffer, size)
        return buffer.raw[:size].decode("utf-8", "replace")


#
# messages
#


def check_messages(messages: Any) -> list[dict[str, Any]]:
    """Returns messages for a template, each with its content as one text (oaicompat_chat_params_parse).

    Raises:
        ApiError: the messages do not fit OpenAI's API, or contain images.
    """
    if messages is None:
        raise invalid("'messages' is required")
    if not isinstance(messages, list):
        raise invalid("Expected 'messages' to be an array")
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
            raise ApiError(500, f"{name} input is not supported - hint: this server reads text only")
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


def random_id() -> str:
    """Returns 32 random letters and digits."""
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(32))
