"""Checks tools and finds tool calls in the model's text."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import Any

from ...models.templates import CALL_BEGIN, ChatTemplate
from ..api.errors import invalid, not_supported
from ..api.ids import random_id
from .templates import BuiltinTemplate

CALL_END = "</tool_call>"

#: matches a call up to its arguments
CALL_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')


def check_tools(
    tools: Any, tool_choice: Any, template: ChatTemplate | BuiltinTemplate
) -> tuple[list[dict[str, Any]], str]:
    """Returns the tools that may be called, and the choice: ``"auto"``, ``"none"`` or ``"required"``.

    Raises:
        ApiError: the tools do not fit OpenAI's API, or the model's template does not support tools.
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
        raise not_supported("tools are not supported: the model's chat template does not use them")
    return tools, choice


def call_schema(tools: list[dict[str, Any]], key: str = "arguments") -> dict[str, Any]:
    """Returns the JSON schema of a call to one of ``tools``, with the arguments under the name ``key``."""
    definitions, calls = {}, []
    for number, tool in enumerate(tools):
        # every schema refers to its own definitions
        where = f"#/$defs/{number}"
        definitions[str(number)] = _moved(tool["function"].get("parameters") or {"type": "object"}, where)
        properties = {"name": {"const": tool["function"]["name"]}, key: {"$ref": where}}
        calls.append({"type": "object", "properties": properties, "required": ["name", key]})
    return {**(calls[0] if len(calls) == 1 else {"oneOf": calls}), "$defs": definitions}


def _moved(schema: Any, where: str) -> Any:
    """Returns a schema with its references changed for its new place ``where``."""
    if isinstance(schema, list):
        return [_moved(item, where) for item in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {name: _moved(value, where) for name, value in schema.items()}
    if isinstance(ref := schema.get("$ref"), str) and ref.startswith("#"):
        moved["$ref"] = where + ref[1:]
    return moved


def _calls(text: str) -> list[dict[str, Any]]:
    """Returns the calls in a JSON text, which is one call or a list. Empty if it is anything else."""
    try:
        found = json.loads(text)
        return [_call(call) for call in (found if isinstance(found, list) else [found])]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []


def _call(call: Any) -> dict[str, Any]:
    """Returns a call in OpenAI's form. Raises one of several exceptions if ``call`` is not a call."""
    name, arguments = call["name"], call.get("arguments", call.get("parameters", {}))
    if not isinstance(name, str):
        raise ValueError("the name of a call has to be a string")
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {"type": "function", "function": {"name": name, "arguments": text}, "id": random_id()}


class BareCalls:
    """Makes deltas of a text that is a call or a list of calls as JSON, or content: the form of Llama and Mistral.

    Args:
        names: names of the tools that may be called.
    Attributes:
        n_calls: number of calls so far.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._held, self.n_calls = "", 0
        self._is_content = False

    def add(self, text: str) -> list[dict[str, Any]]:
        """Returns the deltas that are certain after ``text``."""
        if not self._is_content:
            self._held += text
            beginning = self._held.lstrip()
            if not beginning or beginning[0] in "{[":
                return []
            self._is_content, text = True, self._held
        return [{"content": text}] if text else []

    def end(self) -> list[dict[str, Any]]:
        """Returns the deltas of the text that was held back, at the end."""
        if self._is_content or not self._held:
            return []
        calls = _calls(self._held)
        if not calls or any(call["function"]["name"] not in self._names for call in calls):
            return [{"content": self._held}]
        self.n_calls = len(calls)
        return [{"tool_calls": [{"index": n, **call}]} for n, call in enumerate(calls)]


class CallStream:
    """Makes deltas of a streamed text: content, and tagged calls while the model writes them.

    Attributes:
        n_calls: number of calls so far.
    """

    def __init__(self) -> None:
        self._held, self.n_calls = "", 0
        self._arguments: _Braces | None = None
        self._strips = False

    def add(self, text: str) -> list[dict[str, Any]]:
        """Returns the deltas that are certain after ``text``."""
        self._held += text
        out: list[dict[str, Any]] = []
        while (delta := self._next()) is not None:
            out += [delta] if delta else []
        return out

    def end(self) -> list[dict[str, Any]]:
        """Returns the deltas of the text that was held back, at the end."""
        if self._arguments is not None and self._arguments.is_closed:
            self._held = self._held.lstrip(" \t\r\n}")
        held, self._held = self._held, ""
        # accept a call without its end tag
        calls = _calls(held.removeprefix(CALL_BEGIN)) if held.startswith(CALL_BEGIN) else []
        return [self._begin(call) for call in calls] or ([{"content": held}] if held else [])

    def _next(self) -> dict[str, Any] | None:
        """Returns the next delta. Empty: there is none, but text is left. None: more text is needed."""
        if self._arguments is not None:
            n = self._arguments.take(self._held)
            part, self._held = self._held[:n], self._held[n:]
            if part:
                return self._argument(part)
            return self._close() if self._arguments.is_closed else None
        at = self._held.find(CALL_BEGIN)
        if at < 0:
            beginnings = (n for n in range(len(CALL_BEGIN) - 1, 0, -1) if self._held.endswith(CALL_BEGIN[:n]))
            at = len(self._held) - next(beginnings, 0)
        if at > 0:
            content, self._held = self._held[:at], self._held[at:]
            if self._strips:
                content = content.lstrip()
                self._strips = not content
            return {"content": content} if content else {}
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

    def _close(self) -> dict[str, Any] | None:
        """Skip the call's closing brace and end tag, which a model may forget."""
        rest = self._held.lstrip(" \t\r\n}")
        if CALL_END.startswith(rest):
            if rest != CALL_END:
                return None
            rest = ""
        self._held, self._arguments, self._strips = rest.removeprefix(CALL_END), None, True
        return {}

    def _whole(self, inside: str) -> dict[str, Any] | None:
        """Returns a complete call with its fields in an unusual order. Text that is not a call is content."""
        if CALL_END not in inside:
            return None
        inside, _, self._held = inside.partition(CALL_END)
        calls = _calls(inside)
        return self._begin(calls[0]) if len(calls) == 1 else {"content": CALL_BEGIN + inside + CALL_END}

    def _begin(self, call: dict[str, Any]) -> dict[str, Any]:
        self.n_calls += 1
        self._strips = True
        return {"tool_calls": [{"index": self.n_calls - 1, **call}]}

    def _argument(self, part: str) -> dict[str, Any]:
        return {"tool_calls": [{"index": self.n_calls - 1, "function": {"arguments": part}}]}


class _Braces:
    """Finds the end of a JSON object in a streamed text."""

    def __init__(self) -> None:
        self._depth, self._in_string, self._is_escaped = 0, False, False
        self.is_closed = False

    def take(self, text: str) -> int:
        """Returns how many characters of ``text`` belong to the object."""
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
