"""Formats answers in llama-server's own form (server-task.cpp)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..slots.steps import End, Progress, Token
from .parts import About, answer_probabilities, extras, prompt_text, timings, token_probabilities


def completion(about: About, end: End, streamed: bool = False) -> dict[str, Any]:
    """Returns a whole answer, or the last chunk of a streamed one."""
    what, llama = about.what, about.llama
    body = {
        "index": about.index, "content": "" if streamed else end.text,
        "tokens": [c.token for c in end.tokens] if about.return_tokens and not streamed else [],
        "id_slot": about.id_slot, "stop": True, "model": about.model, "tokens_predicted": end.timings.predicted_n,
        "tokens_evaluated": len(what.tokens), "generation_settings": {**about.settings, "seed": end.seed},
        "prompt": prompt_text(llama, what.tokens), "has_new_line": "\n" in end.text, "truncated": end.truncated,
        "stop_type": end.stop_type, "stopping_word": end.stopping_word, "tokens_cached": end.n_cached,
        "timings": timings(end.timings, end.report),
    }  # fmt: skip
    if what.n_probs and not streamed:
        body["completion_probabilities"] = answer_probabilities(about, end)
    return _selected(body, about.response_fields) if about.response_fields else body


def completion_part(about: About, step: Token | Progress, timings_per_token: bool) -> dict[str, Any]:
    """Returns the chunk for a token of a streamed answer, or for a part of the prompt that was read."""
    if isinstance(step, Progress):
        n, content, tokens = 0, "", [0]
    else:
        n, content, tokens = step.n_decoded, step.text, [step.chosen.token]
    body: dict[str, Any] = {
        "index": about.index, "content": content, "tokens": tokens, "stop": False, "id_slot": about.id_slot,
        "tokens_predicted": n, "tokens_evaluated": len(about.what.tokens),
    }  # fmt: skip
    if isinstance(step, Token) and about.what.n_probs:
        body["completion_probabilities"] = [token_probabilities(about, step.chosen, step.text)]
    return body | extras(step, timings_per_token)


def _selected(body: dict[str, Any], fields: Sequence[str]) -> dict[str, Any]:
    out = {}
    for field in fields:
        value: Any = body
        for name in field.split("/"):
            if not isinstance(value, dict) or name not in value:
                break
            value = value[name]
        else:
            out[field] = value
    return out
