"""Vectors of texts, from a context of their own on the slots' weights."""

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

from ..errors import ConfigError
from ..kernels.types import FloatArray
from ..llama import Llama
from ..native import library
from .errors import ApiError, invalid
from .params import PROMPT_KINDS, Reader
from .slots import Busy, SlotLlama, TimedOut

POOLING = {"none": 0, "mean": 1, "cls": 2, "last": 3}


class Embedder:
    """A context that makes vectors.

    Args:
        pooling: of ``POOLING``; None: the model's own.
        n_batch: most tokens of a text.
        decode_through: as for ``SlotLlama``.
        n_queue: texts that may wait.
        timeout: seconds that a text may wait.
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
        #: decodes so far
        self.n_decodes = 0
        self._llama = SlotLlama(
            str(model_path), decode_through=decode_through, weights_of=weights_of, embedding=True, pooling_type=kind,
            n_ctx=n_batch, n_batch=n_batch, n_ubatch=n_batch, **kwargs,
        )  # fmt: skip
        if self._llama.pooling_type() not in POOLING.values():
            self.close()
            raise ConfigError(
                f"this model's vectors are pooled otherwise than by {', '.join(POOLING)}: pooling is needed"
            )

    @property
    def is_pooled(self) -> bool:
        """Whether a text has one vector, and not one for every token."""
        return bool(self._llama.pooling_type() != POOLING["none"])

    def submit(self, tokens: Sequence[int]) -> Future[FloatArray]:
        """Vectors of a text, float32 ``(1 or n_tokens, n_embd)``; those of one that nobody waits for are not made.

        Raises:
            ApiError: it has no tokens, or too many.
            Busy: too many wait.
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
            raise Busy(f"{self._n_queue} texts wait already")
        try:
            future = self._thread.submit(self._embed, list(tokens), time.monotonic() + self._timeout)
        except RuntimeError as error:
            raise Busy("the server is about to end") from error
        self._waiting.add(future)
        future.add_done_callback(self._waiting.discard)
        return future

    def _embed(self, tokens: list[int], deadline: float) -> FloatArray:
        if time.monotonic() > deadline:
            raise TimedOut("the text waited longer than the server allows")
        llama, llama_cpp = self._llama, library.load()
        llama._ctx.kv_cache_clear()
        llama._batch.reset()
        llama._batch.add_sequence(tokens, 0, True)
        llama._ctx.decode(llama._batch)
        self.n_decodes += 1
        if self.is_pooled:
            n, pointer = 1, llama_cpp.llama_get_embeddings_seq(llama.ctx, 0)
        else:
            n, pointer = len(tokens), llama_cpp.llama_get_embeddings(llama.ctx)
        vectors: FloatArray = np.ctypeslib.as_array(pointer, (n, llama.n_embd())).copy()
        return vectors

    def close(self) -> None:
        """Free the context, when nobody uses it."""
        self._thread.shutdown(cancel_futures=True)
        self._llama.close()


def normalized(vectors: FloatArray, kind: int) -> FloatArray:
    """Vectors as llama.cpp normalizes them (common_embd_normalize): -1 not, 0 to int16's range, 2 Euclid, p p-norm."""
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
    """Tokens of every text of a request: strings, tokens, both, or parts of a text.

    Raises:
        ApiError: it is none.
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
    """The answer of /v1/embeddings."""
    data = []
    for index, vector in enumerate(vectors):
        entry: dict[str, Any] = {"embedding": _encoded(vector[0], as_base64), "index": index, "object": "embedding"}
        data.append(entry | ({"encoding_format": "base64"} if as_base64 else {}))
    usage = {"prompt_tokens": n_tokens, "total_tokens": n_tokens}
    return {"model": model, "object": "list", "usage": usage, "data": data}


def native_body(vectors: Sequence[FloatArray]) -> list[dict[str, Any]]:
    """The answer of /embedding."""
    return [{"index": index, "embedding": rows.tolist()} for index, rows in enumerate(vectors)]


def _encoded(vector: npt.NDArray[np.float32], as_base64: bool) -> Any:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode() if as_base64 else vector.tolist()
