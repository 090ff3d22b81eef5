"""Kernels from attention to composite scores (KVCompose, arXiv 2509.05165, steps 4 to 8)."""

from __future__ import annotations

import numpy as np
from numba import njit

from ..errors import ConfigError
from ..support.checks import check_odd
from .types import FloatArray, IntArray, LongArray, as_c


def _use_max(aggregation: str) -> bool:
    if aggregation not in ("max", "mean"):
        raise ConfigError(f"aggregation {aggregation!r} is neither 'max' nor 'mean'")
    return aggregation == "max"


@njit(cache=True, nogil=True)
def _aggregate_group(attention: FloatArray, n_head_kv: int, use_max: bool) -> FloatArray:
    n_head, n_tokens = attention.shape
    n_group = n_head // n_head_kv
    out = np.empty((n_head_kv, n_tokens), dtype=np.float32)
    for h in range(n_head_kv):
        for i in range(n_tokens):
            if use_max:
                best = attention[h * n_group, i]
                for g in range(1, n_group):
                    x = attention[h * n_group + g, i]
                    if x > best or x != x:  # as in np.max, NaN wins
                        best = x
                out[h, i] = best
            else:
                total = 0.0
                for g in range(n_group):
                    total += attention[h * n_group + g, i]
                out[h, i] = total / n_group
    return out


def aggregate_group(attention: FloatArray, n_head_kv: int, agg_group: str) -> FloatArray:
    """Aggregates attention over the query heads that share a KV head.

    Args:
        attention: float32 ``(n_head, N)``, one layer.
        agg_group: ``"mean"`` or ``"max"``.
    Returns:
        float32 ``(n_head_kv, N)``.
    """
    attention = as_c(attention, "attention", np.float32, 2)
    if attention.shape[0] % n_head_kv:
        raise ConfigError(f"{attention.shape[0]} query heads cannot share {n_head_kv} KV heads evenly")
    return _aggregate_group(attention, n_head_kv, _use_max(agg_group))


@njit(cache=True, nogil=True)
def _add_mean_across_heads(scores: FloatArray) -> FloatArray:
    n_head_kv, n_tokens = scores.shape
    out = np.empty_like(scores)
    for i in range(n_tokens):
        total = 0.0
        for h in range(n_head_kv):
            total += scores[h, i]
        mean = total / n_head_kv
        for h in range(n_head_kv):
            out[h, i] = scores[h, i] + mean
    return out


def add_mean_across_heads(scores: FloatArray) -> FloatArray:
    """Returns ``scores`` float32 ``(n_head_kv, N)`` plus their mean over the layer's KV heads (step 5)."""
    return _add_mean_across_heads(as_c(scores, "scores", np.float32, 2))


@njit(cache=True, nogil=True)
def _rank_tokens(scores: FloatArray) -> IntArray:
    n_head_kv, n_tokens = scores.shape
    out = np.empty((n_head_kv, n_tokens), dtype=np.int32)
    for h in range(n_head_kv):
        out[h, :] = np.argsort(-scores[h], kind="mergesort")  # a stable sort: among equals the lowest index comes first
    return out


def rank_tokens(scores: FloatArray) -> IntArray:
    """Returns each head's tokens by descending score, ties by index: int32 ``(n_head_kv, N)`` (step 6)."""
    return _rank_tokens(as_c(scores, "scores", np.float32, 2))


@njit(cache=True, nogil=True)
def _composite_scores(scores: FloatArray, ranking: IntArray, use_max: bool) -> FloatArray:
    n_head_kv, n_tokens = scores.shape
    out = np.empty(n_tokens, dtype=np.float32)
    for j in range(n_tokens):
        best = scores[0, ranking[0, j]]
        total = 0.0
        for h in range(n_head_kv):
            s = scores[h, ranking[h, j]]
            total += s
            if s > best or s != s:  # as in np.max, NaN wins
                best = s
        out[j] = best if use_max else total / n_head_kv
    return out


def composite_scores(scores: FloatArray, ranking: IntArray, agg_head: str) -> FloatArray:
    """Scores composite token j by agg_head over the heads' j-th largest scores; float32 ``(N,)``, descending."""
    return _composite_scores(
        as_c(scores, "scores", np.float32, 2), as_c(ranking, "ranking", np.int32, 2), _use_max(agg_head)
    )


@njit(cache=True, nogil=True)
def _allocate_budget(composites: FloatArray, n_total: int, floor: int) -> LongArray:
    n_layer, n_tokens = composites.shape
    n_kept = np.full(n_layer, floor, dtype=np.int64)
    n_rest = n_total - n_layer * floor
    if n_rest == 0:
        return n_kept
    rest = composites[:, floor:].copy().ravel()
    threshold = np.partition(rest, rest.size - n_rest)[rest.size - n_rest]
    # scores descend within a layer, so those above the threshold form a prefix
    for l in range(n_layer):
        while n_kept[l] < n_tokens and composites[l, n_kept[l]] > threshold:
            n_kept[l] += 1
            n_rest -= 1
    for l in range(n_layer):
        while n_rest > 0 and n_kept[l] < n_tokens and composites[l, n_kept[l]] == threshold:
            n_kept[l] += 1
            n_rest -= 1
    return n_kept


def allocate_budget(composites: FloatArray, n_total: int, floor: int = 0) -> LongArray:
    """Divides the budget among layers by one ranking of all composites (steps 7 and 8).

    Args:
        composites: float32 ``(n_layer, N)``, descending within each layer.
        n_total: composites to keep over all layers.
        floor: number of first ranks in every layer that are kept before all others (keep_token_lower_bound).
    Returns:
        composites to keep in each layer, int64 ``(n_layer,)`` with sum ``n_total``. Ties go to the lowest layer.
    Raises:
        ConfigError: ``n_total`` exceeds the number of composites, or is below the sum of the floors.
    """
    composites = as_c(composites, "composites", np.float32, 2)
    n_layer, n_tokens = composites.shape
    if not 0 <= floor <= n_tokens or not n_layer * floor <= n_total <= n_layer * n_tokens:
        raise ConfigError(
            f"{n_total} composites cannot be kept: {n_layer} layers of {n_tokens} tokens, at least {floor} in each"
        )
    return _allocate_budget(composites, n_total, floor)


@njit(cache=True, nogil=True)
def _select_rows(ranking: IntArray, n_kept: int) -> IntArray:
    n_head_kv = ranking.shape[0]
    out = np.empty((n_head_kv, n_kept), dtype=np.int32)
    for h in range(n_head_kv):
        out[h, :] = np.sort(ranking[h, :n_kept])
    return out


def select_rows(ranking: IntArray, n_kept: int) -> IntArray:
    """Returns each head's ``n_kept`` best tokens in position order: int32 ``(n_head_kv, n_kept)`` (step 9)."""
    ranking = as_c(ranking, "ranking", np.int32, 2)
    if not 0 <= n_kept <= ranking.shape[1]:
        raise ConfigError(f"n_kept={n_kept} is not in 0 to {ranking.shape[1]}, the number of tokens")
    return _select_rows(ranking, n_kept)


@njit(cache=True, nogil=True)
def _pool_tokens(scores: FloatArray, kernel: int, use_max: bool) -> FloatArray:
    n_row, n_tokens = scores.shape
    out = np.empty_like(scores)
    for row in range(n_row):
        for i in range(n_tokens):
            first = max(0, i - kernel // 2)
            best = scores[row, first]
            total = 0.0
            for j in range(first, min(n_tokens, i + kernel // 2 + 1)):
                x = scores[row, j]
                total += x
                if x > best or x != x:  # as in np.max, NaN wins
                    best = x
            out[row, i] = best if use_max else total / kernel
    return out


def pool_tokens(scores: FloatArray, kernel: int, kind: str) -> FloatArray:
    """Pools every token's score with its ``kernel // 2`` neighbours on either side.

    Beyond both ends ``"mean"`` counts zeros, like the padding of torch's avg_pool1d, and ``"max"`` ignores the
    positions.

    Args:
        scores: float32 ``(n_row, n_tokens)``; a row is a head.
        kernel: an odd number.
        kind: ``"mean"`` or ``"max"``.
    Returns:
        float32 of the same shape.
    """
    check_odd("kernel", kernel)
    return _pool_tokens(as_c(scores, "scores", np.float32, 2), kernel, _use_max(kind))


def with_forced(scores: FloatArray, positions: IntArray, n_sink: int, end: int) -> FloatArray:
    """Returns ``scores`` ``(n_head_kv, n)``, infinite only for tokens before ``n_sink`` and from ``end`` on."""
    forced = (positions < n_sink) | (positions >= end)
    if not forced.any():
        return scores
    out: FloatArray = np.minimum(scores, np.finfo(np.float32).max)
    out[forced] = np.inf
    return out
