"""Makes embedding vectors, in a context of their own that shares the weights of the slots."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ...errors import ConfigError, KVComposeError
from ...kernels.types import FloatArray
from ...llama import Llama
from ...native.pooling import POOLING
from .job import Busy, TimedOut
from .slot_llama import SlotLlama


class TooLong(KVComposeError):
    """A text does not fit into the batch of the context."""


class Embedder:
    """A context that makes embedding vectors, one text at a time.

    Args:
        model_path: the model file.
        weights_of: the ``Llama`` that owns the weights.
        decode_through: as for ``SlotLlama``.
        n_batch: the maximum number of tokens in a text.
        pooling: a name in ``POOLING``. None: the model's own.
        n_queue: the maximum number of texts that wait.
        timeout: the maximum number of seconds that a text waits.
    Raises:
        ConfigError: ``pooling`` is unknown, or the model needs it and it is None.
    """

    def __init__(
        self,
        model_path: Path,
        weights_of: Llama,
        decode_through: Callable[[Callable[[], None], int], None],
        n_batch: int,
        pooling: str | None = None,
        n_queue: int = 64,
        timeout: float = math.inf,
        **kwargs: Any,
    ) -> None:
        if pooling is not None and pooling not in POOLING:
            raise ConfigError(f"pooling={pooling!r} is none of {', '.join(POOLING)}")
        kind = -1 if pooling is None else POOLING[pooling]
        self._thread = ThreadPoolExecutor(1, "vectors")
        self._n_queue, self._timeout = n_queue, timeout
        self._waiting: set[Future[FloatArray]] = set()
        self._llama = SlotLlama(
            str(model_path), decode_through=decode_through, weights_of=weights_of, embedding=True, pooling_type=kind,
            n_ctx=n_batch, n_batch=n_batch, n_ubatch=n_batch, **kwargs,
        )  # fmt: skip
        if self._llama.pooling_type() not in POOLING.values():
            self.close()
            raise ConfigError(f"this model has another kind of pooling: give --pooling, one of {', '.join(POOLING)}")

    @property
    def is_pooled(self) -> bool:
        """Whether a text has one vector. If not, every token has one."""
        return bool(self._llama.pooling_type() != POOLING["none"])

    def submit(self, tokens: Sequence[int]) -> Future[FloatArray]:
        """Returns a future of a text's vectors, float32 ``(1 or n_tokens, n_embd)``. Cancel it to leave the queue.

        Raises:
            ConfigError: the text has no tokens.
            TooLong: it has too many.
            Busy: the queue is full, or the server stops.
        """
        llama = self._llama
        if not tokens:
            raise ConfigError("Input content cannot be empty")
        if len(tokens) > llama.n_batch:
            raise TooLong(
                f"input ({len(tokens)} tokens) is too large to process. increase the physical batch size "
                f"(current batch size: {llama.n_batch})"
            )
        if len(self._waiting) > self._n_queue:
            raise Busy(f"{self._n_queue} texts wait: try again later")
        try:
            future = self._thread.submit(self._embed, list(tokens), time.monotonic() + self._timeout)
        except RuntimeError as error:
            raise Busy("the server is stopping") from error
        self._waiting.add(future)
        future.add_done_callback(self._waiting.discard)
        return future

    def _embed(self, tokens: list[int], deadline: float) -> FloatArray:
        if time.monotonic() > deadline:
            raise TimedOut("the text waited longer than the server's --timeout")
        return self._llama.context.embed(tokens, self._llama.n_embd(), self.is_pooled)

    def close(self) -> None:
        """Wait for the text in work, cancel those that wait, and free the context."""
        self._thread.shutdown(cancel_futures=True)
        self._llama.close()
