"""Spreads work over layers: kernels and linear algebra run on one thread each and release the GIL."""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from threadpoolctl import ThreadpoolController

T = TypeVar("T")


def map_layers(function: Callable[[int], T], n_layer: int, n_threads: int | None = None) -> list[T]:
    """Returns the results of ``function`` for every layer, computed in at most ``n_threads`` threads at a time."""
    with _blas().limit(limits=1, user_api="blas"), ThreadPoolExecutor(n_threads) as pool:
        return list(pool.map(function, range(n_layer)))


@functools.cache
def _blas() -> ThreadpoolController:
    # the threads of a BLAS wait for each other; several of them on two cores were 15 times slower than one
    return ThreadpoolController()
