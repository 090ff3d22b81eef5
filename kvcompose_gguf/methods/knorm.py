"""KNorm (arXiv 2406.11430): keys of a small norm are attended to most."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..kernels.types import FloatArray
from ..queries import Evidence
from .base import Method


@dataclass(frozen=True, kw_only=True)
class KNorm(Method):
    """Minus the L2 norm of the key, as kvpress has it (knorm_press.py).

    Where we differ, as kvpress does: the authors' code leaves the first two layers whole in its example (l2compress,
    README.md). Neither RoPE nor the Hadamard rotation of a quantized cache changes a norm.
    """

    def scores(self, evidence: Evidence) -> list[FloatArray]:
        """For each layer float32 ``(n_head_kv, N)``, at most 0; one layer's keys are read at a time."""
        return [-np.linalg.norm(evidence.read("keys", l), axis=2) for l in range(len(evidence.layers))]
