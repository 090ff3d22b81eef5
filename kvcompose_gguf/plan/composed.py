"""The compressed context at the beginning of a cache, as a value."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..kernels.types import FloatArray


@dataclass(frozen=True, eq=False)
class Composed:
    """A compressed context: its tokens, and what the cache keeps of them.

    Attributes:
        tokens: all N tokens of the context, kept or not.
        choice: the Llama's method at that time (``choice_of``), or the caller's own name for it; a prompt with another
            choice is read again.
        kept: the tokens that every KV head keeps, as ``CompositionPlan.bits``.
        windows: state of the sliding-window layers at the end of the context; None: the model has no such layers.
    """

    tokens: tuple[int, ...]
    choice: str
    kept: npt.NDArray[np.uint8]
    windows: bytes | None = None

    def shares(self) -> FloatArray:
        """Returns for each token the share of all layers' KV heads that keep it, float32 ``(N,)`` in [0, 1]."""
        shares: FloatArray = np.unpackbits(self.kept, axis=1, count=len(self.tokens)).mean(axis=0, dtype=np.float32)
        return shares
