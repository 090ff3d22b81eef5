"""Slots: each has its own cache and thread. All share the weights, and their decodes run one at a time."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ...access import changes_cache, reads_cache
from ...compression import prepare
from ...errors import KVComposeError, UnsupportedError
from ...kernels.types import FloatArray
from ...llama import Llama
from ...methods import Method
from ...methods.base import choice_of, has_grown
from ...plan import seam
from ...plan.composed import Composed
from ...plan.report import KVReport
from ...sessions.info import SessionInfo
from ...sessions.live import load_context, save_context

T = TypeVar("T")


class Cancelled(KVComposeError):
    """The job was cancelled: nobody waits for its result."""


class TimedOut(KVComposeError):
    """The job has passed its deadline."""


class Busy(KVComposeError):
    """The queue is full, or the server is stopping."""


class Turns:
    """Runs all decodes on one thread, in arrival order, so that llama.cpp's thread pools never compete."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "compute")

    def run(self, function: Callable[[], T]) -> T:
        """Run ``function`` when its turn comes; returns or raises what it does."""
        return self._thread.submit(function).result()

    def close(self) -> None:
        """Wait for the decodes that were submitted."""
        self._thread.shutdown()


@dataclass(frozen=True)
class Continuation:
    """How much of a prompt a slot's cache has.

    Attributes:
        tokens: the prompt, changed at the end of the compressed context if a tokenizer merged text there.
        n_cached: how many of them ``read`` need not evaluate.
    """

    tokens: tuple[int, ...]
    n_cached: int


class SlotLlama(Llama):
    """A ``Llama`` that passes its decodes to a function.

    Args:
        decode_through: called with every decode and its number of tokens. It has to call the decode.
        **kwargs: arguments of ``Llama``.
    """

    def __init__(
        self, model_path: str, *, decode_through: Callable[[Callable[[], None], int], None], **kwargs: Any
    ) -> None:
        super().__init__(model_path, **kwargs)
        self.context.through = decode_through
        #: /kv/compress made the context: it is never compressed again, however much follows it
        self.is_document = False

    @property
    def context_tokens(self) -> tuple[int, ...]:
        """Tokens of the compressed context."""
        composed = self.context.composed
        return () if composed is None else composed.tokens

    @property
    def composed_by(self) -> str:
        """The method of the compressed context, as text (``choice_of``). Empty: nothing is compressed."""
        composed = self.context.composed
        return "" if composed is None else composed.choice

    @property
    def kept_shares(self) -> FloatArray:
        """For each token of the context the share of all layers' KV heads that keep it, float32; else empty."""
        composed = self.context.composed
        return np.zeros(0, dtype=np.float32) if composed is None else composed.shares()

    def reset(self) -> None:
        """As ``Llama.reset``."""
        super().reset()
        self.is_document = False

    @reads_cache
    def save_slot(self, file: Path, max_bytes: int | None = None) -> SessionInfo:
        """As ``save_session``; a file of more than ``max_bytes`` is refused."""
        about = {"is_document": self.is_document}
        return save_context(
            self.context, self.identity, file, about, allow_empty=True, max_bytes=max_bytes, name=file.name
        )

    @changes_cache
    def load_slot(self, file: Path) -> SessionInfo:
        """As ``load_session``; the context is continued only under the method that compressed it."""
        info = load_context(self.context, self.identity, file, name=file.name)
        self.is_document = info.extra.get("is_document") is True
        return info

    def begins(self, tokens: Sequence[int], context: Sequence[int]) -> bool:
        """Returns whether a prompt's text begins with the text of ``context``."""
        return tuple(tokens[: len(context)]) == tuple(context) or self.context.joined(tokens, context) is not None

    def continuation(self, tokens: Sequence[int], method: Method | None, reuse: bool = True) -> Continuation:
        """Returns how a prompt can continue from the cache. It cannot if another method compressed the context, or if
        the conversation ``has_grown``.

        Args:
            method: the method that compresses the prompt.
            reuse: False: nothing in the cache may be used.
        """
        cache = self.context
        composed = cache.composed
        joined = tuple((cache.joined(tokens) if composed is not None else None) or tokens)
        if not reuse or (composed is not None and not self._may_continue(composed, len(tokens), method)):
            return Continuation(joined, 0)
        return Continuation(joined, self._n_reusable(joined))

    def _may_continue(self, composed: Composed, n_tokens: int, method: Method | None) -> bool:
        if composed.choice != choice_of(method):
            return False
        return self.is_document or not has_grown(n_tokens, len(composed.tokens), method)

    def _n_reusable(self, tokens: Sequence[int]) -> int:
        """Returns how many tokens of a prompt are in the cache, whatever method compressed it."""
        n_same = min(seam.common_prefix(self.context.tokens, tokens), max(0, len(tokens) - 1))
        return 0 if n_same < self.n_context else n_same

    def read(self, what: Continuation, method: Method | None) -> int:
        """Read a prompt into the cache, compressed by ``method``, up to the logits of its last token.

        Args:
            what: the result of ``continuation``. If it continues nothing, the prompt is read from its beginning.
        Returns:
            How many of the prompt's tokens were in the cache.
        """
        if self.kv_compressor != method:
            self.kv_compressor = method
        tokens, n_before = what.tokens, what.n_cached
        if not n_before:
            self.reset()
        before = self.kv_report
        prepare(self.context, tokens, method)
        if self.kv_report is not before and self.kv_report is not None:
            n_before = self.n_context - self.kv_report.n_prefilled
        n_same = self.context.rewind(self._n_reusable(tokens))
        self.eval(tokens[n_same:])
        return min(n_before, n_same)

    def compress_prompt(self, tokens: Sequence[int], method: Method) -> KVReport:
        """Compress a document, so that prompts that begin with ``tokens`` continue it; returns the report."""
        if self.kv_compressor != method:
            self.kv_compressor = method
        if self.context_tokens != tuple(tokens) or self.composed_by != choice_of(method) or self.kv_report is None:
            self.compress(tokens)
        self.is_document = True
        assert self.kv_report is not None
        return self.kv_report


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
        n_decodes: number of decodes so far.
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
        self.n_decodes = self.kv_bytes = 0
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
        def turn() -> None:
            self.check()
            decode()
            self.n_decodes += 1

        self._turns.run(turn)
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
