"""Divides an answer into thoughts, content and tool calls while it is written, and loses none of it."""

from __future__ import annotations

from typing import Any

from ..errors import ConfigError
from .chat_library import AnswerParser


class AnswerStream:
    """Makes the deltas of OpenAI's chunks while the text comes.

    A text that is not what the model's format allows, e.g. a tool call that ends too early, is content.

    Attributes:
        message: the message in OpenAI's form, after ``end``.
    """

    def __init__(self, parser: AnswerParser) -> None:
        self._parser, self._text = parser, ""
        self._shown: str | None = ""  # what was told, as long as all of it is content
        self.message: dict[str, Any] = {}

    @property
    def n_calls(self) -> int:
        """Number of tool calls in the message."""
        return len(self.message.get("tool_calls", ()))

    def add(self, text: str) -> list[dict[str, Any]]:
        """Returns the deltas that are certain after ``text``."""
        self._text += text
        try:
            return self._told(self._parser.deltas(self._text))
        except ConfigError:  # perhaps its end makes sense of it
            return []

    def end(self) -> list[dict[str, Any]]:
        """Returns the last deltas, at the end."""
        try:
            deltas, self.message = self._parser.end(self._text)
            deltas = self._told(deltas)
        except ConfigError:
            deltas, self.message = [], {"role": "assistant", "content": self._text}
        if self._shown is None or not self._text.startswith(self._shown) or len(self._shown) == len(self._text):
            return deltas
        # llama.cpp still waits for the rest of what might have become a mark, or does not understand the answer
        if self._shown == (self.message.get("content") or ""):
            self.message["content"] = self._text
        rest, self._shown = self._text[len(self._shown) :], self._text
        return [*deltas, {"content": rest}]

    def _told(self, deltas: list[dict[str, Any]]) -> list[dict[str, Any]]:
        for delta in deltas:
            is_content = self._shown is not None and set(delta) == {"content"}
            self._shown = (self._shown or "") + delta["content"] if is_content else None
        return deltas

    def whole(self, text: str) -> dict[str, Any]:
        """Returns the message of a whole text."""
        self._text = text
        self.end()
        return self.message
