"""Compares KVCompose.plan with steps 4 to 9 of the method (arXiv 2509.05165), and checks what the method promises."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.plans import inputs, layer, plain, plan_of, specified_plan

from kvcompose_gguf import CompositionPlan
from kvcompose_gguf.plan.geometry import LayerGeometry


def assert_as_specified(
    attention: Sequence[np.ndarray],
    layers: Sequence[LayerGeometry],
    v_norms: Sequence[np.ndarray],
    options: dict[str, Any],
) -> None:
    """The options give the specified plan."""
    expected = specified_plan(attention, layers, v_norms, **options)
    plan = plan_of(plain(**options), attention, layers, v_norms)
    assert plan.n_tokens == attention[0].shape[1]
    got = [cells.tolist() for cells in plan.rows]
    n_different = max(
        len(set(a) ^ set(b)) for g, e in zip(got, expected, strict=True) for a, b in zip(g, e, strict=True)
    )
    assert got == expected, f"{options}: the largest difference of a head is {n_different} tokens"
    assert [cells.dtype for cells in plan.rows] == [np.int32] * len(layers)


#
# the plan is the specified one
#

BUDGETS: list[dict[str, float]] = [
    {"compression_ratio": 0.0},
    {"compression_ratio": 0.55},
    {"compression_ratio": 0.95},
    {"n_kept": 2.5},
    {"n_kept": 100},
    {"max_kv_bytes": 96 * 3 * 8 + 95},
    {"max_kv_bytes": 1 << 30},
]


@pytest.mark.parametrize("kind", ["continuous", "ties", "all equal"])
@pytest.mark.parametrize("first_layer_rule", [False, True])
@pytest.mark.parametrize("add_mean_across_heads", [False, True])
@pytest.mark.parametrize("add_v_norm", [False, True])
@pytest.mark.parametrize("agg_head", ["mean", "max"])
@pytest.mark.parametrize("agg_group", ["mean", "max"])
def test_every_combination_of_options_keeps_the_specified_tokens(
    kind: str, agg_group: str, agg_head: str, add_v_norm: bool, add_mean_across_heads: bool, first_layer_rule: bool
) -> None:
    attention, layers, v_norms = inputs(kind)
    options: dict[str, Any] = {
        "agg_group": agg_group,
        "agg_head": agg_head,
        "add_v_norm": add_v_norm,
        "add_mean_across_heads": add_mean_across_heads,
        "first_layer_rule": first_layer_rule,
    }
    for bought, (k, n) in itertools.product(BUDGETS, ((0, 0), (4, 0), (0, 3))):  # some floors are above the budget
        assert_as_specified(attention, layers, v_norms, options | bought | {"keep_token_lower_bound": k, "n_sink": n})


@pytest.mark.parametrize(
    "option",
    [
        {"agg_group": "max"},
        {"agg_head": "max"},
        {"add_v_norm": True},
        {"add_mean_across_heads": False},
        {"keep_token_lower_bound": 4},
        {"first_layer_rule": True},
        {"n_sink": 3},
    ],
    ids=lambda option: next(iter(option)),
)
@pytest.mark.parametrize("bought", [{"compression_ratio": 0.65}, {"n_kept": 8}, {"max_kv_bytes": 96 * 24}])
def test_each_option_changes_the_kept_tokens(option: dict[str, Any], bought: dict[str, Any]) -> None:
    attention, layers, v_norms = inputs("continuous")
    default = plan_of(plain(**bought), attention, layers, v_norms)
    changed = plan_of(plain(**bought, **option), attention, layers, v_norms)
    assert [cells.tolist() for cells in changed.rows] != [cells.tolist() for cells in default.rows]
    assert_as_specified(attention, layers, v_norms, bought | option)


@pytest.mark.parametrize(
    "option",
    [
        {"scoring": "prompts", "prompts": ["What?"]},
        {"scoring": "window", "window": 1},
        {"scoring": "prefill"},
        {"scoring_fraction": 0.1},
        {"scoring_chunk": None},
        {"agg_task": "mean"},
    ],
    ids=str,
)
def test_the_plan_depends_on_the_attention_and_not_on_its_source(option: dict[str, Any]) -> None:
    attention, layers, v_norms = inputs("continuous")
    default = plan_of(plain(n_kept=6), attention, layers, v_norms)
    changed = plan_of(plain(n_kept=6, **option), attention, layers, v_norms)
    assert [cells.tolist() for cells in changed.rows] == [cells.tolist() for cells in default.rows]


# sums and means of these values are exact in float32, in any order
SIXTEENTHS = st.integers(0, 16).map(lambda n: n / 16)
QUARTERS = st.integers(1, 8).map(lambda n: n / 4)


@st.composite
def exact_inputs(draw: st.DrawFn) -> tuple[list[np.ndarray], list[LayerGeometry], list[np.ndarray]]:
    n_tokens = draw(st.integers(1, 10))
    shapes = draw(
        st.lists(
            st.tuples(st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]), st.sampled_from([32, 64])),
            min_size=1,
            max_size=3,
        )
    )

    def array(n_rows: int, elements: st.SearchStrategy[float]) -> np.ndarray:
        n = n_rows * n_tokens
        return np.array(draw(st.lists(elements, min_size=n, max_size=n)), np.float32).reshape(n_rows, n_tokens)

    layers = [layer(n_head_kv * n_group, n_head_kv, n_bytes) for n_head_kv, n_group, n_bytes in shapes]
    return (
        [array(g.n_head, SIXTEENTHS) for g in layers],
        layers,
        [array(g.n_head_kv, QUARTERS) for g in layers],
    )


some_options = st.fixed_dictionaries(
    {},
    optional={
        "agg_group": st.sampled_from(["mean", "max"]),
        "agg_head": st.sampled_from(["mean", "max"]),
        "add_v_norm": st.booleans(),
        "add_mean_across_heads": st.booleans(),
        "first_layer_rule": st.booleans(),
        "keep_token_lower_bound": st.integers(0, 12),
        "n_sink": st.integers(0, 12),
    },
)
some_budget = st.one_of(
    st.fixed_dictionaries({"compression_ratio": st.floats(0, 1, exclude_max=True)}),
    st.fixed_dictionaries({"n_kept": st.one_of(st.integers(1, 12), st.floats(0.1, 12))}),
    st.fixed_dictionaries({"max_kv_bytes": st.integers(64 * 3, 64 * 40)}),
)


@settings(deadline=None, derandomize=True, max_examples=100)
@given(exact_inputs(), some_options, some_budget)
def test_any_model_shape_options_and_budget_keep_the_specified_tokens(
    case: tuple[list[np.ndarray], list[LayerGeometry], list[np.ndarray]],
    options: dict[str, Any],
    bought: dict[str, Any],
) -> None:
    assert_as_specified(*case, options | bought)


#
# what the method promises
#


def test_the_heads_of_a_composite_keep_their_own_tokens() -> None:
    attention = np.zeros((4, 8), np.float32)
    favourites = [[1, 6], [0, 2], [6, 7], [3, 4]]
    for head, tokens in enumerate(favourites):
        attention[head, tokens] = [0.5, 0.25]
    plan = plan_of(plain(n_kept=2, add_mean_across_heads=False), [attention], [layer(4, 4)])
    assert plan.rows[0].tolist() == favourites


def test_the_mean_across_heads_lets_a_token_that_all_heads_need_win() -> None:
    # token 3 is every head's second best, by far the best of the layer
    attention = np.array([[0.5, 0, 0, 0.4], [0, 0.5, 0, 0.4], [0, 0, 0.5, 0.4]], np.float32)
    own = plan_of(plain(n_kept=1, add_mean_across_heads=False), [attention], [layer(3, 3)])
    shared = plan_of(plain(n_kept=1), [attention], [layer(3, 3)])
    assert own.rows[0].tolist() == [[0], [1], [2]]
    assert shared.rows[0].tolist() == [[3], [3], [3]]


def test_a_layer_that_is_attended_more_keeps_more() -> None:
    rng = np.random.default_rng(1)
    weak, strong = (rng.random((2, 20), dtype=np.float32) * scale for scale in (0.1, 1.0))
    plan = plan_of(plain(compression_ratio=0.5), [weak, strong], [layer(2, 2)] * 2)
    assert plan.n_kept.sum() == 20
    assert plan.n_kept[1] > 15


def test_among_equal_scores_the_first_tokens_of_the_first_layers_stay() -> None:
    equal = [np.full((2, 6), 0.25, np.float32)] * 3
    plan = plan_of(plain(n_kept=3), equal, [layer(2, 2)] * 3)
    assert [cells.tolist() for cells in plan.rows] == [[list(range(6))] * 2, [list(range(3))] * 2, [[], []]]


def test_a_lower_bound_keeps_the_best_ranks_of_a_layer_that_nobody_attends_to() -> None:
    weak = np.array([[0, 0.01, 0, 0.02, 0, 0]], np.float32)
    strong = np.linspace(0.5, 1, 6, dtype=np.float32)[None]
    plan = plan_of(plain(n_kept=3, keep_token_lower_bound=2), [weak, strong], [layer(1, 1)] * 2)
    assert [cells.tolist() for cells in plan.rows] == [[[1, 3]], [[2, 3, 4, 5]]]


def test_sinks_stay_in_every_head_of_every_layer() -> None:
    attention, layers, _ = inputs("continuous")
    for cells in attention:
        cells[:, :3] = 0
    without = plan_of(plain(n_kept=6), attention, layers)
    plan = plan_of(plain(n_kept=6, n_sink=3), attention, layers)
    assert not any((cells < 3).any() for cells in without.rows)
    for cells in plan.rows:
        assert (cells[:, :3] == [0, 1, 2]).all()
    assert plan.n_kept.sum() == without.n_kept.sum()


def test_more_sinks_than_tokens_keep_every_token_if_the_budget_allows() -> None:
    attention, layers, _ = inputs("continuous")
    plan = plan_of(plain(compression_ratio=0.0, n_sink=1000), attention, layers)
    assert plan.n_kept.tolist() == [23, 23, 23]


def test_ratio_zero_keeps_everything() -> None:
    attention, layers, _ = inputs("continuous")
    plan = plan_of(plain(compression_ratio=0.0), attention, layers)
    expected = CompositionPlan.keep_all(23, [4, 2, 4])
    assert [cells.tolist() for cells in plan.rows] == [cells.tolist() for cells in expected.rows]


def test_planning_leaves_its_inputs_as_they_were() -> None:
    attention, layers, v_norms = inputs("continuous")
    copies = [array.copy() for array in (*attention, *v_norms)]
    options: dict[str, Any] = {"add_v_norm": True, "first_layer_rule": True, "n_sink": 3}
    for add_mean in (False, True):
        plan_of(plain(n_kept=6, add_mean_across_heads=add_mean, **options), attention, layers, v_norms)
    # one query head a KV head: the group's aggregate could be the input itself
    plan_of(plain(n_kept=6, add_mean_across_heads=False, n_sink=3), attention[:1], [layer(8, 8)])
    for before, after in zip(copies, (*attention, *v_norms), strict=True):
        np.testing.assert_array_equal(after, before)


def test_the_arrays_of_a_plan_are_read_only() -> None:
    attention, layers, _ = inputs("continuous")
    plan = plan_of(plain(n_kept=6), attention, layers)
    assert len(plan.rows) == 3
    for cells in plan.rows:
        with pytest.raises(ValueError, match="read-only"):
            cells[0, 0] = 0
