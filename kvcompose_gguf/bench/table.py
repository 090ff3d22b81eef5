"""Prints the measurements of ``kvcompose bench``: a table for each context size."""

from __future__ import annotations

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .result import BenchResult, Measurement

_COLUMNS = (
    "prefill\ns", "score\ns", "plan and\ncompose s", "decode\ntok/s", "\nmin-max", "\nratio",
    "rows\nMB", "allocated\nMB", "RSS\n+ MB", "peak\n+ MB",
)  # fmt: skip


def print_result(result: BenchResult, console: Console) -> None:
    """Prints what was measured where, and the tables of all sizes."""
    print_head(result, console)
    for n_tokens in result.sizes:
        console.print(bench_table(result, n_tokens))


def print_head(result: BenchResult, console: Console) -> None:
    """Prints the model, the machine and the arguments."""
    env, arguments = result.environment, result.arguments
    lines = (
        f"{env.model} ({env.model_bytes / 1e6:.0f} MB), llama.cpp {env.llama_cpp_commit[:9]}, {env.cpu}",
        f"{env.n_threads} threads, {env.n_threads_batch} for batches; flash attention; {env.text}",
        f"N = {', '.join(f'{n:,}' for n in arguments['n_tokens'])}; "
        f"{arguments['repeats']} rounds of {arguments['n_decode']} tokens",
    )
    console.print(Text("\n".join(lines)), soft_wrap=True)


def bench_table(result: BenchResult, n_tokens: int) -> Table:
    """Returns a table of time and memory of every variant at one context size, one row each."""
    rows = result.of_size(n_tokens)
    table = Table(
        title=f"{n_tokens:,} tokens of context, {rows[0].n_ctx:,} cells",
        caption="KVCompose: fraction removed; seconds: measured once; allocated: with room for new tokens; "
        "RSS, peak: of the process, beyond the loaded model",
        box=SIMPLE,
        collapse_padding=True,
    )
    table.add_column("\ncache", no_wrap=True)
    for title in _COLUMNS:
        table.add_column(title, justify="right", no_wrap=True)
    for m in rows:
        table.add_row(m.variant.name, *_seconds(m), *_decoding(result, m), *_memory(m))
    return table


def _seconds(m: Measurement) -> list[str]:
    if m.variant.compression_ratio is None:
        return [f"{m.prefill_seconds:.2f}", "", ""]
    return [f"{m.prefill_seconds:.2f}", f"{m.score_seconds:.2f}", f"{m.plan_seconds + m.compose_seconds:.3f}"]


def _decoding(result: BenchResult, m: Measurement) -> list[str]:
    rates = m.decode_rates
    return [f"{m.decode_rate:.1f}", f"{min(rates):.1f}-{max(rates):.1f}", f"{result.speedup(m):.2f}"]


def _memory(m: Measurement) -> list[str]:
    peak = "" if m.peak_bytes is None else f"{(m.peak_bytes - m.baseline_bytes) / 1e6:.1f}"
    return [
        f"{m.kv_bytes_rows / 1e6:.1f}", f"{m.kv_bytes / 1e6:.1f}", f"{(m.rss_bytes - m.baseline_bytes) / 1e6:.1f}", peak
    ]  # fmt: skip
