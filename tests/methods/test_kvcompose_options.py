"""What KVCompose refuses: budgets, options, attention and norms that make no sense."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from support.plans import inputs, plain, plan_of

from kvcompose_gguf import ConfigError, KVCompose
from kvcompose_gguf.methods.allocation import GlobalRanking


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


def test_a_threshold_alone_may_keep_all_and_limits_any_budget() -> None:
    alone = KVCompose(threshold=0.1)
    assert alone.compression_ratio == 0
    assert dataclasses.replace(alone, threshold=0.2).compression_ratio == 0
    assert KVCompose(threshold=0.1, n_kept=50).n_kept == 50
    given = inputs("continuous")
    sums = [int(plan_of(plain(threshold=threshold, n_sink=4), *given).n_kept.sum()) for threshold in (0, 0.5, 9)]
    assert sums[0] == 3 * 23 > sums[1] > sums[2] == 3 * 4
    assert (plan_of(plain(threshold=0, n_kept=5), *given).n_kept.sum()) == 15


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
        ({"threshold": "0.1"}, "threshold='0.1' is not a number"),
        ({"threshold": float("nan")}, "threshold=nan is not finite"),
        ({"threshold": 0.1, "allocation": GlobalRanking()}, "threshold=0.1 needs the method's own ranking"),
        ({"threshold": 0.1, "allocation": "uniform"}, "threshold=0.1 needs the method's own ranking"),
        ({"keep_last": -1}, "keep_last=-1 is negative"),
        ({"agg_task": "median"}, "agg_task='median' is none of 'max', 'mean'"),
        ({"agg_group": "Mean"}, "agg_group='Mean' is none of"),
        ({"agg_head": None}, "agg_head=None is none of"),
        (
            {"scoring": "windows"},
            "scoring='windows' is none of 'auto', 'learned', 'repeat', 'prompts', 'window', 'prefill'",
        ),
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
        for cells in plan.rows:
            assert (cells[:, : n_total // 3] == np.arange(n_total // 3)).all()


def test_v_norms_are_needed_with_add_v_norm() -> None:
    attention, layers, _ = inputs("continuous")
    with pytest.raises(ConfigError, match="the evidence has no values"):
        plan_of(plain(n_kept=6, add_v_norm=True), attention, layers)


def test_v_norms_are_not_used_without_add_v_norm() -> None:
    attention, layers, v_norms = inputs("continuous")
    with_norms = plan_of(plain(n_kept=6), attention, layers, v_norms)
    without = plan_of(plain(n_kept=6), attention, layers)
    assert [cells.tolist() for cells in with_norms.rows] == [cells.tolist() for cells in without.rows]


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
