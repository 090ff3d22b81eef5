"""Tools that a model may call, and the calls in what it says."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from .chat import CALL_BEGIN, ChatTemplate, random_id
from .errors import invalid, not_supported

CALL_END = "</tool_call>"

#: the beginning of a call, up to its arguments
CALL_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')


def check_tools(tools: Any, tool_choice: Any, template: ChatTemplate) -> tuple[list[dict[str, Any]], str]:
    """Tools, and ``"auto"``, ``"none"``, ``"required"`` or the name of one that is to be called.

    Raises:
        ApiError: they are not what OpenAI's API allows, or the model's template has none.
    """
    if not tools:
        return [], "none"
    for tool in tools if isinstance(tools, list) else [None]:
        function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise invalid('Failed to parse tools: [{"type": "function", "function": {"name": ...}}] is needed')
    choice = tool_choice or "auto"
    if isinstance(choice, dict):
        function = choice.get("function")
        choice = function.get("name") if isinstance(function, dict) else None
        if choice not in [tool["function"]["name"] for tool in tools]:
            raise invalid(f"Invalid tool_choice: {choice}")
        tools = [tool for tool in tools if tool["function"]["name"] == choice]
        choice = "required"
    if choice not in ("auto", "none", "required"):
        raise invalid(f"Invalid tool_choice: {choice}")
    if not template.has_tools:
        raise not_supported("tools are not supported: the model's chat template has none")
    return tools, choice


def call_schema(tools: list[dict[str, Any]]) -> dict[str, Any]:
    """JSON schema of a call of one of ``tools``."""
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool["function"]["name"]},
                "arguments": tool["function"].get("parameters") or {"type": "object"},
            },
            "required": ["name", "arguments"],
        }
        for tool in tools
    ]
    return calls[0] if len(calls) == 1 else {"oneOf": calls}


@dataclass(frozen=True)
class Message:
    """What a model said.

    Attributes:
        content: without the calls.
        tool_calls: as OpenAI's API has them, arguments as JSON text.
    """

    content: str
    tool_calls: tuple[dict[str, Any], ...] = ()


def parse_calls(text: str) -> Message:
    """Calls out of a text, where they stand between ``<tool_call>`` and ``</tool_call>``, the last perhaps unclosed."""
    calls = []
    for found in re.finditer(rf"{CALL_BEGIN}(.*?)(?:{CALL_END}|$)", text, re.DOTALL):
        try:
            call = json.loads(found[1])
            name, arguments = call["name"], call.get("arguments", call.get("parameters", {}))
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
        if isinstance(name, str):
            calls.append((found, name, arguments))
    for found, _, _ in reversed(calls):
        text = text[: found.start()] + text[found.end() :]
    return Message(text.strip() if calls else text, tuple(_call(name, arguments) for _, name, arguments in calls))


def _call(name: str, arguments: Any) -> dict[str, Any]:
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {"type": "function", "function": {"name": name, "arguments": text}, "id": random_id()}


class CallStream:
    """Deltas of a message out of a text that comes in pieces: content, and calls while they are written.

    Args:
        begun: what the prompt ends with of a call.
    Attributes:
        n_calls: calls so far.
    """

    def __init__(self, begun: str = "") -> None:
        self._held, self.n_calls = begun, 0
        self._arguments: _Braces | None = None

    def add(self, text: str) -> list[dict[str, Any]]:
        """What is certain now that ``text`` has come."""
        self._held += text
        out: list[dict[str, Any]] = []
        while (delta := self._next()) is not None:
            out += [delta] if delta else []
        return out

    def end(self) -> list[dict[str, Any]]:
        """What was held back, when nothing more comes."""
        if self._arguments is not None:
            self._held = ""
        message = parse_calls(self._held)
        self._held = ""
        deltas: list[dict[str, Any]] = [{"content": message.content}] if message.content else []
        for call in message.tool_calls:
            deltas.append(self._begin(call))
        return deltas

    def _next(self) -> dict[str, Any] | None:
        """The next delta, empty if there is only more to look at, or None: more text is needed."""
        if self._arguments is not None:
            n = self._arguments.take(self._held)
            part, self._held = self._held[:n], self._held[n:]
            if self._arguments.is_closed:
                if CALL_END not in self._held:
                    return self._argument(part) if part else None
                self._held = self._held.partition(CALL_END)[2].lstrip()
                self._arguments = None
                return self._argument(part) if part else {}
            return self._argument(part) if part else None
        at = self._held.find(CALL_BEGIN)
        if at < 0:
            beginnings = (n for n in range(len(CALL_BEGIN) - 1, 0, -1) if self._held.endswith(CALL_BEGIN[:n]))
            at = len(self._held) - next(beginnings, 0)
        if at > 0:
            content, self._held = self._held[:at], self._held[at:]
            return {"content": content} if content.strip() or not self.n_calls else {}
        if not self._held.startswith(CALL_BEGIN):
            return None
        inside = self._held[len(CALL_BEGIN) :]
        if found := CALL_HEAD.match(inside):
            try:
                name = json.loads(found[1])
            except ValueError:
                return self._whole(inside)
            self._held, self._arguments = inside[found.end() :], _Braces()
            return self._begin({"type": "function", "function": {"name": name, "arguments": ""}, "id": random_id()})
        return self._whole(inside)

    def _whole(self, inside: str) -> dict[str, Any] | None:
        """A call in another order than the usual, when it is complete; what is none is content."""
        if CALL_END not in inside:
            return None
        inside, _, self._held = inside.partition(CALL_END)
        message = parse_calls(CALL_BEGIN + inside + CALL_END)
        return self._begin(message.tool_calls[0]) if message.tool_calls else {"content": message.content}

    def _begin(self, call: dict[str, Any]) -> dict[str, Any]:
        self.n_calls += 1
        return {"tool_calls": [{"index": self.n_calls - 1, **call}]}

    def _argument(self, part: str) -> dict[str, Any]:
        return {"tool_calls": [{"index": self.n_calls - 1, "function": {"arguments": part}}]}


class _Braces:
    """Where a JSON object ends whose text comes in pieces."""

    def __init__(self) -> None:
        self._depth, self._in_string, self._is_escaped = 0, False, False
        self.is_closed = False

    def take(self, text: str) -> int:
        """Characters of ``text`` that are the object's."""
        if self.is_closed:
            return 0
        for n, character in enumerate(text, 1):
            if self._is_escaped:
                self._is_escaped = False
            elif self._in_string:
                self._is_escaped, self._in_string = character == "\\", character != '"'
            else:
                self._in_string = character == '"'
                self._depth += (character in "{[") - (character in "}]")
                if not self._depth:
                    self.is_closed = True
                    return n
        return len(text)
