"""StreamingLLM (arXiv 2309.17453): keeps the first and the last tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..kernels.types import FloatArray
from ..scoring.evidence import Evidence
from .base import Method


@dataclass(frozen=True, kw_only=True)
class StreamingLLM(Method):
    """Keeps ``n_sink`` attention sinks and the last tokens; needs no attention.

    The tokens are those of kvpress (streaming_llm_press.py). Difference from the paper: it gives the kept tokens new
    positions without a gap; here keys keep their rotation.
    """

    n_sink: int = 4

    @property
    def scores_alone(self) -> bool:
        return True

    def scores(self, evidence: Evidence) -> list[FloatArray]:
        """Returns each token's position as its score, float32 ``(n_head_kv, N)``; ``plan`` keeps the sinks."""
        positions = np.arange(evidence.first, evidence.first + evidence.n_tokens, dtype=np.float32)
        return [np.tile(positions, (layer.n_head_kv, 1)) for layer in evidence.layers]
