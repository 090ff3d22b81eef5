"""Budgets: the composites that one buys (budget.py), and their allocation to layers (kernels/aggregate.py)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kvcompose_gguf import ConfigError, KVCompose
from kvcompose_gguf.kernels import aggregate, reference
from kvcompose_gguf.plan import budget
from kvcompose_gguf.plan.geometry import LayerGeometry
from kvcompose_gguf.scoring.evidence import Evidence

thorough = settings(deadline=None, derandomize=True, max_examples=100)

fewer_examples = settings(thorough, max_examples=60)  # of what goes through a plan

counts = st.integers(1, 5)
ratios = st.one_of(st.sampled_from([0.0, 0.5, 0.75, 0.9]), st.floats(0, 1, exclude_max=True))
# few distinct values make ties, where allocations go wrong
score_values = st.one_of(st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.floats(0, 1, width=32))


def layers_of(*n_bytes_row: int, n_head: int = 2) -> list[LayerGeometry]:
    return [LayerGeometry(il, n_head, n_head, 16, 16, 1, 1, False, n) for il, n in enumerate(n_bytes_row)]


def scores_of(*shape: int) -> st.SearchStrategy[np.ndarray]:
    return hnp.arrays(np.float32, shape, elements=score_values)


@st.composite
def composites_and_floor(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    n_layer, n_tokens = draw(counts), draw(st.integers(1, 12))
    scores = draw(scores_of(n_layer, n_tokens))
    return np.ascontiguousarray(np.sort(scores, axis=1)[:, ::-1]), draw(st.integers(0, n_tokens))


def total(data: st.DataObject, composites: np.ndarray, floor: int) -> int:
    return data.draw(st.integers(len(composites) * floor, composites.size), "n_total")


#
# allocate_budget
#


@thorough
@given(composites_and_floor(), st.data())
def test_the_whole_budget_is_spent_within_floor_and_context(case: tuple[np.ndarray, int], data: st.DataObject) -> None:
    composites, floor = case
    n_total = total(data, composites, floor)
    n_kept = aggregate.allocate_budget(composites, n_total, floor)
    assert n_kept.sum() == n_total
    assert (n_kept >= floor).all()
    assert (n_kept <= composites.shape[1]).all()


@thorough
@given(composites_and_floor(), st.data())
def test_allocation_equals_its_numpy_twin(case: tuple[np.ndarray, int], data: st.DataObject) -> None:
    composites, floor = case
    n_total = total(data, composites, floor)
    kernel = aggregate.allocate_budget(composites, n_total, floor)
    twin = reference.allocate_budget(composites, n_total, floor)
    largest = np.abs(kernel - twin).max()
    print(f"largest difference {largest} tokens")
    assert largest == 0, f"kernel {kernel}, twin {twin}"


@thorough
@given(composites_and_floor(), st.data())
def test_no_dropped_composite_scores_higher_than_a_kept_one_behind_the_floor(
    case: tuple[np.ndarray, int], data: st.DataObject
) -> None:
    composites, floor = case
    n_kept = aggregate.allocate_budget(composites, total(data, composites, floor), floor)
    kept = [row[floor:n] for row, n in zip(composites, n_kept, strict=True)]
    dropped = [row[n:] for row, n in zip(composites, n_kept, strict=True)]
    assert np.concatenate(kept).min(initial=np.inf) >= np.concatenate(dropped).max(initial=-np.inf)


@thorough
@given(composites_and_floor(), st.data())
def test_a_larger_budget_takes_nothing_from_any_layer(case: tuple[np.ndarray, int], data: st.DataObject) -> None:
    composites, floor = case
    small, large = sorted((total(data, composites, floor), total(data, composites, floor)))
    n_small = aggregate.allocate_budget(composites, small, floor)
    n_large = aggregate.allocate_budget(composites, large, floor)
    assert (n_small <= n_large).all(), f"{small} composites give {n_small}, {large} give {n_large}"


@thorough
@given(composites_and_floor(), st.data())
def test_a_total_below_the_floors_or_above_the_context_is_refused(
    case: tuple[np.ndarray, int], data: st.DataObject
) -> None:
    composites, floor = case
    below = st.integers(-3, len(composites) * floor - 1) if floor else st.just(-1)
    n_total = data.draw(st.one_of(below, st.integers(composites.size + 1, composites.size + 9)))
    with pytest.raises(ConfigError, match=f"^{n_total} composites cannot be kept"):
        aggregate.allocate_budget(composites, n_total, floor)


@thorough
@given(st.data(), counts, st.integers(1, 12), st.sampled_from(["mean", "max"]))
def test_composite_scores_fall_within_a_layer(data: st.DataObject, n_head: int, n_tokens: int, agg_head: str) -> None:
    scores = data.draw(scores_of(n_head, n_tokens))
    composite = aggregate.composite_scores(scores, aggregate.rank_tokens(scores), agg_head)
    assert (composite[1:] <= composite[:-1]).all(), composite


#
# what a budget buys
#


@thorough
@given(ratios, counts, st.integers(1, 10_000))
def test_a_ratio_removes_at_least_its_share_and_less_than_one_more(ratio: float, n_layer: int, n_tokens: int) -> None:
    n_total = budget.composites_for_ratio(ratio, n_layer, n_tokens)
    n_all = n_layer * n_tokens
    assert n_total == 1 or n_total <= n_all * (1 - ratio)
    assert n_total > n_all * (1 - ratio) - 1
    assert 1 <= n_total <= n_all


@thorough
@given(ratios, ratios, counts, st.integers(1, 10_000))
def test_a_smaller_ratio_buys_no_less(a: float, b: float, n_layer: int, n_tokens: int) -> None:
    fewer, more = (budget.composites_for_ratio(ratio, n_layer, n_tokens) for ratio in sorted((a, b), reverse=True))
    assert fewer <= more


@given(counts, st.integers(1, 10_000))
def test_ratio_zero_buys_everything(n_layer: int, n_tokens: int) -> None:
    assert budget.composites_for_ratio(0, n_layer, n_tokens) == n_layer * n_tokens


@thorough
@given(st.floats(0, 1e9, exclude_min=True), counts, st.integers(1, 10_000))
def test_n_kept_is_an_average_over_layers_that_is_not_exceeded(n_kept: float, n_layer: int, n_tokens: int) -> None:
    n_total = budget.composites_for_n_kept(n_kept, n_layer, n_tokens)
    assert 1 <= n_total <= n_layer * n_tokens
    assert n_total == 1 or n_total <= n_layer * n_kept
    assert n_total == n_layer * n_tokens or n_total > n_layer * n_kept - 1


@thorough
@given(st.integers(1, 100_000), st.lists(st.integers(1, 4_096), min_size=1, max_size=5), st.integers(1, 64))
def test_bytes_buy_as_many_of_the_largest_rows_as_fit(max_kv_bytes: int, rows: list[int], n_tokens: int) -> None:
    assume(max_kv_bytes >= len(rows) * max(rows))
    n_total = budget.composites_for_bytes(max_kv_bytes, layers_of(*rows), n_tokens)
    assert n_total * max(rows) <= max_kv_bytes
    assert n_total == len(rows) * n_tokens or (n_total + 1) * max(rows) > max_kv_bytes
    assert len(rows) <= n_total <= len(rows) * n_tokens


@thorough
@given(st.lists(st.integers(2, 4_096), min_size=1, max_size=5), st.integers(1, 64), st.data())
def test_fewer_bytes_than_a_row_per_layer_are_refused(rows: list[int], n_tokens: int, data: st.DataObject) -> None:
    max_kv_bytes = data.draw(st.integers(1, len(rows) * max(rows) - 1))
    with pytest.raises(ConfigError, match=f"^max_kv_bytes={max_kv_bytes} is less than one row of {max(rows)} bytes"):
        budget.composites_for_bytes(max_kv_bytes, layers_of(*rows), n_tokens)


def test_kvcompose_counts_with_the_budget_that_it_was_given() -> None:
    layers = layers_of(64, 128, 64)
    assert KVCompose(compression_ratio=0.75).n_composites(layers, 100) == 75
    assert KVCompose(n_kept=10).n_composites(layers, 100) == 30
    assert KVCompose(n_kept=10.5).n_composites(layers, 100) == 31
    assert KVCompose(n_kept=1000).n_composites(layers, 100) == 300
    assert KVCompose(max_kv_bytes=128 * 40 + 127).n_composites(layers, 100) == 40
    assert KVCompose(max_kv_bytes=1 << 40).n_composites(layers, 100) == 300
    with pytest.raises(ConfigError, match="max_kv_bytes=383"):
        KVCompose(max_kv_bytes=3 * 128 - 1).n_composites(layers, 100)


#
# budgets through a plan
#


@st.composite
def attentions(draw: st.DrawFn) -> list[np.ndarray]:
    n_layer, n_tokens = draw(counts), draw(st.integers(1, 12))
    return [draw(scores_of(2, n_tokens)) for _ in range(n_layer)]


@fewer_examples
@given(attentions(), st.lists(st.integers(1, 64), min_size=5, max_size=5), st.integers(1, 2_000))
def test_the_kept_rows_never_take_more_than_max_kv_bytes(
    attention: list[np.ndarray], row_bytes: list[int], max_kv_bytes: int
) -> None:
    rows = row_bytes[: len(attention)]
    assume(max_kv_bytes >= len(rows) * max(rows))
    plan = KVCompose(max_kv_bytes=max_kv_bytes, n_sink=0).plan(
        Evidence(attention[0].shape[1], layers_of(*rows), attention)
    )
    assert int(plan.n_kept @ np.array(rows)) <= max_kv_bytes


@fewer_examples
@given(attentions(), ratios, ratios, st.booleans())
def test_a_smaller_ratio_keeps_every_token_that_a_larger_one_keeps(
    attention: list[np.ndarray], a: float, b: float, first_layer_rule: bool
) -> None:
    evidence = Evidence(attention[0].shape[1], layers_of(*[64] * len(attention)), attention)
    fewer, more = (
        KVCompose(compression_ratio=ratio, first_layer_rule=first_layer_rule, n_sink=0).plan(evidence)
        for ratio in sorted((a, b), reverse=True)
    )
    assert (fewer.n_kept <= more.n_kept).all()
    for cells_fewer, cells_more in zip(fewer.rows, more.rows, strict=True):
        for head_fewer, head_more in zip(cells_fewer, cells_more, strict=True):
            assert set(head_fewer) <= set(head_more)


def test_more_tokens_than_any_number_has_are_all() -> None:
    assert budget.composites_for_n_kept(1.7976931348623157e308, 3, 100) == 300
