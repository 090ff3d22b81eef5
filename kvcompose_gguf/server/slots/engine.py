"""Queues jobs and runs them in slots: in order of arrival, each in the slot that has most of its prompt."""

from __future__ import annotations

import functools
import itertools
import math
import threading
from collections import deque
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

from ...ceiling import ceiling_bytes
from ...errors import ConfigError, UnsupportedError
from .embedder import Embedder
from .job import Busy, Cancelled, Job, TimedOut
from .slot import Slot
from .stores import StoreOptions, Stores
from .turns import Turns

#: a slot is chosen for its cache if that has at least this share of the prompt
MIN_SIMILARITY = 0.1

#: cells that a job may need beside those of its tokens: an empty cache's, or a chunk's that scores the prompt
N_SCRATCH = 768


class Engine:
    """A model's slots and the queue of jobs.

    A job ends in this order: its work ends, its slot becomes idle, waiting jobs start, its future gets the result. So
    whoever has the result finds the slot idle, with the job's cache, unless another job was waiting for the slot.

    Args:
        model_path: the model file. Its weights are loaded once.
        n_slots: jobs that can run side by side. Each slot has its own cache.
        n_queue: jobs that can wait.
        kv_budget: maximum bytes of all caches together. Idle slots are evicted, least recently used first. A job that
            does not fit beside the running ones waits. None: no limit.
        timeout: maximum seconds of a job, including its time in the queue. None: no limit.
        stores: where contexts are kept that no slot holds.
        embeddings: maximum tokens of a text for embeddings. 0: no embeddings.
        pooling: pooling of the embeddings.
        **kwargs: arguments for the ``Llama`` of every slot.
    Raises:
        ConfigError: an argument is out of range.
    """

    def __init__(
        self,
        model_path: Path,
        n_slots: int,
        n_queue: int = 64,
        kv_budget: int | None = None,
        timeout: float | None = None,
        stores: StoreOptions | None = None,
        embeddings: int = 0,
        pooling: str | None = None,
        **kwargs: Any,
    ) -> None:
        if n_slots < 1:
            raise ConfigError(f"n_slots={n_slots} is not positive")
        self.turns = Turns()
        self._lock = threading.Lock()
        self._waiting: deque[Job] = deque()
        self._n_queue = n_queue
        self._kv_budget = kv_budget
        self._timeout = math.inf if timeout is None else timeout
        self._numbers = itertools.count()
        self._swaps: list[Future[None]] = []  # evictions and restores that may not be done: later jobs wait for them
        self._stores: Stores | None = None
        self._closed = False
        self.slots: list[Slot] = []
        self.embedder: Embedder | None = None
        try:
            for number in range(n_slots):
                owner = self.slots[0].llama if self.slots else None
                self.slots.append(Slot(number, model_path, self.turns, owner, **kwargs))
            if embeddings:
                threads = {name: kwargs[name] for name in ("n_threads", "n_threads_batch") if name in kwargs}
                self.embedder = Embedder(
                    model_path, self.slots[0].llama, lambda decode, n: self.turns.run(decode), embeddings, pooling,
                    n_queue, self._timeout, verbose=False, flash_attn=kwargs.get("flash_attn", False), **threads,
                )  # fmt: skip
            self._check_budget(kv_budget)
            self._stores = Stores(stores or StoreOptions(), self.slots[0].llama)
        except Exception:
            self.close()
            raise

    @property
    def llama(self) -> Any:
        """The first slot's ``Llama``: use it for the vocabulary and properties, not for its cache."""
        return self.slots[0].llama

    @property
    def n_waiting(self) -> int:
        """Number of jobs in the queue, without cancelled ones."""
        return sum(not job.is_cancelled for job in list(self._waiting))

    @property
    def n_busy(self) -> int:
        """Number of slots at work."""
        return sum(not slot.is_idle for slot in self.slots)

    @property
    def stores(self) -> Stores:
        """Where contexts are kept that no slot holds."""
        assert self._stores is not None
        return self._stores

    def submit(self, job: Job) -> None:
        """Start a job, or put it into the queue.

        Raises:
            Busy: the queue is full, or the engine is closed.
            ConfigError: there is no slot ``id_slot``, or ``kv_budget`` is too small for this job alone.
        """
        if job.id_slot >= len(self.slots):
            raise ConfigError(f"id_slot={job.id_slot}: there are {len(self.slots)} slots")
        most = None if self._kv_budget is None else self._kv_budget - self._empty_bytes * (len(self.slots) - 1)
        if most is not None and self._bytes_of(job) > most:
            raise ConfigError(
                f"{job.n_tokens} tokens need {self._bytes_of(job)} bytes of cache, the server's budget leaves {most}: "
                "ask for fewer tokens"
            )
        with self._lock:
            if self._closed:
                raise Busy("the server is stopping")
            job.accept(next(self._numbers), self._timeout)
            self._waiting.append(job)
            self._start_waiting()
            if len(self._waiting) > self._n_queue:
                self._waiting.remove(job)
                raise Busy(f"all {len(self.slots)} slots work and {self._n_queue} requests wait: try again later")

    def close(self) -> None:
        """Cancel all jobs, wait for them, and free everything, the weights last."""
        with self._lock:
            self._closed = True
            waiting, self._waiting = list(self._waiting), deque()
        for job in waiting:
            job.cancel()
        for slot in self.slots:
            slot.check = _closed
        if self.embedder is not None:
            self.embedder.close()
        for slot in reversed(self.slots):
            slot.close(None if self._stores is None or self._stores.idle is None else self._stores.idle.keep)
        self.slots = []
        if self._stores is not None:
            self._stores.close()
        self.turns.close()

    def _start_waiting(self) -> None:
        """Give idle slots to waiting jobs, in order.

        A job that waits for a certain slot lets later ones pass. A job that waits for memory does not.
        """
        for job in [job for job in self._waiting if job.is_cancelled or job.is_late]:
            self._waiting.remove(job)
            if not job.is_cancelled and job.future.set_running_or_notify_cancel():
                job.future.set_exception(TimedOut("the request waited longer than the server's --timeout"))
        for job in list(self._waiting):
            slot = self._slot_for(job)
            if slot is None:
                continue
            if not self._make_room(slot, job):
                break
            if job.future.set_running_or_notify_cancel():
                self._waiting.remove(job)
                slot.occupy(max(self._bytes_of(job), slot.kv_bytes), job.id)
                slot.check = _closed if self._closed else job.check
                before = self._swaps = [swap for swap in self._swaps if not swap.done()]
                swap: Future[None] = Future()
                self._swaps = [*before, swap]
                slot.start(functools.partial(self._work, job=job, before=before, swap=swap))

    def _slot_for(self, job: Job) -> Slot | None:
        idle = [slot for slot in self.slots if slot.is_idle]
        if job.id_slot >= 0:
            return next((slot for slot in idle if slot.id == job.id_slot), None)
        if not idle:
            return None
        if job.tokens and job.reuse:
            here = ((slot.n_continued(job.tokens, job.method), slot) for slot in idle)
            n_same, best = max(here, key=lambda pair: pair[0])
            if n_same / len(job.tokens) > MIN_SIMILARITY and n_same >= self.stores.n_kept(best.llama, job):
                return best
        return min(idle, key=lambda slot: slot.last_used)

    #
    # memory
    #

    def _check_budget(self, kv_budget: int | None) -> None:
        self._empty_bytes = self._cell_bytes = 0
        try:
            self._empty_bytes = self.slots[0].kv_bytes
            self._cell_bytes = sum(layer.n_bytes_row for layer in self.slots[0].llama.kv_layers)
        except UnsupportedError:
            if kv_budget is not None:
                raise
        if kv_budget is not None and kv_budget < self._empty_bytes * len(self.slots):
            raise ConfigError(
                f"kv_budget={kv_budget} is less than {len(self.slots)} empty slots have: at least "
                f"{self._empty_bytes * len(self.slots)} bytes are needed"
            )

    def _bytes_of(self, job: Job) -> int:
        """Returns the largest number of bytes of a cache while the job runs."""
        # a cache grows by a quarter at a time, and scoring needs a chunk of cells on top
        n_bytes = (job.n_tokens * 5 // 4 + N_SCRATCH) * self._cell_bytes
        if job.method is not None and job.method.has_ceiling:
            layers = self.slots[0].llama.kv_layers
            # composing holds one layer twice
            n_bytes = min(n_bytes, ceiling_bytes(job.method, layers, job.n_tokens) * (len(layers) + 1) // len(layers))
        return max(self._empty_bytes, n_bytes)

    def _make_room(self, slot: Slot, job: Job) -> bool:
        """Start to evict idle caches until a job fits; returns False if it has to wait for running jobs."""
        if self._kv_budget is None:
            return True
        others = [other for other in self.slots if other is not slot]
        room = self._kv_budget - sum(self._empty_bytes if s.is_idle else s.reserved for s in others)
        if self._bytes_of(job) > room:
            return False
        if slot.kv_bytes > room:  # truncating a cache frees no memory
            self._start_forgetting(slot)
        idle = sorted((other for other in others if other.is_idle), key=lambda other: other.last_used)
        n_mine = max(self._bytes_of(job), slot.kv_bytes)
        n_over = n_mine + sum(other.kv_bytes - self._empty_bytes for other in idle) - room
        for other in idle:
            if n_over <= 0:
                break
            n_over -= other.kv_bytes - self._empty_bytes
            self._start_forgetting(other)
        return True

    def _start_forgetting(self, slot: Slot) -> None:
        """Empty an idle slot's cache, in the slot's thread. What it held is kept, if there is a place."""
        slot.forgets = slot.start(self._forget)
        slot.kv_bytes = self._empty_bytes
        self._swaps.append(slot.forgets)

    def _forget(self, slot: Slot) -> None:
        self.stores.keep(slot.llama)
        slot.forget()

    def _work(self, slot: Slot, job: Job, before: list[Future[None]], swap: Future[None]) -> None:
        """Run a job in the slot's thread, then release the slot, then set the job's result, in this order.

        Args:
            before: swaps that began before the job. When they end, their memory is free and their contexts are on disk,
                where the job can find them.
            swap: ends when the job has swapped the slot's own cache.
        """
        result, error = None, None
        try:
            try:
                wait(before)
                job.check()
                if job.tokens:
                    self.stores.exchange(slot.llama, job, None if self._kv_budget is None else job.n_tokens)
            finally:
                swap.set_result(None)
            result = job.work(slot)
        except BaseException as raised:
            error = raised
        try:
            with self._lock:
                slot.release()
                self._start_waiting()
        except BaseException as raised:
            error = error or raised
        if error is not None:
            job.future.set_exception(error)
        else:
            job.future.set_result(result)


def _closed() -> None:
    raise Cancelled("the server is stopping")
