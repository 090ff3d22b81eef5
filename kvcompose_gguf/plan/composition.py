"""The plan: which rows stay in the cache, as a value."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError
from ..kernels.types import IntArray


@dataclass(frozen=True, eq=False)
class CompositionPlan:
    """The rows that every KV head of every layer keeps.

    In a full cache a row is a token. In a composed cache the rows are composites, and behind them the tokens that were
    read since.

    Attributes:
        n_tokens: tokens N that the cache stands for.
        rows: for each layer int32 ``(n_head_kv, n_kept[l])``, indices of rows, strictly ascending within a head. Column
            j is composite token j in position order.
        n_rows: the number of rows that every layer has; empty: N, as in a full cache.
        n_tail: so many last tokens stay in every head, and can still be removed; less than N.
    Raises:
        ConfigError: an array has another shape or dtype, an index is out of range or out of order, or a head does not
            keep its tail.
    """

    n_tokens: int
    rows: tuple[IntArray, ...]
    n_rows: tuple[int, ...] = ()
    n_tail: int = 0

    def __post_init__(self) -> None:
        # copies, so that the caller's arrays are not frozen and cannot change the plan
        object.__setattr__(self, "rows", tuple(np.array(rows) for rows in self.rows))
        object.__setattr__(self, "n_rows", tuple(int(n) for n in self.n_rows) or (self.n_tokens,) * len(self.rows))
        if len(self.n_rows) != len(self.rows):
            raise ConfigError(f"n_rows has {len(self.n_rows)} layers, rows {len(self.rows)}")
        if not 0 <= self.n_tail < max(1, self.n_tokens):
            raise ConfigError(f"n_tail={self.n_tail} is not in [0, {self.n_tokens})")
        for il, (rows, n) in enumerate(zip(self.rows, self.n_rows, strict=True)):
            if rows.ndim != 2 or rows.dtype != np.int32:
                raise ConfigError(f"rows[{il}] is {rows.dtype} {rows.shape}; int32 (n_head_kv, n_kept) is needed")
            if rows.size and (rows.min() < 0 or rows.max() >= n):
                raise ConfigError(f"rows[{il}] has indices outside of [0, {n})")
            if rows.shape[1] > 1 and not (np.diff(rows, axis=1) > 0).all():
                raise ConfigError(f"rows[{il}] is not strictly ascending within each head")
            if self.n_tail and (rows.shape[1] < self.n_tail or (rows[:, -self.n_tail] != n - self.n_tail).any()):
                raise ConfigError(f"rows[{il}] does not keep the last {self.n_tail} rows in each head")
        if not any(rows.size for rows in self.rows):
            raise ConfigError("the plan keeps no token in any layer")
        for rows in self.rows:
            rows.setflags(write=False)

    @property
    def n_kept(self) -> npt.NDArray[np.int64]:
        """Returns how many composite tokens every layer keeps, int64 ``(n_layer,)``."""
        return np.array([rows.shape[1] for rows in self.rows], dtype=np.int64)

    @classmethod
    def keep_all(cls, n_tokens: int, n_head_kv: list[int]) -> CompositionPlan:
        """Returns the plan that removes nothing, for a full cache with ``n_head_kv[l]`` KV heads in layer l."""
        everything = np.arange(n_tokens, dtype=np.int32)
        return cls(n_tokens, tuple(np.tile(everything, (n, 1)) for n in n_head_kv))
