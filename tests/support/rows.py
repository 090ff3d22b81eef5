"""Cached rows in memory, for evidence without a cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from kvcompose_gguf.errors import ConfigError

Turn = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True, eq=False)
class ArrayRows:
    """Keys and values of each layer, and the functions that rotate keys; what is missing is refused."""

    all_keys: Sequence[np.ndarray] = ()
    all_values: Sequence[np.ndarray] = ()
    turn: Turn | None = None
    turn_back: Turn | None = None

    def keys(self, l: int) -> np.ndarray:
        if not self.all_keys:
            raise ConfigError("the evidence has no keys")
        return self.all_keys[l]

    def values(self, l: int) -> np.ndarray:
        if not self.all_values:
            raise ConfigError("the evidence has no values")
        return self.all_values[l]

    def rotate(self, l: int, rows: np.ndarray, pos: np.ndarray) -> np.ndarray:
        if self.turn is None:
            raise ConfigError("the evidence has no states")
        return self.turn(rows, pos)

    def unrotate(self, l: int, rows: np.ndarray, pos: np.ndarray) -> np.ndarray:
        if self.turn_back is None:
            raise ConfigError("the evidence has no unrotate")
        return self.turn_back(rows, pos)
