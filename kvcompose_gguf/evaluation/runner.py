"""`kvcompose eval`: runs the same samples with every method, ratio and cache type, in several processes."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..errors import ConfigError, StateError
from ..measurements.learned import Learned, load_learned
from ..methods import Method
from ..models.hashes import model_sha256
from ..models.resolve import resolve_model
from ..native.environment import system
from ..native.vocab_only import n_ctx_trained, open_vocabulary
from ..support.files import write_file
from ..tasks.texts import load_texts
from .options import EvalOptions
from .records import Answer, RunFolder, SampleCost
from .worker import SampleJob, SampleWorker

#: file of a run with what was known of the model when it began
KNOWN = "learned.npz"


def evaluate(
    model: str,
    options: EvalOptions,
    out: Path,
    *,
    jobs: int | None = None,
    threads: int = 1,
    console: Console | None = None,
) -> RunFolder:
    """Starts the run in ``out``, or finishes it; returns its folder.

    Args:
        jobs: number of processes, each with its own copy of the model; None: one per core. llama.cpp's threads wait for
            each other at every step, so many one-thread processes are faster than one process with many threads.
        console: where to show progress.
    Raises:
        ConfigError: ``out`` contains a run with other settings.
    """
    model_path = resolve_model(model)
    jobs = jobs or psutil.cpu_count(logical=False) or 1
    # a missing calibration must raise before the folder is created
    methods = options.make_methods(model_path, _known(out))
    settings = _settings(model_path, options, methods)
    folder = RunFolder.open(out, settings, _environment(jobs, threads, options))
    _keep_known(out, methods)
    done = folder.done()
    everything = dict.fromkeys(itertools.product(options.types_kv, range(options.n_samples), options.tasks))
    left = [SampleJob(task, index, kv) for kv, index, task in everything if (task, index, kv) not in done]
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console or Console(stderr=True)) as progress:
        bar = progress.add_task("samples", total=len(left) + len(done), completed=len(done))
        for cost, answers in _work(model_path, options, left, jobs, threads, methods):
            folder.add(cost, answers)
            progress.advance(bar)
    return folder


def _known(out: Path) -> Learned | None:
    """Returns what was known of the model when the run began; None: the run is new, or needs no such knowledge.

    Raises:
        ConfigError: its file is damaged.
    """
    file = out / KNOWN
    return load_learned(file) if file.exists() else None


def _keep_known(out: Path, methods: dict[str, list[Method]]) -> None:
    """Keeps what is known of the model with the run, which may go on after more was learnt."""
    known = next((method.known for made in methods.values() for method in made if method.known is not None), None)
    if known is not None and not (out / KNOWN).exists():
        write_file(out / KNOWN, known.to_bytes())


def _work(
    model_path: Path,
    options: EvalOptions,
    left: Sequence[SampleJob],
    jobs: int,
    threads: int,
    methods: dict[str, list[Method]],
) -> Iterator[tuple[SampleCost, list[Answer]]]:
    if jobs == 1 or len(left) == 1:
        worker = SampleWorker(model_path, options, threads, methods)
        with contextlib.closing(worker):
            yield from map(worker.do, left)
        return
    with ProcessPoolExecutor(
        min(jobs, max(1, len(left))), get_context("spawn"), _start_worker, (model_path, options, threads, methods)
    ) as pool:
        try:
            for future in as_completed([pool.submit(_do, job) for job in left]):
                yield future.result()
        except BrokenProcessPool as error:
            raise StateError("a worker died, perhaps for lack of memory; run again to continue") from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_worker: SampleWorker | None = None  # the worker of this process, in a process pool


def _start_worker(model_path: Path, options: EvalOptions, threads: int, methods: dict[str, list[Method]]) -> None:
    global _worker
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker = SampleWorker(model_path, options, threads, methods)


def _end_with_parent() -> None:
    """Ends this process when its parent dies; otherwise it would wait for its next job forever and hold the model."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _do(job: SampleJob) -> tuple[SampleCost, list[Answer]]:
    assert _worker is not None
    return _worker.do(job)


def _settings(model_path: Path, options: EvalOptions, methods: dict[str, list[Method]]) -> dict[str, Any]:
    """Returns the settings that decide the answers; without ``n_samples``, because a later run may add samples."""
    with open_vocabulary(model_path) as vocabulary:
        n_ctx_train = n_ctx_trained(vocabulary)
    if n_ctx_train and options.n_tokens > n_ctx_train:
        raise ConfigError(f"n_tokens={options.n_tokens}, but {model_path.name} was trained for at most {n_ctx_train}")
    settings = {**asdict(options), "texts": load_texts(options.texts).name, "methods": list(options.methods)}
    del settings["n_samples"]
    measurements = {made[0].fingerprint() for made in methods.values() if made} - {b""}
    digests = sorted(hashlib.sha256(data).hexdigest()[:16] for data in measurements)
    return {
        "model": model_path.name, "model_sha256": model_sha256(model_path), **settings, "calibrations": digests
    }  # fmt: skip


def _environment(jobs: int, threads: int, options: EvalOptions) -> dict[str, Any]:
    return {**system(), "jobs": jobs, "threads": threads, "n_samples": options.n_samples}
