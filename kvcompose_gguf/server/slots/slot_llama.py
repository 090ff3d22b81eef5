"""The ``Llama`` of a slot: how a prompt continues from what is in its cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ...access import changes_cache, reads_cache, reads_model
from ...compression import prepare
from ...kernels.types import FloatArray
from ...llama import Llama
from ...methods import Method
from ...methods.continuing import choice_of, is_read_again
from ...plan import seam
from ...plan.composed import Composed, Contents
from ...plan.report import KVReport
from ...sessions.info import SessionInfo
from ...sessions.live import load_context, save_context
from ...support.progress import Progress


@dataclass(frozen=True)
class Continuation:
    """How much of a prompt a slot's cache has.

    Attributes:
        tokens: the prompt, changed at the end of the compressed context if a tokenizer merged text there.
        n_cached: how many of them ``read`` need not evaluate.
    """

    tokens: tuple[int, ...]
    n_cached: int


@dataclass(frozen=True, eq=False)
class Held:
    """What a slot's cache holds.

    Attributes:
        tokens: all tokens, including those of a compressed context.
        composed: the compressed context. None: the cache is a full one.
        is_document: whether /kv/compress made the context: then it is never compressed again, however much follows it.
    """

    tokens: Sequence[int]
    composed: Composed | None
    is_document: bool

    @cached_property
    def context(self) -> tuple[int, ...]:
        """Tokens of the compressed context."""
        return () if self.composed is None else tuple(self.composed.tokens.tolist())

    @property
    def composed_by(self) -> str:
        """The method of the compressed context, as text (``choice_of``). Empty: nothing is compressed."""
        return "" if self.composed is None else self.composed.choice

    def has_all_of(self, other: Held) -> bool:
        """Returns whether the other one is the beginning of this one."""
        is_same = self.composed_by == other.composed_by and self.context == other.context
        return is_same and seam.common_prefix(self.tokens, other.tokens) == len(other.tokens)


@dataclass(frozen=True, eq=False)
class Copy:
    """A copy of a slot's cache: what it holds, and its rows."""

    held: Held
    contents: Contents

    @property
    def n_bytes(self) -> int:
        """Bytes of the copy."""
        composed, n_bytes = self.contents.composed, len(self.contents.state) + self.contents.tokens.nbytes
        if composed is None:
            return n_bytes
        rows = sum(each.nbytes for each in (*composed.rows.positions, *composed.rows.scores))
        return n_bytes + rows + len(composed.partial or b"")


class SlotLlama(Llama):
    """A ``Llama`` that passes its decodes to a function.

    Args:
        decode_through: called with every decode and its number of tokens. It has to call the decode.
        **kwargs: arguments of ``Llama``.
    """

    def __init__(
        self, model_path: str, *, decode_through: Callable[[Callable[[], None], int], None], **kwargs: Any
    ) -> None:
        super().__init__(model_path, **kwargs)
        self.context.through = decode_through
        self._document: Composed | None = None
        self._goes_back = self.can_truncate  # asked once: the engine may not wait for the slot's thread

    @property
    def held(self) -> Held:
        """What is in the cache now."""
        composed = self.context.composed
        return Held(self.context.tokens, composed, self._document is not None and self._document is composed)

    @property
    def kept_shares(self) -> FloatArray:
        """For each token of the context the share of all layers' KV heads that keep it, float32; else empty."""
        composed = self.context.composed
        return np.zeros(0, dtype=np.float32) if composed is None else composed.shares()

    @reads_cache
    def save_slot(self, file: Path, max_bytes: int | None, about: Mapping[str, Any]) -> SessionInfo:
        """As ``save_session``, with ``about`` as further values; a file of more than ``max_bytes`` is refused."""
        more = {**about, "is_document": self.held.is_document}
        return save_context(
            self.context, self.identity, file, more, allow_empty=True, max_bytes=max_bytes, name=file.name
        )

    @changes_cache
    def load_slot(self, file: Path) -> SessionInfo:
        """As ``load_session``; the context is continued only under the method that compressed it."""
        info = load_context(self.context, self.identity, file, name=file.name)
        self._document = self.context.composed if info.extra.get("is_document") is True else None
        return info

    @reads_cache
    def copy(self, max_bytes: int) -> Copy | None:
        """Returns a copy of the cache. None: it would have more than ``max_bytes``."""
        if self.context.decoder.n_bytes_state > max_bytes:
            return None
        copy = Copy(self.held, self.context.save())
        return copy if copy.n_bytes <= max_bytes else None

    @changes_cache
    def paste(self, copy: Copy) -> None:
        """Fill the cache with a copy.

        Raises:
            StateError: as ``Context.load``.
        """
        self.context.load(copy.contents)
        self._document = self.context.composed if copy.held.is_document else None

    def begins(self, tokens: Sequence[int], context: Sequence[int]) -> bool:
        """Returns whether a prompt's text begins with the text of ``context``."""
        return tuple(tokens[: len(context)]) == tuple(context) or self._joined(tokens, context) is not None

    def continuation(
        self, tokens: Sequence[int], method: Method | None, reuse: bool = True, held: Held | None = None
    ) -> Continuation:
        """Returns how a prompt can continue from the cache.

        It cannot if another method compressed the context, or if the conversation ``is_read_again``.

        Args:
            method: the method that compresses the prompt.
            reuse: False: nothing in the cache may be used.
            held: what the cache would hold. None: what it holds.
        """
        held = held or self.held
        joined = tuple((self._joined(tokens, held.context) if held.context else None) or tokens)
        if not reuse or (held.composed is not None and not _may_continue(held, len(joined), method)):
            return Continuation(joined, 0)
        return Continuation(joined, self._n_reusable(joined, held))

    @reads_model
    def _joined(self, tokens: Sequence[int], context: Sequence[int]) -> list[int] | None:
        return self.context.vocabulary.joined(tokens, context)

    def _n_reusable(self, tokens: Sequence[int], held: Held) -> int:
        """Returns how many tokens of a prompt are held, whatever method compressed them."""
        n_context, n_held = len(held.context), len(held.tokens)
        n_same = min(seam.common_prefix(held.tokens, tokens), max(0, len(tokens) - 1))
        if n_same < n_context:
            return 0
        return n_same if n_same == n_held or self._goes_back else n_context

    def read(self, what: Continuation, method: Method | None) -> int:
        """Read a prompt into the cache, compressed by ``method``, up to the logits of its last token.

        Args:
            what: the result of ``continuation``. If it continues nothing, the prompt is read from its beginning.
        Returns:
            How many of the prompt's tokens were in the cache.
        """
        if self.kv_compressor != method:
            self.kv_compressor = method
        tokens, n_before = what.tokens, what.n_cached
        if not n_before:
            self.reset()
        before = self.kv_report
        prepare(self.context, tokens, method, again=not self.held.is_document)
        if self.kv_report is not before and self.kv_report is not None:
            n_before = self.n_context - self.kv_report.n_prefilled
        n_same = self.context.rewind(self._n_reusable(tokens, self.held))
        self.eval(tokens[n_same:])
        return min(n_before, n_same)

    def compress_prompt(
        self, tokens: Sequence[int], method: Method, on_progress: Callable[[Progress], None] | None = None
    ) -> KVReport:
        """Compress a document, so that prompts that begin with ``tokens`` continue it; returns the report."""
        if self.kv_compressor != method:
            self.kv_compressor = method
        held = self.held
        if held.context != tuple(tokens) or held.composed_by != choice_of(method) or self.kv_report is None:
            self.compress(tokens, on_progress)
        self._document = self.context.composed
        assert self.kv_report is not None
        return self.kv_report


def _may_continue(held: Held, n_tokens: int, method: Method | None) -> bool:
    if held.composed_by != choice_of(method):
        return False
    return held.is_document or not is_read_again(n_tokens, len(held.context), method)
