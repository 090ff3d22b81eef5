"""KeyDiff (arXiv 2504.15364): keys that differ from the others are attended to most."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..kernels.types import FloatArray
from ..queries import Evidence
from .base import Method


@dataclass(frozen=True, kw_only=True)
class KeyDiff(Method):
    """Minus the cosine similarity of the key to the head's anchor, the mean of its normalised keys.

    The scores are those of kvpress (keydiff_press.py). Where we differ from the paper, as kvpress does: it compresses
    block by block while the prompt is read, here all keys of the context are judged at once. A Hadamard rotation, as
    in a quantized cache, changes no cosine.
    """

    def scores(self, evidence: Evidence) -> list[FloatArray]:
        """For each layer float32 ``(n_head_kv, N)`` in [-1, 1]; one layer's keys are read at a time."""
        return [_scores(evidence.read("keys", l)) for l in range(len(evidence.layers))]


def _scores(keys: FloatArray) -> FloatArray:
    inverse = 1 / np.maximum(np.linalg.norm(keys, axis=2), np.float32(1e-12))  # (n_head_kv, N); 1e-12 as F.normalize
    anchor = inverse[:, None, :] @ keys / np.float32(keys.shape[1])  # (n_head_kv, 1, n_embd_head_k)
    anchor /= np.maximum(np.linalg.norm(anchor, axis=2, keepdims=True), np.float32(1e-8))  # as F.cosine_similarity
    cosine = (keys @ anchor.swapaxes(1, 2))[:, :, 0] * inverse
    return -cosine
