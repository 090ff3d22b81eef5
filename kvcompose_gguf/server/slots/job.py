"""A job: work for one slot, which can be cancelled and has a deadline."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from ...errors import KVComposeError
from ...methods import Method
from .slot import Slot

#: the clock of deadlines, in seconds; tests replace it
now = time.monotonic


class Cancelled(KVComposeError):
    """The job was cancelled: nobody waits for its result."""


class TimedOut(KVComposeError):
    """The job has passed its deadline."""


class Busy(KVComposeError):
    """The queue is full, or the server is stopping."""


@dataclass(eq=False)
class Job:
    """Work for one slot.

    Attributes:
        work: called with the slot, in the slot's thread. Its result or exception becomes the future's.
        tokens: the prompt's tokens. The engine chooses the slot that has most of them.
        id_slot: the slot to use, -1: any.
        n_tokens: tokens that the slot's cache may have to hold.
        method: the method that compresses the prompt. A cache of another method cannot be continued.
        reuse: whether the job may continue what is in the cache.
        id: number of the job.
        deadline: time on the clock ``now`` when the job is given up.
        future: the result. It is set after the slot is idle again.
    """

    work: Callable[[Slot], Any]
    tokens: Sequence[int] = ()
    id_slot: int = -1
    n_tokens: int = 0
    method: Method | None = None
    reuse: bool = True
    id: int = -1
    deadline: float = math.inf
    future: Future[Any] = field(default_factory=Future)
    _cancelled: threading.Event = field(default_factory=threading.Event)

    def accept(self, number: int, timeout: float) -> None:
        """Give the job its number, and a deadline ``timeout`` seconds from now."""
        self.id, self.deadline = number, now() + timeout

    def cancel(self) -> None:
        """End the job: at once if it waits, before its next decode if it runs."""
        self._cancelled.set()
        self.future.cancel()

    @property
    def is_cancelled(self) -> bool:
        """Whether ``cancel`` was called."""
        return self._cancelled.is_set()

    @property
    def is_late(self) -> bool:
        """Whether the deadline has passed."""
        return now() > self.deadline

    def check(self) -> None:
        """Raise if nobody needs the job's result any more.

        Raises:
            Cancelled: ``cancel`` was called.
            TimedOut: the deadline has passed.
        """
        if self.is_cancelled:
            raise Cancelled("the request was cancelled")
        if self.is_late:
            raise TimedOut("the request took longer than the server's --timeout")
