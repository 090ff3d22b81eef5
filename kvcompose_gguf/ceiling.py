"""Keeps a cache below a budget while answers are written and conversations go on."""

from __future__ import annotations

from collections.abc import Sequence

from .context import START_CELLS, Context
from .methods.base import Method
from .plan.composed import Composed
from .plan.geometry import LayerGeometry
from .reading import Reading, most_cells, most_tokens


def ceiling_bytes(method: Method, layers: Sequence[LayerGeometry], n_tokens: int) -> int:
    """Returns the largest number of bytes that a cache of a method that ``has_ceiling`` may have for ``n_tokens``."""
    n_bytes_row = [layer.n_bytes_row for layer in layers]
    n_composites, chunk = method.n_composites(layers, n_tokens), method.chunk_for(layers, n_tokens)
    return n_composites * max(n_bytes_row) + chunk * sum(n_bytes_row)


class Ceiling:
    """Composes the cache whenever it is about to have a chunk more than a method's budget.

    A full cache is scored as a prompt is; later the tokens behind a compressed context are scored alone. The newest
    ``n_answer`` tokens stay, so that an answer sees what it said last. A context of another method is left alone.

    Args:
        method: one that ``has_ceiling``.
    """

    def __init__(self, context: Context, method: Method) -> None:
        self._context, self._method = context, method
        self._layers = context.session.layers
        self._chunk = method.chunk_for(self._layers, context.n_ctx)
        self._of: Composed | None = None  # the compressed context that the limit is of
        self._limit, self._n_alloc, self._n_before = self.n_cells_full, 0, 0

    @property
    def chunk(self) -> int:
        """Returns the largest number of tokens that there is room for at once, in an empty cache as well."""
        return min(self._chunk, self.n_cells_full)

    @property
    def n_bytes(self) -> int:
        """Returns the largest number of bytes that the cache may have."""
        return ceiling_bytes(self._method, self._layers, self._context.n_ctx)

    @property
    def n_cells_full(self) -> int:
        """Returns how many tokens a cache may have that is not composed yet."""
        method = self._method
        return max(method.min_tokens, most_tokens(method, self._layers, self._context.n_ctx))

    def make_room(self, n_new: int) -> None:
        """Composes the cache if it has no room for ``n_new`` more tokens."""
        context = self._context
        if context.composed is not self._of:
            self._of, self._limit = context.composed, self._tokens_until_full()
        if context.n_tokens + n_new > self._limit:
            self._compose()
        elif context.composed is None:
            self._grow(context.n_tokens + n_new)

    def _grow(self, n_tokens: int) -> None:
        """Lets a full cache grow in steps that end at the ceiling; by itself it would grow beyond."""
        if n_tokens < self._n_before:  # it was emptied, and is small again
            self._n_alloc = 0
        self._n_before = n_tokens
        if n_tokens > self._n_alloc:
            session = self._context.session
            self._n_alloc = session.state().n_cells_alloc
            if n_tokens > self._n_alloc:
                n_most = max(self.n_cells_full, most_cells(self._method, self._layers, self._context.n_ctx))
                session.reserve(min(n_tokens + max(START_CELLS, n_tokens // 4), n_most, self._context.n_ctx))

    def _tokens_until_full(self) -> int:
        """Returns how many tokens the cache may stand for before it has to be composed."""
        composed = self._context.composed
        if composed is None:
            return self.n_cells_full
        n_layer, n_rows = len(self._layers), int(composed.rows.n_rows.sum())
        n_most = self._method.n_composites(self._layers, self._context.n_ctx) + self._chunk * n_layer
        return composed.rows.end + min(self._chunk, (n_most - n_rows) // n_layer)  # the room that it was composed with

    def _compose(self) -> None:
        context, method, n_tokens = self._context, self._method, self._context.n_tokens
        reading = Reading(context, method, n_tokens)
        if not reading.resume(context.tokens, unscored=True):
            if context.composed is not None:
                return
            reading.begin(context.tokens)
        n_tail = min(method.n_answer, n_tokens - max(1, context.n_context))
        reading.compose(self._chunk, n_tail=n_tail)
        report = reading.report()
        context.report = report if context.report is None else report.after(context.report)
