"""The processes of ``kvcompose bench``. Each holds one variant's cache, so that its memory can be measured.

All variants of a context size are alive at the same time, so that their decodes can take turns. Only one computes at
a time; the others wait on their pipes, which takes no CPU time.
"""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

from ..errors import KVComposeError, NativeError
from .measured_cache import MeasuredCache, Memory, Reading, VariantRun


class VariantProcess:
    """A process that takes a :class:`VariantRun` step by step; leaving the ``with`` block ends it.

    Every call waits for the process to finish the step, and raises the errors that the process raised.

    Raises:
        NativeError: the process has died.
    """

    def __init__(self, run: VariantRun) -> None:
        self._label = f"{run.variant.name} at n_tokens={len(run.tokens)}"
        context = multiprocessing.get_context("spawn")  # a forked copy of llama.cpp would lack its threads
        self._connection, child = context.Pipe()
        self._process = context.Process(target=_serve, args=(child, run), daemon=True)
        self._process.start()
        child.close()  # the process then holds the only other end, so its death ends recv()

    def __enter__(self) -> VariantProcess:
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
        """Decodes the run's tokens after the context, and removes them again; returns the seconds."""
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


def _serve(connection: Connection, run: VariantRun) -> None:
    """Answers commands, in the process, until the parent is gone; a failure is the last answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent also gets Ctrl-C, and ends this process
    try:
        measured = MeasuredCache(run)
        while True:
            connection.send(getattr(measured, connection.recv())())
    except (EOFError, BrokenPipeError):
        return
    except KVComposeError as error:
        connection.send(error)
    except Exception:
        connection.send(RuntimeError(traceback.format_exc()))
