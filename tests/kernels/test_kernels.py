"""Compares every kernel with its numpy twin in kernels/reference.py, which is the specification."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from support.arrays import assert_same

from kvcompose_gguf.errors import ConfigError
from kvcompose_gguf.kernels import aggregate, linear, reference

INF = np.float32(np.inf)


def _cases() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(2509)
    random = rng.random((8, 37), dtype=np.float32)
    minus_inf = random.copy()
    minus_inf[rng.random(random.shape) < 0.3] = -INF
    plus_inf = random.copy()
    plus_inf[rng.random(random.shape) < 0.3] = INF
    both_inf = random.copy()
    both_inf[:, :5] = INF
    both_inf[:, 9:14] = -INF
    return {
        "random": random,
        "ties everywhere": rng.integers(0, 3, (8, 37)).astype(np.float32),
        "two tokens": rng.random((8, 2), dtype=np.float32),
        "one token": rng.random((8, 1), dtype=np.float32),
        "one head": rng.random((1, 37), dtype=np.float32),
        "one token of one head": rng.random((1, 1), dtype=np.float32),
        "all equal": np.full((8, 37), 0.1, np.float32),
        "zero scores": np.zeros((8, 37), np.float32),
        "negative": rng.standard_normal((8, 37)).astype(np.float32),
        "tiny": random * np.float32(1e-44),
        "some -inf": minus_inf,
        "some +inf": plus_inf,
        "tokens of -inf and of +inf": both_inf,
        "all -inf": np.full((8, 37), -INF, np.float32),
        "all +inf": np.full((8, 37), INF, np.float32),
        "three heads": rng.random((3, 37), dtype=np.float32),
        "not contiguous": np.asfortranarray(random),
        "every second token": random[:, ::2],
    }


CASES = _cases()
each_case = pytest.mark.parametrize("case", CASES)


def falling(scores: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.sort(scores, axis=1)[:, ::-1])


#
# aggregation and ranking
#


@each_case
@pytest.mark.parametrize("agg_group", ["mean", "max"])
def test_aggregate_group_equals_its_twin_for_every_number_of_kv_heads(case: str, agg_group: str) -> None:
    attention = CASES[case]
    n_head = attention.shape[0]
    for n_head_kv in (n for n in range(1, n_head + 1) if n_head % n == 0):
        with np.errstate(invalid="ignore"):
            twin = reference.aggregate_group(attention, n_head_kv, agg_group)
        assert twin.shape == (n_head_kv, attention.shape[1])
        assert_same(aggregate.aggregate_group(attention, n_head_kv, agg_group), twin)


def test_aggregate_group_takes_neighbouring_query_heads_together() -> None:
    attention = np.array([[0.0], [1.0], [4.0], [8.0]], np.float32)
    np.testing.assert_array_equal(aggregate.aggregate_group(attention, 2, "mean"), [[0.5], [6.0]])
    np.testing.assert_array_equal(aggregate.aggregate_group(attention, 2, "max"), [[1.0], [8.0]])


@pytest.mark.parametrize(
    ("agg_group", "position"),
    [
        ("mean", 0),
        ("mean", 2),
        ("max", 0),
        ("max", 1),
        ("max", 2),
    ],
)
def test_aggregate_group_passes_nan_on_as_its_twin_does(agg_group: str, position: int) -> None:
    attention = np.ones((3, 4), np.float32)
    attention[position, 2] = np.nan
    twin = reference.aggregate_group(attention, 1, agg_group)
    assert np.isnan(twin[0, 2])
    assert_same(aggregate.aggregate_group(attention, 1, agg_group), twin)


def test_query_heads_that_do_not_divide_evenly_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"3 query heads.*2 KV heads"):
        aggregate.aggregate_group(np.ones((3, 4), np.float32), 2, "mean")


@each_case
def test_add_mean_across_heads_equals_its_twin(case: str) -> None:
    scores = CASES[case]
    before = scores.copy()
    with np.errstate(invalid="ignore"):
        twin = reference.add_mean_across_heads(scores)
    assert_same(aggregate.add_mean_across_heads(scores), twin)
    np.testing.assert_array_equal(scores, before, "the argument was changed")


@each_case
def test_rank_tokens_equals_its_twin(case: str) -> None:
    scores = CASES[case]
    assert_same(aggregate.rank_tokens(scores), reference.rank_tokens(scores))


@each_case
def test_ranking_falls_and_ties_go_to_the_lowest_token_index(case: str) -> None:
    scores = CASES[case]
    ranking = aggregate.rank_tokens(scores)
    for head, order in zip(scores, ranking, strict=True):
        assert sorted(order) == list(range(len(head)))
        for a, b in itertools.pairwise(order):
            assert head[a] > head[b] or (head[a] == head[b] and a < b)


@each_case
@pytest.mark.parametrize("agg_head", ["mean", "max"])
def test_composite_scores_equal_their_twin_and_fall(case: str, agg_head: str) -> None:
    scores = CASES[case]
    ranking = reference.rank_tokens(scores)
    with np.errstate(invalid="ignore"):
        twin = reference.composite_scores(scores, ranking, agg_head)
    kernel = aggregate.composite_scores(scores, ranking, agg_head)
    assert_same(kernel, twin)
    known = kernel[~np.isnan(kernel)]  # heads of +inf and of -inf at one rank have no mean
    assert (known[1:] <= known[:-1]).all()


@pytest.mark.parametrize(("agg_head", "head"), [("mean", 0), ("mean", 1), ("max", 0), ("max", 1)])
def test_composite_scores_pass_nan_on_as_their_twin_does(agg_head: str, head: int) -> None:
    scores = np.ones((2, 4), np.float32)
    scores[head, 2] = np.nan
    ranking = reference.rank_tokens(scores)
    twin = reference.composite_scores(scores, ranking, agg_head)
    assert np.isnan(twin).any()
    assert_same(aggregate.composite_scores(scores, ranking, agg_head), twin)


@each_case
def test_select_rows_equals_its_twin_for_every_count(case: str) -> None:
    ranking = reference.rank_tokens(CASES[case])
    for n_kept in range(ranking.shape[1] + 1):
        twin = reference.select_rows(ranking, n_kept)
        assert twin.shape == (ranking.shape[0], n_kept)
        assert_same(aggregate.select_rows(ranking, n_kept), twin)


#
# budget
#


@each_case
def test_allocate_budget_equals_its_twin_for_every_total_and_floor(case: str) -> None:
    composites = falling(CASES[case])
    n_layer, n_tokens = composites.shape
    for floor in sorted({0, 1, n_tokens // 2, n_tokens}):
        totals = range(n_layer * floor, n_layer * n_tokens + 1)
        kernel = np.stack([aggregate.allocate_budget(composites, n_total, floor) for n_total in totals])
        assert_same(kernel, np.stack([reference.allocate_budget(composites, n_total, floor) for n_total in totals]))


def test_budget_ties_go_to_the_lowest_layer() -> None:
    composites = np.ones((3, 4), np.float32)
    np.testing.assert_array_equal(aggregate.allocate_budget(composites, 6), [4, 2, 0])
    np.testing.assert_array_equal(aggregate.allocate_budget(composites, 6, 1), [4, 1, 1])


@pytest.mark.parametrize(
    ("n_total", "floor"), [(-1, 0), (13, 0), (5, 2), (12, 5), (0, -1), (12, -1)], ids=lambda value: str(value)
)
def test_totals_outside_of_what_the_layers_allow_are_refused(n_total: int, floor: int) -> None:
    with pytest.raises(ConfigError, match="cannot be kept"):
        aggregate.allocate_budget(np.ones((3, 4), np.float32), n_total, floor)


#
# what the wrappers refuse
#

FLOATS = np.ones((2, 3), np.float32)
INTS = np.zeros((2, 3), np.int32)
WRAPPERS: dict[str, tuple[Callable[..., Any], np.ndarray]] = {
    "attention": (lambda array: aggregate.aggregate_group(array, 1, "mean"), FLOATS),
    "scores of add_mean_across_heads": (aggregate.add_mean_across_heads, FLOATS),
    "scores of rank_tokens": (aggregate.rank_tokens, FLOATS),
    "scores of composite_scores": (lambda array: aggregate.composite_scores(array, INTS, "mean"), FLOATS),
    "ranking of composite_scores": (lambda array: aggregate.composite_scores(FLOATS, array, "mean"), INTS),
    "composites": (lambda array: aggregate.allocate_budget(array, 1), FLOATS),
    "ranking of select_rows": (lambda array: aggregate.select_rows(array, 1), INTS),
    "scores of pool_tokens": (lambda array: aggregate.pool_tokens(array, 3, "mean"), FLOATS),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_arrays_of_another_dtype_or_rank_are_refused_by_name(name: str) -> None:
    function, good = WRAPPERS[name]
    function(good)
    argument = name.split()[0]
    for bad in (good.astype(np.float64), good.astype(np.int64), good.astype(np.float16), good[0], good[None]):
        with pytest.raises(ConfigError, match=f"^{argument} is {bad.dtype} with {bad.ndim} axes"):
            function(bad)


#
# pooling
#


@each_case
@pytest.mark.parametrize("kernel", [1, 3, 5, 99])
@pytest.mark.parametrize("kind", ["mean", "max"])
def test_pool_tokens_equals_its_twin(case: str, kernel: int, kind: str) -> None:
    scores = CASES[case]
    before = scores.copy()
    with np.errstate(invalid="ignore"):
        twin = reference.pool_tokens(scores, kernel, kind)
    assert_same(aggregate.pool_tokens(scores, kernel, kind), twin)
    np.testing.assert_array_equal(scores, before, "the argument was changed")


@pytest.mark.parametrize("kind", ["mean", "max"])
def test_pool_tokens_passes_nan_on_as_its_twin_does(kind: str) -> None:
    scores = np.ones((2, 9), np.float32)
    scores[0, 4] = scores[1, 0] = scores[1, 1] = np.nan
    twin = reference.pool_tokens(scores, 3, kind)
    assert np.isnan(twin).sum() == 6
    assert_same(aggregate.pool_tokens(scores, 3, kind), twin)


def test_pool_tokens_counts_zeros_beyond_the_ends_or_nothing() -> None:
    scores = np.full((1, 4), -3, np.float32)
    np.testing.assert_array_equal(aggregate.pool_tokens(scores, 3, "mean"), [[-2, -3, -3, -2]])
    np.testing.assert_array_equal(aggregate.pool_tokens(scores, 3, "max"), scores)


def test_no_tokens_pool_to_none() -> None:
    for kind in ("mean", "max"):
        assert aggregate.pool_tokens(np.empty((2, 0), np.float32), 5, kind).shape == (2, 0)


@pytest.mark.parametrize("kernel", [0, -1, 4])
def test_pooling_needs_an_odd_kernel(kernel: int) -> None:
    with pytest.raises(ConfigError, match=f"kernel={kernel} is not (odd|positive)"):
        aggregate.pool_tokens(FLOATS, kernel, "mean")


def row_arguments(n_head_kv: int, n: int, d_k: int, d_v: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng((n_head_kv, n, d_k, d_v))
    keys, values, on_keys, on_values = (n_head_kv, n, d_k), (n_head_kv, n, d_v), (n_head_kv, d_k), (n_head_kv, d_v)
    shapes = {
        "cached": keys, "plain": keys, "values": values, "on_cached": on_keys, "on_plain": on_keys,
        "on_plain_squared": on_keys, "on_values": on_values, "on_values_squared": on_values,
        "on_norms": (n_head_kv, 3), "offsets": (n_head_kv, n),
    }  # fmt: skip
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize("shape", [(1, 1, 2, 2), (3, 50, 64, 64), (2, 7, 6, 10), (1, 9, 1, 3), (2, 0, 4, 4)], ids=str)
def test_weigh_rows_is_as_its_twin(shape: tuple[int, int, int, int]) -> None:
    arguments = row_arguments(*shape)
    kernel, twin = linear.weigh_rows(**arguments), reference.weigh_rows(**arguments)
    assert kernel.dtype == twin.dtype == np.float32
    assert kernel.shape == twin.shape == shape[:2]
    np.testing.assert_allclose(kernel, twin, rtol=1e-5, atol=1e-4)
    if not twin.size:
        return
    for name in arguments:  # nothing is left out
        changed = linear.weigh_rows(**(arguments | {name: arguments[name] + np.float32(0.5)}))
        assert not np.isclose(changed, twin, rtol=1e-4, atol=1e-3).all(), name


def test_weigh_rows_compiles_one_version_for_whatever_layout() -> None:
    arguments = row_arguments(3, 20, 8, 8)
    want = linear.weigh_rows(**arguments)
    n_versions = len(linear._weigh_rows.signatures)
    slices = {name: np.repeat(array, 2, axis=-1)[..., ::2] for name, array in arguments.items()}
    np.testing.assert_array_equal(linear.weigh_rows(**slices), want)
    assert len(linear._weigh_rows.signatures) == n_versions


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weigh_rows_shows_a_row_that_is_not_finite_and_changes_no_other(bad: float) -> None:
    arguments = row_arguments(2, 9, 4, 4)
    want = linear.weigh_rows(**arguments)
    arguments["values"][1, 3, 2] = bad
    got = linear.weigh_rows(**arguments)
    assert not np.isfinite(got[1, 3])
    got[1, 3] = want[1, 3]
    np.testing.assert_array_equal(got, want)
