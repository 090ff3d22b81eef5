"""Implements ``kvcompose learn --for compresskv``: measures once what CompressKV needs to know about a model."""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from rich.bar import Bar
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from .. import __version__
from ..errors import ConfigError
from ..load import load_model
from ..measurements.calibration import Calibration, journal_file, save_calibration
from ..models.hashes import model_sha256
from ..models.resolve import resolve_model
from ..support.files import append_file, write_file
from ..tasks.texts import load_texts
from . import trials
from .trials import CalibrateOptions

if TYPE_CHECKING:
    from ..llama import Llama


def calibrate(model: str, options: CalibrateOptions, threads: int | None = None) -> Path:
    """Measures a model, prints the results, and returns the file in which ``CompressKV`` finds them.

    Writes every finished trial to a journal beside it. A later call with the same options continues from there.

    Raises:
        ConfigError: the model does not exist, its context is shorter than the prompts, the cache folder cannot be
            written, or no answer was right.
    """
    model_path = resolve_model(model)
    settings = {**asdict(options), "texts": load_texts("generated").name, "package": __version__}
    sha256 = model_sha256(model_path)
    journal = Journal(journal_file(sha256, settings, "trials.jsonl"), settings)
    n_ctx = -(-options.n_tokens // 256) * 256
    llama = load_model(model_path, n_ctx, fast_attention=True, threads=threads)
    try:
        if options.n_tokens > llama.n_ctx_train:
            raise ConfigError(f"trials of {options.n_tokens} tokens are longer than the context of {model_path}")
        heads, errors = measure(llama, options, journal)
    finally:
        llama.close()
    calibration = Calibration(model_path.name, sha256, heads, errors, settings)
    file = save_calibration(calibration)
    console = Console()
    console.print(calibration_table(calibration))
    console.print(str(file), soft_wrap=True)
    return file


def calibration_table(calibration: Calibration, n_top: int = 4) -> Table:
    """Returns a table of the best heads and the eviction error of every layer."""
    table = Table.grid(padding=(0, 1), expand=True)
    for justify, ratio in (("right", None), ("left", 2), ("left", 1), ("right", None)):
        table.add_column(justify=justify, ratio=ratio)  # type: ignore[arg-type]
    table.add_row("layer", "best heads, and their scores", "eviction error", "", style="dim")
    for l, (scores, error) in enumerate(zip(calibration.heads, calibration.errors, strict=True)):
        best = np.argsort(-np.array(scores), kind="stable")[:n_top]
        text = "  ".join(f"{head} ({scores[head]:.2f})" for head in best)
        table.add_row(str(l), text, Bar(max(calibration.errors), 0, error, color="cyan"), f"{error:.3f}")
    return table


class Journal:
    """Finished trials, one JSON line each, after a line with the settings; discards trials of other settings."""

    def __init__(self, file: Path, settings: dict[str, Any]) -> None:
        self._file = file
        self._records: dict[str, Any] = {}
        # the file is new, or its last line is incomplete
        with contextlib.suppress(OSError, ValueError), file.open(encoding="utf-8") as stream:
            if json.loads(next(stream, "")) == settings:
                for line in stream:
                    record = json.loads(line)
                    self._records[record["trial"]] = record["result"]
        records = [settings, *({"trial": key, "result": result} for key, result in self._records.items())]
        try:
            write_file(file, "".join(json.dumps(record) + "\n" for record in records))
        except OSError as error:
            raise ConfigError(f"cannot write to {file.parent}, the folder of the calibrations: {error}") from error

    def get(self, key: str) -> Any:
        """Returns the result of a trial, or None if it has not run yet."""
        return self._records.get(key)

    def add(self, key: str, result: Any) -> Any:
        """Stores the result of a trial; returns it."""
        self._records[key] = result
        append_file(self._file, json.dumps({"trial": key, "result": result}) + "\n")
        return result


def measure(
    llama: Llama, options: CalibrateOptions, journal: Journal
) -> tuple[tuple[tuple[float, ...], ...], tuple[float, ...]]:
    """Returns head scores and eviction errors; takes finished trials from the journal."""
    prompt_of, run = trials.needle_prompt, trials.needle_trial
    if options.n_random:
        prompt_of, run = trials.random_prompt, trials.random_trial
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("heads", total=options.n_trials)
        results = []
        for number in range(options.n_trials):
            key = f"heads {number}"
            results.append(journal.get(key) or journal.add(key, run(llama, options, number)))
            progress.advance(bar)
        counted = [number for number, result in enumerate(results) if result["heads"] is not None]
        if not counted:
            raise ConfigError(f"none of {len(results)} answers was right: try shorter prompts, or --data-free")
        of_layers = zip(*(results[number]["heads"] for number in counted), strict=True)
        heads = tuple(_rounded(np.mean(scores, axis=0)) for scores in of_layers)

        able = [number for number in counted if len(results[number]["answer"]) > 1]  # a step needs a token before it
        chosen = np.unique(np.linspace(0, len(able) - 1, min(options.n_errors, len(able))).round().astype(int))
        bar = progress.add_task("errors", total=len(chosen))
        errors = []
        for number in (able[i] for i in chosen):
            found = journal.get(f"errors {number}")
            if found is None:
                prompt, _ = prompt_of(llama, options, number)
                found = trials.eviction_errors(llama, prompt, results[number]["answer"], heads)
                journal.add(f"errors {number}", found)
            errors.append(found)
            progress.advance(bar)
    if not errors:
        raise ConfigError("no right answer has two tokens: eviction errors cannot be measured")
    mean = np.mean([np.array(each) / max(trials.EPS, sum(each)) for each in errors], axis=0)
    return heads, _rounded(mean / mean.sum())


def _rounded(values: npt.NDArray[np.float64]) -> tuple[float, ...]:
    """Rounds to six digits, enough for a ranking, which halves the file."""
    return tuple(float(f"{value:.6g}") for value in values)
