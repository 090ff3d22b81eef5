"""Observed attention: the prefill's own queries score the tokens, as in H2O (arXiv 2306.14048)."""

from __future__ import annotations

from dataclasses import dataclass

from ..kernels import aggregate
from ..kernels.types import FloatArray
from ..scoring.evidence import Evidence
from ..scoring.requests import AttentionRequest, Prefill
from .base import Method, map_layers


@dataclass(frozen=True, kw_only=True)
class ObservedAttention(Method):
    """Mean attention from the context tokens that can see the token, mean over the group's query heads.

    The scores are those of kvpress (observed_attention_press.py). kvpress and we differ from H2O: it sums the
    attention, which favours early tokens, evicts during decoding, and reserves half of the budget for the last tokens.
    """

    @property
    def attention_request(self) -> AttentionRequest:
        return AttentionRequest(Prefill(), "mean")

    def scores(self, evidence: Evidence) -> list[FloatArray]:
        """Returns the scores of each layer, float32 ``(n_head_kv, N)``."""

        def score(l: int) -> FloatArray:
            return aggregate.aggregate_group(evidence.attention[l], evidence.layers[l].n_head_kv, "mean")

        return map_layers(score, len(evidence.layers))
