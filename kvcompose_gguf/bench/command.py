"""What ``kvcompose bench`` does: it measures, or reads an earlier result, and prints, writes and draws it."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from ..errors import ConfigError
from ..load import resolve_model
from ..support.plots import check_plot
from .measure import run_bench
from .options import BenchOptions
from .plot import plot_bench
from .result import BenchResult, read_result
from .table import bench_table, print_head, print_result


def bench(
    model: str | None,
    options: BenchOptions,
    *,
    json_file: Path | None = None,
    plot_file: Path | None = None,
    from_file: Path | None = None,
) -> BenchResult:
    """Measures, or reads an earlier run's file. Prints a table per size; writes the JSON document and the picture.

    Args:
        model: a file, or the name of a fetched model; None with ``from_file``.
        json_file: written after every size; ``-`` prints the document as the last line of the output instead.
    Raises:
        ConfigError: an output cannot be written, or the model does not exist; raised before anything is measured.
    """
    _check_outputs(json_file, plot_file)
    console = _console()
    if from_file is not None:
        if model is not None:
            raise ConfigError(f"model={model!r} and from={str(from_file)!r} cannot be combined")
        result = read_result(from_file)
        print_result(result, console)
        _save(result, json_file, plot_file)
    elif model is not None:
        for result in run_bench(resolve_model(model), options, console):
            if not result.measurements:
                print_head(result, console)
                continue
            console.print(bench_table(result, result.sizes[-1]))
            _save(result, json_file, plot_file)
    else:
        raise ConfigError("model is missing: give a .gguf file or a name that `kvcompose fetch` knows")
    if _is_stdout(json_file):
        print(json.dumps(result.to_dict()))
    return result


def _console() -> Console:
    """Returns a console at least as wide as a table row, because a truncated number would be wrong."""
    return Console(width=max(Console().width, 110))


def _is_stdout(json_file: Path | None) -> bool:
    return json_file is not None and str(json_file) == "-"


def _check_outputs(json_file: Path | None, plot_file: Path | None) -> None:
    if plot_file is not None:
        check_plot(plot_file)
    for name, file in (("json", json_file), ("plot", plot_file)):
        if file is None or _is_stdout(file):
            continue
        is_new = not file.exists()
        try:
            with file.open("ab"):
                pass
        except OSError as error:
            raise ConfigError(f"{name}={str(file)!r} cannot be written: {error}") from error
        if is_new:
            file.unlink()


def _save(result: BenchResult, json_file: Path | None, plot_file: Path | None) -> None:
    if json_file is not None and not _is_stdout(json_file):
        json_file.write_text(json.dumps(result.to_dict(), indent=1) + "\n", "utf-8")
    if plot_file is not None:
        plot_bench(result, plot_file)
