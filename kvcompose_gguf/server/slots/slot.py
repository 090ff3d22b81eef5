"""Slots: each has its own cache and thread. All share the weights, and one thread computes for all of them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import UnsupportedError
from ...llama import Llama
from ...methods import Method
from .slot_llama import SlotLlama
from .turns import Turns


@dataclass
class Task:
    """The current or latest work of a slot, for /slots. Only the slot's thread writes it.

    Attributes:
        id: number of the job.
        about: the generation. None: another kind of job.
        n_cached: prompt tokens that were in the cache.
        n_processed: prompt tokens that were evaluated.
        n_decoded: tokens generated.
        has_new_line: whether the text contains a line end.
    """

    id: int
    about: Any = None
    n_cached: int = 0
    n_processed: int = 0
    n_decoded: int = 0
    has_new_line: bool = False


class Slot:
    """A cache with its own thread. One job at a time uses it.

    Attributes:
        id: number of the slot.
        llama: the slot's context.
        check: called before every decode. It raises if the job is cancelled or late.
        on_decode: called after every decode, with its number of tokens.
        kv_bytes: bytes of the cache at the last ``look``.
        reserved: maximum bytes of the cache during the current job.
        busy_since: time on ``time.monotonic``'s clock when the current job started. None: the slot is idle.
        last_used: time on the same clock when the last job ended.
        task: the current or latest work. None: there was none.
        forgets: future of the latest eviction of the cache. None: there was none.
    """

    def __init__(
        self, number: int, model_path: Path, turns: Turns, weights_of: Llama | None = None, **kwargs: Any
    ) -> None:
        self.id = number
        self.check: Callable[[], None] = lambda: None
        self.on_decode: Callable[[int], None] = lambda n_tokens: None
        self.kv_bytes = self._n_bytes_token = 0
        self.busy_since: float | None = None
        self.last_used = 0.0
        self.reserved = 0
        self.task: Task | None = None
        self.forgets: Future[None] | None = None
        self._turns = turns
        self._thread = ThreadPoolExecutor(1, f"slot-{number}")
        self.llama = SlotLlama(str(model_path), decode_through=self._decode, weights_of=weights_of, **kwargs)
        self.look()

    def start(self, work: Callable[[Slot], None]) -> Future[None]:
        """Run ``work`` in the slot's thread, after the work that is there."""
        return self._thread.submit(work, self)

    def close(self, last: Callable[[SlotLlama], None] | None = None) -> None:
        """Wait for the slot's work, call ``last`` with the context, and free the context."""
        self._thread.shutdown()
        if last is not None:
            last(self.llama)
        self.llama.close()

    def _decode(self, decode: Callable[[], None], n_tokens: int) -> None:
        self._turns.run(decode, self.check)
        self.look()
        self.on_decode(n_tokens)

    @property
    def is_idle(self) -> bool:
        """Whether the slot can take a job."""
        return self.busy_since is None

    def n_continued(self, tokens: Sequence[int], method: Method | None) -> int:
        """Returns how many tokens of a prompt an idle slot need not evaluate: 0 while its thread empties the cache."""
        is_forgetting = self.forgets is not None and not self.forgets.done()
        return 0 if is_forgetting else self.llama.continuation(tokens, method).n_cached

    def look(self) -> None:
        """Set ``kv_bytes``. Call it only while nothing changes the cache. Stays 0 for models without compression."""
        with contextlib.suppress(UnsupportedError):
            self.kv_bytes = self.llama.kv_bytes
            self._n_bytes_token = sum(layer.n_bytes_row for layer in self.llama.kv_layers)

    @property
    def kv_bytes_full(self) -> int:
        """Bytes that a full cache would have for the tokens so far."""
        return self.llama.n_tokens * self._n_bytes_token

    def forget(self) -> None:
        """Empty the cache. The slot has to be idle."""
        self.llama.reset()
        self.look()

    def occupy(self, n_bytes: int, id_task: int) -> None:
        """Make the slot busy with a job, with a cache of at most ``n_bytes``."""
        self.busy_since, self.reserved, self.task = time.monotonic(), n_bytes, Task(id_task)

    def release(self) -> None:
        """Make the slot idle. The engine calls this before it sets the job's result."""
        self.busy_since, self.last_used = None, time.monotonic()
        self.check, self.on_decode = lambda: None, lambda n_tokens: None
        self.look()
