"""Wraps one llama context for the rest of the package: numpy in, numpy out, exceptions instead of statuses."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError, NativeError, StateError
from ..kernels.compose import gather_function
from ..plan.composition import CompositionPlan
from ..plan.geometry import CacheState, KVCells, LayerGeometry
from . import bindings, library


@contextmanager
def start_small(n_cells: int) -> Iterator[None]:
    """Makes contexts that this thread creates in the ``with`` block start with ``n_cells`` cells, and grow."""
    lib = bindings.declare(library.load().llama_cpp._lib)
    lib.llama_kvc_set_start_cells(n_cells)
    try:
        yield
    finally:
        lib.llama_kvc_set_start_cells(0)


class KVSession:
    """Scores, geometry and compose of one ``llama_context``.

    Only :meth:`compose` and :meth:`store` change the cache.

    Args:
        ctx: the bindings' ``llama_context_p``; it must outlive the session.
    Raises:
        UnsupportedError: this model or cache cannot be compressed; the message says why.
    """

    def __init__(self, ctx: Any) -> None:
        self._lib = bindings.declare(library.load().llama_cpp._lib)
        self._ctx = ctypes.cast(ctx, ctypes.c_void_p)
        self._one_at_a_time = threading.Lock()  # llama.cpp allows one call at a time, but several threads plan layers
        self._closed = False
        self._call("llama_kvc_supported")
        self._biased = False
        #: the cached layers in order, a tuple of LayerGeometry
        self.layers = tuple(self._geometry(self._layer(ikv)) for ikv in range(self._cache().n_layer))

    def _call(self, name: str, *args: Any) -> None:
        with self._one_at_a_time:
            if self._closed:
                raise StateError("the context of this session is closed")
            status = getattr(self._lib, name)(self._ctx, *args)
            message = "" if status == bindings.OK else self._lib.llama_kvc_last_error().decode()
        if status != bindings.OK:
            raise bindings.EXCEPTIONS.get(status, NativeError)(message)

    def close(self) -> None:
        """Refuse all later calls with StateError, because the context is about to be freed."""
        with self._one_at_a_time:
            self._closed = True

    def _cache(self) -> bindings.CacheInfo:
        info = bindings.CacheInfo()
        self._call("llama_kvc_get_cache", ctypes.byref(info), ctypes.sizeof(info))
        return info

    def _layer(self, ikv: int) -> bindings.LayerInfo:
        info = bindings.LayerInfo()
        self._call("llama_kvc_get_layer", ikv, ctypes.byref(info), ctypes.sizeof(info))
        return info

    @staticmethod
    def _geometry(info: bindings.LayerInfo) -> LayerGeometry:
        return LayerGeometry(
            il=info.il, n_head=info.n_head, n_head_kv=info.n_head_kv, n_embd_head_k=info.n_embd_head_k,
            n_embd_head_v=info.n_embd_head_v, type_k=info.type_k, type_v=info.type_v, v_trans=bool(info.v_trans),
            n_bytes_row=info.n_bytes_row, v_in_k=bool(info.v_in_k),
        )  # fmt: skip

    def state(self) -> CacheState:
        """Returns the current cells and bytes of the whole cache."""
        info = self._cache()
        return CacheState(
            n_cells=info.n_cells,
            n_cells_alloc=info.n_cells_alloc,
            n_cells_used=info.n_cells_used,
            n_composed=info.n_composed,
            scoring=bool(info.scoring),
            n_cells_swa=info.n_cells_swa,
            recurrent=bool(info.recurrent),
            n_bytes=info.n_bytes,
        )

    def cells(self, ikv: int) -> KVCells:
        """Returns the current rows of cached layer ``ikv``."""
        info = self._layer(ikv)
        return KVCells(n_rows=info.n_rows, n_rows_used=info.n_rows_used, n_bytes=info.n_bytes)

    def n_rows_used(self) -> list[int]:
        """Returns how many rows of each layer hold a composite or a token."""
        return [self.cells(ikv).n_rows_used for ikv in range(len(self.layers))]

    def stored(self, ikv: int, which: str) -> npt.NDArray[np.uint8]:
        """Returns the bytes of a layer's ``"k"`` or ``"v"`` tensor, uint8 ``(n_bytes,)``.

        In host memory this is a read-only view of the tensor itself, valid until the cache next changes; otherwise a
        copy.
        """
        info = self._layer(ikv)
        layer = self.layers[ikv]
        is_v = which == "v"
        n_bytes = info.n_rows * _row_bytes(layer, is_v)
        address = info.v if is_v else info.k
        if address:
            view = np.ctypeslib.as_array((ctypes.c_uint8 * n_bytes).from_address(address))
            view.setflags(write=False)
            return view
        copy = np.empty(n_bytes, dtype=np.uint8)
        self._call("llama_kvc_get_tensor", ikv, int(is_v), copy.ctypes.data_as(ctypes.c_void_p), 0, n_bytes)
        return copy

    def store(self, ikv: int, which: str, data: npt.NDArray[np.uint8], offset: int) -> None:
        """Overwrites bytes of a layer's ``"k"`` or ``"v"`` tensor from ``offset`` on; does not check their meaning."""
        data = np.ascontiguousarray(data)
        self._call(
            "llama_kvc_set_tensor", ikv, int(which == "v"), data.ctypes.data_as(ctypes.c_void_p), offset, data.size
        )

    def reserve(self, n_cells: int) -> None:
        """Allocates room for ``n_cells`` cells at once, so that the cache need not grow in steps.

        The room lasts until the next compose or call. An empty cache releases the cells beyond it.

        Raises:
            ConfigError: the context has fewer cells.
            NativeError: not enough memory; the cache is unchanged.
        """
        self._call("llama_kvc_reserve", n_cells)

    def set_fast_attention(self, on: bool) -> None:
        """Turns the package's own CPU kernel for flash attention of batches on or off; equal up to rounding."""
        self._call("llama_kvc_set_fast_attention", int(on))

    def skip_to(self, pos: int) -> None:
        """Lets the next decode begin at position ``pos``, with a gap before it; -1: directly after the last token.

        Only ``context.Context.on_top`` calls this.
        """
        self._call("llama_kvc_skip_to", pos)

    @contextmanager
    def scoring(self, agg: str, n_cells: int, max_bytes: int) -> Iterator[None]:
        """Makes decodes in the ``with`` block collect attention on the first ``n_cells`` cells; any exit ends it.

        Args:
            agg: ``"max"`` or ``"sum"`` over the query tokens of all decodes.
            max_bytes: limit of the working memory, not counting the scores.
        """
        self._call("llama_kvc_scores_begin", bindings.AGG[agg], n_cells, max_bytes)
        try:
            yield
        finally:
            self._call("llama_kvc_scores_end")

    def scores(self) -> list[npt.NDArray[np.float32]]:
        """Returns the attention collected so far, for each layer float32 ``(n_head, n_rows)``; only while scoring.

        A layer's rows are all scored cells, or in a composed cache its composites and the tokens behind them.
        """
        out = []
        for ikv, layer in enumerate(self.layers):
            n_rows = ctypes.c_uint32()
            self._call("llama_kvc_scores_n_rows", ikv, ctypes.byref(n_rows))
            scores = np.empty((layer.n_head, n_rows.value), dtype=np.float32)
            self._call("llama_kvc_scores_get", ikv, scores.ctypes.data_as(bindings.c_float_p), scores.size)
            out.append(scores)
        return out

    @contextmanager
    def taps(self, what: str, n_tokens: int) -> Iterator[None]:
        """Makes decodes in the ``with`` block store vectors of their first ``n_tokens`` tokens for ``tapped``.

        Args:
            what: ``"queries"``, rotated and scaled so that their products with keys are the attention logits, or
                ``"outputs"`` of attention, before the output projection.
            n_tokens: at most ``n_ubatch``.
        """
        self._call("llama_kvc_taps_begin", bindings.TAP[what], n_tokens)
        try:
            yield
        finally:
            self._call("llama_kvc_taps_end")

    def tapped(self, what: str, ikv: int, n_tokens: int) -> npt.NDArray[np.float32]:
        """Returns the latest decode's vectors of layer ``ikv``, float32 ``(n_tokens, n_head, n_embd_head)``.

        ``n_embd_head`` is that of keys for queries, and that of values for outputs. If the cache's rows are quantized,
        these vectors are Hadamard-rotated as the rows are.
        """
        layer = self.layers[ikv]
        n_embd_head = layer.n_embd_head_v if what == "outputs" else layer.n_embd_head_k
        rows = np.empty((n_tokens, layer.n_head, n_embd_head), dtype=np.float32)
        self._call("llama_kvc_taps_get", ikv, bindings.TAP[what], rows.ctypes.data_as(bindings.c_float_p), rows.size)
        return rows

    def rope(
        self, ikv: int, rows: npt.NDArray[np.float32], pos: npt.NDArray[np.int32], inverse: bool = False
    ) -> npt.NDArray[np.float32]:
        """Rotates ``rows`` float32 ``(n_rows, n_embd_head_k)`` to positions int32 ``(n_rows,)``, or back from them.

        Uses the model's own frequencies, factors, scaling and kind of RoPE.
        """
        shape = (len(pos), self.layers[ikv].n_embd_head_k)
        if rows.shape != shape:
            raise ConfigError(f"rows are {rows.shape}; {shape} is needed")
        out = np.array(rows, dtype=np.float32, order="C")
        pos = np.ascontiguousarray(pos, dtype=np.int32)
        self._call(
            "llama_kvc_rope", ikv, out.ctypes.data_as(bindings.c_float_p), len(pos),
            pos.ctypes.data_as(bindings.c_int32_p), int(inverse),
        )  # fmt: skip
        return out

    @contextmanager
    def biased(self, biases: Sequence[npt.NDArray[np.float32]]) -> Iterator[None]:
        """Makes decodes in the ``with`` block add biases to the attention logits of the rows, layer by layer.

        Args:
            biases: for each layer float32 ``(n_head_kv, n_rows)``; minus infinity hides a row from a KV head. Rows are
                the tokens of a full cache, or the composites of a compressed cache followed by the tokens after them.
        Raises:
            UnsupportedError: values are quantized.
            StateError: the block is inside another one.
        """
        if self._biased:
            raise StateError("attention is biased already")
        if len(biases) > len(self.layers):
            raise ConfigError(f"biases of {len(biases)} layers; the cache has {len(self.layers)}")
        self._biased = True
        try:
            for ikv, bias in enumerate(biases):
                bias = np.ascontiguousarray(bias, dtype=np.float32)
                n_head_kv = self.layers[ikv].n_head_kv
                if bias.ndim != 2 or bias.shape[0] != n_head_kv:
                    raise ConfigError(f"biases[{ikv}] is {bias.shape}; ({n_head_kv}, n_rows) is needed")
                if not bias.shape[1]:
                    continue  # a layer that keeps nothing has no rows
                self._call("llama_kvc_set_bias", ikv, bias.ctypes.data_as(bindings.c_float_p), bias.shape[1])
            yield
        finally:
            self._biased = False
            self._call("llama_kvc_set_bias", 0, None, 0)

    def compose(self, plan: CompositionPlan, n_room: int = 256) -> None:
        """Applies ``plan`` to the cache, all or nothing; a composed cache can be composed again.

        Args:
            n_room: free cells to leave after the composites; the cache grows beyond them when needed.
        Raises:
            ConfigError: the plan does not fit this cache.
            StateError: the cache does not hold exactly the plan's tokens.
        """
        n_kept = plan.n_kept.astype(np.uint32)
        shapes = [rows.shape[0] for rows in plan.rows]
        if shapes != [layer.n_head_kv for layer in self.layers]:
            raise ConfigError(f"the plan's KV heads per layer {shapes} are not the cache's")
        rows = np.concatenate([rows.ravel() for rows in plan.rows]).astype(np.int32)
        self._call(
            "llama_kvc_compose",
            plan.n_tokens,
            plan.n_tail,
            len(plan.rows),
            n_kept.ctypes.data_as(bindings.c_uint32_p),
            rows.ctypes.data_as(bindings.c_int32_p),
            rows.size,
            n_room,
            gather_function().address,  # type: ignore[attr-defined]
        )


def _row_bytes(layer: LayerGeometry, is_v: bool) -> int:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    n_block, n_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(layer.type_v if is_v else layer.type_k)]
    n_embd = layer.n_head_kv * (layer.n_embd_head_v if is_v else layer.n_embd_head_k)
    return n_embd // n_block * n_bytes
