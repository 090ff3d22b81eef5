"""What ``kvcompose eval`` does: a run, and its report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markdown import Markdown

from ..tasks.ruler import RULER_TASKS
from .options import EvalOptions
from .options import quick as quick_options
from .records import RunFolder
from .report import write_report
from .runner import evaluate as run
from .suites import expand


def evaluate(
    model: str,
    out: Path,
    *,
    tasks: str,
    methods: Sequence[str],
    quick: bool = False,
    report_only: bool = False,
    jobs: int | None = None,
    threads: int = 1,
    **options: Any,
) -> None:
    """Run or go on with the evaluation in ``out``, then write and print its report."""
    console = Console()
    if report_only:
        folder = RunFolder(out)
    else:
        names = RULER_TASKS if tasks == "all" else tuple(tasks.split(","))
        asked = EvalOptions(tasks=names, methods=tuple(expand(list(methods))), **options)
        folder = run(model, quick_options(asked) if quick else asked, out, jobs=jobs, threads=threads, console=console)
    write_report(folder)
    console.print(Markdown((out / "report.md").read_text("utf-8")))
    console.print(f"{out / 'report.md'}, with pictures, summary.json and all answers beside it")
