"""An assistant's message out of its text: thoughts, content and calls."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .reasoning import Thoughts
from .tools import BareCalls, CallStream


class MessageStream:
    """Deltas of a message, as OpenAI's chunks have them, while its text comes.

    Args:
        thoughts: divides the text.
        calls: finds calls in what is not thought; None: there are none.
    """

    def __init__(self, thoughts: Thoughts, calls: CallStream | BareCalls | None) -> None:
        self._thoughts, self._calls = thoughts, calls

    @property
    def n_calls(self) -> int:
        """Calls so far."""
        return 0 if self._calls is None else self._calls.n_calls

    def add(self, text: str) -> list[dict[str, Any]]:
        """What is certain now that ``text`` has come."""
        return self._deltas(*self._thoughts.add(text))

    def end(self) -> list[dict[str, Any]]:
        """What was held back, when nothing more comes."""
        deltas = self._deltas(*self._thoughts.end())
        return deltas + (self._calls.end() if self._calls is not None else [])

    def whole(self, text: str) -> Message:
        """The message of a text that is there at once."""
        return _joined([*self.add(text), *self.end()])

    def _deltas(self, thoughts: str, content: str) -> list[dict[str, Any]]:
        deltas: list[dict[str, Any]] = [{"reasoning_content": thoughts}] if thoughts else []
        if self._calls is not None:
            return deltas + self._calls.add(content)
        return deltas + ([{"content": content}] if content else [])


@dataclass(frozen=True)
class Message:
    """What a model said.

    Attributes:
        content: without thoughts and calls.
        reasoning: the thoughts.
        tool_calls: as OpenAI's API has them, arguments as JSON text.
    """

    content: str
    reasoning: str = ""
    tool_calls: tuple[dict[str, Any], ...] = ()


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
