"""A fake cache that records what scoring does to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from kvcompose_gguf import KVCompose
from kvcompose_gguf.errors import StateError
from kvcompose_gguf.plan import seam
from kvcompose_gguf.plan.geometry import CacheState, LayerGeometry
from kvcompose_gguf.scoring.collect import Attention
from kvcompose_gguf.support.progress import Meter


def layer(n_head: int, n_head_kv: int) -> LayerGeometry:
    return LayerGeometry(0, n_head, n_head_kv, 16, 16, 1, 1, False, 64)


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
    n_batch = n_ubatch = n_ctx_train = 1 << 20

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
        return CacheState(self.n_cells, self.n_cells, len(self.held), n_composed, self.is_scoring, 0, False, 0)

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

    def scores(self) -> list[np.ndarray]:
        assert self.is_scoring, "the native library has scores only while it is scoring"
        self._call("scores")
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
    def on_top(self, gap: int = 0) -> Iterator[None]:
        assert not self.is_on_top
        self.is_on_top, pos = True, len(self.held)
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
    method = KVCompose(**({"compression_ratio": 0.5, "scoring": "repeat", "in_place": False} | options))  # type: ignore[arg-type]
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
