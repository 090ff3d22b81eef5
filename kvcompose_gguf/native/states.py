"""Saves and restores a context's memory as bytes: all of it, or only the sliding-window layers."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import NativeError, StateError
from ..plan.geometry import CacheState
from . import library

llama_cpp = library.load()


def save(ctx: Any) -> npt.NDArray[np.uint8]:
    """Returns the whole state of a ``llama_context``, uint8 ``(n_bytes,)``."""
    data = np.empty(llama_cpp.llama_state_get_size(ctx), dtype=np.uint8)
    n_bytes = llama_cpp.llama_state_get_data(ctx, _pointer(data), data.size)
    return data[:n_bytes]


def load(ctx: Any, state: bytes | npt.NDArray[np.uint8]) -> None:
    """Restores what ``save`` returned, straight from its memory.

    Raises:
        StateError: the state belongs to another model, or does not fit.
    """
    data = np.frombuffer(state, dtype=np.uint8)
    if llama_cpp.llama_state_set_data(ctx, _pointer(data), data.size) != data.size:
        raise StateError("the state is damaged or does not fit this context: use the same model and options")


def save_windows(ctx: Any, cells: CacheState) -> bytes | None:
    """Returns the state of the sliding-window layers, which drop older tokens; None: the model has no such layers."""
    if not 0 < cells.n_cells_swa < cells.n_cells:
        return None
    flags = llama_cpp.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY
    data = np.empty(llama_cpp.llama_state_seq_get_size_ext(ctx, 0, flags), dtype=np.uint8)
    n_bytes = llama_cpp.llama_state_seq_get_data_ext(ctx, _pointer(data), data.size, 0, flags)
    return data[:n_bytes].tobytes()


def load_windows(ctx: Any, windows: bytes) -> None:
    """Restores what ``save_windows`` returned.

    Raises:
        NativeError: llama.cpp refuses the state.
    """
    flags = llama_cpp.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY
    data = np.frombuffer(windows, dtype=np.uint8)
    if llama_cpp.llama_state_seq_set_data_ext(ctx, _pointer(data), data.size, 0, flags) != data.size:
        raise NativeError("llama.cpp cannot restore the sliding-window layers to the end of the context: call reset()")


def _pointer(data: npt.NDArray[np.uint8]) -> Any:
    return data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
