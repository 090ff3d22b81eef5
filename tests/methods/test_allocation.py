"""Compares every allocation with its rule, written as plain loops."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcompose_gguf import ConfigError
from kvcompose_gguf.kernels import aggregate
from kvcompose_gguf.methods.allocation import Allocation, GlobalRanking, Pyramid, Ranked, Uniform


def ranked(scores: Sequence[np.ndarray]) -> Ranked:
    return Ranked(scores, [aggregate.rank_tokens(s) for s in scores])


def equal(n_layer: int, n_tokens: int) -> Ranked:
    return ranked([np.ones((1, n_tokens), np.float32)] * n_layer)


def specified_pyramid(n_layer: int, n_tokens: int, n_total: int, floor: int, window: int, beta: float) -> list[int]:
    """KVCache-Factory's PyramidKVCluster.update_kv, with max_capacity_prompt = n_total / n_layer and exact fractions."""
    capacity = Fraction(n_total, n_layer)
    reserved = min(Fraction(window + floor), capacity)
    min_num = (capacity - reserved) / Fraction(beta)
    max_num = (capacity - reserved) * 2 - min_num
    if max_num >= n_tokens - reserved:
        max_num = n_tokens - reserved
        min_num = (capacity - reserved) * 2 - max_num
    if n_layer == 1:
        max_num = capacity - reserved
    exact = [reserved + max_num - l * (max_num - min_num) / max(1, n_layer - 1) for l in range(n_layer)]
    budgets = [x.numerator // x.denominator for x in exact]
    for l in range(n_layer):
        if sum(budgets) < n_total and budgets[l] < n_tokens:
            budgets[l] += 1
    return budgets


def specified_ranking(
    scores: Sequence[np.ndarray],
    n_total: int,
    floor: int,
    agg_head: str,
    lower_bound: int,
    first_layer_rule: bool,
    threshold: float = -np.inf,
) -> list[int]:
    n_tokens = scores[0].shape[1]
    composites = []
    for layer in scores:
        heads = [sorted((float(x) for x in head), reverse=True) for head in layer]
        columns = list(zip(*heads, strict=True))
        composites.append([max(column) if agg_head == "max" else sum(column) / len(column) for column in columns])
    if first_layer_rule:
        composites[0] = [max(layer[j] for layer in composites) for j in range(n_tokens)]
    floor = max(floor, min(lower_bound, n_tokens))
    places = [(j >= floor, -composites[l][j], l, j) for l in range(len(scores)) for j in range(n_tokens)]
    best, *others = sorted(places)[: max(1, n_total)]
    winners = [best, *(winner for winner in others if not winner[0] or -winner[1] >= threshold)][:n_total]
    return [sum(winner[2] == l for winner in winners) for l in range(len(scores))]


#
# uniform
#


@pytest.mark.parametrize(
    ("n_total", "budgets"), [(3, [1, 1, 1]), (4, [2, 1, 1]), (11, [4, 4, 3]), (30, [10, 10, 10]), (0, [0, 0, 0])]
)
def test_uniform_gives_the_remainder_to_the_first_layers(n_total: int, budgets: list[int]) -> None:
    n_kept = Uniform().n_kept(equal(3, 10), n_total, 0)
    assert n_kept.tolist() == budgets
    assert n_kept.dtype == np.int64


#
# one ranking of all layers
#


@pytest.mark.parametrize("kind", ["continuous", "ties", "all equal"])
@pytest.mark.parametrize("agg_head", ["mean", "max"])
@pytest.mark.parametrize("first_layer_rule", [False, True])
def test_the_global_ranking_is_the_specified_one(kind: str, agg_head: str, first_layer_rule: bool) -> None:
    rng = np.random.default_rng(5165)
    n_heads, n_tokens = (4, 2, 1), 13
    scores: list[np.ndarray] = [rng.random((n, n_tokens), dtype=np.float32) ** (l + 1) for l, n in enumerate(n_heads)]
    if kind == "ties":
        scores = [rng.integers(0, 4, (n, n_tokens)).astype(np.float32) / 4 for n in n_heads]
    if kind == "all equal":
        scores = [np.full((n, n_tokens), 0.5, np.float32) for n in n_heads]
    for floor, lower_bound in ((0, 0), (2, 0), (0, 3), (3, 2), (2, 99)):
        allocation = GlobalRanking(agg_head, lower_bound, first_layer_rule)
        for n_total in range(3 * max(floor, min(lower_bound, n_tokens)), 3 * n_tokens + 1):
            expected = specified_ranking(scores, n_total, floor, agg_head, lower_bound, first_layer_rule)
            assert allocation.n_kept(ranked(scores), n_total, floor).tolist() == expected, (n_total, floor)


@pytest.mark.parametrize("agg_head", ["mean", "max"])
@pytest.mark.parametrize("floor", [0, 2])
@pytest.mark.parametrize("threshold", [0.0, 0.25, 0.5, 1.0, 2.0])
def test_a_threshold_evicts_what_is_below_it_although_the_budget_has_room(
    agg_head: str, floor: int, threshold: float
) -> None:
    rng = np.random.default_rng(2508)
    scores: list[np.ndarray] = [rng.integers(0, 9, (n, 13)).astype(np.float32) / 8 for n in (4, 2, 1)]
    ragged = ranked([scores[0], scores[1][:, :5], scores[2]])  # as the layers of a composed cache
    n_above = [int(np.count_nonzero(row >= threshold)) for row in ragged.composites(agg_head)]
    n_kept = GlobalRanking(agg_head, threshold=threshold).n_kept(ragged, 31, floor).tolist()
    assert n_kept == [max(floor, n) for n in n_above] or (sum(n_above) == floor == 0 and sum(n_kept) == 1)
    allocation, sums = GlobalRanking(agg_head, threshold=threshold), set()
    for n_total in range(max(1, 3 * floor), 40):
        expected = specified_ranking(scores, n_total, floor, agg_head, 0, False, threshold)
        assert allocation.n_kept(ranked(scores), n_total, floor).tolist() == expected, n_total
        sums.add(sum(expected))
    assert (max(sums) < 39) == (threshold > 0)


def test_infinite_scores_win_in_every_layer() -> None:
    scores = [np.full((2, 8), value, np.float32) for value in (1.0, 0.1)]
    for layer in scores:
        layer[:, -3:] = np.inf
    assert GlobalRanking().n_kept(ranked(scores), 6, 0).tolist() == [3, 3]
    assert GlobalRanking().n_kept(ranked(scores), 8, 0).tolist() == [5, 3]


#
# pyramid
#


@settings(deadline=None, derandomize=True, max_examples=200)
@given(st.data())
def test_pyramid_budgets_are_the_specified_ones(data: st.DataObject) -> None:
    n_layer, n_tokens = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 500))
    floor = data.draw(st.integers(0, min(8, n_tokens)))
    n_total = data.draw(st.integers(n_layer * floor, n_layer * n_tokens))
    window, beta = data.draw(st.integers(0, 80)), data.draw(st.one_of(st.integers(1, 40), st.floats(1, 1e9)))

    n_kept = Pyramid(window, beta).n_kept(equal(n_layer, n_tokens), n_total, floor)
    assert n_kept.tolist() == specified_pyramid(n_layer, n_tokens, n_total, floor, window, beta)
    assert n_kept.dtype == np.int64
    assert n_kept.sum() == n_total
    assert n_kept.min() >= floor
    assert n_kept.max() <= n_tokens
    assert (np.diff(n_kept) <= 0).all()
    assert n_kept.min() >= min(floor + window, n_total // n_layer)


def test_the_last_layer_of_a_pyramid_has_a_beta_th_of_the_average_behind_the_window() -> None:
    n_kept = Pyramid(64, 20).n_kept(equal(5, 4096), 5 * (64 + 400), 0)
    assert (n_kept - 64).tolist() == [780, 590, 400, 210, 20]


def test_the_first_layer_of_a_pyramid_has_all_tokens_if_the_budget_is_large() -> None:
    assert Pyramid(10, 20).n_kept(equal(3, 100), 3 * 80, 0).tolist() == [100, 80, 60]


def test_a_pyramid_of_less_than_its_windows_is_uniform() -> None:
    assert Pyramid(64).n_kept(equal(3, 100), 100, 0).tolist() == [34, 33, 33]


def test_a_pyramid_of_beta_one_is_uniform() -> None:
    for n_total in range(31):
        expected = Uniform().n_kept(equal(3, 10), n_total, 0)
        np.testing.assert_array_equal(Pyramid(2, 1).n_kept(equal(3, 10), n_total, 0), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": -1}, "window=-1 is negative"),
        ({"window": 8, "beta": 0.9}, "beta=0.9 is below 1"),
        ({"window": 8, "beta": float("nan")}, "beta=nan is below 1"),
        ({"window": 8, "beta": float("inf")}, "beta=inf is below 1 or not finite"),
    ],
)
def test_a_pyramid_out_of_its_range_is_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Pyramid(**options)  # type: ignore[arg-type]


#
# every allocation
#


@pytest.mark.parametrize("allocation", [Uniform(), GlobalRanking(), Pyramid(4)], ids=lambda a: type(a).__name__)
@pytest.mark.parametrize(("n_total", "floor"), [(5, 2), (31, 0), (33, 11), (-1, 0)])
def test_budgets_that_the_layers_cannot_have_are_refused(allocation: Allocation, n_total: int, floor: int) -> None:
    with pytest.raises(ConfigError, match=f"{n_total} composites cannot be kept: 3 layers of 10 rows"):
        allocation.n_kept(equal(3, 10), n_total, floor)
