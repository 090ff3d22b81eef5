"""The scoring pass with a cache and a session that only write down what is asked of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcompose_gguf.errors import ConfigError, ContextLengthError, StateError
from kvcompose_gguf.geometry import CacheState, LayerGeometry
from kvcompose_gguf.scoring import chunk_size, collect_attention, decode_size

thorough = settings(deadline=None, derandomize=True, max_examples=100)


def layer(n_head: int, n_head_kv: int) -> LayerGeometry:
    return LayerGeometry(0, n_head, n_head_kv, 16, 16, 1, 1, False, 64)


#
# sizes
#


@thorough
@given(st.integers(1, 600), st.integers(1, 5_000), st.integers(1, 5_000), st.integers(1, 5_000))
def test_a_chunk_is_as_large_as_asked_for_if_the_query_and_the_free_cells_allow(
    scoring_chunk: int, n_query: int, n_tokens: int, n_free: int
) -> None:
    chunk = chunk_size(scoring_chunk, n_query, n_tokens, n_tokens + n_free)
    assert chunk >= 1
    assert chunk == min(scoring_chunk, n_query, n_free)


@thorough
@given(st.integers(1, 5_000), st.integers(1, 5_000), st.integers(0, 5_000))
def test_no_chunk_size_keeps_the_whole_query_if_it_fits(n_query: int, n_tokens: int, n_more: int) -> None:
    assert chunk_size(None, n_query, n_tokens, n_tokens + n_query + n_more) == n_query


@pytest.mark.parametrize("n_free", [-1, 0, 1, 9])
def test_no_chunk_size_is_refused_if_the_query_does_not_fit(n_free: int) -> None:
    with pytest.raises(ContextLengthError, match=rf"scoring_chunk=None needs 110 cells, n_ctx is {100 + n_free}"):
        chunk_size(None, 10, 100, 100 + n_free)


@pytest.mark.parametrize("n_cells", [99, 100])
def test_a_context_that_leaves_no_cell_free_cannot_be_scored(n_cells: int) -> None:
    with pytest.raises(ContextLengthError, match=f"100 tokens fill n_ctx={n_cells}"):
        chunk_size(512, 10, 100, n_cells)


def test_one_free_cell_is_enough_to_score() -> None:
    assert chunk_size(512, 100, 100, 101) == 1


@thorough
@given(st.integers(1, 1 << 28), st.integers(1, 40_000), st.sampled_from([1, 2, 3, 4, 8]))
def test_a_scoring_decode_is_the_largest_whose_matrix_is_in_bounds(max_bytes: int, n_kv: int, n_group: int) -> None:
    n_decode = decode_size(max_bytes, [layer(2 * n_group, 2)], n_kv)
    n_kv_padded = next(n for n in itertools.count(n_kv) if n % 256 == 0)
    n_bytes_token = 4 * n_kv_padded * n_group
    assert n_decode == 1 or n_decode * n_bytes_token <= max_bytes
    assert (n_decode + 1) * n_bytes_token > max_bytes


def test_the_layer_with_the_largest_groups_bounds_a_scoring_decode() -> None:
    one, large = layer(4, 4), layer(16, 2)
    assert decode_size(1 << 20, [one], 256) == 1024
    assert decode_size(1 << 20, [large], 256) == 128
    assert decode_size(1 << 20, [one, large, one], 256) == 128


def test_one_token_is_decoded_at_a_time_if_not_even_that_is_in_bounds() -> None:
    assert decode_size(1, [layer(2, 2)], 100_000) == 1


#
# collect_attention
#


class Cache:
    """Session and decoder in one: a cache of ``n_tokens`` that knows its length and keeps a list of what happened."""

    layers = (layer(4, 2), layer(4, 1))
    n_batch = 1 << 20

    def __init__(self, n_tokens: int, n_cells: int = 1 << 20) -> None:
        self.n_tokens = n_tokens
        self.n_cells = n_cells
        self.length = self.peak = n_tokens
        self.is_scoring = False
        self.events: list[tuple[Any, ...]] = []
        self.fail_at_decode: int | None = None
        self.fail_at_scores = False
        self.error: BaseException = RuntimeError("llama_decode returned -1")
        self.collected = [np.full((g.n_head, n_tokens), il, np.float32) for il, g in enumerate(self.layers)]

    def state(self) -> CacheState:
        return CacheState(self.n_cells, self.n_cells, self.length, 0, self.is_scoring, 0)

    @contextmanager
    def scoring(self, agg_task: str, n_cells: int) -> Iterator[None]:
        self.events.append(("begin", agg_task, n_cells))
        self.is_scoring = True
        try:
            yield
        finally:
            self.is_scoring = False
            self.events.append(("end",))

    def scores(self, n_cells: int) -> list[np.ndarray]:
        assert self.is_scoring, "the native library has scores only while it is scoring"
        self.events.append(("scores", n_cells))
        if self.fail_at_scores:
            raise self.error
        return self.collected

    def decode(self, tokens: Sequence[int], pos: int) -> None:
        assert self.is_scoring, "decoded without scoring"
        assert 0 < len(tokens) <= self.n_batch
        assert pos == self.length, f"decoded at {pos}, the cache ends at {self.length}"
        if self.fail_at_decode == len(self.of_kind("decode")):
            raise self.error
        self.events.append(("decode", list(tokens), pos))
        self.length += len(tokens)
        self.peak = max(self.peak, self.length)
        assert self.length <= self.n_cells, "decoded beyond the last cell"

    def remove(self, pos: int) -> None:
        self.events.append(("remove", pos))
        self.length = min(self.length, pos)

    @property
    def decodes(self) -> list[tuple[int, int]]:
        """Number of tokens and first position of every decode."""
        return [(len(tokens), pos) for _, tokens, pos in self.of_kind("decode")]

    def of_kind(self, kind: str) -> list[tuple[Any, ...]]:
        return [event for event in self.events if event[0] == kind]


def collect(
    cache: Cache,
    *queries: Sequence[int],
    agg_task: str = "max",
    scoring_chunk: int | None = 512,
    max_score_bytes: int = 1 << 40,
) -> tuple[list[np.ndarray], int]:
    return collect_attention(
        cache,  # type: ignore[arg-type]
        cache,
        queries,
        cache.n_tokens,
        agg_task,
        scoring_chunk,
        max_score_bytes,
    )


def test_every_chunk_starts_again_at_n_tokens_and_is_removed() -> None:
    cache = Cache(100)
    _, chunk = collect(cache, range(10), scoring_chunk=4)
    assert chunk == 4
    decodes_and_removes = [event for event in cache.events if event[0] in ("decode", "remove")]
    assert decodes_and_removes[:6] == [
        ("decode", [0, 1, 2, 3], 100),
        ("remove", 100),
        ("decode", [4, 5, 6, 7], 100),
        ("remove", 100),
        ("decode", [8, 9], 100),
        ("remove", 100),
    ]
    assert not [event for event in decodes_and_removes[6:] if event[0] == "decode"]
    assert (cache.length, cache.peak) == (100, 104)


def test_decodes_of_one_chunk_follow_each_other_and_are_removed_together() -> None:
    cache = Cache(100)
    cache.n_batch = 3
    collect(cache, range(10), scoring_chunk=5)
    decodes_and_removes = [event for event in cache.events if event[0] in ("decode", "remove")]
    assert decodes_and_removes[:6] == [
        ("decode", [0, 1, 2], 100),
        ("decode", [3, 4], 103),
        ("remove", 100),
        ("decode", [5, 6, 7], 100),
        ("decode", [8, 9], 103),
        ("remove", 100),
    ]


def test_the_score_matrix_bounds_a_decode_and_not_a_chunk() -> None:
    cache = Cache(100)
    n_bytes_token = 4 * 256 * 4  # float32, 100 + 10 cells padded to 256, 4 query heads a KV head
    _, chunk = collect(cache, range(10), max_score_bytes=3 * n_bytes_token)
    assert chunk == 10
    assert cache.decodes == [(3, 100), (3, 103), (3, 106), (1, 109)]


def test_no_chunk_size_keeps_the_whole_repeat_on_top_of_the_context() -> None:
    cache = Cache(100, n_cells=200)
    cache.n_batch = 64
    _, chunk = collect(cache, range(100), scoring_chunk=None)
    assert chunk == 100
    assert cache.decodes == [(64, 100), (36, 164)]
    assert (cache.length, cache.peak) == (100, 200)


def test_a_nearly_full_cache_is_scored_in_the_cells_that_are_free() -> None:
    cache = Cache(100, n_cells=103)
    _, chunk = collect(cache, range(10))
    assert chunk == 3
    assert cache.decodes == [(3, 100), (3, 100), (3, 100), (1, 100)]


def test_no_chunk_spans_two_queries() -> None:
    cache = Cache(100)
    _, chunk = collect(cache, [1, 2, 3], [4], [5, 6, 7, 8, 9], scoring_chunk=4)
    assert chunk == 4
    assert cache.of_kind("decode") == [
        ("decode", [1, 2, 3], 100),
        ("decode", [4], 100),
        ("decode", [5, 6, 7, 8], 100),
        ("decode", [9], 100),
    ]


@thorough
@given(
    st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=12), min_size=1, max_size=3),
    st.integers(1, 20),
    st.one_of(st.none(), st.integers(1, 14)),
    st.integers(1, 14),
    st.integers(1, 1 << 16),
    st.integers(12, 40),
)
def test_every_query_token_is_decoded_once_and_in_order(
    queries: list[list[int]], n_tokens: int, scoring_chunk: int | None, n_batch: int, max_score_bytes: int, n_free: int
) -> None:
    cache = Cache(n_tokens, n_cells=n_tokens + n_free)
    cache.n_batch = n_batch
    _, chunk = collect(cache, *queries, scoring_chunk=scoring_chunk, max_score_bytes=max_score_bytes)
    assert [token for _, tokens, _ in cache.of_kind("decode") for token in tokens] == list(itertools.chain(*queries))
    assert cache.length == n_tokens
    assert cache.peak == n_tokens + chunk
    assert not cache.is_scoring


@pytest.mark.parametrize("agg_task", ["max", "mean"])
def test_scores_of_the_contexts_cells_are_read_once_everything_is_removed(agg_task: str) -> None:
    cache = Cache(100)
    attention, _ = collect(cache, range(10), agg_task=agg_task, scoring_chunk=4)
    assert attention is cache.collected
    assert cache.events[0] == ("begin", agg_task, 100)
    assert cache.events[-3:] == [("remove", 100), ("scores", 100), ("end",)]
    assert len(cache.of_kind("begin")) == len(cache.of_kind("end")) == len(cache.of_kind("scores")) == 1


@pytest.mark.parametrize("fail_at_decode", [0, 1, 3])
@pytest.mark.parametrize("error", [RuntimeError, MemoryError, KeyboardInterrupt, SystemExit])
def test_an_exception_while_decoding_leaves_the_context_alone_in_the_cache(
    error: type[BaseException], fail_at_decode: int
) -> None:
    cache = Cache(100)
    cache.n_batch = 2
    cache.error = error("stop")
    cache.fail_at_decode = fail_at_decode
    with pytest.raises(error) as caught:
        collect(cache, range(10), scoring_chunk=4)
    assert caught.value is cache.error
    assert len(cache.of_kind("decode")) == fail_at_decode
    assert cache.length == 100
    assert cache.events[-2:] == [("remove", 100), ("end",)]
    assert not cache.of_kind("scores")


@pytest.mark.parametrize("error", [StateError, KeyboardInterrupt])
def test_an_exception_while_reading_the_scores_ends_the_scoring(error: type[BaseException]) -> None:
    cache = Cache(100)
    cache.error = error("stop")
    cache.fail_at_scores = True
    with pytest.raises(error):
        collect(cache, range(10))
    assert cache.length == 100
    assert cache.events[-1] == ("end",)


@pytest.mark.parametrize(("scoring_chunk", "n_cells"), [(512, 100), (None, 109)])
def test_a_cache_without_room_is_refused_before_scoring_begins(scoring_chunk: int | None, n_cells: int) -> None:
    cache = Cache(100, n_cells=n_cells)
    with pytest.raises(ContextLengthError):
        collect(cache, range(10), scoring_chunk=scoring_chunk)
    assert cache.events == []


def test_an_empty_query_beside_others_asks_nothing() -> None:
    cache = Cache(100)
    collect(cache, [], [1, 2], [])
    assert cache.of_kind("decode") == [("decode", [1, 2], 100)]


def test_queries_without_any_token_are_refused() -> None:
    cache = Cache(100)
    with pytest.raises(ConfigError):
        collect(cache, [])
