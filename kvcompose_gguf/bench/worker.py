"""The worker processes of ``kvcompose bench``. Each holds one variant's cache, so that its memory can be measured.

All variants of a context size are alive at the same time, so that their decodes can take turns. Only one computes at
a time; the others wait on their pipes, which takes no CPU time.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import psutil

from ..errors import ConfigError, KVComposeError, NativeError
from .result import Variant

if TYPE_CHECKING:
    from ..llama import Llama


@dataclass(frozen=True)
class Job:
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


class Worker:
    """A process that runs a :class:`Job` step by step; leaving the ``with`` block ends it.

    Every call waits for the process to finish the step, and raises the errors that the process raised.

    Raises:
        NativeError: the process has died.
    """

    def __init__(self, job: Job) -> None:
        self._label = f"{job.variant.name} at n_tokens={len(job.tokens)}"
        context = multiprocessing.get_context("spawn")  # a forked copy of llama.cpp would lack its threads
        self._connection, child = context.Pipe()
        self._process = context.Process(target=_serve, args=(child, job), daemon=True)
        self._process.start()
        child.close()  # the process then holds the only other end, so its death ends recv()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()  # it has nothing to save, and after Ctrl-C it may be in the middle of a decode
        self._process.join()
        self._connection.close()

    @property
    def pid(self) -> int | None:
        """Returns the process id."""
        return self._process.pid

    def read(self) -> Reading:
        """Loads the model, prefills the context, and compresses it if the variant asks for it."""
        reading: Reading = self._call("read")
        return reading

    def decode(self) -> float:
        """Decodes the job's tokens after the context, and removes them again; returns the seconds."""
        seconds: float = self._call("decode")
        return seconds

    def memory(self) -> Memory:
        """Returns the current memory of cache and process."""
        memory: Memory = self._call("memory")
        return memory

    def _call(self, command: str) -> Any:
        try:
            self._connection.send(command)
            answer = self._connection.recv()
        except (EOFError, OSError) as error:
            self._process.join(10)
            code = self._process.exitcode
            hint = "; it probably ran out of memory" if code == -9 else ""
            raise NativeError(f"{self._label}: the process ended with exit code {code}{hint}") from error
        if isinstance(answer, KVComposeError):
            raise type(answer)(f"{self._label}: {answer}")
        if isinstance(answer, Exception):
            raise answer
        return answer


#
# in the process
#


def _serve(connection: Connection, job: Job) -> None:
    """Answers commands until the parent is gone; a failure is the last answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent also gets Ctrl-C, and ends this process
    try:
        measured = _Measured(job)
        while True:
            connection.send(getattr(measured, connection.recv())())
    except (EOFError, BrokenPipeError):
        return
    except KVComposeError as error:
        connection.send(error)
    except Exception:
        connection.send(RuntimeError(traceback.format_exc()))


class _Measured:
    """One Llama and its measurements; the methods are the commands."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._llama = _load(job)
        # one token reads every weight, so that neither prefill time nor memory growth includes loading the file
        self._llama.eval(job.tokens[:1])
        self._llama.reset()
        # llama.cpp zeroes a cache when it allocates it, so all of its memory is resident already
        self._baseline = psutil.Process().memory_info().rss - self._llama.kv_bytes
        _reset_peak()

    def read(self) -> Reading:
        tokens = list(self._job.tokens)
        if self._job.variant.compression_ratio is None:
            seconds = self._eval_seconds([tokens])
            n_bytes_rows = len(tokens) * sum(layer.n_bytes_row for layer in self._llama.kv_layers)
            return Reading(seconds, 0.0, 0.0, 0.0, 0, n_bytes_rows)
        report = self._llama.compress(tokens)
        return Reading(
            report.prefill_seconds, report.score_seconds, report.plan_seconds, report.compose_seconds,
            report.scoring_chunk, report.kv_bytes_kept,
        )  # fmt: skip

    def decode(self) -> float:
        self._decode_seconds(self._job.decoded[:1])  # wakes up the threads after another process's turn
        return self._decode_seconds(self._job.decoded)

    def memory(self) -> Memory:
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


def _load(job: Job) -> Llama:
    from gguf import GGMLQuantizationType

    from ..llama import Llama
    from ..methods.kvcompose import KVCompose

    ratio = job.variant.compression_ratio
    type_kv = GGMLQuantizationType[job.variant.type_kv.upper()].value
    try:
        return Llama(
            str(job.model_path),
            n_ctx=job.n_ctx,
            n_threads=job.n_threads,
            n_threads_batch=job.n_threads_batch,
            flash_attn=True,
            type_k=type_kv,
            type_v=type_kv,
            kv_compressor=None if ratio is None else KVCompose(compression_ratio=ratio, min_tokens=1),
            verbose=False,
        )
    except ConfigError:
        raise
    except ValueError as error:  # the bindings raise only ValueError if llama.cpp rejects a file or a context
        raise ConfigError(f"{job.model_path} cannot be used: {error}") from error


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
