"""Requests for embeddings and their answers."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np

from ...kernels.types import FloatArray
from .errors import invalid
from .reader import PROMPT_KINDS, Reader


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


def _encoded(vector: FloatArray, as_base64: bool) -> Any:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode() if as_base64 else vector.tolist()
