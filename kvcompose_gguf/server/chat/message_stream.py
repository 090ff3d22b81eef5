"""Divides the model's text into an assistant's message: thoughts, content and tool calls."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ...support.reasoning import Thoughts
from ..api.openai import Message
from .tools import BareCalls, CallStream


class MessageStream:
    """Makes the deltas of OpenAI's chunks while the text comes.

    Args:
        thoughts: separates the thoughts.
        calls: finds tool calls in the rest. None: there are no tools.
    """

    def __init__(self, thoughts: Thoughts, calls: CallStream | BareCalls | None) -> None:
        self._thoughts, self._calls = thoughts, calls

    @property
    def n_calls(self) -> int:
        """Number of tool calls so far."""
        return 0 if self._calls is None else self._calls.n_calls

    def add(self, text: str) -> list[dict[str, Any]]:
        """Returns the deltas that are certain after ``text``."""
        return self._deltas(*self._thoughts.add(text))

    def end(self) -> list[dict[str, Any]]:
        """Returns the deltas of the text that was held back, at the end."""
        deltas = self._deltas(*self._thoughts.end())
        return deltas + (self._calls.end() if self._calls is not None else [])

    def whole(self, text: str) -> Message:
        """Returns the message of a whole text."""
        return _joined([*self.add(text), *self.end()])

    def _deltas(self, thoughts: str, content: str) -> list[dict[str, Any]]:
        deltas: list[dict[str, Any]] = [{"reasoning_content": thoughts}] if thoughts else []
        if self._calls is not None:
            return deltas + self._calls.add(content)
        return deltas + ([{"content": content}] if content else [])


def _joined(deltas: Iterable[dict[str, Any]]) -> Message:
    content, reasoning, calls = "", "", list[dict[str, Any]]()
    for delta in deltas:
        content += delta.get("content", "")
        reasoning += delta.get("reasoning_content", "")
        for call in delta.get("tool_calls", ()):
            if "id" in call:
                calls.append({name: value for name, value in call.items() if name != "index"})
                calls[-1]["function"] = dict(call["function"])
            else:
                calls[-1]["function"]["arguments"] += call["function"]["arguments"]
    return Message(content.strip() if calls else content, reasoning, tuple(calls))
