"""The upper bound of KVCompose: the same scores, but every head of every layer keeps its own number of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from ..errors import UnsupportedError
from ..kernels import aggregate
from ..kernels.types import FloatArray
from ..plan.rows import Rows
from ..plan.trial import Trial
from ..scoring.evidence import Evidence
from .kvcompose import KVCompose


@dataclass(frozen=True, kw_only=True)
class Unstructured(KVCompose):
    """Ranks all (layer, head, token) together. Plain tensors cannot hold such a cache, so masking simulates it.

    The reported bytes are those of a cache with separate rows per head.
    """

    @property
    def simulated(self) -> bool:
        return True

    def mask(self, evidence: Evidence, scores: Sequence[FloatArray] | None = None) -> list[npt.NDArray[np.bool_]]:
        """Returns which tokens every head keeps, for each layer ``(n_head_kv, N)``: the largest scores of all heads.

        Ties go to the lowest layer, head and index.
        """
        scores = self.scores(evidence) if scores is None else scores
        n_tokens = evidence.n_tokens
        n_rows = self.n_composites(evidence.layers, n_tokens)
        n_head_kv = evidence.layers[0].n_head_kv  # a composite is a row of this many heads
        n_sink, n_recent = self.forced(evidence.layers, n_tokens)
        positions = Rows.of_tokens(scores).positions
        forced = [
            aggregate.with_forced(s, p, n_sink, n_tokens - n_recent) for s, p in zip(scores, positions, strict=True)
        ]
        everything = np.concatenate([s.ravel() for s in forced])
        visible = np.zeros(everything.size, dtype=bool)
        visible[np.argsort(-everything, kind="stable")[: n_rows * n_head_kv]] = True
        ends = np.cumsum([s.size for s in forced])[:-1]
        return [part.reshape(s.shape) for part, s in zip(np.split(visible, ends), forced, strict=True)]

    def trial(self, evidence: Evidence, scores: Sequence[FloatArray] | None = None) -> Trial:
        """Returns a full cache in which biases hide the tokens that a head does not keep."""
        shown, hidden = np.float32(0), np.float32(-np.inf)
        return Trial(None, biases=[np.where(visible, shown, hidden) for visible in self.mask(evidence, scores)])

    def plan(self, evidence: Evidence, scores: Sequence[FloatArray] | None = None) -> NoReturn:
        raise UnsupportedError("the unstructured upper bound is only simulated: kvcompose eval --method unstructured")
