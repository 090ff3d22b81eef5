"""Formats answers as llama-server does (server-task.cpp): its own form, OpenAI's completions, OpenAI's chat."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..plan.report import KVReport
from .chat.messages import Message
from .slots.generation import End, Generation, Progress, Timings, Token
from .slots.sampling import Chosen
from .slots.slot import Slot, SlotLlama

#: stands for minus infinity, which JSON does not have
SMALLEST = -3.4028234663852886e38

FINISH = {"none": "stop", "eos": "stop", "word": "stop", "limit": "length"}


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


#
# parts
#


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
        "prefill_ms": 1000 * report.prefill_seconds, "score_ms": 1000 * report.score_seconds,
        "compose_ms": 1000 * (report.plan_seconds + report.compose_seconds),
    }  # fmt: skip


def usage(end: End, n_prompt: int) -> dict[str, Any]:
    """Returns OpenAI's token counts."""
    n = end.timings.predicted_n
    return {
        "completion_tokens": n, "prompt_tokens": n_prompt, "total_tokens": n_prompt + n,
        "prompt_tokens_details": {"cached_tokens": end.timings.cache_n},
    }  # fmt: skip


def probabilities(llama: SlotLlama, chosen: Chosen, text: str, after_sampling: bool) -> dict[str, Any]:
    """Returns a token with its probability and the most probable tokens."""
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


def settings(what: Generation, stream: bool, timings_per_token: bool) -> dict[str, Any]:
    """Returns ``generation_settings`` (task_params::to_json)."""
    sampling = what.sampling
    named = {name: getattr(sampling, name) for name in SETTINGS}
    bias = [{"token": token, "bias": b if math.isfinite(b) else None} for token, b in sampling.logit_bias]
    return {
        "seed": sampling.seed, **named, "dry_sequence_breakers": list(sampling.dry_sequence_breakers),
        "stop": list(what.stops), "max_tokens": what.n_predict, "n_predict": what.n_predict, "n_keep": 0,
        "n_discard": 0,
        "ignore_eos": what.ignore_eos, "stream": stream, "logit_bias": bias, "n_probs": what.n_probs,
        "min_keep": sampling.min_keep, "grammar": sampling.grammar, "samplers": list(sampling.samplers),
        "speculative.types": "none", "timings_per_token": timings_per_token,
        "post_sampling_probs": what.post_sampling_probs, "backend_sampling": False, "lora": [],
        "chat_format": "Content-only", "reasoning_format": "none", "reasoning_in_content": False,
        "generation_prompt": "",
    }  # fmt: skip


def brief_settings(what: Generation) -> dict[str, Any]:
    """Returns the settings for /props and /slots, without long ones (task_params::to_json, only_metrics)."""
    return {name: value for name, value in settings(what, False, False).items() if name not in LONG_SETTINGS}


def slot(slot: Slot) -> dict[str, Any]:
    """Returns the state of a slot, for /slots."""
    llama, task = slot.llama, slot.task
    body: dict[str, Any] = {
        "id": slot.id, "n_ctx": llama.n_ctx(), "speculative": False, "is_processing": not slot.is_idle
    }  # fmt: skip
    if task is None:
        return body
    what: Generation | None = task.about
    is_limited = what is not None and what.n_predict >= 0 and not slot.is_idle
    body |= {
        "id_task": task.id, "n_prompt_tokens": llama.n_tokens,
        "n_prompt_tokens_processed": 0 if slot.is_idle else task.n_processed, "n_prompt_tokens_cache": task.n_cached,
        **({"params": brief_settings(what)} if what is not None else {}),
        "next_token": [{
            "has_next_token": not slot.is_idle, "has_new_line": task.has_new_line,
            "n_remain": what.n_predict - task.n_decoded if what is not None and is_limited else -1,
            "n_decoded": 0 if slot.is_idle else task.n_decoded,
        }],
        "kv_bytes": slot.kv_bytes,
        "kv": compression(llama.kv_report) if llama.n_context and llama.kv_report is not None else None,
    }  # fmt: skip
    return body


LONG_SETTINGS = frozenset({"dry_sequence_breakers", "stop", "logit_bias", "grammar"})
SETTINGS = (
    "temperature", "dynatemp_range", "dynatemp_exponent", "top_k", "top_p", "min_p", "top_n_sigma", "xtc_probability",
    "xtc_threshold", "typical_p", "repeat_last_n", "repeat_penalty", "presence_penalty", "frequency_penalty",
    "dry_multiplier", "dry_base", "dry_allowed_length", "dry_penalty_last_n", "mirostat", "mirostat_tau",
    "mirostat_eta", "adaptive_target", "adaptive_decay",
)  # fmt: skip


def _over(a: float, b: float) -> float:
    return a / b if b > 0 else 0.0


def _progress(progress: Progress) -> dict[str, Any]:
    return {
        "total": progress.total, "cache": progress.cache, "processed": progress.processed, "time_ms": progress.time_ms
    }  # fmt: skip


#
# llama-server's own form
#


def native(about: About, end: End, streamed: bool = False) -> dict[str, Any]:
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
        body["completion_probabilities"] = _all_probabilities(about, end)
    return _selected(body, about.response_fields) if about.response_fields else body


def native_part(about: About, step: Token | Progress, timings_per_token: bool) -> dict[str, Any]:
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
        body["completion_probabilities"] = [_probabilities_of(about, step)]
    return body | extras(step, timings_per_token)


def prompt_text(llama: SlotLlama, tokens: Sequence[int]) -> str:
    """Returns the text of a prompt, control tokens included."""
    return b"".join(llama.piece(token, special=True) for token in tokens).decode("utf-8", "replace")


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


#
# OpenAI's forms
#


def text_completion(about: About, end: End, streamed: bool = False) -> dict[str, Any]:
    """Returns the whole answer of /v1/completions, or the last chunk of a streamed one."""
    logprobs = {"content": _all_probabilities(about, end)} if about.what.n_probs and not streamed else None
    choice = {
        "text": "" if streamed else end.text, "index": about.index, "logprobs": logprobs,
        "finish_reason": FINISH[end.stop_type],
    }  # fmt: skip
    body = {"choices": [choice], **_head(about, "text_completion"), "usage": usage(end, len(about.what.tokens))}
    if about.verbose:
        body["__verbose"] = native(about, end)
    return body | {"timings": timings(end.timings, end.report)}


def text_completion_part(about: About, step: Token | Progress, timings_per_token: bool) -> dict[str, Any]:
    """Returns the chunk for a token of a streamed /v1/completions."""
    content = step.text if isinstance(step, Token) else ""
    logprobs = None
    if isinstance(step, Token) and about.what.n_probs:
        logprobs = {"content": [_probabilities_of(about, step)]}
    choice = {"text": content, "index": about.index, "logprobs": logprobs, "finish_reason": None}
    return {"choices": [choice], **_head(about, "text_completion")} | extras(step, timings_per_token)


def chat_completion(about: About, end: End, said: Message) -> dict[str, Any]:
    """Returns the whole answer of /v1/chat/completions."""
    message: dict[str, Any] = {"role": "assistant", "content": said.content}
    if said.reasoning:
        message["reasoning_content"] = said.reasoning
    if said.tool_calls:
        message["tool_calls"] = list(said.tool_calls)
    choice: dict[str, Any] = {
        "finish_reason": chat_finish(end, bool(said.tool_calls)), "index": about.index, "message": message
    }  # fmt: skip
    if about.logprobs:
        choice["logprobs"] = {"content": _all_probabilities(about, end)}
    body = {"choices": [choice], **_head(about, "chat.completion"), "usage": usage(end, len(about.what.tokens))}
    if about.verbose:
        body["__verbose"] = native(about, end)
    return body | {"timings": timings(end.timings, end.report)}


def chat_part(about: About, delta: dict[str, Any], finish: str | None = None, **more: Any) -> dict[str, Any]:
    """Returns a chunk of a streamed /v1/chat/completions."""
    choice = {"finish_reason": finish, "index": about.index, "delta": delta}
    return {"choices": [choice], **_head(about, "chat.completion.chunk"), **more}


def chat_usage(about: About, end: End) -> dict[str, Any]:
    """Returns the last chunk, for requests that want ``usage``."""
    return {"choices": [], **_head(about, "chat.completion.chunk"), "usage": usage(end, len(about.what.tokens))}


def chat_finish(end: End, has_calls: bool) -> str:
    """Returns the finish reason of a chat."""
    return "tool_calls" if has_calls and end.stop_type != "limit" else FINISH[end.stop_type]


def chat_logprobs(about: About, step: Token) -> dict[str, Any]:
    """Returns the ``logprobs`` for a token of a streamed chat."""
    return {"content": [_probabilities_of(about, step)]}


def _head(about: About, kind: str) -> dict[str, Any]:
    return {
        "created": about.created, "model": about.model, "system_fingerprint": about.fingerprint, "object": kind,
        "id": about.id,
    }  # fmt: skip


def extras(step: Token | Progress, timings_per_token: bool) -> dict[str, Any]:
    """Returns the optional fields of a chunk: progress and timings."""
    told = {"prompt_progress": _progress(step)} if isinstance(step, Progress) else {}
    return told | ({"timings": timings(step.timings)} if timings_per_token else {})


def _probabilities_of(about: About, step: Token) -> dict[str, Any]:
    return probabilities(about.llama, step.chosen, step.text, about.what.post_sampling_probs)


def _all_probabilities(about: About, end: End) -> list[dict[str, Any]]:
    """Returns the probabilities of the answer's tokens, without the stop string."""
    tokens = list(end.tokens)
    if end.stopping_word:
        n_stop = len(about.llama.tokenize(end.stopping_word.encode(), add_bos=False, special=True))
        tokens = tokens[: max(0, len(tokens) - n_stop)]
    return [
        probabilities(about.llama, chosen, text, about.what.post_sampling_probs)
        for chosen, text in zip(tokens, end.shown, strict=False)
    ]
