"""Owns one live cache: its tokens, its compressed context, and the only methods that change them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from .access import Access, changes_cache, reads_cache
from .errors import ConfigError, ContextLengthError, NativeError, StateError, UnsupportedError
from .holdings import Holdings, Room
from .kernels.types import FloatArray
from .native.decoder import Decode, Decoder, Outputs
from .native.rows import write_values
from .native.vocabulary import Vocabulary
from .plan import seam
from .plan.composed import Composed, Contents
from .plan.composition import CompositionPlan
from .plan.rows import Rows
from .support.progress import Meter

#: cells of an empty elastic cache, and free cells that it reserves after a prompt
START_CELLS = 256


class Context(Holdings):
    """One ``llama_context``, and the tokens in its cache. Only the methods below change either.

    A full cache has a row for every token in every layer. A compressed cache begins with a compressed context, which
    can be continued or removed as a whole, but not cut. Several threads may share one object, as ``Access`` says.

    Args:
        decoder, vocabulary: llama.cpp's own functions of this context and its model.
        access: controls which thread may use the context.
        n_ctx: number of cells.
        n_batch: largest number of tokens of one decode.
        elastic: allocate memory only for the tokens in the cache.
        clears: whether ``reset`` also clears the native memory, as recurrent models need.
        logits: where to store the logits of every evaluated token, float32 ``(n_ctx, n_vocab)``; None: nowhere.
    Attributes:
        meter: counts the tokens that are read and scored.
        through: called with every decode and its number of tokens; it has to call the decode.
        ceiling: composes the cache before it becomes too large; None: it may have ``n_ctx`` tokens.
    """

    def __init__(
        self,
        decoder: Decoder,
        vocabulary: Vocabulary,
        access: Access,
        *,
        n_ctx: int,
        n_batch: int,
        elastic: bool,
        clears: bool = False,
        logits: FloatArray | None = None,
    ) -> None:
        super().__init__(decoder, access, n_ctx)
        self.vocabulary = vocabulary
        self.n_ctx, self.n_batch, self.n_ubatch = n_ctx, n_batch, decoder.n_ubatch
        self.n_ctx_train = decoder.n_ctx_train
        self._elastic, self._clears, self._logits = elastic, clears, logits
        self.meter = Meter()
        self.ceiling: Room | None = None
        self.through: Callable[[Callable[[], None], int], None] = lambda decode, n_tokens: decode()

    @changes_cache
    def set_fast_attention(self, on: bool) -> None:
        """Turns the package's own CPU kernel for flash attention of batches on or off; equal up to rounding."""
        if on or self.has_session:
            self.session.set_fast_attention(on)

    #
    # reading: the cache stays or becomes full
    #

    @changes_cache
    def eval(self, tokens: Sequence[int]) -> None:
        """Evaluates ``tokens`` after those in the cache; the logits of the last one can be sampled from.

        Raises:
            ContextLengthError: the tokens do not fit into ``n_ctx``.
        """
        self._eval(tokens, self.ceiling)

    @changes_cache
    def extend(self, tokens: Sequence[int]) -> None:
        """Same as ``eval``, but without regard to the ceiling: the caller has made room.

        Raises:
            ContextLengthError: the tokens do not fit into ``n_ctx``.
        """
        self._eval(tokens, None)

    @changes_cache
    def eval_logits(self, tokens: Sequence[int]) -> FloatArray:
        """Evaluates ``tokens`` after those in the cache and returns the logits after each, float32 ``(n, n_vocab)``.

        Raises:
            ContextLengthError: the tokens do not fit into ``n_ctx``.
        """
        rows = np.empty((len(tokens), self.vocabulary.n_tokens), dtype=np.float32)
        for first, part in self._read(tokens, "all", self.ceiling):
            rows[first : first + len(part)] = self.decoder.logits(len(part))
        return rows

    @changes_cache
    def prefill(self, tokens: Sequence[int], keep_prefix: bool = True) -> int:
        """Makes a full cache hold exactly ``tokens``; returns how many had to be evaluated.

        Args:
            keep_prefix: reuse the leading tokens that a full cache holds already.
        Raises:
            ContextLengthError: the tokens do not fit into ``n_ctx``.
        """
        if len(tokens) > self.n_ctx:
            raise ContextLengthError(f"{len(tokens)} tokens do not fit into n_ctx={self.n_ctx}: raise n_ctx")
        n_reused = self.rewind(0 if self.composed or not keep_prefix else seam.common_prefix(self.tokens, tokens))
        self.meter.begin("reading", len(tokens) - n_reused)
        if n_reused < len(tokens):
            self._eval(tokens[n_reused:], None)
        return len(tokens) - n_reused

    @changes_cache
    def embed(self, tokens: Sequence[int], n_embd: int, pooled: bool) -> FloatArray:
        """Empties the cache and returns a text's embedding vectors, as ``native.decoder.Decoder.embed``."""
        self.note_end(0)
        vectors: list[FloatArray] = []
        self.through(lambda: vectors.append(self.decoder.embed(tokens, n_embd, pooled)), len(tokens))
        return vectors[0]

    #
    # trying: the cache ends as it began
    #

    @changes_cache
    def decode(self, tokens: Sequence[int], pos: int) -> None:
        """Evaluates at most ``n_batch`` tokens at positions ``pos, pos + 1, …`` without output.

        The tokens do not count as part of the cache: call this only inside of ``on_top``.
        """
        self._run(tokens, pos, "none")
        self.meter.add(len(tokens))

    @contextlib.contextmanager
    def on_top(self, gap: int = 0) -> Iterator[None]:
        """Removes at the end of the ``with`` block what ``decode`` evaluated, ``gap`` positions after the cache."""
        with self.access.turn("on_top"):
            n_tokens, partial = self.n_tokens, self.partial_state()
            self.note_end(0)  # after an error below, the cache counts as empty
            try:
                self.session.skip_to(n_tokens + gap if gap else -1)
                yield
            finally:
                self.session.skip_to(-1)
                self._go_back(n_tokens, partial)

    @contextlib.contextmanager
    def undone(self) -> Iterator[None]:
        """Removes at the end of the ``with`` block the tokens that were evaluated in it; nothing else may change."""
        with self.access.turn("undone"):
            n_tokens, partial = self.n_tokens, self.partial_state()
            try:
                yield
            finally:
                self._go_back(n_tokens, partial)

    #
    # composing, and what follows
    #

    @changes_cache
    def compose(self, plan: CompositionPlan, choice: str = "", n_room: int = 256, rows: Rows | None = None) -> None:
        """Applies ``plan`` to the cache; prompts that begin with its tokens can continue from it.

        Args:
            choice: name of the method that made the plan (``choice_of``).
            n_room: free cells to leave after the composites; the cache grows beyond them when needed.
            rows: the rows of the cache now, with their scores, so that it can be composed again later; None: those of a
                full cache, all with a score of 0.
        Raises:
            ConfigError: the plan does not fit this cache, or the rows.
            StateError: the cache does not hold exactly the plan's tokens; or it is composed, and ``rows`` is None.
        """
        session = self.session
        if rows is None:
            if self.composed is not None:
                raise StateError(f"the cache is compressed already, from {self.n_context} tokens: call reset() first")
            rows = Rows.of_tokens([np.zeros((len(kept), plan.n_tokens), np.float32) for kept in plan.rows])
        if tuple(rows.n_rows) != plan.n_rows:
            raise ConfigError(f"the plan is for layers of {plan.n_rows} rows, not {tuple(rows.n_rows.tolist())}")
        tokens = self.ids[: min(plan.n_tokens - plan.n_tail, self.n_tokens)].copy()
        composed = Composed(tokens, choice, rows.kept(plan), self.partial_state())
        try:
            session.compose(plan, n_room)
        finally:  # Ctrl-C may arrive after the cache has changed
            if session.state().n_composed and session.n_rows_used() == plan.n_kept.tolist():
                self.note_composed(composed)

    @changes_cache
    def rewind(self, n_tokens: int) -> int:
        """Removes the tokens after the first ``n_tokens``, and more of them if this cache cannot stop there.

        If layers forget (windows, recurrent), a compressed cache only goes back to its context, a full one to nothing.

        Returns:
            The number of tokens that are left, at most ``n_tokens``.
        """
        composed, is_cut = self.composed, n_tokens < self.n_tokens
        if n_tokens == 0 or n_tokens < self.n_context or (is_cut and composed is None and not self.can_truncate):
            self.reset()
            return 0
        if is_cut and composed is not None and composed.partial is not None:
            n_tokens = self.n_context
            self._go_back(n_tokens, composed.partial)
        elif not self.decoder.remove(n_tokens):
            self.reset()
            return 0
        self.note_end(n_tokens)
        return n_tokens

    @changes_cache
    def truncate(self, n_tokens: int) -> None:
        """Removes all tokens after the first ``n_tokens``.

        Raises:
            StateError: the cache has fewer tokens, or ``n_tokens`` is inside the compressed context, or the model has
                sliding windows or recurrent layers, which have forgotten what was before (``can_truncate``).
        """
        if not self.n_context <= n_tokens <= self.n_tokens:
            raise StateError(f"n_tokens={n_tokens} is not in [{self.n_context}, {self.n_tokens}]")
        if n_tokens < self.n_tokens and (not self.can_truncate or not self.decoder.remove(n_tokens)):
            raise StateError(f"n_tokens={n_tokens}: this cache cannot remove only its last tokens: call reset()")
        self.note_end(n_tokens)

    @changes_cache
    def reset(self) -> None:
        """Empties the cache; a compressed cache becomes a full one again, and an elastic cache becomes small."""
        self.note_end(0)
        self.first_image, self.report = None, None
        if self.composed is not None or self._elastic or self._clears:
            self.note_composed(None)
            self.decoder.clear()
        if self._elastic:
            self._reserve(0)

    @changes_cache
    def write_values(self, values: Sequence[FloatArray]) -> None:
        """Replaces the values of the first rows; takes float32 ``(n_head_kv, n_rows, n_embd_head_v)`` per layer.

        Raises:
            ConfigError: an array does not fit.
            UnsupportedError: the values are quantized or latent.
        """
        write_values(self.session, values)

    #
    # saving
    #

    @reads_cache
    def save(self) -> Contents:
        """Returns everything in the cache, as a value."""
        held, state = self.ids[: self.n_tokens].copy(), self.decoder.state()
        return Contents(held, state, self.composed, self.report, self.first_image)

    @changes_cache
    def load(self, contents: Contents, choice: str | None = None) -> None:
        """Fills the cache with saved contents, whatever it holds now.

        Args:
            choice: the name under which a compressed context continues; None: the saved one.
        Raises:
            StateError: there are too many tokens, and the cache is unchanged; or llama.cpp refuses the state, and the
                cache is empty.
        """
        n_tokens = len(contents.tokens)
        if n_tokens >= self.n_ctx:
            raise StateError(f"the state has {n_tokens} tokens, too many for a context of n_ctx={self.n_ctx}")
        self.reset()
        self.decoder.load_state(contents.state)
        self.ids[:n_tokens] = contents.tokens
        self.note_end(n_tokens)
        self.first_image = contents.first_image
        composed = contents.composed
        self.note_composed(composed if composed is None or choice is None else replace(composed, choice=choice))
        self.report, self.taught = contents.report, None

    #
    # helpers
    #

    def _eval(self, tokens: Sequence[int], ceiling: Room | None) -> None:
        for _, part in self._read(tokens, "last" if self._logits is None else "all", ceiling):
            self.note_logits()
            self.meter.add(len(part))

    def _begin(self, n: int, ceiling: Room | None) -> None:
        """Prepares the evaluation of ``n`` tokens after those in the cache."""
        if 0 < self.n_tokens < self.n_context:
            where = f"position {self.n_tokens} is inside the compressed context of {self.n_context} tokens"
            raise StateError(f"{where}: call reset() first")
        if self.composed is not None and self.n_tokens == 0:
            self.reset()
        if self._elastic and n > START_CELLS and self.composed is None:
            n_tokens = self.n_tokens + n
            self._reserve((n_tokens if ceiling is None else min(n_tokens, ceiling.n_cells_full)) + START_CELLS)
        if not self.decoder.remove(self.n_tokens):
            self.reset()
            raise StateError("an interruption left the recurrent layers ahead; the cache is empty now: read all again")

    def _read(
        self, tokens: Sequence[int], outputs: Outputs, ceiling: Room | None
    ) -> Iterator[tuple[int, Sequence[int]]]:
        """Evaluates ``tokens`` after those in the cache; yields each batch with its place in ``tokens``."""
        if self.n_tokens + len(tokens) > self.n_ctx:
            raise ContextLengthError(f"{self.n_tokens} + {len(tokens)} tokens do not fit into n_ctx={self.n_ctx}")
        self._begin(len(tokens), ceiling)
        n_batch = self.n_batch if ceiling is None else min(self.n_batch, ceiling.chunk)
        for first in range(0, len(tokens), n_batch):
            part, at = tokens[first : first + n_batch], self.n_tokens
            if ceiling is not None:
                ceiling.make_room(len(part))
            self.forget_logits()  # after an interruption, the last logits may belong to another token
            self._run(part, at, outputs)
            if self._logits is not None and outputs == "all":
                self._logits[at : at + len(part)] = self.decoder.logits(len(part))
            self.note_new(part)
            yield first, part

    def _run(self, tokens: Sequence[int], pos: int, outputs: Outputs) -> None:
        self.through(Decode(self.decoder, tokens, pos, outputs), len(tokens))

    def _go_back(self, n_tokens: int, partial: bytes | None) -> None:
        """Removes all tokens after the first ``n_tokens``; ``partial``: the state there of layers that cannot."""
        self.note_end(0)  # after an error below, the cache counts as empty
        if partial is not None:  # first: recurrent layers refuse to remove a part of what they have read
            self.decoder.load_partial_state(partial)
        self.decoder.remove(n_tokens)
        self.note_end(n_tokens)

    def _reserve(self, n_cells: int) -> None:
        """Allocates ``n_cells`` at once; a context that cannot be compressed, or lacks the memory, grows in steps."""
        with contextlib.suppress(UnsupportedError, NativeError):
            self.session.reserve(min(n_cells, self.session.state().n_cells))
