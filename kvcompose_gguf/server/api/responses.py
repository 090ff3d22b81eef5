"""Formats answers as OpenAI's Responses API does (https://platform.openai.com/docs/api-reference/responses-streaming)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..slots.steps import End
from .ids import random_id
from .parts import About, timings

#: fields of a request that its response repeats, with their defaults
REPEATED: dict[str, Any] = {
    "instructions": None, "max_output_tokens": None, "metadata": {}, "parallel_tool_calls": True, "temperature": None,
    "text": {"format": {"type": "text"}}, "tool_choice": "auto", "tools": [], "top_p": None,
}  # fmt: skip


class ResponseForm:
    """One response, and its events while it is written.

    Args:
        body: the request's body.
    """

    def __init__(self, about: About, body: Mapping[str, Any]) -> None:
        self._about = about
        self._repeated = {name: body.get(name, default) for name, default in REPEATED.items()}
        self._id = f"resp_{random_id()}"
        self._items: list[dict[str, Any]] = []
        self._n_events = 0

    def begin(self, n_cached: int) -> list[dict[str, Any]]:
        """Returns the events before the first item."""
        response = self._response("in_progress")
        return [self._event(f"response.{name}", response=response) for name in ("created", "in_progress")]

    def progress(self) -> list[dict[str, Any]]:
        """Returns an event that says no more than that the prompt is being read."""
        return [self._event("response.in_progress", response=self._response("in_progress"))]

    def add(self, deltas: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Returns the events for what is new in OpenAI's message."""
        out = []
        for delta in deltas:
            if thoughts := delta.get("reasoning_content"):
                out += self._open("reasoning", id=f"rs_{random_id()}", summary=[], content=[])
                out += self._grow("reasoning_text", thoughts)
            if text := delta.get("content"):
                out += self._open("message", id=f"msg_{random_id()}", role="assistant", content=[])
                out += self._grow("output_text", text)
            for call in delta.get("tool_calls", ()):
                if "id" in call:
                    name, number = call["function"]["name"], call["id"]
                    out += self._open("function_call", True, id=f"fc_{number}", call_id=number, name=name, arguments="")
                out += self._argue(call["function"].get("arguments", ""))
        return out

    def end(self, end: End) -> list[dict[str, Any]]:
        """Returns the events after the last delta.

        The last one is ``response.completed`` also if the answer was cut, as in llama-server: clients wait for it. The
        response in it has the status "incomplete" then.
        """
        out, more = self._close(), {"timings": timings(end.timings, end.report)}
        return [*out, self._event("response.completed", response=self.whole(end), **more)]

    def whole(self, end: End) -> dict[str, Any]:
        """Returns the response after its last delta."""
        self._close()
        n_prompt, n_written = len(self._about.what.tokens), end.timings.predicted_n
        is_cut = end.stop_type == "limit"
        return {
            **self._response("incomplete" if is_cut else "completed"),
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "usage": {
                "input_tokens": n_prompt, "input_tokens_details": {"cached_tokens": end.timings.cache_n},
                "output_tokens": n_written, "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": n_prompt + n_written,
            },
        }  # fmt: skip

    def _response(self, status: str) -> dict[str, Any]:
        return {
            "id": self._id, "object": "response", "created_at": self._about.created, "status": status, "error": None,
            "incomplete_details": None, "model": self._about.model, "output": list(self._items), **self._repeated,
        }  # fmt: skip

    def _open(self, kind: str, anew: bool = False, **fields: Any) -> list[dict[str, Any]]:
        """Begins an item, unless the last one is of this kind."""
        if self._items and self._items[-1]["type"] == kind and not anew:
            return []
        out = self._close()
        self._items.append({"type": kind, "status": "in_progress", **fields})
        return [*out, self._of_item("response.output_item.added", item=dict(self._items[-1]))]

    def _grow(self, kind: str, text: str) -> list[dict[str, Any]]:
        item, out = self._items[-1], []
        if not item["content"]:
            more: dict[str, Any] = {"annotations": [], "logprobs": []} if kind == "output_text" else {}
            item["content"] = [{"type": kind, "text": "", **more}]
            out = [self._of_part("response.content_part.added", part=dict(item["content"][0]))]
        item["content"][0]["text"] += text
        return [*out, self._of_part(f"response.{kind}.delta", delta=text, **_logprobs(kind))]

    def _argue(self, arguments: str) -> list[dict[str, Any]]:
        if not arguments:
            return []
        self._items[-1]["arguments"] += arguments
        return [self._of_item("response.function_call_arguments.delta", True, delta=arguments)]

    def _close(self) -> list[dict[str, Any]]:
        if not self._items or self._items[-1]["status"] == "completed":
            return []
        item, out = self._items[-1], []
        item["status"] = "completed"
        if item["type"] == "function_call":
            said = {"arguments": item["arguments"], "name": item["name"]}
            out = [self._of_item("response.function_call_arguments.done", True, **said)]
        elif item["content"]:
            part = item["content"][0]
            kind, text = part["type"], part["text"]
            out = [
                self._of_part(f"response.{kind}.done", text=text, **_logprobs(kind)),
                self._of_part("response.content_part.done", part=dict(part)),
            ]
        return [*out, self._of_item("response.output_item.done", item=dict(item))]

    def _of_part(self, event: str, /, **more: Any) -> dict[str, Any]:
        return self._of_item(event, True, content_index=0, **more)

    def _of_item(self, event: str, /, with_id: bool = False, **more: Any) -> dict[str, Any]:
        about = {"item_id": self._items[-1]["id"]} if with_id else {}
        return self._event(event, output_index=len(self._items) - 1, **about, **more)

    def _event(self, event: str, /, **more: Any) -> dict[str, Any]:
        self._n_events += 1
        return {"type": event, "sequence_number": self._n_events - 1, **more}


def _logprobs(kind: str) -> dict[str, Any]:
    return {"logprobs": []} if kind == "output_text" else {}
