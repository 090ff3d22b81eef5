"""Prints a demo: answers side by side, kept tokens per layer, bytes and seconds."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ...support.printing import layer_bars, megabytes
from .comparison import DemoResult
from .questions import Question


def print_demo(result: DemoResult, console: Console) -> None:
    """Prints the answers side by side, the layers, and memory and time."""
    console.print(answer_table(result))
    console.print(layer_bars(result.report.n_kept.tolist(), result.report.n_tokens))
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


def cost_table(result: DemoResult) -> Table:
    """Returns a table of the bytes and seconds of both rounds."""
    report, full, compressed = result.report, result.full, result.compressed
    n_questions = len(result.questions)
    table = Table("", "full cache", "compressed", caption="allocated: with the room for new tokens", expand=True)
    table.add_row("document in the KV cache", megabytes(report.kv_bytes_full), megabytes(report.kv_bytes_kept))
    table.add_row("KV cache allocated", megabytes(full.n_bytes_kv), megabytes(compressed.n_bytes_kv))
    table.add_row("process memory (RSS)", megabytes(full.n_bytes_rss), megabytes(compressed.n_bytes_rss))
    table.add_row(f"reading {report.n_tokens} tokens, once", f"{result.prefill_seconds:.1f} s", "")
    table.add_row("compressing", "", f"{report.score_seconds + report.plan_seconds + report.compose_seconds:.1f} s")
    table.add_row(f"{n_questions} answers", f"{full.seconds:.1f} s", f"{compressed.seconds:.1f} s")
    return table


def _marked(answer: str, question: Question) -> Text:
    right = question.is_answered_by(answer)
    return Text("✓ " if right else "✗ ", style="green" if right else "red").append(answer, style="default")
