"""Prefills a context and collects the attention that queries pay to it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import numpy as np

from ..errors import ConfigError, ContextLengthError
from ..kernels.types import FloatArray
from .evidence import Positions
from .pieces import Piece, gap_before
from .reader import Reader, decode_all


@dataclass(frozen=True, eq=False)
class Attention:
    """The attention that queries pay to a context in the cache (KVCompose steps 1 to 3).

    Attributes:
        layers: for each layer float32 ``(n_head, N)``: attention probabilities on each context token, aggregated over
            the requested queries and not renormalised.
        n_prefilled: number of context tokens evaluated.
        prefill_seconds, score_seconds: wall time of the prefill, and of decoding the queries. Queries of ``Window``
            belong to both and count as scoring; queries of ``Prefill`` count as prefill.
        chunk: number of queries at a time: a chunk of the repeat or the prompts, or the whole window; otherwise 0.
        n_window: number of last context tokens that are queries of a ``Window``.
        repeated: the context tokens that were evaluated again at the positions that they have in the whole repeat,
            int32 ``(n,)``.
    """

    layers: list[FloatArray]
    n_prefilled: int
    prefill_seconds: float
    score_seconds: float
    chunk: int
    n_window: int = 0
    repeated: Positions = field(default_factory=lambda: np.empty(0, np.int32))


def collect_queries(reader: Reader, n_queries: int, tokens: Sequence[int]) -> list[FloatArray]:
    """Evaluates the last context tokens again, and returns their queries as they are before the rotation.

    Args:
        n_queries: number of tokens, at most the context.
    Returns:
        For each layer float32 ``(n_head, n_queries, n_embd_head_k)``, scaled as ``QueryStates`` says.
    """
    session, n_tokens = reader.session, len(tokens)
    n_queries = min(n_queries, n_tokens)
    first = n_tokens - n_queries
    reader.prefill(tokens[:first], True)
    tapped: list[list[FloatArray]] = [[] for _ in session.layers]
    for begin in range(first, n_tokens, reader.n_ubatch):  # a tap only has the tokens that are computed at once
        end = min(begin + reader.n_ubatch, n_tokens)
        with session.taps("queries", end - begin):
            reader.prefill(tokens[:end], True)
            for l, parts in enumerate(tapped):
                parts.append(session.tapped("queries", l, end - begin))
    queries = []
    for l, parts in enumerate(tapped):
        rows = np.concatenate(parts)
        n_head = rows.shape[1]
        pos = np.repeat(np.arange(first, n_tokens, dtype=np.int32), n_head)
        plain = session.rope(l, rows.reshape(n_queries * n_head, -1), pos, inverse=True)
        queries.append(np.ascontiguousarray(plain.reshape(rows.shape).transpose(1, 0, 2)))
    return queries


def chunk_size(scoring_chunk: int | None, n_query: int, n_tokens: int, n_cells: int) -> int:
    """Returns how many query tokens fit on top of the context at a time.

    Raises:
        ContextLengthError: the context leaves no cell free, or ``scoring_chunk=None`` and the repeat does not fit.
    """
    n_free = n_cells - n_tokens
    if scoring_chunk is None and n_query > n_free:
        raise ContextLengthError(
            f"scoring_chunk=None needs {n_tokens + n_query} cells, n_ctx is {n_cells}: raise n_ctx or set scoring_chunk"
        )
    if n_free < 1:
        raise ContextLengthError(f"{n_tokens} tokens fill n_ctx={n_cells}, scoring needs free cells: raise n_ctx")
    return min(scoring_chunk or n_query, n_query, n_free)


@dataclass(frozen=True)
class Scorer:
    """The ways to collect attention from a live cache; each request of ``scoring.requests`` uses one of them.

    Attributes:
        reader: the cache.
        use_max: aggregate over the queries by the maximum; False: by the mean over those that can see the token.
        max_bytes: limit of the working memory, not counting the scores.
        tokenize: returns the tokens of a text that follows another text.
        length: length of the whole context, if only its beginning is in the cache; 0: all of it is.
    """

    reader: Reader
    use_max: bool
    max_bytes: int
    tokenize: Callable[[str], Sequence[int]] | None = None
    length: int = 0

    def tokens_of(self, text: str) -> list[int]:
        """Returns the tokens of a text."""
        if not text:
            return []
        if self.tokenize is None:
            raise ConfigError("these queries have texts: give tokenize")
        return list(self.tokenize(text))

    def _scoring(self, n_tokens: int) -> AbstractContextManager[None]:
        return self.reader.session.scoring("max" if self.use_max else "sum", n_tokens, self.max_bytes)

    def on_top(
        self,
        queries: Sequence[Piece],
        scoring_chunk: int | None,
        tokens: Sequence[int],
        introduction: Callable[[int], list[int]] = lambda first: [],
        own: bool = False,
        in_place: bool = False,
    ) -> Attention:
        """Scores with chunks on top of the context: each sees the context and its own beginning.

        Each chunk is removed before the next. The reference instead evaluates one repeat of N tokens at positions N to
        2N-1 (kvcompose_press.py); ``Repeat(chunk=None)`` does the same.

        Args:
            introduction: returns the tokens to put before the chunk that starts at a given token; they are queries too.
            own: score a token only by the chunk that repeats it; the query must be the context.
            in_place: put each chunk at its place after the end of the whole context, or as near to it as the positions
                that the model was trained for allow; False: all directly after what is in the cache.
        """
        n_tokens = len(tokens)
        n_query = max((len(query.tokens) for query in queries), default=0)
        if n_query == 0:
            raise ConfigError("there is no query token to score with: give a context and prompts that are not empty")
        n_words = max(len(introduction(0)), len(introduction(n_query)))
        chunk = chunk_size(scoring_chunk, n_query, n_tokens + n_words, self.reader.session.state().n_cells)
        chunks = [
            Piece(query.place + first, introduction(first) + list(query.tokens[first : first + chunk]))
            for query in queries
            for first in range(0, len(query.tokens), chunk)
        ]

        start = time.perf_counter()
        n_prefilled = self.reader.prefill(tokens, True)
        prefilled = time.perf_counter()
        self.reader.session.reserve(n_tokens + n_words + chunk)
        self.reader.meter.begin("scoring", sum(len(query.tokens) for query in chunks))
        scores: list[list[FloatArray]] = []
        for judges in [[query] for query in chunks] if own else [chunks]:
            with self._scoring(n_tokens):
                for query in judges:
                    gap = gap_before(query, n_tokens, self.length, self.reader.n_ctx_train) if in_place else 0
                    with self.reader.on_top(gap):
                        decode_all(self.reader, query.tokens, n_tokens + gap)
                new = self.reader.session.scores()
            if not self.use_max:
                n_judges = sum(len(query.tokens) for query in judges)
                new = [score / np.float32(n_judges) for score in new]
            scores.append(new)
        if own:
            parts = [[score[:, i * chunk : (i + 1) * chunk] for score in new] for i, new in enumerate(scores)]
            joined = [np.concatenate(part, axis=1) for part in zip(*parts, strict=True)]
        else:
            joined = scores[0]
        return Attention(joined, n_prefilled, prefilled - start, time.perf_counter() - prefilled, chunk)

    def of_window(self, size: int, tokens: Sequence[int], suffix: Sequence[int]) -> Attention:
        """Scores with the prompt's last ``size`` tokens; those after the context are removed from the cache again."""
        n_tokens, n_prompt = len(tokens), len(tokens) + len(suffix)
        first = max(0, n_prompt - size)
        n_cells = self.reader.session.state().n_cells
        if n_prompt > n_cells:
            raise ContextLengthError(f"a prompt of {n_prompt} tokens does not fit into n_ctx={n_cells}: raise n_ctx")

        start = time.perf_counter()
        n_prefilled = self.reader.prefill(tokens[:first], True)
        prefilled = time.perf_counter()
        if first < n_tokens:
            with self._scoring(n_tokens):
                n_prefilled += self.reader.prefill(tokens, True)
                with self.reader.on_top():
                    decode_all(self.reader, suffix, n_tokens)
                scores = self.reader.session.scores()
        else:
            with self.reader.on_top():
                decode_all(self.reader, suffix[: first - n_tokens], n_tokens)
                with self._scoring(n_tokens):
                    decode_all(self.reader, suffix[first - n_tokens :], first)
                    scores = self.reader.session.scores()
        self._divide_by_queries(scores, first, n_prompt)
        elapsed = time.perf_counter() - prefilled
        return Attention(
            scores, n_prefilled, prefilled - start, elapsed, n_prompt - first, max(0, n_tokens - first)
        )  # fmt: skip

    def of_prefill(self, tokens: Sequence[int]) -> Attention:
        """Scores with the context's own tokens during the prefill, so all of them are evaluated again."""
        start = time.perf_counter()
        self.reader.prefill([], False)  # empties the cache: all of the context is needed
        with self._scoring(len(tokens)):
            n_prefilled = self.reader.prefill(tokens, False)
            prefilled = time.perf_counter()
            scores = self.reader.session.scores()
        self._divide_by_queries(scores, 0, len(tokens))
        return Attention(scores, n_prefilled, prefilled - start, time.perf_counter() - prefilled, 0)

    def _divide_by_queries(self, scores: list[FloatArray], first: int, end: int) -> None:
        """Turns sums into means, in place: the queries at ``[max(first, i), end)`` see token i."""
        if not self.use_max:
            n_queries = end - np.maximum(first, np.arange(scores[0].shape[1]))
            for score in scores:
                score /= n_queries.astype(np.float32)
