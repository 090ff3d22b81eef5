"""Specifies every kernel in plain numpy. Ties between tokens go to the lowest index, and ties between composites to
the lowest layer."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .types import FloatArray, IntArray, LongArray


def aggregate_group(attention: FloatArray, n_head_kv: int, agg_group: str) -> FloatArray:
    n_head, n_tokens = attention.shape
    grouped = attention.reshape(n_head_kv, n_head // n_head_kv, n_tokens)
    if agg_group == "max":
        return grouped.max(axis=1)
    return grouped.astype(np.float64).mean(axis=1).astype(np.float32)


def add_mean_across_heads(scores: FloatArray) -> FloatArray:
    return (scores + scores.astype(np.float64).mean(axis=0)).astype(np.float32)


def rank_tokens(scores: FloatArray) -> IntArray:
    return np.argsort(-scores, axis=1, kind="stable").astype(np.int32)


def composite_scores(scores: FloatArray, ranking: IntArray, agg_head: str) -> FloatArray:
    ranked = np.take_along_axis(scores, ranking, axis=1)
    if agg_head == "max":
        return ranked.max(axis=0)
    return ranked.astype(np.float64).mean(axis=0).astype(np.float32)


def allocate_budget(composites: FloatArray, n_total: int, floor: int) -> LongArray:
    n_layer, n_tokens = composites.shape
    n_kept = np.full(n_layer, floor, dtype=np.int64)
    rest = composites[:, floor:]
    order = np.argsort(-rest, axis=None, kind="stable")[: n_total - n_layer * floor]
    n_kept += np.bincount(order // max(1, n_tokens - floor), minlength=n_layer)
    return n_kept


def select_rows(ranking: IntArray, n_kept: int) -> IntArray:
    return np.sort(ranking[:, :n_kept], axis=1)


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
    k_norms, v_norms = (np.linalg.norm(rows.astype(np.float64), axis=2) for rows in (plain, values))
    norms = np.stack([k_norms, v_norms, np.log(v_norms + 1e-6)], axis=2)
    pairs = (
        (cached, on_cached), (plain, on_plain), (np.square(plain.astype(np.float64)), on_plain_squared),
        (values, on_values), (np.square(values.astype(np.float64)), on_values_squared), (norms, on_norms),
    )  # fmt: skip
    total = offsets + sum(np.einsum("hnd,hd->hn", rows.astype(np.float64), weights) for rows, weights in pairs)
    return total.astype(np.float32)


def gather(
    src: npt.NDArray[np.uint8],
    dst: npt.NDArray[np.uint8],
    rows: IntArray,
    n_chunk: int,
    n_bytes: int,
    src_strides: tuple[int, int, int],
    dst_strides: tuple[int, int, int],
) -> None:
    """Copies rows between flat arrays; strides are (row, head, chunk) in bytes, as in llama-kvc.h."""
    n_head, n_kept = rows.shape
    for h in range(n_head):
        for c in range(n_chunk):
            for j in range(n_kept):
                to = j * dst_strides[0] + h * dst_strides[1] + c * dst_strides[2]
                from_ = int(rows[h, j]) * src_strides[0] + h * src_strides[1] + c * src_strides[2]
                dst[to : to + n_bytes] = src[from_ : from_ + n_bytes]


def pool_tokens(scores: FloatArray, kernel: int, kind: str) -> FloatArray:
    n_tokens, n_side = scores.shape[1], kernel // 2
    beyond = -np.inf if kind == "max" else 0.0
    padded = np.pad(scores.astype(np.float64), ((0, 0), (n_side, n_side)), constant_values=beyond)
    neighbours = [padded[:, j : j + n_tokens] for j in range(kernel)]
    pooled = np.max(neighbours, axis=0) if kind == "max" else sum(neighbours) / kernel
    return np.asarray(pooled, dtype=np.float32)
