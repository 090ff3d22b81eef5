"""Compares the orders of numbers."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def rank_correlation(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Returns Spearman's correlation over the last axis of arrays ``(..., n)``; equal values rank in index order.

    Returns:
        float64 ``(...)``; 1 for a single value.
    """
    n = a.shape[-1]
    if n == 1:
        return np.ones(a.shape[:-1])
    ranks = [np.argsort(np.argsort(x, axis=-1, kind="stable"), axis=-1) - (n - 1) / 2 for x in (a, b)]
    product: npt.NDArray[np.float64] = (ranks[0] * ranks[1]).sum(axis=-1)
    product /= n * (n * n - 1) / 12  # the ranks are 0 to n - 1, so their variance is known
    return product
