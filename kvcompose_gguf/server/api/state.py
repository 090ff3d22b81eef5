"""Formats settings and slots as llama-server does, for /props and /slots."""

from __future__ import annotations

import math
from typing import Any

from ..slots.slot import Slot
from ..slots.steps import Generation
from .parts import compression

LONG_SETTINGS = frozenset({
    "dry_sequence_breakers", "stop", "logit_bias", "grammar", "grammar_triggers", "preserved_tokens",
})  # fmt: skip
SETTINGS = (
    "temperature", "dynatemp_range", "dynatemp_exponent", "top_k", "top_p", "min_p", "top_n_sigma", "xtc_probability",
    "xtc_threshold", "typical_p", "repeat_last_n", "repeat_penalty", "presence_penalty", "frequency_penalty",
    "dry_multiplier", "dry_base", "dry_allowed_length", "dry_penalty_last_n", "mirostat", "mirostat_tau",
    "mirostat_eta", "adaptive_target", "adaptive_decay",
)  # fmt: skip


def settings(what: Generation, stream: bool, timings_per_token: bool) -> dict[str, Any]:
    """Returns ``generation_settings`` (task_params::to_json)."""
    sampling, constraint = what.sampling, what.sampling.constraint
    named = {name: getattr(sampling, name) for name in SETTINGS}
    bias = [{"token": token, "bias": b if math.isfinite(b) else None} for token, b in sampling.logit_bias]
    return {
        "seed": sampling.seed, **named, "dry_sequence_breakers": list(sampling.dry_sequence_breakers),
        "stop": list(what.stops), "max_tokens": what.n_predict, "n_predict": what.n_predict, "n_keep": 0,
        "n_discard": 0,
        "ignore_eos": what.ignore_eos, "stream": stream, "logit_bias": bias, "n_probs": what.n_probs,
        "min_keep": sampling.min_keep, "grammar": constraint.grammar if constraint else "",
        "grammar_lazy": constraint is not None and constraint.is_lazy,
        "grammar_triggers": [*constraint.patterns, *constraint.tokens] if constraint else [],
        "preserved_tokens": sorted(what.preserved), "samplers": list(sampling.samplers),
        "speculative.types": "none", "timings_per_token": timings_per_token,
        "post_sampling_probs": what.post_sampling_probs, "backend_sampling": False, "lora": [],
        "chat_format": "Content-only", "reasoning_format": "none", "reasoning_in_content": False,
        "generation_prompt": "",
    }  # fmt: skip


def brief_settings(what: Generation) -> dict[str, Any]:
    """Returns the settings for /props and /slots, without long ones (task_params::to_json, only_metrics)."""
    return {name: value for name, value in settings(what, False, False).items() if name not in LONG_SETTINGS}


def slot_state(slot: Slot) -> dict[str, Any]:
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
        "kv_bytes_ceiling": None if llama.context.ceiling is None else llama.context.ceiling.n_bytes,
        "kv_bytes_full": slot.kv_bytes_full,
        "kv": compression(llama.kv_report) if llama.n_context and llama.kv_report is not None else None,
    }  # fmt: skip
    return body
