"""Reads and writes cached keys and values as numpy arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError, StateError, UnsupportedError
from ..kernels.types import FloatArray
from .session import KVSession


class ContextRows:
    """Reads the rows of a context in a full cache (``scoring.evidence.RowReader``).

    Args:
        n_tokens: number of context tokens N.
    """

    def __init__(self, session: KVSession, n_tokens: int) -> None:
        self._session, self._n_tokens = session, n_tokens

    def keys(self, l: int) -> FloatArray:
        """Returns float32 ``(n_head_kv, N, n_embd_head_k)``; raises StateError if the cache has changed."""
        return cached_rows(self._session, l, "k", self._n_tokens)

    def values(self, l: int) -> FloatArray:
        """Returns float32 ``(n_head_kv, N, n_embd_head_v)``; raises StateError if the cache has changed."""
        return cached_rows(self._session, l, "v", self._n_tokens)

    def rotate(self, l: int, rows: FloatArray, pos: npt.NDArray[np.int32]) -> FloatArray:
        """Returns ``rows`` with the model's RoPE, as ``KVSession.rope``."""
        return self._session.rope(l, rows, pos)

    def unrotate(self, l: int, rows: FloatArray, pos: npt.NDArray[np.int32]) -> FloatArray:
        """Inverts ``rotate``."""
        return self._session.rope(l, rows, pos, inverse=True)


class NewRows(ContextRows):
    """Reads the rows of the last ``n_tokens`` tokens, behind those of a composed or full cache."""

    def keys(self, l: int) -> FloatArray:
        """Returns float32 ``(n_head_kv, n_tokens, n_embd_head_k)``."""
        return self._last(l, "k")

    def values(self, l: int) -> FloatArray:
        """Returns float32 ``(n_head_kv, n_tokens, n_embd_head_v)``."""
        return self._last(l, "v")

    def _last(self, l: int, which: Literal["k", "v"]) -> FloatArray:
        first = self._session.cells(l).n_rows_used - self._n_tokens
        return read_rows(self._session, l, which, self._n_tokens, first)


def cached_rows(session: KVSession, ikv: int, which: Literal["k", "v"], n_tokens: int) -> FloatArray:
    """Returns keys or values of the first ``n_tokens`` tokens in a full cache, as :func:`read_rows`.

    Raises:
        StateError: the cache is composed, or has fewer tokens.
    """
    state = session.state()
    if state.n_composed or state.n_cells_used < n_tokens:
        held = f"{state.n_composed} compressed tokens" if state.n_composed else f"{state.n_cells_used} tokens"
        raise StateError(f"the cache has {held} now: the {n_tokens} tokens of the full cache cannot be read any more")
    return read_rows(session, ikv, which, n_tokens)


def read_rows(session: KVSession, ikv: int, which: Literal["k", "v"], n_rows: int, first: int = 0) -> FloatArray:
    """Returns ``n_rows`` rows of cached layer ``ikv`` from ``first`` on, float32 ``(n_head_kv, n_rows, n_embd_head)``.

    Rows are returned as stored: keys with their rotation, and both Hadamard-rotated if they are quantized
    (llama-kv-cache.cpp, attn_rot_k and attn_rot_v), which keeps norms and products; latent rows never are. Their
    contents are not checked.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    layer = session.layers[ikv]
    if layer.v_in_k and which == "v":
        return read_rows(session, ikv, "k", n_rows, first)[:, :, : layer.n_embd_head_v]
    stored = session.stored(ikv, which)
    is_v = which == "v"
    kind = GGMLQuantizationType(layer.type_v if is_v else layer.type_k)
    n_embd_head = layer.n_embd_head_v if is_v else layer.n_embd_head_k
    n_embd = layer.n_head_kv * n_embd_head
    n_block, n_bytes = GGML_QUANT_SIZES[kind]
    rows: npt.NDArray[np.floating]
    if is_v and layer.v_trans:
        columns = stored.reshape(n_embd, -1)[:, first * n_bytes : (first + n_rows) * n_bytes]
        rows = dequantize(np.ascontiguousarray(columns), kind).T
    else:
        rows = dequantize(stored.reshape(-1, n_embd // n_block * n_bytes)[first : first + n_rows], kind)
    out = np.empty((layer.n_head_kv, n_rows, n_embd_head), dtype=np.float32)
    out[:] = rows.reshape(n_rows, layer.n_head_kv, n_embd_head).transpose(1, 0, 2)
    return out


def write_values(session: KVSession, values: Sequence[FloatArray]) -> None:
    """Replaces the values of the first rows of the first layers, as ``write_layer_values``.

    Raises:
        ConfigError: there are more arrays than layers, or one does not fit.
    """
    if len(values) > len(session.layers):
        raise ConfigError(f"values has {len(values)} layers; give at most the {len(session.layers)} of the cache")
    for ikv, rows in enumerate(values):
        write_layer_values(session, ikv, rows)


def write_layer_values(session: KVSession, ikv: int, values: FloatArray) -> None:
    """Replaces the values of layer ``ikv``'s first rows by float32 ``(n_head_kv, n_rows, n_embd_head_v)``.

    Raises:
        UnsupportedError: values are quantized, so they are Hadamard-rotated, or they are parts of keys.
        ConfigError: the shape is wrong, or the layer uses fewer rows.
    """
    layer = session.layers[ikv]
    if layer.v_quantized:
        raise UnsupportedError("values of a quantized cache cannot be replaced")
    if layer.v_in_k:
        raise UnsupportedError("latent attention stores no values that could be replaced")
    n_used, shape = session.cells(ikv).n_rows_used, (layer.n_head_kv, layer.n_embd_head_v)
    if values.ndim != 3 or values.shape[::2] != shape or values.shape[1] > n_used:
        needed = f"({shape[0]}, at most {n_used}, {shape[1]})"
        raise ConfigError(f"values of layer {ikv} are {values.shape}; {needed} is needed")
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    n_head_kv, n_rows, n_embd_head = values.shape
    if n_rows == 0:
        return
    rows = np.ascontiguousarray(values.transpose(1, 0, 2).reshape(n_rows, n_head_kv * n_embd_head))
    rows = quantize(rows, GGMLQuantizationType(layer.type_v))
    data = rows.view(np.uint8).reshape(n_rows, n_head_kv * n_embd_head, -1)  # bf16 arrives as bytes
    if not layer.v_trans:
        session.store(ikv, "v", data.ravel(), 0)
        return
    stride = session.cells(ikv).n_rows * data.shape[2]
    for column in range(data.shape[1]):
        session.store(ikv, "v", data[:, column].ravel(), column * stride)
