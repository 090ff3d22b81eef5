"""Conversations side by side: each has its own cache, all have the same weights, and their decodes take turns."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from .. import seam, sessions
from ..errors import KVComposeError, UnsupportedError
from ..kernels.types import FloatArray
from ..llama import Llama
from ..methods import Method
from ..methods.base import choice_of
from ..native import library
from ..report import KVReport
from ..sessions import SessionInfo

T = TypeVar("T")


class Cancelled(KVComposeError):
    """Nobody waits for the result any more."""


class TimedOut(KVComposeError):
    """A request has taken as long as it may."""


class Busy(KVComposeError):
    """All slots work and the queue is full."""


class Turns:
    """One thread that computes for all: who has waited longest is next, and nobody's threads wait beside another's."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "compute")

    def run(self, function: Callable[[], T]) -> T:
        """What ``function`` returns, or raises, when its turn has come."""
        return self._thread.submit(function).result()

    def close(self) -> None:
        """Wait for what runs."""
        self._thread.shutdown()


class SlotLlama(Llama):
    """A ``Llama`` whose decodes go through a function.

    Args:
        decode_through: is called with every decode and the number of its tokens, and has to call it.
        weights_of: whose weights it uses, which has to live longer; None: it loads its own.
    """

    def __init__(
        self,
        model_path: str,
        *,
        decode_through: Callable[[Callable[[], None], int], None],
        weights_of: Llama | None = None,
        **kwargs: Any,
    ) -> None:
        with _borrowed_weights(weights_of):
            super().__init__(model_path, **kwargs)
        decode = self._ctx.decode
        self._ctx.decode = lambda batch: decode_through(lambda: decode(batch), batch.n_tokens())
        #: the context is a document that was compressed for itself, and stays however much follows it
        self.is_document = False

    @property
    def context_tokens(self) -> list[int]:
        """Tokens of the compressed context."""
        return list(self._compressed)

    @property
    def composed_by(self) -> str:
        """How the context was compressed (``choice_of``); empty: the cache is a full one."""
        return "" if self._composed is None else self._composed.choice

    @property
    def kept_shares(self) -> FloatArray:
        """For each token of the context the share of all layers' KV heads that keep it, float32; else empty."""
        return np.zeros(0, dtype=np.float32) if self._composed is None else self._composed.shares()

    def reset(self) -> None:
        """As ``Llama.reset``."""
        super().reset()
        self.is_document = False

    def save_slot(self, file: Path, max_bytes: int | None = None) -> SessionInfo:
        """As ``save_session``; a file of more than ``max_bytes`` is refused."""
        with self._access.turn():
            snapshot = self._snapshot({"is_document": self.is_document}, allow_empty=True)
            return sessions.save(snapshot, file, max_bytes, file.name)

    def load_slot(self, file: Path) -> SessionInfo:
        """As ``load_session``; the context is continued only under the method that compressed it."""
        info = self._load_session(file, choice=None, name=file.name)
        self.is_document = info.extra.get("is_document") is True
        return info

    def cached_tokens(self) -> list[int]:
        """Tokens that a prompt may begin with to be continued, those of a compressed context included."""
        return [int(token) for token in self._input_ids]

    def begins(self, tokens: Sequence[int], context: Sequence[int]) -> bool:
        """Whether a prompt's text begins with the text of ``context``."""
        return tuple(tokens[: len(context)]) == tuple(context) or self._at_seam(list(tokens), context) is not None

    def joined(self, tokens: Sequence[int]) -> list[int]:
        """A prompt's tokens so that they begin with the compressed context, if its text does."""
        return (self._at_seam(list(tokens)) if self._composed is not None else None) or list(tokens)

    def n_reusable(self, tokens: Sequence[int]) -> int:
        """Tokens of a prompt that need not be evaluated, however the context was compressed."""
        n_same = min(seam.common_prefix(self.cached_tokens(), self.joined(tokens)), max(0, len(tokens) - 1))
        return 0 if n_same < self.n_context else n_same

    def n_continued(self, tokens: Sequence[int], method: Method | None) -> int:
        """Tokens of a prompt that ``read`` will not evaluate."""
        if self.n_context:
            if self.composed_by != choice_of(method):
                return 0
            if not self.is_document and has_grown(len(tokens), self.n_context, method):
                return 0
        return self.n_reusable(tokens)

    def read(self, tokens: Sequence[int], method: Method | None, reuse: bool = True) -> int:
        """Bring a prompt into the cache, compressed by ``method``, up to the logits of its last token.

        A context that another method has compressed is read again, and so is one that ``has_grown``.

        Returns:
            How many of its tokens were there already.
        """
        if self.kv_compressor != method:
            self.kv_compressor = method
        n_before = self.n_continued(tokens, method) if reuse else 0
        if not n_before:
            self.reset()
        before = self.kv_report
        self._prepare(list(tokens), method)
        if self.kv_report is not before and self.kv_report is not None:
            n_before = self.n_context - self.kv_report.n_prefilled
        n_same = self.n_reusable(tokens)
        if self._composed is not None and self._composed.windows is not None and n_same < self.n_tokens:
            self._back_to_context()  # sliding windows can go back to the context's end, and nowhere else
            n_same = self.n_context
        if not n_same or not self._forget_after(n_same):
            self.reset()
            n_same = 0
        self.eval(list(tokens[n_same:]))
        return min(n_before, n_same)

    def compress_prompt(self, tokens: Sequence[int], method: Method) -> KVReport:
        """Leave a cache that prompts continue which begin with ``tokens``."""
        if self.kv_compressor != method:
            self.kv_compressor = method
        if self._compressed != list(tokens) or self.composed_by != choice_of(method) or self.kv_report is None:
            self.compress(tokens)
        self.is_document = True
        assert self.kv_report is not None
        return self.kv_report

    def _forget_after(self, n_tokens: int) -> bool:
        """Whether the cache holds exactly the first ``n_tokens`` now."""
        if self.n_context and not self.can_truncate:
            # windows that go back to the context's end have been brought there, others hold all that there is
            self._requires_eval = True
            if n_tokens < self.n_tokens and not self._ctx.kv_cache_seq_rm(-1, n_tokens, -1):
                return False
            self.n_tokens = n_tokens
            return True
        if n_tokens < self.n_tokens and not self.can_truncate:
            return False
        self.truncate(n_tokens)
        return True


@dataclass
class Task:
    """What a slot is doing, or did last, for /slots; the slot's thread writes it, anybody reads.

    Attributes:
        id: number of the job.
        about: what is generated, or None.
        n_cached, n_processed: tokens of the prompt that were there, and that were evaluated.
        n_decoded: tokens generated.
        has_new_line: one of them ended a line.
    """

    id: int
    about: Any = None
    n_cached: int = 0
    n_processed: int = 0
    n_decoded: int = 0
    has_new_line: bool = False


class Slot:
    """A cache that one request at a time works on.

    Attributes:
        id: its number.
        llama: its context.
        check: raises if the work of the present request is of no use any more; called before every decode.
        on_decode: told the tokens of every decode that is done.
        n_decodes: decodes so far.
        kv_bytes: of its cache, when it was last looked at in a thread that may.
        reserved: bytes that the present request's cache may take.
        busy_since: seconds on ``time.monotonic``'s clock, or None: it is idle.
        task: the present one, or the last; None: it never had one.
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
        """Do ``work`` in the slot's own thread, after what it does now."""
        return self._thread.submit(work, self)

    def close(self, last: Callable[[SlotLlama], None] | None = None) -> None:
        """Wait for its work, and free its cache, after ``last`` was called with it."""
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
        """Whether it can take a request."""
        return self.busy_since is None

    def n_continued(self, tokens: Sequence[int], method: Method | None) -> int:
        """Tokens of a prompt that the idle slot need not evaluate: 0 while its own thread empties the cache."""
        is_forgetting = self.forgets is not None and not self.forgets.done()
        return 0 if is_forgetting else self.llama.n_continued(tokens, method)

    def look(self) -> None:
        """Count the cache's bytes, while nothing changes it; 0 of models that cannot be compressed."""
        with contextlib.suppress(UnsupportedError):
            self.kv_bytes = self.llama.kv_bytes

    def forget(self) -> None:
        """Empty its cache, which nobody works on."""
        self.llama.reset()
        self.look()

    def occupy(self, n_bytes: int, id_task: int) -> None:
        """Take it for a request whose cache may take so many bytes."""
        self.busy_since, self.reserved, self.task = time.monotonic(), n_bytes, Task(id_task)

    def release(self) -> None:
        """Give it back."""
        self.busy_since, self.last_used = None, time.monotonic()
        self.check, self.on_decode = lambda: None, lambda n_tokens: None
        self.look()


def has_grown(n_tokens: int, n_context: int, method: Method | None) -> bool:
    """Whether more follows a compressed context than it has: then all of it is compressed again.

    So a conversation that grows is read three times at most, and less than about half of it is there in full.
    """
    return method is not None and n_tokens - n_context - method.keep_last > max(n_context, method.min_tokens)


@contextlib.contextmanager
def _borrowed_weights(owner: Llama | None) -> Iterator[None]:
    """Llama objects made inside of the ``with`` take ``owner``'s weights, and do not free them."""
    if owner is None:
        yield
        return
    internals = library.load()._internals
    original = internals.LlamaModel

    def borrow(**kwargs: Any) -> Any:
        model = original.__new__(original)
        model.__dict__.update(owner._model.__dict__)
        model._exit_stack = contextlib.ExitStack()  # what close() closes: nothing
        return model

    internals.LlamaModel = borrow
    try:
        yield
    finally:
        internals.LlamaModel = original
