"""Tests scoring with a fake cache, session and decoder that only records the calls."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.caches import Cache, ask, assert_scores, collect, context

from kvcompose_gguf.errors import ConfigError, ContextLengthError
from kvcompose_gguf.scoring.pieces import spread

thorough = settings(deadline=None, derandomize=True, max_examples=100)


#
# queries on top of the context: "repeat" and "prompts"
#


def test_every_chunk_starts_again_at_n_tokens_and_is_removed() -> None:
    cache, tokens = Cache(), context(10)
    attention = collect(cache, tokens, scoring_chunk=4)
    assert attention.chunk == 4
    assert cache.of_kind("prefill", "decode", "remove") == [
        ("prefill", 10, True),
        ("decode", tokens[:4], 10),
        ("remove", 10),
        ("decode", tokens[4:8], 10),
        ("remove", 10),
        ("decode", tokens[8:], 10),
        ("remove", 10),
    ]
    assert cache.held == tokens
    assert cache.peak == 14


def test_decodes_of_one_chunk_follow_each_other_and_are_removed_together() -> None:
    cache, tokens = Cache(), context(10)
    cache.n_batch = 3
    collect(cache, tokens, scoring_chunk=5)
    assert cache.of_kind("decode", "remove") == [
        ("decode", tokens[:3], 10),
        ("decode", tokens[3:5], 13),
        ("remove", 10),
        ("decode", tokens[5:8], 10),
        ("decode", tokens[8:], 13),
        ("remove", 10),
    ]


def test_the_memory_that_scoring_may_use_is_passed_on_and_splits_nothing() -> None:
    cache = Cache()
    attention = collect(cache, context(100), max_score_bytes=1)
    assert attention.chunk == 100
    assert cache.decodes == [(100, 100)]
    assert cache.of_kind("begin") == [("begin", "max", 100, 1)]


def test_no_chunk_size_keeps_the_whole_repeat_on_top_of_the_context() -> None:
    cache = Cache(n_cells=200)
    cache.n_batch = 64
    attention = collect(cache, context(100), scoring_chunk=None)
    assert attention.chunk == 100
    assert cache.decodes == [(64, 100), (36, 164)]
    assert (cache.held, cache.peak) == (context(100), 200)


def test_a_nearly_full_cache_is_scored_in_the_cells_that_are_free() -> None:
    cache = Cache(n_cells=13)
    attention = collect(cache, context(10))
    assert attention.chunk == 3
    assert cache.decodes == [(3, 10), (3, 10), (3, 10), (1, 10)]


def test_no_chunk_spans_two_queries() -> None:
    cache = Cache()
    attention = ask(cache, context(100), [1, 2, 3], [4], [5, 6, 7, 8, 9], scoring_chunk=4)
    assert attention.chunk == 4
    assert cache.of_kind("decode", "remove") == [
        ("decode", [1, 2, 3], 100),
        ("remove", 100),
        ("decode", [4], 100),
        ("remove", 100),
        ("decode", [5, 6, 7, 8], 100),
        ("remove", 100),
        ("decode", [9], 100),
        ("remove", 100),
    ]


@thorough
@given(
    st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=12), min_size=1, max_size=3),
    st.integers(1, 20),
    st.one_of(st.none(), st.integers(1, 14)),
    st.integers(1, 14),
    st.integers(12, 40),
    st.sampled_from(["max", "mean"]),
)
def test_every_query_token_is_decoded_once_and_in_order(
    queries: list[list[int]], n_tokens: int, scoring_chunk: int | None, n_batch: int, n_free: int, agg_task: str
) -> None:
    cache, tokens = Cache(n_cells=n_tokens + n_free), context(n_tokens)
    cache.n_batch = n_batch
    attention = ask(cache, tokens, *queries, scoring_chunk=scoring_chunk, agg_task=agg_task)
    assert [token for token, _ in cache.queries] == list(itertools.chain(*queries))
    assert cache.held == tokens
    assert cache.peak == n_tokens + attention.chunk
    assert not cache.is_scoring
    assert_scores(attention, cache.queries, n_tokens, agg_task)


@thorough
@given(
    st.integers(1, 400),
    st.floats(0, 1, exclude_min=True),
    st.integers(1, 500),
    st.integers(1, 500),
    st.integers(1, 500),
    st.sampled_from(["max", "mean"]),
)
def test_the_repeat_uses_the_requested_share_of_the_context(
    n_tokens: int, fraction: float, scoring_chunk: int, n_batch: int, n_free: int, agg_task: str
) -> None:
    cache, tokens = Cache(n_cells=n_tokens + n_free), context(n_tokens)
    cache.n_batch = n_batch
    attention = collect(cache, tokens, scoring_fraction=fraction, scoring_chunk=scoring_chunk, agg_task=agg_task)
    assert [token for token, _ in cache.queries] == [
        tokens[i] for places in spread(n_tokens, fraction, 64) for i in places
    ]
    assert cache.held == tokens
    assert_scores(attention, cache.queries, n_tokens, agg_task)


def test_a_mean_divides_the_sum_by_the_number_of_queries_of_all_prompts() -> None:
    cache = Cache()
    attention = ask(cache, context(10), [1, 2, 3], [4], [5, 6, 7], agg_task="mean", scoring_chunk=2)
    for got, summed in zip(attention.layers, cache.collected, strict=True):
        np.testing.assert_array_equal(got, summed / np.float32(7))


@pytest.mark.parametrize(("agg_task", "agg"), [("max", "max"), ("mean", "sum")])
def test_scores_of_the_contexts_cells_are_read_once_everything_is_removed(agg_task: str, agg: str) -> None:
    cache = Cache()
    collect(cache, context(10), agg_task=agg_task, scoring_chunk=4, max_score_bytes=123)
    assert cache.of_kind("begin") == [("begin", agg, 10, 123)]
    assert cache.events[-3:] == [("remove", 10), ("scores",), ("end",)]
    assert len(cache.of_kind("end")) == len(cache.of_kind("scores")) == 1


def test_room_for_a_chunk_is_made_at_once_behind_the_prefill() -> None:
    cache = Cache()
    collect(cache, context(10), scoring_chunk=4)
    assert cache.events[:3] == [("prefill", 10, True), ("reserve", 14), ("begin", "max", 10, 64 << 20)]
    assert len(cache.of_kind("reserve")) == 1


def test_the_prefill_itself_is_not_scored() -> None:
    cache, tokens = Cache(), context(10)
    collect(cache, tokens)
    assert cache.evaluated == [(tokens, 0, False), (tokens, 10, True)]


def test_what_follows_the_context_does_not_judge_it() -> None:
    modes: list[dict[str, Any]] = [{}, {"scoring": "prompts", "prompts": ["1 2"]}]
    for options in modes:
        with_suffix, without = Cache(), Cache()
        collect(with_suffix, context(10), [7, 8, 9], **options)
        collect(without, context(10), **options)
        assert with_suffix.events == without.events


def test_every_prompt_is_tokenized_by_itself() -> None:
    asked: list[str] = []

    def tokenize(text: str) -> list[int]:
        asked.append(text)
        return [len(text)]

    cache = Cache()
    collect(cache, context(10), tokenize=tokenize, scoring="prompts", prompts=["What?", "Who was it?"])
    assert asked == ["What?", "Who was it?"]
    assert cache.of_kind("decode") == [("decode", [5], 10), ("decode", [11], 10)]


@pytest.mark.parametrize(("scoring_chunk", "n_cells"), [(512, 10), (512, 9), (None, 19)])
def test_a_cache_without_room_is_refused_before_anything_is_evaluated(scoring_chunk: int | None, n_cells: int) -> None:
    cache = Cache(n_cells=n_cells, held=[1, 2, 3])
    with pytest.raises(ContextLengthError):
        collect(cache, context(10), scoring_chunk=scoring_chunk)
    assert cache.events == []
    assert cache.held == [1, 2, 3]


def test_less_of_the_context_needs_less_room() -> None:
    cache = Cache(n_cells=264)
    with pytest.raises(ContextLengthError, match="scoring_chunk=None needs 400 cells, n_ctx is 264"):
        collect(cache, context(200), scoring_chunk=None)
    attention = collect(cache, context(200), scoring_chunk=None, scoring_fraction=0.3)
    assert attention.chunk == 64


def test_an_empty_query_beside_others_asks_nothing() -> None:
    cache = Cache()
    ask(cache, context(10), [], [1, 2], [])
    assert cache.of_kind("decode") == [("decode", [1, 2], 10)]


def test_queries_without_any_token_are_refused_before_anything_is_evaluated() -> None:
    cache = Cache()
    with pytest.raises(ConfigError, match="no query token"):
        ask(cache, context(10), [], [])
    assert cache.events == []


#
# every mode
#

SUFFIX = [1, 2, 3, 4, 5, 6]
MODES: dict[str, dict[str, Any]] = {
    "repeat": {"scoring_chunk": 4},
    "prompts": {"scoring": "prompts", "prompts": ["1 2 3 4 5", "6 7"], "scoring_chunk": 4},
    "window inside": {"scoring": "window", "window": 10},
    "window behind": {"scoring": "window", "window": 3},
    "window of all": {"scoring": "window", "window": 100},
    "prefill": {"scoring": "prefill"},
}


@pytest.mark.parametrize("agg_task", ["max", "mean"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("error", [RuntimeError, MemoryError, KeyboardInterrupt, SystemExit])
def test_an_exception_anywhere_leaves_the_context_alone_in_the_cache_and_ends_the_scoring(
    error: type[BaseException], mode: str, agg_task: str
) -> None:
    tokens, options = context(10), MODES[mode] | {"agg_task": agg_task}
    whole = Cache()
    whole.n_batch = 2
    expected = collect(whole, tokens, SUFFIX, **options)
    failed = []
    for fail_at in range(whole.n_calls):
        cache = Cache()
        cache.n_batch = 2
        cache.error = error("stop")
        cache.fail_at = fail_at
        with pytest.raises(error) as caught:
            collect(cache, tokens, SUFFIX, **options)
        assert caught.value is cache.error
        assert cache.n_calls == fail_at + 1, "something was asked for after the exception"
        assert not cache.is_scoring
        assert not cache.is_on_top
        failed.append(next(event[0] for event in reversed(cache.events) if event[0] not in ("remove", "end")))
        if failed[-1] in ("reserve", "decode", "scores"):
            assert cache.held == tokens
        else:  # there was no whole context yet
            assert cache.held == tokens[: len(cache.held)]

        again = collect(cache, tokens, SUFFIX, **options)
        for got, want in zip(again.layers, expected.layers, strict=True):
            np.testing.assert_array_equal(got, want)
    assert {"prefill", "begin", "scores"} <= set(failed)
    assert ("decode" in failed) == (mode != "prefill")


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "prefill"])
def test_what_the_cache_has_of_the_context_is_not_evaluated_again(mode: str) -> None:
    # a window needs its own tokens again
    n_again = {"window inside": 4, "window of all": 10}.get(mode, 0)
    for n_held in (0, 6, 10, 12):
        cache = Cache(held=context(n_held))
        attention = collect(cache, context(10), SUFFIX, **MODES[mode])
        assert attention.n_prefilled == max(n_again, 10 - n_held)
        assert cache.held == context(10)


@pytest.mark.parametrize("mode", MODES)
def test_another_context_in_the_cache_is_forgotten(mode: str) -> None:
    cache, fresh = Cache(held=[1000, 1001, 7, 8, 9]), Cache()
    attention = collect(cache, context(10), SUFFIX, **MODES[mode])
    expected = collect(fresh, context(10), SUFFIX, **MODES[mode])
    assert cache.held == fresh.held == context(10)
    for got, want in zip(attention.layers, expected.layers, strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("mode", MODES)
def test_a_compressed_context_in_the_cache_is_forgotten_before_scoring_begins(mode: str) -> None:
    cache = Cache(held=context(10), is_composed=True)
    attention = collect(cache, context(10), SUFFIX, **MODES[mode])
    assert attention.n_prefilled == 10
    assert cache.held == context(10)


@pytest.mark.parametrize(
    ("mode", "prefill_seconds", "score_seconds"),
    [("repeat", 10, 10), ("prompts", 10, 7), ("window behind", 10, 6), ("prefill", 10, 0)],
)
def test_the_times_of_the_prefill_and_of_the_scoring_pass_are_reported_separately(
    mode: str, prefill_seconds: float, score_seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache()  # a token takes a second
    monkeypatch.setattr("kvcompose_gguf.scoring.collect.time", SimpleNamespace(perf_counter=lambda: cache.seconds))
    attention = collect(cache, context(10), SUFFIX, **MODES[mode])
    assert (attention.prefill_seconds, attention.score_seconds) == (prefill_seconds, score_seconds)
