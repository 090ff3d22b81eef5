"""What several commands print alike: sizes, and bars of what the layers keep."""

from __future__ import annotations

from collections.abc import Iterable

from rich.bar import Bar
from rich.table import Table
from rich.text import Text


def megabytes(n_bytes: int) -> str:
    """A size, e.g. ``"1,012.5 MB"``."""
    return f"{n_bytes / 1e6:,.1f} MB"


def layer_bars(n_kept: Iterable[int], n_tokens: int) -> Table:
    """Horizontal bars of the tokens that every layer keeps, on the scale of all ``n_tokens``."""
    table = Table.grid(padding=(0, 1), expand=True)
    table.add_column(justify="right")
    table.add_column(ratio=1)
    table.add_column(justify="right")
    table.add_row("layer", Text(f"of {n_tokens} tokens"), "kept", style="dim")
    for il, n in enumerate(n_kept):
        table.add_row(str(il), Bar(n_tokens, 0, n, color="cyan"), str(n))
    return table
