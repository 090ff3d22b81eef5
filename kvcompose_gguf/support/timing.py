"""Times a call."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def timed(function: Callable[[], T]) -> tuple[T, float]:
    """Returns the result of ``function``, and its wall time in seconds."""
    start = time.perf_counter()
    result = function()
    return result, time.perf_counter() - start
