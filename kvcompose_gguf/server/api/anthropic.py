"""Formats answers as Anthropic's Messages API does (https://docs.anthropic.com/en/api/messages-streaming)."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from ..slots.steps import End
from .parts import About


class _Kind(NamedTuple):
    """A kind of a block: its name, the field with its text, and the name of its deltas."""

    name: str
    field: str
    delta: str


TEXT = _Kind("text", "text", "text_delta")
THINKING = _Kind("thinking", "thinking", "thinking_delta")
TOOL = _Kind("tool_use", "partial_json", "input_json_delta")


class MessageForm:
    """One message, and its events while it is written."""

    def __init__(self, about: About) -> None:
        self._about = about
        self._blocks: list[dict[str, Any]] = []
        self._kind = TEXT

    def begin(self, n_cached: int) -> list[dict[str, Any]]:
        """Returns the events before the first block.

        Args:
            n_cached: number of the prompt's tokens that were in the cache.
        """
        message = {**self._head(), "stop_reason": None, "stop_sequence": None, "usage": self._usage(n_cached, 0)}
        return [{"type": "message_start", "message": message}]

    def progress(self) -> list[dict[str, Any]]:
        """Returns an event that says no more than that the prompt is being read."""
        return [{"type": "ping"}]

    def add(self, deltas: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Returns the events for what is new in OpenAI's message."""
        out = []
        for delta in deltas:
            if thoughts := delta.get("reasoning_content"):
                out += self._grow(THINKING, thoughts)
            if text := delta.get("content"):
                out += self._grow(TEXT, text)
            for call in delta.get("tool_calls", ()):
                if "id" in call:
                    out += self._open(TOOL, {"id": call["id"], "name": call["function"]["name"], "input": {}})
                out += self._grow(TOOL, call["function"].get("arguments", ""))
        return out

    def end(self, end: End) -> list[dict[str, Any]]:
        """Returns the events after the last delta."""
        done = self.whole(end)
        delta = {name: done[name] for name in ("stop_reason", "stop_sequence")}
        usage = {"output_tokens": end.timings.predicted_n}
        return [*self._close(), {"type": "message_delta", "delta": delta, "usage": usage}, {"type": "message_stop"}]

    def whole(self, end: End) -> dict[str, Any]:
        """Returns the message after its last delta."""
        is_stopped = end.stop_type in ("eos", "word")
        has_calls = any(block["type"] == "tool_use" for block in self._blocks)
        reason = ("tool_use" if has_calls else "end_turn") if is_stopped else "max_tokens"
        if end.stop_type == "word" and not has_calls:
            reason = "stop_sequence"
        return {
            **self._head(), "content": [_finished(block) for block in self._blocks], "stop_reason": reason,
            "stop_sequence": end.stopping_word or None,
            "usage": self._usage(end.timings.cache_n, end.timings.predicted_n),
        }  # fmt: skip

    def _head(self) -> dict[str, Any]:
        about = self._about
        return {"id": about.id, "type": "message", "role": "assistant", "content": [], "model": about.model}

    def _usage(self, n_cached: int, n_written: int) -> dict[str, int]:
        return {
            "input_tokens": len(self._about.what.tokens) - n_cached, "cache_read_input_tokens": n_cached,
            "cache_creation_input_tokens": 0, "output_tokens": n_written,
        }  # fmt: skip

    def _grow(self, kind: _Kind, text: str) -> list[dict[str, Any]]:
        out = []
        if not self._blocks or self._blocks[-1]["type"] != kind.name:
            out = self._open(kind, {kind.field: ""} | ({"signature": ""} if kind is THINKING else {}))
        if text:
            block = self._blocks[-1]
            block[kind.field] = block.get(kind.field, "") + text
            out.append(self._event("content_block_delta", delta={"type": kind.delta, kind.field: text}))
        return out

    def _open(self, kind: _Kind, more: dict[str, Any]) -> list[dict[str, Any]]:
        before = self._close()
        self._kind = kind
        self._blocks.append({"type": kind.name, **more})
        return [*before, self._event("content_block_start", content_block={"type": kind.name, **more})]

    def _close(self) -> list[dict[str, Any]]:
        if not self._blocks:
            return []
        signature: list[dict[str, Any]] = []
        if self._kind is THINKING:  # clients expect one; a local model has nothing to sign
            signature = [self._event("content_block_delta", delta={"type": "signature_delta", "signature": ""})]
        return [*signature, self._event("content_block_stop")]

    def _event(self, name: str, **more: Any) -> dict[str, Any]:
        return {"type": name, "index": len(self._blocks) - 1, **more}


def _finished(block: dict[str, Any]) -> dict[str, Any]:
    if block["type"] != "tool_use":
        return block
    try:
        arguments = json.loads(block.get("partial_json", "") or "{}")
    except ValueError:  # the answer was cut
        arguments = {}
    return {name: value for name, value in block.items() if name != "partial_json"} | {"input": arguments}
