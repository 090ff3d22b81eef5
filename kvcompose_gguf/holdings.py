"""What one live cache holds: its tokens, its compressed context, and the figures about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from .access import Access, reads_cache
from .errors import UnsupportedError
from .methods.base import Method
from .native.decoder import Decoder
from .native.session import KVSession
from .plan.composed import Composed
from .plan.report import KVReport


class Room(Protocol):
    """Makes room in a cache that has a ceiling; ``ceiling.Ceiling`` is one."""

    @property
    def chunk(self) -> int:
        """Largest number of tokens that there is room for at once."""

    @property
    def n_bytes(self) -> int:
        """Largest number of bytes that the cache may have."""

    @property
    def n_cells_full(self) -> int:
        """Number of tokens that a full cache may have."""

    def make_room(self, n_new: int) -> None:
        """Composes the cache if it has no room for ``n_new`` more tokens."""


class Holdings:
    """What is in the cache of one ``llama_context``. It only notes changes; the verbs of ``context.Context`` make them.

    Args:
        decoder: llama.cpp's own functions of this context.
        access: controls which thread may use the context.
        n_ctx: number of cells.
    Attributes:
        ids: int32 ``(n_ctx,)``; the first ``n_tokens`` are those in the cache.
        report: figures of the compression; None while the cache is full and nobody asked to compress it.
        first_image: place of the first image that was in the cache, or None.
        taught: the method that read the latest context, with what that taught it; it scores what follows.
    """

    def __init__(self, decoder: Decoder, access: Access, n_ctx: int) -> None:
        self.decoder, self.access = decoder, access
        self._session: KVSession | None = None
        self.first_image: int | None = None
        self.ids: npt.NDArray[np.int32] = np.zeros(n_ctx, dtype=np.int32)
        self._n_tokens, self._needs_eval = 0, True
        self._composed: Composed | None = None
        self.report: KVReport | None = None
        self.taught: Method | None = None

    def close(self) -> None:
        """Refuses later calls of the session, because the native context is about to be freed."""
        if self._session is not None:
            self._session.close()

    @property
    @reads_cache
    def session(self) -> KVSession:
        """Returns numpy access to rows, scores and probes; do not use it while another thread decodes.

        Raises:
            UnsupportedError: this model or cache cannot be compressed.
        """
        if self._session is None:
            self._session = KVSession(self.decoder.handle)
        return self._session

    @property
    def has_session(self) -> bool:
        """Returns whether anybody has asked for the session."""
        return self._session is not None

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
        return self.first_image is not None and self.first_image < self.n_tokens

    @property
    @reads_cache
    def can_truncate(self) -> bool:
        """Returns whether ``truncate`` can remove any number of tokens; windows and recurrent layers cannot go back."""
        try:
            return self.session.state().can_go_back
        except UnsupportedError:  # unknown, so the cache is read again
            return False

    #
    # notes of changes
    #

    def adopt(self, n_tokens: int) -> None:
        """Notes that the bindings themselves made the cache end after ``n_tokens``; more can only be an image."""
        if n_tokens > self._n_tokens and not self.has_images:
            self.first_image = self._n_tokens
        self._set_end(n_tokens)

    def note_composed(self, composed: Composed | None) -> None:
        """Notes the compressed context; None: the cache is full."""
        self._composed = composed

    def note_logits(self) -> None:
        """Notes that the last logits are those of the last token."""
        self._needs_eval = False

    def forget_logits(self) -> None:
        """Notes that the last logits are not those of the last token."""
        self._needs_eval = True

    def note_end(self, n_tokens: int) -> None:
        """Notes that the cache ends after ``n_tokens``; the last logits then belong to another token."""
        self._set_end(n_tokens)
        self._needs_eval = True

    def _set_end(self, n_tokens: int) -> None:
        self._n_tokens = n_tokens
        composed = self._composed
        # rows behind the context may have been planned with it
        if composed is not None and len(composed.tokens) <= n_tokens < composed.rows.end:
            self._composed = replace(composed, rows=composed.rows.until(n_tokens))

    def note_new(self, tokens: Sequence[int]) -> None:
        """Notes tokens that were evaluated after those in the cache."""
        if not self.has_images:  # one that was there has been removed
            self.first_image = None
        self.ids[self.n_tokens : self.n_tokens + len(tokens)] = tokens
        self._n_tokens += len(tokens)

    def partial_state(self) -> bytes | None:
        """Returns the state of sliding-window and recurrent layers; None: all layers have every token."""
        return self.decoder.partial_state() if self.session.state().forgets else None
