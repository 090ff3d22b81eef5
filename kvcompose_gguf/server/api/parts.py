"""Parts that several answers have: timings, token counts, probabilities, the figures of a compression."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...plan.report import KVReport
from ..slots.sampling import Chosen
from ..slots.slot_llama import SlotLlama
from ..slots.steps import End, Generation, Progress, Timings, Token

#: stands for minus infinity, which JSON does not have
SMALLEST = -3.4028234663852886e38


@dataclass(frozen=True, kw_only=True)
class About:
    """Facts about a request and the server that its answer contains.

    Attributes:
        index: number of this answer among the answers to the request.
        id_slot: number of the slot that made the answer.
        verbose: whether answers in OpenAI's form contain llama-server's own form too.
    """

    what: Generation
    llama: SlotLlama
    model: str
    fingerprint: str
    created: int
    id: str
    settings: dict[str, Any]
    index: int = 0
    id_slot: int = -1
    verbose: bool = False
    return_tokens: bool = False
    response_fields: tuple[str, ...] = ()
    logprobs: bool = False


def timings(t: Timings, report: KVReport | None = None) -> dict[str, Any]:
    """Returns llama-server's timings and, for a compressed prompt, our ``kv`` figures."""
    n_steps = t.predicted_n - 1  # the prompt's last decode gives the first token
    return {
        "cache_n": t.cache_n, "prompt_n": t.prompt_n, "prompt_ms": 1000 * t.prompt_seconds,
        "prompt_per_token_ms": _over(1000 * t.prompt_seconds, t.prompt_n),
        "prompt_per_second": _over(t.prompt_n, t.prompt_seconds),
        "predicted_n": t.predicted_n, "predicted_ms": 1000 * t.predicted_seconds,
        "predicted_per_token_ms": _over(1000 * t.predicted_seconds, n_steps) if n_steps > 0 else 0.0,
        "predicted_per_second": _over(n_steps, t.predicted_seconds) if n_steps > 0 else 0.0,
        **({"kv": compression(report)} if report is not None else {}),
    }  # fmt: skip


def compression(report: KVReport) -> dict[str, Any]:
    """Returns the figures of a compression, for timings and /slots."""
    return {
        "n_tokens": report.n_tokens, "n_kept": report.n_kept.tolist(), "ratio": report.compression_ratio,
        "bytes": report.kv_bytes_kept, "bytes_full": report.kv_bytes_full,
        "scoring": report.scoring, "prefill_ms": 1000 * report.prefill_seconds, "score_ms": 1000 * report.score_seconds,
        "compose_ms": 1000 * (report.plan_seconds + report.compose_seconds),
    }  # fmt: skip


def usage(*answers: tuple[About, End]) -> dict[str, Any]:
    """Returns OpenAI's token counts of all answers to a request; a prompt with several answers counts once."""
    prompts = {id(about.what.tokens): (len(about.what.tokens), end.timings.cache_n) for about, end in reversed(answers)}
    n_prompt, n_cached = (sum(numbers) for numbers in zip(*prompts.values(), strict=True))
    n = sum(end.timings.predicted_n for _, end in answers)
    return {
        "completion_tokens": n, "prompt_tokens": n_prompt, "total_tokens": n_prompt + n,
        "prompt_tokens_details": {"cached_tokens": n_cached},
    }  # fmt: skip


def token_probabilities(about: About, chosen: Chosen, text: str) -> dict[str, Any]:
    """Returns a token of the answer with its probability, and the most probable tokens in its place."""
    llama, after_sampling = about.llama, about.what.post_sampling_probs
    value, best = ("prob", "top_probs") if after_sampling else ("logprob", "top_logprobs")

    def entry(token: int, probability: float, text: str | None = None) -> dict[str, Any]:
        piece = llama.piece(token, special=True)
        number = probability if after_sampling else math.log(probability) if probability > 0 else SMALLEST
        return {
            "id": token, "token": piece.decode("utf-8", "ignore") if text is None else text,
            "bytes": list(piece), value: number,
        }  # fmt: skip

    # tokens that the samplers removed have no probability
    others = [entry(token, p) for token, p in chosen.best if p > 0 or not after_sampling]
    return {**entry(chosen.token, chosen.probability, text), best: others}


def answer_probabilities(about: About, end: End) -> list[dict[str, Any]]:
    """Returns ``token_probabilities`` of all tokens of an answer, without the stop string."""
    reported = zip(end.tokens[: n_reported(about, end)], end.shown, strict=False)
    return [token_probabilities(about, chosen, text) for chosen, text in reported]


def n_reported(about: About, end: End) -> int:
    """Returns how many tokens of an answer are reported with their probabilities: all but those of the stop string."""
    word = end.stopping_word.encode()
    n_stop = len(about.llama.tokenize(word, add_bos=False, special=True)) if word else 0
    return max(0, len(end.tokens) - n_stop)


def prompt_text(llama: SlotLlama, tokens: Sequence[int]) -> str:
    """Returns the text of a prompt, control tokens included."""
    return b"".join(llama.piece(token, special=True) for token in tokens).decode("utf-8", "replace")


def extras(step: Token | Progress, timings_per_token: bool) -> dict[str, Any]:
    """Returns the optional fields of a chunk: progress and timings."""
    told = {"prompt_progress": _progress(step)} if isinstance(step, Progress) else {}
    return told | ({"timings": timings(step.timings)} if timings_per_token else {})


def _progress(progress: Progress) -> dict[str, Any]:
    return {
        "total": progress.total, "cache": progress.cache, "processed": progress.processed, "time_ms": progress.time_ms,
        "kv_bytes": progress.kv_bytes,
    }  # fmt: skip


def _over(a: float, b: float) -> float:
    return a / b if b > 0 else 0.0
