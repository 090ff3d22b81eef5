"""Random tokens: the baseline that every method must beat."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import ConfigError
from ..kernels.types import FloatArray
from ..scoring.evidence import Evidence
from .base import Method, check_integer


@dataclass(frozen=True, kw_only=True)
class RandomTokens(Method):
    """Every head of every layer keeps its own tokens, drawn uniformly (as in kvpress, random_press.py).

    Attributes:
        seed: equal seeds and shapes give equal plans.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("seed", self.seed)
        if self.seed < 0:
            raise ConfigError(f"seed={self.seed} is negative")

    def scores(self, evidence: Evidence) -> list[FloatArray]:
        """Returns noise, float32 ``(n_head_kv, N)`` in [0, 1) for each layer."""
        return [
            np.random.default_rng((self.seed, l)).random((layer.n_head_kv, evidence.n_tokens), dtype=np.float32)
            for l, layer in enumerate(evidence.layers)
        ]
