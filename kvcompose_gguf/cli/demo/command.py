"""What ``kvcompose demo`` does: it fetches the model, asks both caches and prints the answers."""

from __future__ import annotations

from rich.console import Console

from ...methods.kvcompose import KVCompose
from ...models import known
from .comparison import DemoResult, run_demo
from .tables import print_demo

MODEL = "smollm2"


def demo(compression_ratio: float = 0.75, threads: int | None = None) -> DemoResult:
    """Fetches the model, runs the comparison and prints it."""
    method = KVCompose(compression_ratio=compression_ratio)  # a wrong ratio must raise before the download
    console = Console()
    result = run_demo(known.fetch(MODEL), method, threads=threads, console=console)
    print_demo(result, console)
    return result
