"""Terminal tables of a report: answers side by side, kept tokens per layer, bytes and seconds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.bar import Bar
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..plan.report import KVReport

if TYPE_CHECKING:
    from ..bench.result import BenchResult, Measurement
    from .demo import DemoResult, Question

_BENCH_COLUMNS = (
    "prefill\ns", "score\ns", "plan and\ncompose s", "decode\ntok/s", "\nmin-max", "\nratio",
    "rows\nMB", "allocated\nMB", "RSS\n+ MB", "peak\n+ MB",
)  # fmt: skip


def print_demo(result: DemoResult, console: Console) -> None:
    """Prints the answers side by side, the layers, and memory and time."""
    console.print(answer_table(result))
    console.print(layer_bars(result.report))
    console.print(cost_table(result))


def answer_table(result: DemoResult) -> Table:
    """Returns a table with a row per question: both answers, marked right or wrong, and the counts below."""
    table = Table(show_footer=True, expand=True)
    rounds = {"full cache": result.full, f"{result.report.compression_ratio:.0%} removed": result.compressed}
    table.add_column("the sentence to finish", ratio=4)
    for title, answers in rounds.items():
        right = answers.right(result.questions)
        table.add_column(title, f"{sum(right)} of {len(right)} right", ratio=3)
    for i, question in enumerate(result.questions):
        cells = [_marked(answers.texts[i], question) for answers in rounds.values()]
        table.add_row(f"{question.prompt} …", *cells)
    return table


def layer_bars(report: KVReport) -> Table:
    """Returns horizontal bars of the tokens that every layer keeps, on the scale of the whole context."""
    table = Table.grid(padding=(0, 1), expand=True)
    table.add_column(justify="right")
    table.add_column(ratio=1)
    table.add_column(justify="right")
    table.add_row("layer", Text(f"of {report.n_tokens} tokens"), "kept", style="dim")
    for il, n_kept in enumerate(report.n_kept.tolist()):
        table.add_row(str(il), Bar(report.n_tokens, 0, n_kept, color="cyan"), str(n_kept))
    return table


def cost_table(result: DemoResult) -> Table:
    """Returns a table of the bytes and seconds of both rounds."""
    report, full, compressed = result.report, result.full, result.compressed
    n_questions = len(result.questions)
    table = Table("", "full cache", "compressed", caption="allocated: with the room for new tokens", expand=True)
    table.add_row("document in the KV cache", _megabytes(report.kv_bytes_full), _megabytes(report.kv_bytes_kept))
    table.add_row("KV cache allocated", _megabytes(full.n_bytes_kv), _megabytes(compressed.n_bytes_kv))
    table.add_row("process memory (RSS)", _megabytes(full.n_bytes_rss), _megabytes(compressed.n_bytes_rss))
    table.add_row(f"reading {report.n_tokens} tokens, once", f"{result.prefill_seconds:.1f} s", "")
    table.add_row("compressing", "", f"{report.score_seconds + report.plan_seconds + report.compose_seconds:.1f} s")
    table.add_row(f"{n_questions} answers", f"{full.seconds:.1f} s", f"{compressed.seconds:.1f} s")
    return table


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
    for title in _BENCH_COLUMNS:
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


def _marked(answer: str, question: Question) -> Text:
    right = question.is_answered_by(answer)
    return Text("✓ " if right else "✗ ", style="green" if right else "red").append(answer, style="default")


def _megabytes(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:.1f} MB"
