"""A ridge regression of log(attention of the repeat) on ``features``; every repeated piece of text updates it.

Keeping its sums exactly would take the square of the number of features for every KV head, 200 MB for a model of 8B
parameters. So it keeps the weights, and how sure it is of them: the precision of the weights as a diagonal and ``RANK``
directions, 8 MB for such a model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ..kernels.types import FloatArray

#: number of directions in which the precision is kept
RANK = 16

#: smallest scale: features that hardly differ in the first prompt may do so in later ones, e.g. places near the end
MIN_SCALE = np.float32(1e-3)

#: ridge penalty per token, for features with variance 1
RIDGE = 5e-2

#: steps of the power iteration that finds the directions; it begins with those of the prompt before
N_POWER = 3


@dataclass(frozen=True, eq=False)
class Regression:
    """The regression of one layer. Features are standardized by ``mean`` and ``scale``, those of the first prompt.

    Attributes:
        mean, scale: float32 ``(n_head_kv, n_features)``; 0 and 1 for the constant, which is the last feature.
        weights: of standardized features, float32 ``(n_head_kv, n_features)``.
        diagonal, factors: precision of the weights, ``diag(diagonal) + factors @ factors.T``; float32
            ``(n_head_kv, n_features)`` and float16 ``(n_head_kv, n_features, RANK)``.
    """

    mean: FloatArray
    scale: FloatArray
    weights: FloatArray
    diagonal: FloatArray
    factors: npt.NDArray[np.float16]

    @classmethod
    def empty(cls, table: FloatArray) -> Regression:
        """Returns a regression that knows nothing, standardized for features ``(n_head_kv, n, n_features)``."""
        mean, scale = table.mean(axis=1, dtype=np.float64).astype(np.float32), table.std(axis=1)
        mean[:, -1], scale[:, -1] = 0, 1
        scale = np.maximum(scale, MIN_SCALE)
        nothing = np.zeros_like(mean)
        return cls(mean, scale, nothing, nothing, np.zeros((*mean.shape, RANK), np.float16))

    @property
    def plain_weights(self) -> FloatArray:
        """Returns the weights of features that are not standardized."""
        weights = self.weights / self.scale
        weights[:, -1] -= (weights * self.mean).sum(axis=1)
        return weights

    def standardized(self, table: FloatArray) -> FloatArray:
        """Returns features ``(n_head_kv, n, n_features)`` with the mean and scale of the first prompt."""
        out: FloatArray = (table - self.mean[:, None]) / self.scale[:, None]
        return out

    def moved(self, rows: FloatArray, target: FloatArray, n_before: float, keep: float) -> Regression:
        """Returns the regression after more tokens.

        Args:
            rows: standardized features ``(n_head_kv, n, n_features)``.
            target: ``(n_head_kv, n)``.
            n_before: number of tokens learnt before.
            keep: how much these count now, at most 1.
        """
        n_features = rows.shape[2]
        old, factors = np.float32(keep) * self.diagonal, np.float32(np.sqrt(keep)) * self.factors.astype(np.float32)
        # what was known counts as RANK more tokens
        known = np.concatenate([rows, factors.transpose(0, 2, 1)], axis=1)
        expected = np.concatenate([target, np.einsum("hfr,hf->hr", factors, self.weights)], axis=1)
        wanted = old * self.weights + np.einsum("hnf,hn->hf", known, expected)
        precision = known.transpose(0, 2, 1) @ known
        diagonal = np.einsum("hff->hf", precision)  # a view
        diagonal += old
        factors = _largest(precision, factors)
        rest = np.maximum(diagonal - np.square(factors).sum(axis=2), 0)
        penalty = np.full(n_features, RIDGE * (keep * n_before + rows.shape[1]), np.float32)
        penalty[-1] = 1e-6  # the constant is free
        diagonal += penalty
        weights = np.linalg.solve(precision, wanted[:, :, None])[:, :, 0]
        return replace(self, weights=weights, diagonal=rest, factors=factors.astype(np.float16))


def _largest(matrices: FloatArray, start: FloatArray) -> FloatArray:
    """Returns the ``RANK`` largest components of symmetric ``(n, f, f)``, as ``(n, f, RANK)`` times its transpose."""
    n_features, rank = matrices.shape[1], min(RANK, matrices.shape[1])
    basis = start[:, :, :rank] + np.random.default_rng(0).standard_normal((n_features, rank), np.float32)
    for _ in range(N_POWER):
        basis = np.linalg.qr(matrices @ basis).Q
    values, vectors = np.linalg.eigh(basis.transpose(0, 2, 1) @ matrices @ basis)
    out = np.zeros((len(matrices), n_features, RANK), np.float32)
    out[:, :, :rank] = basis @ (vectors * np.sqrt(np.maximum(values, 0))[:, None])
    return out
