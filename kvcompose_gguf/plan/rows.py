"""The rows of a cache: the token that each holds, and its score, as a value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError
from ..kernels.types import FloatArray, IntArray

if TYPE_CHECKING:
    from .composition import CompositionPlan


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of all layers, in the order of the cache. In each row, every KV head holds a token of its own.

    Attributes:
        positions: of the tokens, for each layer int32 ``(n_head_kv, n_rows)``, strictly ascending within a head.
        scores: their scores, float32 of the same shapes.
        end: position behind the last token that had a row; it may have been evicted since.
    """

    positions: tuple[IntArray, ...]
    scores: tuple[FloatArray, ...]
    end: int

    @classmethod
    def of_tokens(cls, scores: Sequence[FloatArray], first: int = 0) -> Rows:
        """Returns a row for every token from position ``first`` on; ``scores``: ``(n_head_kv, n)`` for each layer."""
        places = (np.arange(first, first + s.shape[1], dtype=np.int32) for s in scores)
        positions = tuple(np.tile(p, (len(s), 1)) for p, s in zip(places, scores, strict=True))
        return cls(positions, tuple(scores), first + scores[0].shape[1])

    @property
    def n_rows(self) -> npt.NDArray[np.int64]:
        """Returns the number of rows of each layer, int64 ``(n_layer,)``."""
        return np.array([positions.shape[1] for positions in self.positions], dtype=np.int64)

    def followed_by(self, other: Rows) -> Rows:
        """Returns these rows, and behind them those of ``other``."""
        return Rows(_joined(self.positions, other.positions), _joined(self.scores, other.scores), other.end)

    def kept(self, plan: CompositionPlan) -> Rows:
        """Returns the rows that ``plan`` keeps."""
        return Rows(_taken(self.positions, plan), _taken(self.scores, plan), self.end)

    def until(self, n_tokens: int) -> Rows:
        """Returns the rows of tokens before position ``n_tokens``; every head must hold all tokens behind it."""
        n = [int(np.count_nonzero(positions[0] < n_tokens)) for positions in self.positions]
        return Rows(_cut(self.positions, n), _cut(self.scores, n), min(self.end, n_tokens))

    def bits(self) -> npt.NDArray[np.uint8]:
        """Returns one bit a token, set if a head holds it.

        Returns:
            uint8 ``(sum of n_head_kv, ceil(end / 8))``, KV heads of all layers in order.
        """
        held = []
        for positions in self.positions:
            of_layer = np.zeros((len(positions), self.end), dtype=np.bool_)
            np.put_along_axis(of_layer, positions.astype(np.int64), True, axis=1)
            held.append(np.packbits(of_layer, axis=1))
        return np.concatenate(held)

    @classmethod
    def from_bits(cls, end: int, n_head_kv: Sequence[int], bits: npt.NDArray[np.uint8], scores: FloatArray) -> Rows:
        """Returns the rows that ``bits`` was called on.

        Args:
            n_head_kv: KV heads of every layer.
            scores: all scores, float32 ``(n,)``, head by head.
        Raises:
            ConfigError: another shape, or heads of one layer that hold different numbers of tokens.
        """
        shape = (sum(n_head_kv), -(-end // 8))
        if bits.shape != shape or bits.dtype != np.uint8:
            raise ConfigError(f"bits are {bits.dtype} {bits.shape}, uint8 {shape} is needed")
        positions, sizes = [], []
        for l, held in enumerate(np.split(np.unpackbits(bits, axis=1, count=end), np.cumsum(n_head_kv)[:-1])):
            n_rows = held.sum(axis=1, dtype=np.int64)
            if (n_rows != n_rows[0]).any():
                raise ConfigError(f"the KV heads of layer {l} hold different numbers of tokens, {n_rows.tolist()}")
            positions.append(np.nonzero(held)[1].reshape(len(held), n_rows[0]).astype(np.int32))
            sizes.append(positions[-1].size)
        if scores.shape != (sum(sizes),):
            raise ConfigError(f"there are {scores.shape} scores of {sum(sizes)} rows")
        parts = np.split(scores, np.cumsum(sizes)[:-1])
        return cls(tuple(positions), tuple(s.reshape(p.shape) for s, p in zip(parts, positions, strict=True)), end)


def _joined(a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
    return tuple(np.concatenate(pair, axis=1) for pair in zip(a, b, strict=True))


def _taken(arrays: Sequence[np.ndarray], plan: CompositionPlan) -> tuple[np.ndarray, ...]:
    pairs = zip(arrays, plan.rows, strict=True)
    return tuple(np.take_along_axis(array, rows.astype(np.int64), axis=1) for array, rows in pairs)


def _cut(arrays: Sequence[np.ndarray], n_rows: Sequence[int]) -> tuple[np.ndarray, ...]:
    return tuple(array[:, :n] for array, n in zip(arrays, n_rows, strict=True))
