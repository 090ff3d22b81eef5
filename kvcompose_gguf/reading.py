"""Reads a context into the cache in parts: each is scored when it was read, and the cache composed before the next."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from .context import START_CELLS, Context
from .errors import ContextLengthError
from .kernels.types import FloatArray
from .methods.base import Method
from .methods.continuing import choice_of
from .native.rows import ContextRows, NewRows
from .plan import seam
from .plan.budget import PART
from .plan.geometry import LayerGeometry
from .plan.report import KVReport
from .plan.rows import Rows
from .scoring.collect import Attention
from .scoring.evidence import Evidence
from .scoring.newest import attention_to_newest
from .scoring.requests import AttentionRequest, StateRequest
from .support.printing import megabytes
from .support.timing import Stopwatch, timed


def attend(
    context: Context,
    tokens: Sequence[int],
    request: AttentionRequest | None,
    suffix: Sequence[int] = (),
    max_bytes: int = 64 << 20,
    length: int = 0,
) -> Attention:
    """Prefills ``tokens`` and returns the attention that ``request`` asks for, if any (``AttentionRequest.collect``).

    Args:
        suffix: tokens that follow the context in its prompt.
        max_bytes: limit of the working memory, not counting the scores.
        length: length of the whole context, if ``tokens`` are only its beginning.
    """
    if request is None:
        n_prefilled, seconds = timed(lambda: context.prefill(tokens))
        return Attention([], n_prefilled, seconds, 0.0, 0)
    try:
        return request.collect(context, tokens, suffix, context.vocabulary.tokens, max_bytes, length)
    finally:
        context.forget_logits()  # the last logits belong to another decode


def evidence_of(
    context: Context, tokens: Sequence[int], attention: Attention, states: StateRequest | None, length: int = 0
) -> Evidence:
    """Returns the evidence of a full cache that holds ``tokens``.

    Args:
        length: as for ``attend``.
    """
    queries = [] if states is None else states.collect(context, tokens)
    rows, layers, n = ContextRows(context.session, len(tokens)), context.session.layers, len(tokens)
    return Evidence(n, layers, attention.layers, attention.n_window, rows, queries, attention.repeated, length=length)


def check_ceiling(method: Method, layers: Sequence[LayerGeometry], n_tokens: int) -> None:
    """Raises ContextLengthError if a context has to be read as a whole, and then takes more than ``max_kv_bytes``."""
    n_rows = method.n_composites(layers, n_tokens) // len(layers)
    if method.max_kv_bytes is None or method.streams or n_tokens <= n_rows + method.chunk_for(layers, n_tokens):
        return
    n_bytes = n_tokens * sum(layer.n_bytes_row for layer in layers)
    name = type(method).__name__
    raise ContextLengthError(
        f"{name} with these options reads all {n_tokens} tokens before it evicts any: {megabytes(n_bytes)}, more than "
        f"max_kv_bytes={method.max_kv_bytes}; use a method that reads in parts, e.g. KVCompose(scoring='auto'), or "
        "compression_ratio or n_kept, which limit only what is kept"
    )


def first_part(method: Method, layers: Sequence[LayerGeometry], n_tokens: int) -> int:
    """Returns how many tokens of a context are read before any is evicted: all, unless it is read in parts."""
    n_rows = method.n_composites(layers, n_tokens) // len(layers)
    if not method.reads_in_parts or n_tokens + START_CELLS <= n_rows + method.chunk_for(layers, n_tokens):
        return n_tokens
    return min(n_tokens, most_tokens(method, layers, n_tokens))


def most_tokens(method: Method, layers: Sequence[LayerGeometry], n_tokens: int) -> int:
    """Returns how many tokens a full cache may have, so that pieces of them can be repeated on top of it."""
    n_spare = max(START_CELLS, method.n_on_top)  # a cache reserves as many when it reads
    return max(START_CELLS, most_cells(method, layers, n_tokens) - n_spare)


def most_cells(method: Method, layers: Sequence[LayerGeometry], n_tokens: int) -> int:
    """Returns how many cells a full cache may have: those of the budget and a chunk, in llama.cpp's steps."""
    n_rows = method.n_composites(layers, n_tokens) // len(layers)
    return max(2, (n_rows + method.chunk_for(layers, n_tokens)) // START_CELLS) * START_CELLS


def part_size(chunk: int, n_rows: int) -> int:
    """Returns how many tokens are read between two compositions: 512, or fewer if chunk or budget are smaller.

    A part sees what is left of the parts before it. Budget and chunk are the ceiling in any case, so the shorter the
    part, the more is left. That matters where little is kept: SmolLM2, 2,048 tokens, 87.5 % removed.
    """
    return max(1, min(chunk, PART, max(n_rows, chunk // 4)))


class Reading:
    """One context on its way into a cache: what has been read, scored and composed of it so far.

    Args:
        n_tokens: number of tokens of the whole context, which decides the budget.
    Attributes:
        method: the method, with what this context has taught it.
        rows: the rows of the cache, with their scores.
        n_composed: how often the cache was composed.
    """

    def __init__(self, context: Context, method: Method, n_tokens: int) -> None:
        self._context, self._layers, self._n_tokens = context, context.session.layers, n_tokens
        self._choice = choice_of(method)
        self._n_total = method.n_composites(self._layers, n_tokens)
        self._n_sink, self._n_recent = method.forced(self._layers, n_tokens)
        self.method = method.informed()
        self.rows = Rows.of_tokens([np.zeros((layer.n_head_kv, 0), np.float32) for layer in self._layers])
        self.n_composed = 0
        self._attention = Attention([], 0, 0.0, 0.0, 0)
        self._clock, self._n_read, self._peak, self._is_blind = Stopwatch(), 0, 0, False

    def prefill(self, tokens: Sequence[int]) -> None:
        """Reads tokens into a full cache, and scores nothing."""
        self._attention = attend(self._context, tokens, None)
        self._look()

    def begin(self, tokens: Sequence[int], suffix: Sequence[int] = ()) -> None:
        """Reads the first tokens into a full cache, and scores them with all evidence that the method asks for."""
        method, context, time, length = self.method, self._context, self._clock.time, self._n_tokens
        request, states = method.attention_request, method.state_request
        self._attention = attend(context, tokens, request, suffix, method.max_score_bytes, length)
        if len(tokens) < length:
            context.session.reserve(most_cells(method, self._layers, length))
        self._look()
        evidence = time("scores", lambda: evidence_of(context, tokens, self._attention, states, length))
        self.method = time("scores", partial(method.taught_by, evidence))
        self.rows = self._scored(evidence)

    def resume(self, tokens: Sequence[int], unscored: bool = False) -> bool:
        """Goes on from the compressed beginning of ``tokens`` in the cache; returns False if that is impossible.

        Args:
            unscored: go on although new tokens cannot be scored; they are evicted before all others.
        """
        composed = self._context.composed
        if composed is None or composed.choice != self._choice or not composed.begins(tokens):
            return False
        if choice_of(self._context.taught) == self._choice:
            self.method = self._context.taught or self.method
        self._is_blind = not self.method.can_score_alone(self._layers)
        if self._is_blind and not unscored:
            return False
        self._context.rewind(seam.common_prefix(self._context.tokens, tokens))
        composed = self._context.composed
        if composed is None:  # this cache could not go back
            return False
        self.rows = composed.rows
        if not self._is_blind:
            self.method = self.method.taught_by(self._evidence(0, 0))  # nothing, but the method must not ask for more
        self.score()
        return True

    def go_on(self, tokens: Sequence[int]) -> None:
        """Reads the rest of ``tokens``, part by part; composes the cache before a part that does not fit."""
        n_first, n_layer = self._context.n_tokens, len(self._layers)
        chunk = self.method.chunk_for(self._layers, self._n_tokens)
        n_most = self._n_total + chunk * n_layer
        n_part = part_size(chunk, self._n_total // n_layer)
        n_part -= min(n_part // 2, max(0, n_part + self._n_again(n_part) - chunk))  # both fit into the chunk
        if n_first < len(tokens):
            self._context.meter.begin("reading", len(tokens), n_first)
        for first in range(n_first, len(tokens), n_part):
            part = tokens[first : first + n_part]
            n_again = min(self._n_again(len(part)), self._context.n_ctx - first - len(part))  # a layer may keep all
            n_left = n_most - (len(part) + n_again) * n_layer
            if self.rows.n_rows.sum() > n_left:
                # nobody continues a context that is interrupted here: its budget is another. No method has this name
                room, n_fresh = len(part) + n_again, self.method.n_fresh
                self.compose(room, choice="unfinished", n_fresh=n_fresh, n_total=n_left)
            self._clock.time("prefill", partial(self._context.extend, part))
            self._n_read += len(part)
            self.score(n_again)
        if n_first < len(tokens):
            self._context.forget_logits()

    def _n_again(self, n_tokens: int) -> int:
        return 0 if self._is_blind else self.method.n_again(n_tokens)

    def score(self, n_again: int = 0) -> None:
        """Scores the tokens of the cache that have no scores.

        Args:
            n_again: so many of them are evaluated a second time: what they pay to the others is seen, not predicted.
        """
        self._look()
        first = self.rows.end
        if first < self._context.n_tokens:
            n_new = self._context.n_tokens - first
            if self._is_blind:
                scores = [np.zeros((layer.n_head_kv, n_new), np.float32) for layer in self._layers]
                new = Rows.of_tokens(scores, first)
            else:
                new = self._scored(self._clock.time("scores", partial(self._evidence, first, n_new, n_again)))
            self.rows = self.rows.followed_by(new)

    def compose(
        self, n_room: int, choice: str | None = None, n_fresh: int = 0, n_tail: int = 0, n_total: int | None = None
    ) -> None:
        """Composes the cache.

        Args:
            n_room: free cells to leave.
            choice: name under which the context continues; None: that of the method.
            n_fresh: so many of the newest tokens stay in every head, but at most a quarter of the budget.
            n_tail: so many of the newest tokens stay, and can still be removed, but at most a quarter of the budget.
            n_total: number of rows to keep, over all layers; None: the budget.
        """
        n_total = self._n_total if n_total is None else n_total
        n_total = min(n_total, int(self.rows.n_rows.sum()))  # fewer are left if tokens were taken back
        n_rows = n_total // len(self._layers)
        n_tail = min(n_tail, n_rows // 4, n_rows - self._n_sink)
        n_fresh = max(self._n_recent, n_tail, min(n_fresh, n_rows // 4, n_rows - self._n_sink))
        choose = partial(self.method.choose, self.rows, self._context.n_tokens, n_total, self._n_sink, n_fresh, n_tail)
        plan = self._clock.time("plan", choose)
        choice = self._choice if choice is None else choice
        self._clock.time("compose", partial(self._context.compose, plan, choice, n_room, self.rows))
        self.rows, self.n_composed = self.rows.kept(plan), self.n_composed + 1

    def report(self) -> KVReport:
        """Returns the figures so far."""
        n_kept = self.rows.n_rows if self.n_composed else np.full(len(self._layers), self._n_tokens)
        n_bytes_row = [layer.n_bytes_row for layer in self._layers]
        return KVReport(
            n_tokens=self._n_tokens,
            n_kept=n_kept,
            n_sink=self._n_sink if self.n_composed else 0,
            n_recent=self._n_recent if self.n_composed else 0,
            kv_bytes_full=self._n_tokens * sum(n_bytes_row),
            kv_bytes_kept=int(sum(n * size for n, size in zip(n_kept, n_bytes_row, strict=True))),
            kv_bytes_before=self._peak,
            kv_bytes=self._context.session.state().n_bytes,
            prefill_seconds=self._attention.prefill_seconds + self._clock.seconds["prefill"],
            score_seconds=self._attention.score_seconds + self._clock.seconds["scores"],
            plan_seconds=self._clock.seconds["plan"],
            compose_seconds=self._clock.seconds["compose"],
            n_prefilled=self._attention.n_prefilled + self._n_read,
            scoring_chunk=self._attention.chunk,
            scoring=self.method.note,
            n_composed=self.n_composed,
        )

    def _scored(self, evidence: Evidence) -> Rows:
        """Returns the rows of tokens that were just read."""

        def score() -> list[FloatArray]:
            self.method = self.method.read_on(evidence)
            return self.method.scores(evidence)

        scores = self._clock.time("scores", score)
        self._context.taught = self.method
        return Rows.of_tokens(scores, evidence.first)

    def _evidence(self, first: int, n: int, n_again: int = 0) -> Evidence:
        """Returns the evidence of the newest ``n`` tokens of the cache, from position ``first`` on."""
        context, length, attention = self._context, self._n_tokens, list[FloatArray]()
        if n_again:
            max_bytes = self.method.max_score_bytes
            attention = attention_to_newest(context, context.tokens, n, n_again, length, max_bytes)
            self._look()
        return Evidence(n, self._layers, attention, rows=NewRows(context.session, n), first=first, length=length)

    def _look(self) -> None:
        self._peak = max(self._peak, self._context.session.state().n_bytes)
