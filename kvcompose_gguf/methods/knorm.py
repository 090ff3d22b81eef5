"""KNorm (arXiv 2406.11430): keeps keys with a small norm, because they get most attention."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..kernels.types import FloatArray
from ..scoring.evidence import Evidence
from .base import Method


@dataclass(frozen=True, kw_only=True)
class KNorm(Method):
    """Minus the L2 norm of the key, as in kvpress (knorm_press.py).

    kvpress and we differ from the authors' example, which leaves the first two layers whole (l2compress, README.md).
    Neither RoPE nor the Hadamard rotation of a quantized cache changes a norm.
    """

    @property
    def scores_alone(self) -> bool:
        return True

    def scores(self, evidence: Evidence) -> list[FloatArray]:
        """Returns the scores of each layer, float32 ``(n_head_kv, N)``, at most 0; reads one layer's keys at a time."""
        return [-np.linalg.norm(evidence.keys(l), axis=2) for l in range(len(evidence.layers))]
