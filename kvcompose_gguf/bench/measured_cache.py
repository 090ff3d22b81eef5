"""What one process of ``kvcompose bench`` holds and measures: a model with one variant of the cache."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from ..load import load_model
from .result import Variant

if TYPE_CHECKING:
    from ..llama import Llama


@dataclass(frozen=True)
class VariantRun:
    """One variant at one context size: the context in ``tokens``, and the tokens of a decode sample in ``decoded``."""

    model_path: Path
    variant: Variant
    n_ctx: int
    n_threads: int
    n_threads_batch: int
    tokens: Sequence[int]
    decoded: Sequence[int]


@dataclass(frozen=True)
class Reading:
    """Measurements of reading the context; the fields are those of ``Measurement``."""

    prefill_seconds: float
    score_seconds: float
    plan_seconds: float
    compose_seconds: float
    scoring_chunk: int
    kv_bytes_rows: int


@dataclass(frozen=True)
class Memory:
    """Memory of the process now; the fields are those of ``Measurement``."""

    kv_bytes: int
    baseline_bytes: int
    rss_bytes: int
    peak_bytes: int | None


class MeasuredCache:
    """One model with its cache, in a process of its own; the methods are the commands of :class:`VariantProcess`."""

    def __init__(self, run: VariantRun) -> None:
        self._run = run
        self._llama = _load(run)
        # one token reads every weight, so that neither prefill time nor memory growth includes loading the file
        self._llama.eval(run.tokens[:1])
        self._llama.reset()
        # llama.cpp zeroes a cache when it allocates it, so all of its memory is resident already
        self._baseline = psutil.Process().memory_info().rss - self._llama.kv_bytes
        _reset_peak()

    def read(self) -> Reading:
        """See ``VariantProcess.read``."""
        tokens = list(self._run.tokens)
        if self._run.variant.compression_ratio is None:
            seconds = self._eval_seconds([tokens])
            n_bytes_rows = len(tokens) * sum(layer.n_bytes_row for layer in self._llama.kv_layers)
            return Reading(seconds, 0.0, 0.0, 0.0, 0, n_bytes_rows)
        report = self._llama.compress(tokens)
        return Reading(
            report.prefill_seconds, report.score_seconds, report.plan_seconds, report.compose_seconds,
            report.scoring_chunk, report.kv_bytes_kept,
        )  # fmt: skip

    def decode(self) -> float:
        """See ``VariantProcess.decode``."""
        self._decode_seconds(self._run.decoded[:1])  # wakes up the threads after another process's turn
        return self._decode_seconds(self._run.decoded)

    def memory(self) -> Memory:
        """See ``VariantProcess.memory``."""
        return Memory(self._llama.kv_bytes, self._baseline, psutil.Process().memory_info().rss, peak_bytes())

    def _decode_seconds(self, tokens: Sequence[int]) -> float:
        """Returns the wall time of single-token decodes after the context; the decoded tokens are removed again."""
        with self._llama.context.undone():
            return self._eval_seconds([[token] for token in tokens])

    def _eval_seconds(self, batches: Sequence[Sequence[int]]) -> float:
        from llama_cpp import llama_synchronize

        start = time.perf_counter()
        for batch in batches:
            self._llama.eval(batch)
        llama_synchronize(self._llama.ctx)
        return time.perf_counter() - start


def _load(run: VariantRun) -> Llama:
    from ..methods.kvcompose import KVCompose
    from ..native.kv_types import ggml_type

    ratio = run.variant.compression_ratio
    type_kv = ggml_type(run.variant.type_kv)
    return load_model(
        run.model_path, run.n_ctx, None if ratio is None else KVCompose(compression_ratio=ratio, min_tokens=1),
        n_threads=run.n_threads, n_threads_batch=run.n_threads_batch, type_k=type_kv, type_v=type_kv,
    )  # fmt: skip


def _reset_peak() -> None:
    """Resets the peak, if the system supports it (Linux, proc(5), clear_refs): loading may need more memory."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int | None:
    """Returns the peak resident memory of this process, or None if the system does not report it.

    On Linux this is VmHWM: getrusage's ru_maxrss survives an exec and would be the parent's.
    """
    status = Path("/proc/self/status")
    if status.exists():
        lines = [line.split() for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        return int(lines[0][1]) * 1024 if lines else None
    info = psutil.Process().memory_info()
    if hasattr(info, "peak_wset"):  # Windows
        return int(info.peak_wset)
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
