"""Tests scoring with a fake cache, session and decoder that only records the calls."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcompose_gguf import KVCompose
from kvcompose_gguf.errors import ConfigError, ContextLengthError, StateError
from kvcompose_gguf.plan import seam
from kvcompose_gguf.plan.geometry import CacheState, LayerGeometry
from kvcompose_gguf.scoring.collect import PIECE, Attention, chunk_size, spread
from kvcompose_gguf.support.progress import Meter

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


#
# a fraction of the context
#


@thorough
@given(st.integers(1, 5_000))
def test_a_fraction_of_one_is_the_whole_context(n_tokens: int) -> None:
    assert spread(range(n_tokens), 1.0) == list(range(n_tokens))


@thorough
@given(st.integers(1, 5_000), st.floats(0, 1, exclude_min=True))
def test_a_share_is_pieces_of_neighbours_from_the_first_token_to_the_last(n_tokens: int, fraction: float) -> None:
    share = spread(range(n_tokens), fraction)
    assert len(share) <= n_tokens
    assert (np.diff(share) > 0).all(), "a token is taken twice, or out of order"
    if len(share) == n_tokens:
        return
    pieces = np.array(share).reshape(-1, PIECE)
    assert (np.diff(pieces, axis=1) == 1).all()
    assert share[0] == 0
    if len(pieces) > 1:
        assert share[-1] == n_tokens - 1
        assert np.ptp(np.diff(pieces[:, 0])) <= 1, "the pieces are not evenly spread"


@thorough
@given(st.integers(1, 5_000), st.floats(0, 1, exclude_min=True))
def test_a_share_is_the_fraction_asked_for_to_half_a_piece_but_one_piece_at_least(
    n_tokens: int, fraction: float
) -> None:
    n_share = len(spread(range(n_tokens), fraction))
    assert n_share >= min(PIECE, n_tokens)
    assert n_share == min(PIECE, n_tokens) or abs(n_share - fraction * n_tokens) <= PIECE / 2


@pytest.mark.parametrize(
    ("n_tokens", "fraction", "starts"),
    [
        (640, 0.3, [0, 288, 576]),
        (1000, 0.01, [0]),
        (1000, 0.13, [0, 936]),
        (129, 0.99, [0, 65]),
        (64, 0.5, [0]),
        (65, 1e-9, [0]),
    ],
)
def test_pieces_start_where_they_should(n_tokens: int, fraction: float, starts: list[int]) -> None:
    expected = [token for start in starts for token in range(start, start + 64)]
    assert spread(range(n_tokens), fraction) == expected


@pytest.mark.parametrize("n_tokens", [1, 10, 63])
def test_a_context_shorter_than_a_piece_is_taken_whole(n_tokens: int) -> None:
    assert spread(range(n_tokens), 0.1) == list(range(n_tokens))


#
# a cache that records what happens to it
#


def payment(il: int, g: LayerGeometry, token: int, n_cells: int) -> np.ndarray:
    """Returns a query token's attention to each cell, ``(n_head, n_cells)``: sixteenths, with exact sums in float32."""
    head = np.arange(g.n_head)[:, None]
    return ((il + 3 * token + 7 * head + 5 * np.arange(n_cells)) % 16 / 16).astype(np.float32)


class Cache:
    """A fake session and decoder that knows its tokens; ``payment`` gives its queries' attention.

    Attributes:
        events: the requests, in order.
        evaluated: tokens, first position and whether they were scored, for every prefill and decode.
        fail_at: number of the call that raises ``error`` half-way.
    """

    layers = (layer(4, 2), layer(2, 1))
    n_batch = n_ubatch = 1 << 20

    def __init__(self, n_cells: int = 1 << 20, held: Sequence[int] = (), is_composed: bool = False) -> None:
        self.n_cells = n_cells
        self.held = list(held)
        self.peak = len(self.held)
        self.is_composed = is_composed
        self.is_scoring = self.is_on_top = False
        self.meter = Meter()
        self.events: list[tuple[Any, ...]] = []
        self.evaluated: list[tuple[list[int], int, bool]] = []
        self.collected: list[np.ndarray] = []
        self.seconds = 0.0
        self.n_calls = 0
        self.fail_at: int | None = None
        self.error: BaseException = RuntimeError("llama_decode returned -1")

    def _call(self, *event: Any) -> None:
        self.events.append(event)
        self.n_calls += 1
        if self.fail_at == self.n_calls - 1:
            raise self.error

    def _evaluate(self, tokens: Sequence[int]) -> None:
        if not tokens:
            return
        self.evaluated.append((list(tokens), len(self.held), self.is_scoring))
        self.seconds += len(tokens)
        for token in tokens:
            self.held.append(token)
            for il in range(len(self.layers) if self.is_scoring else 0):
                scores = self.collected[il][:, : len(self.held)]  # a view: causal attention
                paid = payment(il, self.layers[il], token, scores.shape[1])
                scores[:] = np.maximum(scores, paid) if self.agg == "max" else scores + paid
        self.peak = max(self.peak, len(self.held))
        assert self.peak <= self.n_cells, "decoded beyond the last cell"

    # session

    @property
    def session(self) -> Cache:
        return self

    def state(self) -> CacheState:
        n_composed = len(self.held) if self.is_composed else 0
        return CacheState(self.n_cells, self.n_cells, len(self.held), n_composed, self.is_scoring, 0, 0)

    def reserve(self, n_cells: int) -> None:
        assert n_cells <= self.n_cells, "the native library refuses more cells than the context has"
        self._call("reserve", n_cells)

    @contextmanager
    def scoring(self, agg: str, n_cells: int, max_bytes: int) -> Iterator[None]:
        assert agg in ("max", "sum")
        assert 0 < n_cells <= self.n_cells
        assert not self.is_scoring
        self._call("begin", agg, n_cells, max_bytes)
        if self.is_composed:
            raise StateError("the cache is composed, its cells are no single tokens")
        self.agg, self.is_scoring = agg, True
        self.collected = [np.zeros((g.n_head, n_cells), np.float32) for g in self.layers]
        try:
            yield
        finally:
            self.is_scoring = False
            self.events.append(("end",))

    def scores(self, n_cells: int) -> list[np.ndarray]:
        assert self.is_scoring, "the native library has scores only while it is scoring"
        assert n_cells == self.collected[0].shape[1]
        self._call("scores", n_cells)
        return [scores.copy() for scores in self.collected]

    # decoder

    def prefill(self, tokens: Sequence[int], keep_prefix: bool) -> int:
        assert not self.is_on_top, "prefilled what is forgotten again"
        n_kept = seam.common_prefix(self.held, list(tokens)) if keep_prefix and not self.is_composed else 0
        rest = list(tokens[n_kept:])
        try:
            self._call("prefill", len(tokens), keep_prefix)
        except BaseException:
            rest = rest[: len(rest) // 2]
            raise
        finally:
            del self.held[n_kept:]
            self.is_composed = False
            self._evaluate(rest)
        return len(rest)

    def decode(self, tokens: Sequence[int], pos: int) -> None:
        assert self.is_on_top, "nobody would remove these tokens"
        assert 0 < len(tokens) <= self.n_batch
        assert pos == len(self.held), f"decoded at {pos}, the cache ends at {len(self.held)}"
        try:
            self._call("decode", list(tokens), pos)
        finally:
            self._evaluate(tokens)

    @contextmanager
    def on_top(self, pos: int) -> Iterator[None]:
        assert not self.is_on_top
        assert pos == len(self.held), f"what is kept ends at {pos}, the cache at {len(self.held)}"
        self.is_on_top = True
        try:
            yield
        finally:
            self.is_on_top = False
            self.events.append(("remove", pos))
            del self.held[pos:]

    # what was recorded

    def of_kind(self, *kinds: str) -> list[tuple[Any, ...]]:
        return [event for event in self.events if event[0] in kinds]

    @property
    def decodes(self) -> list[tuple[int, int]]:
        """Returns the number of tokens and the first position of every decode."""
        return [(len(tokens), pos) for _, tokens, pos in self.of_kind("decode")]

    @property
    def queries(self) -> list[tuple[int, int]]:
        """Returns every scored token and its position."""
        return [
            (token, pos + i)
            for tokens, pos, is_scored in self.evaluated
            for i, token in enumerate(tokens if is_scored else [])
        ]


def context(n_tokens: int) -> list[int]:
    return list(range(1000, 1000 + n_tokens))


def words(text: str) -> list[int]:
    return [int(word) for word in text.split()]


def collect(
    cache: Cache,
    tokens: Sequence[int],
    suffix: Sequence[int] = (),
    tokenize: Callable[[str], Sequence[int]] = words,
    **options: Any,
) -> Attention:
    method = KVCompose(compression_ratio=0.5, **options)
    request = method.attention_request
    assert request is not None
    return request.collect(cache, tokens, suffix, tokenize, method.max_score_bytes)  # type: ignore[arg-type]


def ask(cache: Cache, tokens: Sequence[int], *queries: Sequence[int], **options: Any) -> Attention:
    """Calls ``collect`` with prompts of these tokens."""
    prompts = [" ".join(map(str, query)) or " " for query in queries]
    return collect(cache, tokens, scoring="prompts", prompts=prompts, **options)


def assert_scores(attention: Attention, queries: Sequence[tuple[int, int]], n_tokens: int, agg_task: str) -> None:
    """Asserts that the scores are agg_task over the queries (tokens and positions) that can see each context token."""
    sees = np.array([[pos >= i for i in range(n_tokens)] for _, pos in queries])
    for il, g in enumerate(Cache.layers):
        paid = np.stack([payment(il, g, token, n_tokens) for token, _ in queries]) * sees[:, None]
        expected = paid.max(axis=0) if agg_task == "max" else paid.sum(axis=0) / sees.sum(axis=0, dtype=np.float32)
        assert attention.layers[il].dtype == np.float32
        np.testing.assert_array_equal(attention.layers[il], expected.astype(np.float32))
    assert len(attention.layers) == len(Cache.layers)


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
    assert [token for token, _ in cache.queries] == spread(tokens, fraction)
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
    assert cache.events[-3:] == [("remove", 10), ("scores", 10), ("end",)]
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
    for options in ({}, {"scoring": "prompts", "prompts": ["1 2"]}):
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
    monkeypatch.setattr(f"{__name__}.payment", lambda il, g, token, n: np.full((g.n_head, n), 0.25, np.float32))
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
    assert cache.events[-3:] == [("prefill", 10, False), ("scores", 10), ("end",)]
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
