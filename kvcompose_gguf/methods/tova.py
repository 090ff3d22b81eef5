"""TOVA (arXiv 2401.06104): the last token scores the context, with one choice for all heads of a layer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..kernels import aggregate
from ..kernels.threads import map_layers
from ..kernels.types import FloatArray
from ..scoring.evidence import Evidence
from ..scoring.requests import AttentionRequest, Window
from .base import Method


@dataclass(frozen=True, kw_only=True)
class TOVA(Method):
    """Attention of the prompt's last token, mean over all query heads of the layer.

    As in kvpress (tova_press.py), that token is kept if it belongs to the context; in the paper its score decides.
    Difference: the paper evicts one token per step; here the last query of the prompt decides once, and with
    ``keep_last`` it lies after the context.
    """

    @property
    def attention_request(self) -> AttentionRequest:
        return AttentionRequest(Window(1), "mean")

    def scores(self, evidence: Evidence) -> list[FloatArray]:
        """Returns the scores of each layer, float32 ``(n_head_kv, N)`` with equal rows, infinity for the last token."""

        def score(l: int) -> FloatArray:
            scores = aggregate.aggregate_group(evidence.attention[l], 1, "mean")
            scores[:, evidence.n_tokens - evidence.n_window :] = np.inf
            return np.repeat(scores, evidence.layers[l].n_head_kv, axis=0)

        return map_layers(score, len(evidence.layers))
