"""What scoring needs of a live cache."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from ..native.session import KVSession
from ..support.progress import Meter


class Reader(Protocol):
    """What scoring needs of a live cache; ``context.Context`` is one."""

    @property
    def session(self) -> KVSession:
        """Scores, taps and rows of the cache."""

    @property
    def n_batch(self) -> int:
        """Largest number of tokens of a ``decode``."""

    @property
    def n_ubatch(self) -> int:
        """Largest number of tokens that are computed at once."""

    @property
    def n_ctx_train(self) -> int:
        """Number of positions that the model was trained for."""

    @property
    def meter(self) -> Meter:
        """Counts the tokens of ``decode``."""

    def prefill(self, tokens: Sequence[int], keep_prefix: bool = True) -> int:
        """Makes the cache hold exactly ``tokens``; returns how many were evaluated.

        Args:
            keep_prefix: reuse the leading tokens that the cache holds already; False: evaluate all of them.
        """

    def decode(self, tokens: Sequence[int], pos: int) -> None:
        """Evaluates at most ``n_batch`` tokens at positions ``pos, pos + 1, …`` without output."""

    def on_top(self, gap: int = 0) -> AbstractContextManager[None]:
        """Removes at the end of the ``with`` block the tokens that it has decoded after those of the cache.

        Args:
            gap: number of positions to skip before them.
        """


def decode_all(reader: Reader, tokens: Sequence[int], pos: int) -> None:
    """Evaluates tokens at positions ``pos, pos + 1, …``, a batch at a time."""
    for first in range(0, len(tokens), reader.n_batch):
        reader.decode(tokens[first : first + reader.n_batch], pos + first)
