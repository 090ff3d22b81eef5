"""Spreads work over layers: the kernels run on one thread each and release the GIL."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def map_layers(function: Callable[[int], T], n_layer: int, n_threads: int | None = None) -> list[T]:
    """Returns the results of ``function`` for every layer, computed in at most ``n_threads`` threads at a time."""
    with ThreadPoolExecutor(n_threads) as pool:
        return list(pool.map(function, range(n_layer)))
