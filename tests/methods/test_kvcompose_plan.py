"""Compares KVCompose.plan with steps 4 to 9 of the method (arXiv 2509.05165), written as plain loops."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.rows import ArrayRows

from kvcompose_gguf import CompositionPlan, ConfigError, KVCompose
from kvcompose_gguf.plan.geometry import LayerGeometry
from kvcompose_gguf.scoring.evidence import Evidence

Plan = list[list[list[int]]]  # layer, KV head, tokens
Aggregate = Callable[[Sequence[float]], float]


def plain(**options: Any) -> KVCompose:
    """Returns KVCompose without sinks, as in the paper."""
    return KVCompose(**({"n_sink": 0} | options))


def layer(n_head: int, n_head_kv: int, n_bytes_row: int = 64) -> LayerGeometry:
    return LayerGeometry(0, n_head, n_head_kv, 16, 16, 1, 1, False, n_bytes_row)


def plan_of(
    method: KVCompose,
    attention: Sequence[np.ndarray],
    layers: Sequence[LayerGeometry],
    v_norms: Sequence[np.ndarray] | None = None,
) -> CompositionPlan:
    """Returns the plan for values of one element, with the given norms."""
    rows = None if v_norms is None else ArrayRows(all_values=[norms[:, :, None] for norms in v_norms])
    return method.plan(Evidence(attention[0].shape[-1], layers, attention, rows=rows))


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def specified_plan(
    attention: Sequence[np.ndarray],
    layers: Sequence[LayerGeometry],
    v_norms: Sequence[np.ndarray],
    *,
    compression_ratio: float | None = None,
    n_kept: float | None = None,
    max_kv_bytes: int | None = None,
    agg_group: str = "mean",
    agg_head: str = "mean",
    add_v_norm: bool = False,
    add_mean_across_heads: bool = True,
    keep_token_lower_bound: int = 0,
    first_layer_rule: bool = False,
    n_sink: int = 0,
) -> Plan:
    """Returns the tokens that every head keeps."""
    n_layer, n_tokens = len(layers), attention[0].shape[1]
    aggregates: dict[str, Aggregate] = {"mean": mean, "max": max}

    # the budget of step 8
    if compression_ratio is not None:
        n_total = max(1, int(n_layer * n_tokens * (1 - compression_ratio)))
    elif n_kept is not None:
        n_total = max(1, min(int(n_layer * n_kept), n_layer * n_tokens))
    else:
        assert max_kv_bytes is not None
        n_total = min(max_kv_bytes // max(g.n_bytes_row for g in layers), n_layer * n_tokens)
    n_sink = min(n_sink, n_total // n_layer)

    rankings: Plan = []
    composites: list[list[float]] = []
    for il in range(n_layer):
        n_head_kv = layers[il].n_head_kv
        n_group = layers[il].n_head // n_head_kv
        # step 4: over the query heads of each KV head
        s = [
            [
                aggregates[agg_group]([float(attention[il][h * n_group + g][i]) for g in range(n_group)])
                for i in range(n_tokens)
            ]
            for h in range(n_head_kv)
        ]
        # step 5
        if add_v_norm:
            s = [[s[h][i] * float(v_norms[il][h][i]) for i in range(n_tokens)] for h in range(n_head_kv)]
        if add_mean_across_heads:
            means = [mean([s[h][i] for h in range(n_head_kv)]) for i in range(n_tokens)]
            s = [[s[h][i] + means[i] for i in range(n_tokens)] for h in range(n_head_kv)]
        # forced sinks, as many as the budget allows per layer, come first; then by descending score, then by index
        rankings.append([sorted(range(n_tokens), key=lambda i: (i >= n_sink, -s[h][i], i)) for h in range(n_head_kv)])
        # step 6
        composites.append(
            [aggregates[agg_head]([s[h][rankings[il][h][j]] for h in range(n_head_kv)]) for j in range(n_tokens)]
        )
    if first_layer_rule:
        composites[0] = [max(composites[il][j] for il in range(n_layer)) for j in range(n_tokens)]

    # step 7: the first ranks come before all others
    floor = min(max(keep_token_lower_bound, n_sink), n_tokens, n_total // n_layer)
    # step 8: the largest of all
    everything = [(il, j) for il in range(n_layer) for j in range(n_tokens)]
    winners = sorted(everything, key=lambda place: (place[1] >= floor, -composites[place[0]][place[1]], place))[
        :n_total
    ]
    # step 9: every head's own tokens
    counts = [sum(winner[0] == il for winner in winners) for il in range(n_layer)]
    return [[sorted(order[: counts[il]]) for order in rankings[il]] for il in range(n_layer)]


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
    got = [cells.tolist() for cells in plan.cells]
    n_different = max(
        len(set(a) ^ set(b)) for g, e in zip(got, expected, strict=True) for a, b in zip(g, e, strict=True)
    )
    assert got == expected, f"{options}: the largest difference of a head is {n_different} tokens"
    assert [cells.dtype for cells in plan.cells] == [np.int32] * len(layers)


#
# the plan is the specified one
#

BUDGETS = [
    {"compression_ratio": 0.0},
    {"compression_ratio": 0.55},
    {"compression_ratio": 0.95},
    {"n_kept": 2.5},
    {"n_kept": 100},
    {"max_kv_bytes": 96 * 3 * 8 + 95},
    {"max_kv_bytes": 1 << 30},
]


def inputs(kind: str) -> tuple[list[np.ndarray], list[LayerGeometry], list[np.ndarray]]:
    """Three layers of 4 and of 2 KV heads over 23 tokens."""
    rng = np.random.default_rng(5165)
    layers = [layer(8, 4, 64), layer(8, 2, 96), layer(8, 4, 64)]
    n_tokens = 23
    if kind == "continuous":
        powers = (3, 1, 2)  # the first layer is attended least
        attention = [
            rng.random((g.n_head, n_tokens), dtype=np.float32) ** p for p, g in zip(powers, layers, strict=True)
        ]
        v_norms = [rng.random((g.n_head_kv, n_tokens), dtype=np.float32) + 1 for g in layers]
    elif kind == "ties":  # multiples of small powers of two: exact in float32, so ties stay ties
        attention = [rng.integers(0, 4, (g.n_head, n_tokens)).astype(np.float32) / 4 for g in layers]
        v_norms = [rng.integers(1, 4, (g.n_head_kv, n_tokens)).astype(np.float32) / 2 for g in layers]
    else:
        attention = [np.full((g.n_head, n_tokens), 0.5, np.float32) for g in layers]
        v_norms = [np.ones((g.n_head_kv, n_tokens), np.float32) for g in layers]
    return attention, layers, v_norms


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
    options = {
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
    assert [cells.tolist() for cells in changed.cells] != [cells.tolist() for cells in default.cells]
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
    assert [cells.tolist() for cells in changed.cells] == [cells.tolist() for cells in default.cells]


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
    assert plan.cells[0].tolist() == favourites


def test_the_mean_across_heads_lets_a_token_that_all_heads_need_win() -> None:
    # token 3 is every head's second best, by far the best of the layer
    attention = np.array([[0.5, 0, 0, 0.4], [0, 0.5, 0, 0.4], [0, 0, 0.5, 0.4]], np.float32)
    own = plan_of(plain(n_kept=1, add_mean_across_heads=False), [attention], [layer(3, 3)])
    shared = plan_of(plain(n_kept=1), [attention], [layer(3, 3)])
    assert own.cells[0].tolist() == [[0], [1], [2]]
    assert shared.cells[0].tolist() == [[3], [3], [3]]


def test_a_layer_that_is_attended_more_keeps_more() -> None:
    rng = np.random.default_rng(1)
    weak, strong = (rng.random((2, 20), dtype=np.float32) * scale for scale in (0.1, 1.0))
    plan = plan_of(plain(compression_ratio=0.5), [weak, strong], [layer(2, 2)] * 2)
    assert plan.n_kept.sum() == 20
    assert plan.n_kept[1] > 15


def test_among_equal_scores_the_first_tokens_of_the_first_layers_stay() -> None:
    equal = [np.full((2, 6), 0.25, np.float32)] * 3
    plan = plan_of(plain(n_kept=3), equal, [layer(2, 2)] * 3)
    assert [cells.tolist() for cells in plan.cells] == [[list(range(6))] * 2, [list(range(3))] * 2, [[], []]]


def test_a_lower_bound_keeps_the_best_ranks_of_a_layer_that_nobody_attends_to() -> None:
    weak = np.array([[0, 0.01, 0, 0.02, 0, 0]], np.float32)
    strong = np.linspace(0.5, 1, 6, dtype=np.float32)[None]
    plan = plan_of(plain(n_kept=3, keep_token_lower_bound=2), [weak, strong], [layer(1, 1)] * 2)
    assert [cells.tolist() for cells in plan.cells] == [[[1, 3]], [[2, 3, 4, 5]]]


def test_sinks_stay_in_every_head_of_every_layer() -> None:
    attention, layers, _ = inputs("continuous")
    for cells in attention:
        cells[:, :3] = 0
    without = plan_of(plain(n_kept=6), attention, layers)
    plan = plan_of(plain(n_kept=6, n_sink=3), attention, layers)
    assert not any((cells < 3).any() for cells in without.cells)
    for cells in plan.cells:
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
    assert [cells.tolist() for cells in plan.cells] == [cells.tolist() for cells in expected.cells]


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
    assert len(plan.cells) == 3
    for cells in plan.cells:
        with pytest.raises(ValueError, match="read-only"):
            cells[0, 0] = 0


#
# what is refused
#


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of compression_ratio, max_kv_bytes, n_kept is needed, 0 given"),
        ({"compression_ratio": 0.5, "n_kept": 10}, "2 given.*compression_ratio.*n_kept"),
        ({"compression_ratio": 0.5, "max_kv_bytes": 10}, "2 given.*compression_ratio.*max_kv_bytes"),
        ({"max_kv_bytes": 10, "n_kept": 10}, "2 given.*max_kv_bytes.*n_kept"),
        ({"compression_ratio": 0.0, "max_kv_bytes": 10, "n_kept": 10}, "3 given"),
        ({"compression_ratio": 1}, r"compression_ratio=1, the fraction removed, is not in \[0, 1\)"),
        ({"compression_ratio": 1.5}, "compression_ratio=1.5"),
        ({"compression_ratio": 75}, "compression_ratio=75"),
        ({"compression_ratio": -0.1}, "compression_ratio=-0.1"),
        ({"compression_ratio": float("nan")}, "compression_ratio=nan"),
        ({"max_kv_bytes": 0}, "max_kv_bytes=0 is not positive"),
        ({"max_kv_bytes": -1}, "max_kv_bytes=-1 is not positive"),
        ({"n_kept": 0}, "n_kept=0 is not positive"),
        ({"n_kept": -0.5}, "n_kept=-0.5 is not positive"),
        ({"n_kept": float("nan")}, "n_kept=nan is not positive"),
    ],
    ids=str,
)
def test_not_exactly_one_budget_in_its_range_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plain(**options)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"scoring_chunk": 0}, "scoring_chunk=0 is not positive"),
        ({"scoring_chunk": -1}, "scoring_chunk=-1 is not positive"),
        ({"min_tokens": 0}, "min_tokens=0 is not positive"),
        ({"min_tokens": -1}, "min_tokens=-1 is not positive"),
        ({"n_room": 1 << 31}, "is not below 2\\^31"),
        ({"max_score_bytes": 0}, "max_score_bytes=0 is not positive"),
        ({"max_score_bytes": -1}, "max_score_bytes=-1 is not positive"),
        ({"n_room": 0}, "n_room=0 is not positive"),
        ({"n_room": -1}, "n_room=-1 is not positive"),
        ({"keep_token_lower_bound": -1}, "keep_token_lower_bound=-1 is negative"),
        ({"n_sink": -1}, "n_sink=-1 is negative"),
        ({"keep_last": -1}, "keep_last=-1 is negative"),
        ({"agg_task": "median"}, "agg_task='median' is none of 'max', 'mean'"),
        ({"agg_group": "Mean"}, "agg_group='Mean' is none of"),
        ({"agg_head": None}, "agg_head=None is none of"),
        ({"scoring": "windows"}, "scoring='windows' is none of 'auto', 'repeat', 'prompts', 'window', 'prefill'"),
        ({"scoring": None}, "scoring=None is none of"),
        ({"scoring": ["repeat"]}, r"scoring=\['repeat'\] is none of"),
        ({"scoring_fraction": 0}, r"scoring_fraction=0 is not in \(0, 1\]"),
        ({"scoring_fraction": -0.5}, "scoring_fraction=-0.5 is not in"),
        ({"scoring_fraction": 1.01}, "scoring_fraction=1.01 is not in"),
        ({"scoring_fraction": 50}, "scoring_fraction=50 is not in"),
        ({"scoring_fraction": float("nan")}, "scoring_fraction=nan is not in"),
        ({"scoring_fraction": float("inf")}, "scoring_fraction=inf is not in"),
        ({"scoring_fraction": 2, "scoring": "window"}, "scoring_fraction=2 is not in"),
        ({"scoring_fraction": 0.5, "scoring": "window"}, "scoring_fraction=0.5 needs scoring='repeat'"),
        ({"scoring_fraction": 0.5, "scoring": "prefill"}, "scoring_fraction=0.5 needs scoring='repeat'"),
        ({"scoring_fraction": 0.5, "scoring": "prompts", "prompts": ["What?"]}, "needs scoring='repeat'"),
        ({"window": 0}, "window=0 is not positive"),
        ({"window": -1, "scoring": "window"}, "window=-1 is not positive"),
        ({"scoring": "prompts"}, r"prompts=\(\): scoring='prompts' needs at least one text"),
        ({"scoring": "prompts", "prompts": []}, r"prompts=\[\]: scoring='prompts' needs at least one text"),
        ({"scoring": "prompts", "prompts": "What?"}, "prompts='What\\?' must be a list of texts"),
        ({"scoring": "prompts", "prompts": ""}, "prompts='' must be a list of texts"),
        ({"prompts": ["What?"]}, "scoring='prompts' needs at least one text, others none"),
        ({"scoring": "window", "prompts": ["What?"]}, "scoring='prompts' needs at least one text, others none"),
        ({"scoring": "prefill", "prompts": ["What?"]}, "scoring='prompts' needs at least one text, others none"),
        ({"scoring": "repeat", "prompts": "What?"}, "prompts='What\\?' must be a list of texts"),
    ],
    ids=str,
)
def test_an_option_out_of_its_range_is_refused_by_name_and_value(option: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plain(compression_ratio=0.5, **option)


@pytest.mark.parametrize(
    "option",
    [
        {"scoring": "prompts", "prompts": ["What?"]},
        {"scoring": "prompts", "prompts": ("What?", "Who?")},
        {"scoring": "prompts", "prompts": ["What?"], "scoring_fraction": 1},
        {"scoring": "repeat", "scoring_fraction": 1},
        {"scoring": "repeat", "scoring_fraction": 1e-9},
        {"scoring": "window", "window": 1},
        {"scoring": "window", "window": 1 << 40, "scoring_fraction": 1.0},
        {"scoring": "prefill"},
        {"scoring_chunk": None},
        {"scoring_chunk": 1},
        {"keep_last": 0, "n_sink": 0, "keep_token_lower_bound": 0},
        {"min_tokens": 1, "n_room": 1, "max_score_bytes": 1},
    ],
    ids=str,
)
def test_an_option_at_the_end_of_its_range_is_taken(option: dict[str, Any]) -> None:
    method = plain(compression_ratio=0.0, **option)
    assert {name: getattr(method, name) for name in option} == option


def test_options_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        plain(compression_ratio=0.5).compression_ratio = 0.9  # type: ignore[misc]


def test_the_defaults_are_the_papers_but_for_scoring_and_sinks() -> None:
    method = KVCompose(compression_ratio=0.5)
    assert (method.agg_task, method.agg_group, method.agg_head) == ("max", "mean", "mean")
    assert (method.add_v_norm, method.add_mean_across_heads) == (False, True)
    assert (method.keep_token_lower_bound, method.n_sink, method.first_layer_rule) == (0, 4, False)
    assert (method.scoring, method.scoring_fraction) == ("auto", 1)


def test_paper_gives_the_papers_settings_and_refuses_others() -> None:
    method = KVCompose.paper(compression_ratio=0.5, keep_last=7)
    assert (method.scoring_chunk, method.keep_last, method.allocation) == (None, 7, "global")
    assert (method.scoring, method.n_sink) == ("repeat", 0)
    ours = dataclasses.replace(method, scoring="auto", scoring_chunk=512, n_sink=4, keep_last=32, allocation=None)
    assert ours == KVCompose(compression_ratio=0.5)
    with pytest.raises(ConfigError, match="agg_head, n_sink: the paper's settings decide this"):
        KVCompose.paper(compression_ratio=0.5, n_sink=4, agg_head="max")


@pytest.mark.parametrize("floor", [{"keep_token_lower_bound": 7}, {"n_sink": 7}, {"keep_token_lower_bound": 10**6}])
@pytest.mark.parametrize("bought", [{"compression_ratio": 0.75}, {"n_kept": 6.9}, {"max_kv_bytes": 96 * 20}])
def test_floors_larger_than_the_budget_shrink_to_what_it_buys_in_every_layer(
    floor: dict[str, int], bought: dict[str, Any]
) -> None:
    attention, layers, _ = inputs("continuous")
    plan = plan_of(plain(**bought, **floor), attention, layers)
    n_total = {"compression_ratio": 17, "n_kept": 20, "max_kv_bytes": 20}[next(iter(bought))]
    assert plan.n_kept.sum() == n_total
    assert plan.n_kept.min() >= n_total // 3  # every layer its share
    if "n_sink" in floor:
        for cells in plan.cells:
            assert (cells[:, : n_total // 3] == np.arange(n_total // 3)).all()


def test_v_norms_are_needed_with_add_v_norm() -> None:
    attention, layers, _ = inputs("continuous")
    with pytest.raises(ConfigError, match="the evidence has no values"):
        plan_of(plain(n_kept=6, add_v_norm=True), attention, layers)


def test_v_norms_are_not_used_without_add_v_norm() -> None:
    attention, layers, v_norms = inputs("continuous")
    with_norms = plan_of(plain(n_kept=6), attention, layers, v_norms)
    without = plan_of(plain(n_kept=6), attention, layers)
    assert [cells.tolist() for cells in with_norms.cells] == [cells.tolist() for cells in without.cells]


@pytest.mark.parametrize(
    ("agg_group", "agg_head", "head"),
    [
        ("mean", "mean", 0),
        ("mean", "mean", 7),
        ("mean", "max", 0),
        ("mean", "max", 7),
        ("max", "mean", 0),
        ("max", "mean", 7),
    ],
)
def test_a_nan_in_the_attention_of_any_head_is_refused(agg_group: str, agg_head: str, head: int) -> None:
    attention, layers, _ = inputs("continuous")
    attention[1][head, 5] = np.nan
    method = plain(n_kept=6, agg_group=agg_group, agg_head=agg_head, add_mean_across_heads=False)
    with pytest.raises(ConfigError, match="not finite"):
        plan_of(method, attention, layers)


def test_a_nan_among_the_v_norms_is_refused() -> None:
    attention, layers, v_norms = inputs("continuous")
    v_norms[2][0, 22] = np.nan
    with pytest.raises(ConfigError, match="has NaN"):
        plan_of(plain(n_kept=6, add_v_norm=True), attention, layers, v_norms)


def test_infinite_attention_is_refused() -> None:
    attention, layers, _ = inputs("continuous")
    attention[1][0, 5] = np.inf
    with pytest.raises(ConfigError):
        plan_of(plain(n_kept=6), attention, layers)


def test_layers_of_different_context_lengths_are_refused() -> None:
    attention, layers, _ = inputs("continuous")
    attention[2] = attention[2][:, :-1]
    with pytest.raises(ConfigError):
        plan_of(plain(n_kept=6), attention, layers)


@pytest.mark.parametrize("n_given", [2, 4])
def test_another_number_of_attention_layers_is_refused(n_given: int) -> None:
    attention, layers, _ = inputs("continuous")
    with pytest.raises(ConfigError):
        plan_of(plain(n_kept=6), (attention * 2)[:n_given], layers)


@pytest.mark.parametrize(
    "option",
    [
        {"n_kept": float("inf")},
        {"max_kv_bytes": 1e6},
        {"compression_ratio": "0.5"},
        {"compression_ratio": 0.5, "n_sink": 1.5},
        {"compression_ratio": 0.5, "scoring_chunk": 1.5},
        {"compression_ratio": 0.5, "min_tokens": None},
        {"compression_ratio": 0.5, "scoring_fraction": "0.5"},
        {"compression_ratio": 0.5, "scoring_fraction": None},
        {"compression_ratio": 0.5, "scoring_fraction": True},
        {"compression_ratio": 0.5, "scoring": "window", "window": 64.0},
        {"compression_ratio": 0.5, "scoring": "window", "window": None},
        {"compression_ratio": 0.5, "scoring": "window", "window": True},
        {"compression_ratio": 0.5, "scoring": "prompts", "prompts": b"What?"},
        {"compression_ratio": 0.5, "scoring": "prompts", "prompts": [1]},
        {"compression_ratio": 0.5, "prompts": None},
    ],
    ids=str,
)
def test_an_option_of_another_type_is_refused(option: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        plain(**option)
