"""Owns one live cache: its tokens, its compressed context, and the only methods that change them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from .access import Access, changes_cache, reads_cache
from .errors import ContextLengthError, NativeError, StateError, UnsupportedError
from .kernels.types import FloatArray
from .native.decoder import Decoder, Outputs
from .native.rows import write_values
from .native.session import KVSession
from .native.vocabulary import Vocabulary
from .plan import seam
from .plan.composed import Composed, Contents
from .plan.composition import CompositionPlan
from .plan.report import KVReport
from .support.progress import Meter

#: cells of an empty elastic cache, and free cells that it reserves after a prompt
START_CELLS = 256


class Context:
    """One ``llama_context``, and the tokens in its cache. Only the methods below change either.

    A full cache has a row for every token in every layer. A compressed cache begins with a compressed context, which
    can be continued or removed as a whole, but not cut.

    Several threads may share one object, as ``Access`` says.

    Args:
        decoder, vocabulary: llama.cpp's own functions of this context and its model.
        access: controls which thread may use the context.
        n_ctx: number of cells.
        n_batch: largest number of tokens of one decode.
        elastic: allocate memory only for the tokens in the cache.
        clears: whether ``reset`` also clears the native memory, as recurrent models need.
        logits: where to store the logits of every evaluated token, float32 ``(n_ctx, n_vocab)``; None: nowhere.
    Attributes:
        report: figures of the compression; None while the cache is full and nobody asked to compress it.
        meter: counts the tokens that are read and scored.
        through: called with every decode and its number of tokens; it has to call the decode.
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
        self._decoder, self.access, self.vocabulary = decoder, access, vocabulary
        self.n_ctx, self.n_batch, self.n_ubatch = n_ctx, n_batch, decoder.n_ubatch
        self.n_ctx_train = decoder.n_ctx_train
        self._elastic, self._clears, self._logits = elastic, clears, logits
        self._session: KVSession | None = None
        self._first_image: int | None = None  # place of the first image in the cache
        #: int32 ``(n_ctx,)``; the first ``n_tokens`` are those in the cache
        self.ids: npt.NDArray[np.int32] = np.zeros(n_ctx, dtype=np.int32)
        self._n_tokens, self._needs_eval = 0, True
        self._composed: Composed | None = None
        self.report: KVReport | None = None
        self.meter = Meter()
        self.through: Callable[[Callable[[], None], int], None] = lambda decode, n_tokens: decode()

    def close(self) -> None:
        """Refuses later calls of the session, because the native context is about to be freed."""
        if self._session is not None:
            self._session.close()

    #
    # what is in the cache
    #

    @property
    @reads_cache
    def session(self) -> KVSession:
        """Returns numpy access to rows, scores and probes; do not use it while another thread decodes.

        Raises:
            UnsupportedError: this model or cache cannot be compressed.
        """
        if self._session is None:
            self._session = KVSession(self._decoder.handle)
        return self._session

    @changes_cache
    def set_fast_attention(self, on: bool) -> None:
        """Turns the package's own CPU kernel for flash attention of batches on or off; equal up to rounding."""
        if on or self._session is not None:
            self.session.set_fast_attention(on)

    @property
    def n_tokens(self) -> int:
        """Returns the number of tokens in the cache."""
        return self._n_tokens

    @property
    def composed(self) -> Composed | None:
        """Returns the compressed context; None: the cache is full."""
        return self._composed

    @property
    def needs_eval(self) -> bool:
        """Returns whether the last logits do not belong to the last token, so that it has to be evaluated again."""
        return self._needs_eval

    @property
    def tokens(self) -> list[int]:
        """Returns the tokens in the cache, including all tokens of a compressed context."""
        held: list[int] = self.ids[: self.n_tokens].tolist()
        return held

    @property
    def n_context(self) -> int:
        """Returns the number of tokens of the compressed context, which cannot be cut; 0: the cache is full."""
        return 0 if self.composed is None else len(self.composed.tokens)

    @property
    def has_images(self) -> bool:
        """Returns whether the cache holds an image, which only the bindings' own handlers can evaluate."""
        return self._first_image is not None and self._first_image < self.n_tokens

    @property
    @reads_cache
    def can_truncate(self) -> bool:
        """Returns whether ``truncate`` can remove any number of tokens; with sliding windows it cannot."""
        try:
            return not self.session.state().n_cells_swa
        except UnsupportedError:  # unknown, so the cache is read again
            return False

    #
    # reading: the cache stays or becomes full
    #

    @changes_cache
    def eval(self, tokens: Sequence[int]) -> None:
        """Evaluates ``tokens`` after those in the cache; the logits of the last one can be sampled from.

        Raises:
            ContextLengthError: the tokens do not fit into ``n_ctx``.
        """
        for _, part in self._read(tokens, "last" if self._logits is None else "all"):
            self._needs_eval = False
            self.meter.add(len(part))

    @changes_cache
    def eval_logits(self, tokens: Sequence[int]) -> FloatArray:
        """Evaluates ``tokens`` after those in the cache and returns the logits after each, float32 ``(n, n_vocab)``.

        Raises:
            ContextLengthError: the tokens do not fit into ``n_ctx``.
        """
        rows = np.empty((len(tokens), self.vocabulary.n_tokens), dtype=np.float32)
        for first, part in self._read(tokens, "all"):
            rows[first : first + len(part)] = self._decoder.logits(len(part))
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
            self.eval(tokens[n_reused:])
        return len(tokens) - n_reused

    @changes_cache
    def embed(self, tokens: Sequence[int], n_embd: int, pooled: bool) -> FloatArray:
        """Empties the cache and returns a text's embedding vectors, as ``native.decoder.Decoder.embed``."""
        self._end_at(0)
        vectors: list[FloatArray] = []
        self.through(lambda: vectors.append(self._decoder.embed(tokens, n_embd, pooled)), len(tokens))
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
            n_tokens, partial = self.n_tokens, self._partial_state()
            self._end_at(0)  # after an error below, the cache counts as empty
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
            n_tokens, partial = self.n_tokens, self._partial_state()
            try:
                yield
            finally:
                self._go_back(n_tokens, partial)

    #
    # composing, and what follows
    #

    @changes_cache
    def compose(self, plan: CompositionPlan, choice: str = "", n_room: int = 256) -> None:
        """Applies ``plan`` to the cache; prompts that begin with its tokens can continue from it.

        Args:
            choice: name of the method that made the plan (``choice_of``).
            n_room: free cells to leave after the composites; the cache grows beyond them when needed.
        Raises:
            ConfigError: the plan does not fit this cache.
            StateError: the cache does not hold exactly the plan's tokens, or is composed already.
        """
        if self.composed is not None:
            raise StateError(f"the cache is compressed already, from {self.n_context} tokens: call reset() first")
        tokens = tuple(self.ids[: min(plan.n_tokens, self.n_tokens)].tolist())
        composed = Composed(tokens, choice, plan.bits(), self._partial_state())
        try:
            self.session.compose(plan, n_room)
        finally:  # Ctrl-C may arrive after the cache has changed
            self._composed = composed if self.session.state().n_composed else None

    @changes_cache
    def rewind(self, n_tokens: int) -> int:
        """Removes the tokens after the first ``n_tokens``, and more of them if this cache cannot stop there.

        With sliding windows, a compressed cache only goes back to the end of its context, and a full one to nothing.

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
        elif not self._decoder.remove(n_tokens):
            self.reset()
            return 0
        self._end_at(n_tokens)
        return n_tokens

    @changes_cache
    def truncate(self, n_tokens: int) -> None:
        """Removes all tokens after the first ``n_tokens``.

        Raises:
            StateError: the cache has fewer tokens, or ``n_tokens`` is inside the compressed context, or the model has
                sliding windows, which no longer hold the tokens before them (``can_truncate``).
        """
        if not self.n_context <= n_tokens <= self.n_tokens:
            raise StateError(f"n_tokens={n_tokens} is not in [{self.n_context}, {self.n_tokens}]")
        if n_tokens < self.n_tokens and (not self.can_truncate or not self._decoder.remove(n_tokens)):
            raise StateError(f"n_tokens={n_tokens}: this cache cannot remove only its last tokens: call reset()")
        self._end_at(n_tokens)

    @changes_cache
    def reset(self) -> None:
        """Empties the cache; a compressed cache becomes a full one again, and an elastic cache becomes small."""
        self._end_at(0)
        self._first_image, self.report = None, None
        if self.composed is not None or self._elastic or self._clears:
            self._composed = None
            self._decoder.clear()
        if self._elastic:
            self._reserve(0)

    def adopt(self, n_tokens: int) -> None:
        """Notes that the bindings themselves made the cache end after ``n_tokens``; more can only be an image."""
        if n_tokens > self._n_tokens and not self.has_images:
            self._first_image = self._n_tokens
        self._n_tokens = n_tokens

    def forget_logits(self) -> None:
        """Notes that the last logits are not those of the last token."""
        self._needs_eval = True

    @changes_cache
    def write_values(self, values: Sequence[FloatArray]) -> None:
        """Replaces the values of the first rows; takes float32 ``(n_head_kv, n_rows, n_embd_head_v)`` per layer.

        Raises:
            ConfigError: an array does not fit.
            UnsupportedError: the values are quantized.
        """
        write_values(self.session, values)

    #
    # saving
    #

    @reads_cache
    def save(self) -> Contents:
        """Returns everything in the cache, as a value."""
        held, state = self.ids[: self.n_tokens].copy(), self._decoder.state()
        return Contents(held, state, self.composed, self.report, self._first_image)

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
        self._decoder.load_state(contents.state)
        self.ids[:n_tokens] = contents.tokens
        self._end_at(n_tokens)
        self._first_image = contents.first_image
        composed = contents.composed
        self._composed = composed if composed is None or choice is None else replace(composed, choice=choice)
        self.report = contents.report

    #
    # helpers
    #

    def _begin(self, n: int) -> None:
        """Prepares the evaluation of ``n`` tokens after those in the cache."""
        if 0 < self.n_tokens < self.n_context:
            where = f"position {self.n_tokens} is inside the compressed context of {self.n_context} tokens"
            raise StateError(f"{where}: call reset() first")
        if self.composed is not None and self.n_tokens == 0:
            self.reset()
        if self._elastic and n > START_CELLS and self.composed is None:
            self._reserve(self.n_tokens + n + START_CELLS)
        self._decoder.remove(self.n_tokens)

    def _read(self, tokens: Sequence[int], outputs: Outputs) -> Iterator[tuple[int, Sequence[int]]]:
        """Evaluates ``tokens`` after those in the cache; yields each batch with its place in ``tokens``."""
        if self.n_tokens + len(tokens) > self.n_ctx:
            raise ContextLengthError(f"{self.n_tokens} + {len(tokens)} tokens do not fit into n_ctx={self.n_ctx}")
        self._begin(len(tokens))
        for first in range(0, len(tokens), self.n_batch):
            part, at = tokens[first : first + self.n_batch], self.n_tokens
            self._needs_eval = True  # after an interruption, the last logits may belong to another token
            self._run(part, at, outputs)
            if self._logits is not None and outputs == "all":
                self._logits[at : at + len(part)] = self._decoder.logits(len(part))
            self._append(part)
            yield first, part

    def _run(self, tokens: Sequence[int], pos: int, outputs: Outputs) -> None:
        self.through(lambda: self._decoder.decode(tokens, pos, outputs), len(tokens))

    def _end_at(self, n_tokens: int) -> None:
        """Makes the cache end after ``n_tokens``; the last logits then belong to another token."""
        self._n_tokens, self._needs_eval = n_tokens, True

    def _go_back(self, n_tokens: int, partial: bytes | None) -> None:
        """Removes all tokens after the first ``n_tokens``; ``partial``: the state there of layers that cannot."""
        self._end_at(0)  # after an error below, the cache counts as empty
        self._decoder.remove(n_tokens)
        if partial is not None:
            self._decoder.load_partial_state(partial)
        self._end_at(n_tokens)

    def _append(self, tokens: Sequence[int]) -> None:
        if not self.has_images:  # one that was there has been removed
            self._first_image = None
        self.ids[self.n_tokens : self.n_tokens + len(tokens)] = tokens
        self._n_tokens += len(tokens)

    def _reserve(self, n_cells: int) -> None:
        """Allocates ``n_cells`` at once; a context that cannot be compressed, or lacks the memory, grows in steps."""
        with contextlib.suppress(UnsupportedError, NativeError):
            self.session.reserve(min(n_cells, self.session.state().n_cells))

    def _partial_state(self) -> bytes | None:
        """Returns the state of the sliding-window layers; None: there are none, or they keep every token."""
        state = self.session.state()
        return self._decoder.partial_state() if 0 < state.n_cells_swa < state.n_cells else None
