"""The plan: which tokens stay in the cache, as a value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError

IntArray = npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class CompositionPlan:
    """The tokens that every KV head of every layer keeps.

    Attributes:
        n_tokens: context tokens N that the plan is for.
        cells: for each layer int32 ``(n_head_kv, n_kept[l])``, token indices in ``[0, N)``, strictly ascending within a
            head. Column j is composite token j in position order.
    Raises:
        ConfigError: an array has another shape or dtype, or an index is out of range or out of order.
    """

    n_tokens: int
    cells: tuple[IntArray, ...]

    def __post_init__(self) -> None:
        # copies, so that the caller's arrays are not frozen and cannot change the plan
        object.__setattr__(self, "cells", tuple(np.array(cells) for cells in self.cells))
        for il, cells in enumerate(self.cells):
            if cells.ndim != 2 or cells.dtype != np.int32:
                raise ConfigError(f"cells[{il}] is {cells.dtype} {cells.shape}; int32 (n_head_kv, n_kept) is needed")
            if cells.size and (cells.min() < 0 or cells.max() >= self.n_tokens):
                raise ConfigError(f"cells[{il}] has indices outside of [0, {self.n_tokens})")
            if cells.shape[1] > 1 and not (np.diff(cells, axis=1) > 0).all():
                raise ConfigError(f"cells[{il}] is not strictly ascending within each head")
        if not any(cells.size for cells in self.cells):
            raise ConfigError("the plan keeps no token in any layer")
        for cells in self.cells:
            cells.setflags(write=False)

    @property
    def n_kept(self) -> npt.NDArray[np.int64]:
        """Returns how many composite tokens every layer keeps, int64 ``(n_layer,)``."""
        return np.array([cells.shape[1] for cells in self.cells], dtype=np.int64)

    def bits(self) -> npt.NDArray[np.uint8]:
        """The plan with one bit a token: uint8 ``(sum of n_head_kv, ceil(N / 8))``, KV heads of all layers in order."""
        rows = []
        for cells in self.cells:
            kept = np.zeros((cells.shape[0], self.n_tokens), dtype=np.bool_)
            np.put_along_axis(kept, cells, True, axis=1)
            rows.append(np.packbits(kept, axis=1))
        return np.concatenate(rows)

    @classmethod
    def from_bits(cls, n_tokens: int, n_head_kv: Sequence[int], bits: npt.NDArray[np.uint8]) -> CompositionPlan:
        """The plan that ``bits()`` was made from.

        Args:
            n_head_kv: KV heads of every layer.
        Raises:
            ConfigError: another shape, or heads of one layer that keep different numbers of tokens.
        """
        shape = (sum(n_head_kv), -(-n_tokens // 8))
        if bits.shape != shape or bits.dtype != np.uint8:
            raise ConfigError(f"bits are {bits.dtype} {bits.shape}, uint8 {shape} is needed")
        kept = np.unpackbits(bits, axis=1, count=n_tokens)
        cells = []
        for l, rows in enumerate(np.split(kept, np.cumsum(n_head_kv)[:-1])):
            n_kept = rows.sum(axis=1, dtype=np.int64)
            if (n_kept != n_kept[0]).any():
                raise ConfigError(f"the KV heads of layer {l} keep different numbers of tokens, {n_kept.tolist()}")
            cells.append(np.nonzero(rows)[1].reshape(len(rows), n_kept[0]).astype(np.int32))
        return cls(n_tokens, tuple(cells))

    @classmethod
    def keep_all(cls, n_tokens: int, n_head_kv: list[int]) -> CompositionPlan:
        """Returns the plan that removes nothing, for a cache with ``n_head_kv[l]`` KV heads in layer l."""
        everything = np.arange(n_tokens, dtype=np.int32)
        return cls(n_tokens, tuple(np.tile(everything, (n, 1)) for n in n_head_kv))
