"""Makes embedding vectors, in a context of their own that shares the weights of the slots."""

from __future__ import annotations

import base64
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import ConfigError
from ...kernels.types import FloatArray
from ...llama import Llama
from ..errors import ApiError, invalid
from ..params import PROMPT_KINDS, Reader
from .slot import Busy, SlotLlama, TimedOut

POOLING = {"none": 0, "mean": 1, "cls": 2, "last": 3}


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
        #: number of decodes so far
        self.n_decodes = 0
        self._llama = SlotLlama(
            str(model_path), decode_through=decode_through, weights_of=weights_of, embedding=True, pooling_type=kind,
            n_ctx=n_batch, n_batch=n_batch, n_ubatch=n_batch, **kwargs,
        )  # fmt: skip
        if self._llama.pooling_type() not in POOLING.values():
            self.close()
            raise ConfigError(
                f"this model has another kind of pooling: give --pooling, one of {', '.join(POOLING)}"
            )

    @property
    def is_pooled(self) -> bool:
        """Whether a text has one vector. If not, every token has one."""
        return bool(self._llama.pooling_type() != POOLING["none"])

    def submit(self, tokens: Sequence[int]) -> Future[FloatArray]:
        """Returns a future of a text's vectors, float32 ``(1 or n_tokens, n_embd)``. Cancel it to leave the queue.

        Raises:
            ApiError: the text has no tokens, or too many.
            Busy: the queue is full, or the server stops.
        """
        llama = self._llama
        if not tokens:
            raise invalid("Input content cannot be empty")
        if len(tokens) > llama.n_batch:
            raise ApiError(
                500, f"input ({len(tokens)} tokens) is too large to process. increase the physical batch size "
                f"(current batch size: {llama.n_batch})",
            )  # fmt: skip
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
        vectors = self._llama.context.embed(tokens, self._llama.n_embd(), self.is_pooled)
        self.n_decodes += 1
        return vectors

    def close(self) -> None:
        """Wait for the text in work, cancel those that wait, and free the context."""
        self._thread.shutdown(cancel_futures=True)
        self._llama.close()


def normalized(vectors: FloatArray, kind: int) -> FloatArray:
    """Returns vectors normalized as in llama.cpp (common_embd_normalize).

    Args:
        kind: -1 for none, 0 for the range of int16, 2 for the Euclidean norm, another p for the p-norm.
    """
    x = vectors.astype(np.float64)
    if kind < 0:
        return vectors
    if kind == 0:
        norms = np.abs(x).max(axis=1, keepdims=True) / 32760
    elif kind == 2:
        norms = np.sqrt((x * x).sum(axis=1, keepdims=True))
    else:
        with np.errstate(over="ignore"):
            norms = (np.abs(x) ** kind).sum(axis=1, keepdims=True) ** (1 / kind)
    out: FloatArray = np.divide(x, norms, out=np.zeros_like(x), where=(norms > 0) & np.isfinite(norms)).astype(
        np.float32
    )
    return out


def texts_of(reader: Reader, content: Any) -> list[tuple[int, ...]]:
    """Returns the tokens of every text in a request: strings, lists of tokens, mixed lists, or objects with parts.

    Raises:
        ApiError: ``content`` is something else.
    """
    if content is None:
        raise invalid('"input" or "content" must be provided')
    if isinstance(content, list) and not content:
        raise invalid('"input" must not be empty')
    items = content if isinstance(content, list) and not any(isinstance(item, int) for item in content) else [content]
    return [() if item in ("", []) else _tokens(reader, item) for item in items]


def _tokens(reader: Reader, item: Any) -> tuple[int, ...]:
    if isinstance(item, dict) and "content" in item:
        parts = item["content"]
        if not isinstance(parts, list):
            raise invalid('"content" must be an array')
        texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in parts]
        if not all(isinstance(text, str) for text in texts):
            raise invalid("unsupported content[].type")
        item = "".join(map(str, texts))
    found = reader.prompts(item)
    if len(found) != 1:
        raise invalid(PROMPT_KINDS)
    return found[0]


def openai_body(vectors: Sequence[FloatArray], n_tokens: int, model: str, as_base64: bool) -> dict[str, Any]:
    """Returns the body of /v1/embeddings."""
    data = []
    for index, vector in enumerate(vectors):
        entry: dict[str, Any] = {"embedding": _encoded(vector[0], as_base64), "index": index, "object": "embedding"}
        data.append(entry | ({"encoding_format": "base64"} if as_base64 else {}))
    usage = {"prompt_tokens": n_tokens, "total_tokens": n_tokens}
    return {"model": model, "object": "list", "usage": usage, "data": data}


def native_body(vectors: Sequence[FloatArray]) -> list[dict[str, Any]]:
    """Returns the body of /embedding."""
    return [{"index": index, "embedding": rows.tolist()} for index, rows in enumerate(vectors)]


def _encoded(vector: npt.NDArray[np.float32], as_base64: bool) -> Any:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode() if as_base64 else vector.tolist()
