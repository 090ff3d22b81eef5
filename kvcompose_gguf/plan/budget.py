"""Converts a user's budget to a number of composite tokens."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import ConfigError
from .geometry import LayerGeometry

#: largest number of tokens that are read between two compositions
PART = 512


def composites_for_ratio(compression_ratio: float, n_layer: int, n_tokens: int) -> int:
    """Returns ``int(n_layer * n_tokens * (1 - compression_ratio))``, the reference's rounding (kvcompose_press.py)."""
    return max(1, int(n_layer * n_tokens * (1 - compression_ratio)))


def composites_for_n_kept(n_kept: float, n_layer: int, n_tokens: int) -> int:
    """Returns the composites of ``n_kept`` tokens per layer on average, at most ``n_layer * n_tokens``."""
    return max(1, int(n_layer * min(n_kept, n_tokens)))


def composites_for_bytes(max_kv_bytes: int, layers: Sequence[LayerGeometry], n_tokens: int) -> int:
    """Returns how many composites' rows fit into ``max_kv_bytes``; room for new tokens is extra.

    If row sizes differ between layers, the largest counts, so that the limit holds for any allocation.

    Raises:
        ConfigError: not even one row per layer fits.
    """
    n_bytes_row = max(layer.n_bytes_row for layer in layers)
    n_total = min(max_kv_bytes // n_bytes_row, len(layers) * n_tokens)
    if n_total < len(layers):
        raise ConfigError(
            f"max_kv_bytes={max_kv_bytes} is less than one row of {n_bytes_row} bytes in each of {len(layers)} layers"
        )
    return n_total
