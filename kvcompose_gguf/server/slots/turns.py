"""The one thread that computes: decodes of all slots in arrival order, and those of single tokens together."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from ...errors import UnsupportedError
from ...native.decoder import Decode, Decoder
from ...native.joint import decode_joint

#: how long a step waits for those of other answers, as a share of what the last step took
PATIENCE = 0.5


@dataclass
class _Job:
    """A decode that waits for its turn; ``done`` has no value."""

    decode: Callable[[], None]
    check: Callable[[], None]
    done: Future[None] = field(default_factory=Future)

    @property
    def step(self) -> Decode | None:
        """The decode, if it is one token of an answer."""
        return self.decode if isinstance(self.decode, Decode) and self.decode.is_step else None

    def run(self) -> None:
        try:
            self.decode()
        except BaseException as error:
            self.done.set_exception(error)
        else:
            self.done.set_result(None)

    def passes(self) -> bool:
        """Returns whether the job may still run; if not, it is done."""
        try:
            self.check()
        except BaseException as error:
            self.done.set_exception(error)
            return False
        return True


class Turns:
    """Runs all decodes on one thread, so that llama.cpp's thread pools never compete.

    They run in arrival order, but a token of an answer takes those of all other answers with it: one decode reads the
    weights once for all of them. It waits a little for answers that are going on and whose next token is being chosen.

    Attributes:
        n_decodes: calls of llama.cpp so far.
        n_served: decodes of slots so far; a call may do several of them.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "compute")
        self._changed = threading.Condition()
        self._waiting: deque[_Job] = deque()
        self._due: set[Decoder] = set()  # had a token in the last step, and will soon want the next one
        self._joins = True
        self._seconds = 0.0  # of the last step
        self.n_decodes = self.n_served = 0

    def run(self, decode: Callable[[], None], check: Callable[[], None] = lambda: None) -> None:
        """Run ``decode`` when its turn comes; raises what it raises.

        Args:
            check: called directly before, in the same thread. What it raises is raised, and ``decode`` does not run.
        """
        job = _Job(decode, check)
        with self._changed:
            self._waiting.append(job)
            if isinstance(decode, Decode):
                self._due.discard(decode.decoder)
            self._changed.notify()
        self._thread.submit(self._next)
        job.done.result()

    def close(self) -> None:
        """Wait for the decodes that were submitted."""
        self._thread.shutdown()

    def _next(self) -> None:
        """Runs the oldest job, with others if it is a step; does nothing if it was run with another one."""
        with self._changed:
            if not self._waiting:
                return
            jobs = self._take()
        jobs = [job for job in jobs if job.passes()]
        start = time.perf_counter()
        if len(jobs) < 2 or not self._run_joint(jobs):
            for job in jobs:
                self.n_decodes, self.n_served = self.n_decodes + 1, self.n_served + 1
                job.run()
        if jobs and jobs[0].step is not None:
            self._seconds = time.perf_counter() - start

    def _take(self) -> list[_Job]:
        """Removes and returns the jobs that are next."""
        if self._waiting[0].step is None or not self._joins:
            return [self._waiting.popleft()]
        self._changed.wait_for(lambda: not self._due, PATIENCE * self._seconds)
        jobs = [job for job in self._waiting if job.step is not None]
        self._waiting = deque(job for job in self._waiting if job.step is None)
        self._due = {job.step.decoder for job in jobs if job.step is not None}
        return jobs

    def _run_joint(self, jobs: list[_Job]) -> bool:
        """Runs steps together; returns False if they have to run one at a time, which tells each its own error."""
        try:
            decode_joint([job.step for job in jobs if job.step is not None])
        except UnsupportedError:
            self._joins = False
            return False
        except Exception:  # whatever it is: no slot may wait for ever
            return False
        self.n_decodes, self.n_served = self.n_decodes + 1, self.n_served + len(jobs)
        for job in jobs:
            job.done.set_result(None)
        return True
