"""Times calls."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def timed(function: Callable[[], T]) -> tuple[T, float]:
    """Returns the result of ``function``, and its wall time in seconds."""
    start = time.perf_counter()
    result = function()
    return result, time.perf_counter() - start


class Stopwatch:
    """Adds up the wall time of calls, by name.

    Attributes:
        seconds: of all calls of a name; 0 for a name without calls.
    """

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()

    def time(self, name: str, function: Callable[[], T]) -> T:
        """Returns the result of ``function``."""
        result, seconds = timed(function)
        self.seconds[name] += seconds  # type: ignore[assignment]
        return result
