"""The scoring pass: run query tokens on top of a prefilled context and collect the attention they pay to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from .errors import ConfigError, ContextLengthError
from .geometry import LayerGeometry
from .kernels.types import FloatArray
from .native.session import KVSession


class Decoder(Protocol):
    """What the scoring pass needs of a model."""

    n_batch: int

    def decode(self, tokens: Sequence[int], pos: int) -> None:
        """Evaluate ``tokens`` at positions ``pos, pos + 1, …`` without output."""

    def remove(self, pos: int) -> None:
        """Forget everything from position ``pos`` on."""


def chunk_size(scoring_chunk: int | None, n_query: int, n_tokens: int, n_cells: int) -> int:
    """Query tokens that are on top of the context at a time.

    Raises:
        ContextLengthError: the context leaves no cell free, or ``scoring_chunk=None`` and the repeat does not fit.
    """
    n_free = n_cells - n_tokens
    if scoring_chunk is None and n_query > n_free:
        raise ContextLengthError(
            f"scoring_chunk=None needs {n_tokens + n_query} cells, n_ctx is {n_cells}: raise n_ctx or set scoring_chunk"
        )
    if n_free < 1:
        raise ContextLengthError(f"{n_tokens} tokens fill n_ctx={n_cells}, scoring needs free cells: raise n_ctx")
    return min(scoring_chunk or n_query, n_query, n_free)


def decode_size(max_score_bytes: int, layers: Sequence[LayerGeometry], n_kv: int) -> int:
    """Tokens of one scoring decode for which the matrix of one KV head, float32 n_kv x tokens x group, is in bounds."""
    n_group = max(layer.n_head // layer.n_head_kv for layer in layers)
    n_kv_padded = -(-n_kv // 256) * 256
    return max(1, max_score_bytes // (4 * n_kv_padded * n_group))


def collect_attention(
    session: KVSession,
    decoder: Decoder,
    queries: Sequence[Sequence[int]],
    n_tokens: int,
    agg_task: str,
    scoring_chunk: int | None,
    max_score_bytes: int,
) -> tuple[list[FloatArray], int]:
    """KVCompose step 2 and 3.

    The context is in the cache at positions ``[0, n_tokens)``. Every chunk of every query starts at position
    ``n_tokens``, sees the context and the chunk so far, and is removed again. The reference runs one repeat of N tokens
    at positions N to 2N-1 instead (kvcompose_press.py), here ``scoring_chunk=None``.

    Returns:
        for each layer float32 ``(n_head, n_tokens)``, and the chunk size used.
    """
    n_query = max((len(query) for query in queries), default=0)
    if n_query == 0:
        raise ConfigError("there is no query token to score with")
    n_cells = session.state().n_cells
    chunk = chunk_size(scoring_chunk, n_query, n_tokens, n_cells)
    piece = min(decoder.n_batch, decode_size(max_score_bytes, session.layers, n_tokens + chunk))
    with session.scoring(agg_task, n_tokens):
        try:
            for query in queries:
                for start in range(0, len(query), chunk):
                    end = min(start + chunk, len(query))
                    for first in range(start, end, piece):
                        decoder.decode(query[first : min(first + piece, end)], n_tokens + first - start)
                    decoder.remove(n_tokens)
        finally:
            decoder.remove(n_tokens)
        return session.scores(n_tokens), chunk


def value_norms(session: KVSession, n_tokens: int) -> list[FloatArray]:
    """L2 norms of the cached values, for each layer float32 ``(n_head_kv, n_tokens)``.

    Quantized values are stored Hadamard-rotated (llama-kv-cache.cpp, attn_rot_v), which keeps norms.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    norms = []
    for ikv, layer in enumerate(session.layers):
        stored = session.stored(ikv, "v")
        kind = GGMLQuantizationType(layer.type_v)
        n_embd = layer.n_head_kv * layer.n_embd_head_v
        n_block, n_bytes = GGML_QUANT_SIZES[kind]
        values: npt.NDArray[np.float32]
        if layer.v_trans:
            n_rows = session.cells(ikv).n_rows
            columns = stored.reshape(n_embd, n_rows * n_bytes)[:, : n_tokens * n_bytes]
            values = dequantize(np.ascontiguousarray(columns), kind).T
        else:
            values = dequantize(stored.reshape(-1, n_embd // n_block * n_bytes)[:n_tokens], kind)
        heads = values.astype(np.float32).reshape(n_tokens, layer.n_head_kv, layer.n_embd_head_v)
        norms.append(np.ascontiguousarray(np.linalg.norm(heads, axis=2).T))
    return norms
