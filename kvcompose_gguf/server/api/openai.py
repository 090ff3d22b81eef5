"""Formats answers in OpenAI's forms: completions and chats."""

from __future__ import annotations

from typing import Any

from ..slots.steps import End, Progress, Token
from .llama_server import completion
from .parts import About, answer_probabilities, extras, timings, token_probabilities, usage

FINISH = {"none": "stop", "eos": "stop", "word": "stop", "limit": "length"}


def text_completion(about: About, end: End, streamed: bool = False) -> dict[str, Any]:
    """Returns the whole answer of /v1/completions, or the last chunk of a streamed one."""
    logprobs = {"content": answer_probabilities(about, end)} if about.what.n_probs and not streamed else None
    choice = {
        "text": "" if streamed else end.text, "index": about.index, "logprobs": logprobs,
        "finish_reason": FINISH[end.stop_type],
    }  # fmt: skip
    body = {"choices": [choice], **_head(about, "text_completion"), "usage": usage((about, end))}
    if about.verbose:
        body["__verbose"] = completion(about, end)
    return body | {"timings": timings(end.timings, end.report)}


def text_completion_part(about: About, step: Token | Progress, timings_per_token: bool) -> dict[str, Any]:
    """Returns the chunk for a token of a streamed /v1/completions."""
    content = step.text if isinstance(step, Token) else ""
    logprobs = None
    if isinstance(step, Token) and about.what.n_probs:
        logprobs = {"content": [token_probabilities(about, step.chosen, step.text)]}
    choice = {"text": content, "index": about.index, "logprobs": logprobs, "finish_reason": None}
    return {"choices": [choice], **_head(about, "text_completion")} | extras(step, timings_per_token)


def chat_completion(about: About, end: End, message: dict[str, Any]) -> dict[str, Any]:
    """Returns the whole answer of /v1/chat/completions.

    Args:
        message: the assistant's message in OpenAI's form.
    """
    finish = chat_finish(end, bool(message.get("tool_calls")))
    choice: dict[str, Any] = {"finish_reason": finish, "index": about.index, "message": message}
    if about.logprobs:
        choice["logprobs"] = {"content": answer_probabilities(about, end)}
    body = {"choices": [choice], **_head(about, "chat.completion"), "usage": usage((about, end))}
    if about.verbose:
        body["__verbose"] = completion(about, end)
    return body | {"timings": timings(end.timings, end.report)}


def chat_part(about: About, delta: dict[str, Any], finish: str | None = None, **more: Any) -> dict[str, Any]:
    """Returns a chunk of a streamed /v1/chat/completions."""
    choice = {"finish_reason": finish, "index": about.index, "delta": delta}
    return {"choices": [choice], **_head(about, "chat.completion.chunk"), **more}


def chat_usage(*answers: tuple[About, End]) -> dict[str, Any]:
    """Returns the last chunk of all answers to a request, if it wants ``usage``."""
    about, end = answers[-1]
    head = {"choices": [], **_head(about, "chat.completion.chunk")}
    return {**head, "usage": usage(*answers), "timings": timings(end.timings, end.report)}


def chat_finish(end: End, has_calls: bool) -> str:
    """Returns the finish reason of a chat."""
    return "tool_calls" if has_calls and end.stop_type != "limit" else FINISH[end.stop_type]


def _head(about: About, kind: str) -> dict[str, Any]:
    return {
        "created": about.created, "model": about.model, "system_fingerprint": about.fingerprint, "object": kind,
        "id": about.id,
    }  # fmt: skip
