"""KeyDiff (arXiv 2504.15364): keeps keys that differ from the others, because they get most attention."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..kernels.types import FloatArray
from ..scoring.evidence import Evidence
from .base import Method


@dataclass(frozen=True, kw_only=True)
class KeyDiff(Method):
    """Minus the cosine similarity of the key to the head's anchor, the mean of its normalised keys.

    The scores are those of kvpress (keydiff_press.py). kvpress and we differ from the paper: it compresses block by
    block while it reads the prompt; we score all keys of the context at once. A Hadamard rotation, as in a quantized
    cache, changes no cosine.
    """

    def scores(self, evidence: Evidence) -> list[FloatArray]:
        """Returns the scores of each layer, float32 ``(n_head_kv, N)`` in [-1, 1]; reads one layer's keys at a time."""
        return [_scores(evidence.keys(l)) for l in range(len(evidence.layers))]


def _scores(keys: FloatArray) -> FloatArray:
    inverse = 1 / np.maximum(np.linalg.norm(keys, axis=2), np.float32(1e-12))  # (n_head_kv, N); 1e-12 as F.normalize
    anchor = inverse[:, None, :] @ keys / np.float32(keys.shape[1])  # (n_head_kv, 1, n_embd_head_k)
    anchor /= np.maximum(np.linalg.norm(anchor, axis=2, keepdims=True), np.float32(1e-8))  # as F.cosine_similarity
    cosine = (keys @ anchor.swapaxes(1, 2))[:, :, 0] * inverse
    return -cosine
