"""Arrays compared: to the bit, and up to a tolerance."""

from __future__ import annotations

from typing import Any

import numpy as np


def assert_same(kernel: np.ndarray, twin: np.ndarray) -> None:
    """Asserts equal dtype, shape and values, with NaN equal to NaN; prints the largest difference."""
    assert (kernel.dtype, kernel.shape) == (twin.dtype, twin.shape)
    same = (kernel == twin) | (np.isnan(kernel) & np.isnan(twin))
    with np.errstate(invalid="ignore"):
        difference = np.abs(kernel.astype(np.float64) - twin.astype(np.float64))
    largest = np.max(np.nan_to_num(difference, nan=np.inf), where=~same, initial=0.0)
    print(f"largest difference {largest} in {kernel.size} values")
    assert same.all(), f"{(~same).sum()} of {same.size} values differ, by {largest} at most"


def assert_close(got: Any, want: Any, tolerance: float, what: str = "") -> None:
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape
    difference = np.abs(got.astype(np.float64) - want).max(initial=0.0)
    assert difference <= tolerance, f"{what}: the largest difference is {difference:.3g}"
