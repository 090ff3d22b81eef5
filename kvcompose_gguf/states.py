"""Save and restore a context's memory as bytes: all of it, or the sliding-window layers alone."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import NativeError, StateError
from .geometry import CacheState
from .native import library

llama_cpp = library.load()


def save(ctx: Any) -> npt.NDArray[np.uint8]:
    """Return the whole state of a ``llama_context``, uint8 ``(n_bytes,)``."""
    data = np.empty(llama_cpp.llama_state_get_size(ctx), dtype=np.uint8)
    n_bytes = llama_cpp.llama_state_get_data(ctx, _pointer(data), data.size)
    return data[:n_bytes]


def load(ctx: Any, state: bytes | npt.NDArray[np.uint8]) -> None:
    """Restore what ``save`` returned, straight from its memory.

    Raises:
        StateError: the state is another model's, or does not fit.
    """
    data = np.frombuffer(state, dtype=np.uint8)
    if llama_cpp.llama_state_set_data(ctx, _pointer(data), data.size) != data.size:
        raise StateError("the state cannot be loaded into this context")


def save_windows(ctx: Any, cells: CacheState) -> bytes | None:
    """Return the state of the sliding-window layers, which forget what lies behind their window; None without any."""
    if not 0 < cells.n_cells_swa < cells.n_cells:
        return None
    flags = llama_cpp.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY
    data = np.empty(llama_cpp.llama_state_seq_get_size_ext(ctx, 0, flags), dtype=np.uint8)
    n_bytes = llama_cpp.llama_state_seq_get_data_ext(ctx, _pointer(data), data.size, 0, flags)
    return data[:n_bytes].tobytes()


def load_windows(ctx: Any, windows: bytes) -> None:
    """Restore what ``save_windows`` returned.

    Raises:
        NativeError: llama.cpp refuses it.
    """
    flags = llama_cpp.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY
    data = np.frombuffer(windows, dtype=np.uint8)
    if llama_cpp.llama_state_seq_set_data_ext(ctx, _pointer(data), data.size, 0, flags) != data.size:
        raise NativeError("the sliding-window layers could not be brought back to the end of the context")


def _pointer(data: npt.NDArray[np.uint8]) -> Any:
    return data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
