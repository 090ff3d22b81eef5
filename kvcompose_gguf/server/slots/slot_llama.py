"""The ``Llama`` of a slot: how a prompt continues from what is in its cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
from ...plan.composed import Composed
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

    @property
    def is_document(self) -> bool:
        """Whether /kv/compress made the context: then it is never compressed again, however much follows it."""
        return self._document is not None and self._document is self.context.composed

    @property
    def context_tokens(self) -> tuple[int, ...]:
        """Tokens of the compressed context."""
        composed = self.context.composed
        return () if composed is None else tuple(composed.tokens.tolist())

    @property
    def composed_by(self) -> str:
        """The method of the compressed context, as text (``choice_of``). Empty: nothing is compressed."""
        composed = self.context.composed
        return "" if composed is None else composed.choice

    @property
    def kept_shares(self) -> FloatArray:
        """For each token of the context the share of all layers' KV heads that keep it, float32; else empty."""
        composed = self.context.composed
        return np.zeros(0, dtype=np.float32) if composed is None else composed.shares()

    @reads_cache
    def save_slot(self, file: Path, max_bytes: int | None, about: Mapping[str, Any]) -> SessionInfo:
        """As ``save_session``, with ``about`` as further values; a file of more than ``max_bytes`` is refused."""
        more = {**about, "is_document": self.is_document}
        return save_context(
            self.context, self.identity, file, more, allow_empty=True, max_bytes=max_bytes, name=file.name
        )

    @changes_cache
    def load_slot(self, file: Path) -> SessionInfo:
        """As ``load_session``; the context is continued only under the method that compressed it."""
        info = load_context(self.context, self.identity, file, name=file.name)
        self._document = self.context.composed if info.extra.get("is_document") is True else None
        return info

    def begins(self, tokens: Sequence[int], context: Sequence[int]) -> bool:
        """Returns whether a prompt's text begins with the text of ``context``."""
        return tuple(tokens[: len(context)]) == tuple(context) or self._joined(tokens, context) is not None

    def continuation(self, tokens: Sequence[int], method: Method | None, reuse: bool = True) -> Continuation:
        """Returns how a prompt can continue from the cache.

        It cannot if another method compressed the context, or if the conversation ``is_read_again``.

        Args:
            method: the method that compresses the prompt.
            reuse: False: nothing in the cache may be used.
        """
        composed = self.context.composed
        joined = tuple((None if composed is None else self._joined(tokens, self.context_tokens)) or tokens)
        if not reuse or (composed is not None and not self._may_continue(composed, len(joined), method)):
            return Continuation(joined, 0)
        return Continuation(joined, self._n_reusable(joined))

    @reads_model
    def _joined(self, tokens: Sequence[int], context: Sequence[int]) -> list[int] | None:
        return self.context.vocabulary.joined(tokens, context)

    def _may_continue(self, composed: Composed, n_tokens: int, method: Method | None) -> bool:
        if composed.choice != choice_of(method):
            return False
        return self.is_document or not is_read_again(n_tokens, len(composed.tokens), method)

    def _n_reusable(self, tokens: Sequence[int]) -> int:
        """Returns how many tokens of a prompt are in the cache, whatever method compressed it."""
        n_same = min(seam.common_prefix(self.context.tokens, tokens), max(0, len(tokens) - 1))
        return 0 if n_same < self.n_context else n_same

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
        prepare(self.context, tokens, method, again=not self.is_document)
        if self.kv_report is not before and self.kv_report is not None:
            n_before = self.n_context - self.kv_report.n_prefilled
        n_same = self.context.rewind(self._n_reusable(tokens))
        self.eval(tokens[n_same:])
        return min(n_before, n_same)

    def compress_prompt(
        self, tokens: Sequence[int], method: Method, on_progress: Callable[[Progress], None] | None = None
    ) -> KVReport:
        """Compress a document, so that prompts that begin with ``tokens`` continue it; returns the report."""
        if self.kv_compressor != method:
            self.kv_compressor = method
        if self.context_tokens != tuple(tokens) or self.composed_by != choice_of(method) or self.kv_report is None:
            self.compress(tokens, on_progress)
        self._document = self.context.composed
        assert self.kv_report is not None
        return self.kv_report
