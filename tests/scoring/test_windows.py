"""Tests scoring by the prompt's last tokens, and by the context itself, with a fake cache that records the calls."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.caches import Cache, assert_scores, collect, context

thorough = settings(deadline=None, derandomize=True, max_examples=100)


#
# "window": the prompt's last tokens
#


def test_a_window_inside_of_the_context_scores_its_last_tokens_as_they_are_prefilled() -> None:
    cache, tokens = Cache(), context(10)
    collect(cache, tokens, scoring="window", window=4)
    assert cache.evaluated == [(tokens[:6], 0, False), (tokens[6:], 6, True)]
    assert cache.held == tokens


def test_a_window_across_the_contexts_end_scores_its_last_tokens_and_all_that_follow() -> None:
    cache, tokens = Cache(), context(10)
    collect(cache, tokens, [1, 2, 3], scoring="window", window=5)
    assert cache.evaluated == [(tokens[:8], 0, False), (tokens[8:], 8, True), ([1, 2, 3], 10, True)]
    assert cache.held == tokens
    assert cache.peak == 13


def test_a_window_behind_the_context_comes_after_the_tokens_between_that_are_not_scored() -> None:
    cache, tokens = Cache(), context(10)
    attention = collect(cache, tokens, [1, 2, 3, 4, 5, 6, 7, 8], scoring="window", window=3)
    assert cache.evaluated == [(tokens, 0, False), ([1, 2, 3, 4, 5], 10, False), ([6, 7, 8], 15, True)]
    assert cache.held == tokens
    assert attention.chunk == 3


def test_a_window_that_is_all_of_what_follows_the_context_evaluates_nothing_twice() -> None:
    cache, tokens = Cache(), context(10)
    attention = collect(cache, tokens, [1, 2, 3], scoring="window", window=3)
    assert cache.evaluated == [(tokens, 0, False), ([1, 2, 3], 10, True)]
    assert attention.chunk == 3


@pytest.mark.parametrize("window", [13, 14, 1000])
def test_a_window_longer_than_the_prompt_is_the_whole_prompt(window: int) -> None:
    cache, tokens = Cache(), context(10)
    collect(cache, tokens, [1, 2, 3], scoring="window", window=window)
    assert cache.evaluated == [(tokens, 0, True), ([1, 2, 3], 10, True)]


def test_a_windows_tokens_are_evaluated_again_if_the_cache_has_them_but_not_those_before() -> None:
    cache, tokens = Cache(held=context(10)), context(10)
    attention = collect(cache, tokens, scoring="window", window=4)
    assert cache.evaluated == [(tokens[6:], 6, True)]
    assert attention.n_prefilled == 4


def test_a_window_longer_than_a_batch_is_decoded_in_several() -> None:
    cache = Cache()
    cache.n_batch = 3
    collect(cache, context(10), [1, 2, 3, 4, 5, 6, 7, 8, 9], scoring="window", window=5)
    assert cache.decodes == [(3, 10), (1, 13), (3, 14), (2, 17)]


def test_a_windows_mean_divides_by_the_queries_that_could_see_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("support.caches.payment", lambda il, g, token, n: np.full((g.n_head, n), 0.25, np.float32))
    for n_suffix in (0, 3, 8):
        attention = collect(Cache(), context(10), range(n_suffix), scoring="window", window=5, agg_task="mean")
        for scores in attention.layers:
            assert (scores == 0.25).all()


@thorough
@given(
    st.integers(1, 30),
    st.integers(0, 20),
    st.integers(1, 60),
    st.integers(0, 40),
    st.integers(1, 20),
    st.sampled_from(["max", "mean"]),
)
def test_the_last_tokens_of_the_prompt_judge_at_their_own_positions(
    n_tokens: int, n_suffix: int, window: int, n_held: int, n_batch: int, agg_task: str
) -> None:
    tokens, suffix = context(n_tokens), list(range(n_suffix))
    cache = Cache(n_cells=max(n_tokens + n_suffix, n_held), held=context(n_held))
    cache.n_batch = n_batch
    attention = collect(cache, tokens, suffix, scoring="window", window=window, agg_task=agg_task)
    prompt = [(token, pos) for pos, token in enumerate(tokens + suffix)]
    assert cache.queries == prompt[-window:]
    assert cache.held == tokens
    assert not cache.is_scoring
    assert attention.n_prefilled == sum(len(evaluated) for evaluated, pos, _ in cache.evaluated if pos < n_tokens)
    assert_scores(attention, prompt[-window:], n_tokens, agg_task)


#
# "prefill": the context's own tokens
#


def test_the_prefill_is_scored_whatever_the_cache_has_already() -> None:
    cache, tokens = Cache(held=context(6)), context(10)
    attention = collect(cache, tokens, scoring="prefill")
    assert cache.evaluated == [(tokens, 0, True)]
    assert cache.events[-3:] == [("prefill", 10, False), ("scores",), ("end",)]
    assert cache.of_kind("begin") == [("begin", "max", 10, 64 << 20)]
    assert (attention.n_prefilled, attention.chunk) == (10, 0)


@thorough
@given(st.integers(1, 40), st.integers(0, 40), st.sampled_from(["max", "mean"]))
def test_a_prefills_mean_divides_by_the_tokens_from_each_one_on(n_tokens: int, n_held: int, agg_task: str) -> None:
    cache, tokens = Cache(n_cells=40, held=context(n_held)), context(n_tokens)
    attention = collect(cache, tokens, [1, 2, 3], scoring="prefill", agg_task=agg_task)
    queries = [(token, pos) for pos, token in enumerate(tokens)]
    assert cache.queries == queries
    assert cache.held == tokens
    assert not cache.is_scoring
    assert_scores(attention, queries, n_tokens, agg_task)


def test_a_prefill_needs_no_cell_but_the_contexts() -> None:
    cache = Cache(n_cells=10)
    collect(cache, context(10), scoring="prefill")
    assert cache.peak == 10
