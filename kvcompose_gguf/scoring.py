"""Prefill a context and collect the attention that queries pay to it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from .errors import ConfigError, ContextLengthError
from .kernels.types import FloatArray
from .methods.kvcompose import KVCompose
from .native.session import KVSession

#: tokens of the pieces that ``scoring_fraction`` takes: long enough for each to be text
PIECE = 64


class Decoder(Protocol):
    """What scoring needs of a model."""

    n_batch: int

    def prefill(self, tokens: Sequence[int], keep_prefix: bool) -> int:
        """Bring exactly ``tokens`` into the cache; returns how many were evaluated.

        Args:
            keep_prefix: what the cache has of them already need not be evaluated again.
        """

    def decode(self, tokens: Sequence[int], pos: int) -> None:
        """Evaluate at most ``n_batch`` tokens at positions ``pos, pos + 1, …`` without output."""

    def on_top(self, pos: int) -> AbstractContextManager[None]:
        """What is decoded inside of the ``with``, from position ``pos`` on, is forgotten at its end."""


@dataclass(frozen=True, eq=False)
class Attention:
    """What queries have paid to a context that is in the cache now (KVCompose steps 1 to 3).

    Attributes:
        layers: for each layer float32 ``(n_head, N)``, agg_task over the queries of their attention probability on
            each context token, not renormalised.
        n_prefilled: context tokens evaluated.
        prefill_seconds, score_seconds: wall time of the prefill, and of the decodes of queries; those of ``"window"``
            are part of both prefill and scoring, and counted as scoring, those of ``"prefill"`` as prefill.
        chunk: queries at a time: a chunk of the repeat or the prompts, the whole window, 0 for ``"prefill"``.
    """

    layers: list[FloatArray]
    n_prefilled: int
    prefill_seconds: float
    score_seconds: float
    chunk: int


def collect_attention(
    session: KVSession,
    decoder: Decoder,
    method: KVCompose,
    tokens: Sequence[int],
    suffix: Sequence[int] = (),
    tokenize: Callable[[str], Sequence[int]] | None = None,
) -> Attention:
    """Prefill ``tokens`` and score them as ``method.scoring`` says.

    Args:
        suffix: what follows the context in its prompt, whose last tokens are the queries of ``"window"``.
        tokenize: tokens of one of ``method.prompts``.
    Raises:
        ContextLengthError: the context leaves no cell for queries on top of it.
        ConfigError: there are no queries.
    """
    if method.scoring == "window":
        return _attention_of_window(session, decoder, method, tokens, suffix)
    if method.scoring == "prefill":
        return _attention_of_prefill(session, decoder, method, tokens)
    if method.scoring == "prompts":
        assert tokenize is not None
        queries = [tokenize(text) for text in method.prompts]
    else:
        queries = [spread(tokens, method.scoring_fraction)]
    return _attention_on_top(session, decoder, method, tokens, queries)


def spread(tokens: Sequence[int], fraction: float) -> list[int]:
    """A share of ``tokens``: pieces of PIECE neighbours, evenly spread from the first token to the last."""
    n_pieces = max(1, round(fraction * len(tokens) / PIECE))
    if fraction == 1 or n_pieces * PIECE >= len(tokens):
        return list(tokens)
    starts = np.linspace(0, len(tokens) - PIECE, n_pieces).round().astype(int)
    return [token for start in starts for token in tokens[start : start + PIECE]]


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


def _attention_on_top(
    session: KVSession,
    decoder: Decoder,
    method: KVCompose,
    tokens: Sequence[int],
    queries: Sequence[Sequence[int]],
) -> Attention:
    """Every chunk of every query starts at position N, sees the context and the chunk so far, and is removed again.

    The reference runs one repeat of N tokens at positions N to 2N-1 instead (kvcompose_press.py), here
    ``scoring_chunk=None``.
    """
    n_tokens = len(tokens)
    n_query = max((len(query) for query in queries), default=0)
    if n_query == 0:
        raise ConfigError("there is no query token to score with")
    chunk = chunk_size(method.scoring_chunk, n_query, n_tokens, session.state().n_cells)

    start = time.perf_counter()
    n_prefilled = decoder.prefill(tokens, True)
    prefilled = time.perf_counter()
    session.reserve(n_tokens + chunk)
    with _scoring(session, method, n_tokens):
        for query in queries:
            for first in range(0, len(query), chunk):
                with decoder.on_top(n_tokens):
                    _decode(decoder, query[first : first + chunk], n_tokens)
        scores = session.scores(n_tokens)
    if method.agg_task == "mean":
        scores = [score / np.float32(sum(map(len, queries))) for score in scores]
    return Attention(scores, n_prefilled, prefilled - start, time.perf_counter() - prefilled, chunk)


def _attention_of_window(
    session: KVSession, decoder: Decoder, method: KVCompose, tokens: Sequence[int], suffix: Sequence[int]
) -> Attention:
    """The prompt's last ``method.window`` tokens judge; those behind the context are evaluated again after it."""
    n_tokens, n_prompt = len(tokens), len(tokens) + len(suffix)
    first = max(0, n_prompt - method.window)
    n_cells = session.state().n_cells
    if n_prompt > n_cells:
        raise ContextLengthError(f"a prompt of {n_prompt} tokens does not fit into n_ctx={n_cells}")

    start = time.perf_counter()
    n_prefilled = decoder.prefill(tokens[:first], True)
    prefilled = time.perf_counter()
    if first < n_tokens:
        with _scoring(session, method, n_tokens):
            n_prefilled += decoder.prefill(tokens, True)
            with decoder.on_top(n_tokens):
                _decode(decoder, suffix, n_tokens)
            scores = session.scores(n_tokens)
    else:
        with decoder.on_top(n_tokens):
            _decode(decoder, suffix[: first - n_tokens], n_tokens)
            with _scoring(session, method, n_tokens):
                _decode(decoder, suffix[first - n_tokens :], first)
                scores = session.scores(n_tokens)
    _divide_by_queries(scores, method, first, n_prompt)
    return Attention(scores, n_prefilled, prefilled - start, time.perf_counter() - prefilled, n_prompt - first)


def _attention_of_prefill(
    session: KVSession, decoder: Decoder, method: KVCompose, tokens: Sequence[int]
) -> Attention:
    """The context's own tokens judge while they are prefilled, so what the cache has of them is no use."""
    start = time.perf_counter()
    decoder.prefill([], False)  # a compressed cache cannot be scored
    with _scoring(session, method, len(tokens)):
        n_prefilled = decoder.prefill(tokens, False)
        prefilled = time.perf_counter()
        scores = session.scores(len(tokens))
    _divide_by_queries(scores, method, 0, len(tokens))
    return Attention(scores, n_prefilled, prefilled - start, time.perf_counter() - prefilled, 0)


def _scoring(session: KVSession, method: KVCompose, n_tokens: int) -> AbstractContextManager[None]:
    return session.scoring("max" if method.agg_task == "max" else "sum", n_tokens, method.max_score_bytes)


def _divide_by_queries(scores: list[FloatArray], method: KVCompose, first: int, end: int) -> None:
    """Sums to means, in place: token i was seen by the queries at ``[max(first, i), end)``."""
    if method.agg_task == "mean":
        n_queries = end - np.maximum(first, np.arange(scores[0].shape[1]))
        for score in scores:
            score /= n_queries.astype(np.float32)


def _decode(decoder: Decoder, tokens: Sequence[int], pos: int) -> None:
    for first in range(0, len(tokens), decoder.n_batch):
        decoder.decode(tokens[first : first + decoder.n_batch], pos + first)


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
