"""Evaluates a linear function of keys, values, their squares and their norms in one pass over a layer's rows."""

from __future__ import annotations

import numpy as np
from numba import njit

from .types import FloatArray, as_c


# sums may be reassociated, so that loops vectorise; NaN and infinity keep their meaning
@njit(cache=True, nogil=True, fastmath={"reassoc", "contract"})
def _weigh_rows(
    cached: FloatArray,
    plain: FloatArray,
    values: FloatArray,
    on_cached: FloatArray,
    on_plain: FloatArray,
    on_plain_squared: FloatArray,
    on_values: FloatArray,
    on_values_squared: FloatArray,
    on_norms: FloatArray,
    offsets: FloatArray,
) -> FloatArray:
    n_head_kv, n, d_k = cached.shape
    d_v = values.shape[2]
    out = np.empty((n_head_kv, n), dtype=np.float32)
    for h in range(n_head_kv):
        for i in range(n):
            total = offsets[h, i]
            squares = np.float32(0)
            for j in range(d_k):
                k = plain[h, i, j]
                total += cached[h, i, j] * on_cached[h, j] + k * (on_plain[h, j] + k * on_plain_squared[h, j])
                squares += k * k
            total += np.sqrt(squares) * on_norms[h, 0]
            squares = np.float32(0)
            for j in range(d_v):
                v = values[h, i, j]
                total += v * (on_values[h, j] + v * on_values_squared[h, j])
                squares += v * v
            norm = np.sqrt(squares)
            out[h, i] = total + norm * on_norms[h, 1] + np.log(norm + np.float32(1e-6)) * on_norms[h, 2]
    return out


def weigh_rows(
    cached: FloatArray,
    plain: FloatArray,
    values: FloatArray,
    on_cached: FloatArray,
    on_plain: FloatArray,
    on_plain_squared: FloatArray,
    on_values: FloatArray,
    on_values_squared: FloatArray,
    on_norms: FloatArray,
    offsets: FloatArray,
) -> FloatArray:
    """Returns weighted sums over the elements of every row; each KV head has its own weights.

    Args:
        cached: keys as cached, float32 ``(n_head_kv, n, d_k)``.
        plain: the same keys before their rotation.
        values: float32 ``(n_head_kv, n, d_v)``.
        on_cached, on_plain, on_plain_squared: weights float32 ``(n_head_kv, d_k)``.
        on_values, on_values_squared: weights float32 ``(n_head_kv, d_v)``.
        on_norms: weights float32 ``(n_head_kv, 3)`` of the plain key's norm, the value's norm, and its logarithm.
        offsets: float32 ``(n_head_kv, n)``, added.
    Returns:
        float32 ``(n_head_kv, n)``.
    """
    rows = {"cached": cached, "plain": plain, "values": values}
    weights = {
        "on_cached": on_cached, "on_plain": on_plain, "on_plain_squared": on_plain_squared, "on_values": on_values,
        "on_values_squared": on_values_squared, "on_norms": on_norms, "offsets": offsets,
    }  # fmt: skip
    # one memory layout, because numba compiles each layout separately
    return _weigh_rows(
        *(as_c(array, name, np.float32, 3) for name, array in rows.items()),
        *(as_c(array, name, np.float32, 2) for name, array in weights.items()),
    )
