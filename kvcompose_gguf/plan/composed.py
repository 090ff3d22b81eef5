"""A cache's contents, and the compressed context at its beginning, as values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..kernels.types import FloatArray
from .report import KVReport
from .rows import Rows


@dataclass(frozen=True, eq=False)
class Composed:
    """A compressed context: its tokens, and what the cache keeps of them.

    Attributes:
        tokens: all N tokens of the context, kept or not, int32 ``(N,)``; none of them can be removed alone.
        choice: the method that compressed it (``choice_of``), or the caller's own name for it; a prompt with another
            choice is read again.
        rows: the tokens that every KV head keeps, with their scores; also tokens behind the context that were planned
            together with it.
        partial: state of the layers that cannot go back (sliding windows, recurrent) at the end of the context; None:
            the model has no such layers.
    """

    tokens: npt.NDArray[np.int32]
    choice: str
    rows: Rows
    partial: bytes | None = None

    def begins(self, tokens: Sequence[int]) -> bool:
        """Returns whether ``tokens`` begin with this context."""
        return np.array_equal(tokens[: len(self.tokens)], self.tokens)

    def shares(self) -> FloatArray:
        """Returns for each token the share of all layers' KV heads that keep it, float32 ``(N,)`` in [0, 1]."""
        n_tokens, n_heads = len(self.tokens), sum(len(positions) for positions in self.rows.positions)
        held = np.concatenate([positions.ravel() for positions in self.rows.positions])
        shares: FloatArray = (np.bincount(held, minlength=n_tokens)[:n_tokens] / n_heads).astype(np.float32)
        return shares


@dataclass(frozen=True, eq=False)
class Contents:
    """Everything that a cache holds.

    Attributes:
        tokens: int32 ``(n_tokens,)``, all tokens, including those of a compressed context.
        state: uint8 ``(n_bytes,)`` or bytes, the result of ``native.decoder.Decoder.state``.
        composed: the compressed context, or None.
        report: figures of the compression, or None.
        first_image: place of the first token that is an image's, or None.
    """

    tokens: npt.NDArray[np.int32]
    state: npt.NDArray[np.uint8] | bytes
    composed: Composed | None
    report: KVReport | None
    first_image: int | None = None
