"""KeyDiff (arXiv 2504.15364): keeps keys that differ from the others, because they get most attention."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from ..kernels.types import FloatArray
from ..scoring.evidence import Evidence
from .base import Method


@dataclass(frozen=True, kw_only=True)
class KeyDiff(Method):
    """Minus the cosine similarity of the key to the head's anchor, the mean of its normalised keys.

    The scores of a context that is read at once are those of kvpress (keydiff_press.py). While a context is read in
    parts, the anchor is the mean over all tokens so far, also those that were evicted. In the paper it is the mean over
    what is left, and all of that is scored again with every part; we score each token once. A Hadamard rotation, as in
    a quantized cache, changes no cosine.

    Attributes:
        sums: sums of the normalised keys of earlier parts, for each layer float32 ``(n_head_kv, n_embd_head_k)``;
            ``read_on`` makes them.
    """

    sums: tuple[FloatArray, ...] = field(default=(), repr=False, compare=False)

    @property
    def scores_alone(self) -> bool:
        return True

    def read_on(self, evidence: Evidence) -> KeyDiff:
        """Returns the method with the keys of these tokens in its ``sums``."""
        new = _sums(evidence)
        sums = [a + b for a, b in zip(self.sums, new, strict=True)] if self.sums else new
        return replace(self, sums=tuple(sums))

    def scores(self, evidence: Evidence) -> list[FloatArray]:
        """Returns the scores of each layer, float32 ``(n_head_kv, N)`` in [-1, 1]; reads one layer's keys at a time.

        The anchor is that of the tokens in ``sums``; if there are none, that of these tokens.
        """
        sums = self.sums or _sums(evidence)
        return [_scores(evidence.keys(l), sums[l]) for l in range(len(evidence.layers))]


def _sums(evidence: Evidence) -> list[FloatArray]:
    return [_normalised(evidence.keys(l)).sum(axis=1) for l in range(len(evidence.layers))]


def _scores(keys: FloatArray, anchor: FloatArray) -> FloatArray:
    anchor = anchor / np.maximum(np.linalg.norm(anchor, axis=1, keepdims=True), np.float32(1e-8))
    return -(_normalised(keys) @ anchor[:, :, None])[:, :, 0]


def _normalised(keys: FloatArray) -> FloatArray:
    out: FloatArray = keys / np.maximum(np.linalg.norm(keys, axis=2, keepdims=True), np.float32(1e-12))
    return out
