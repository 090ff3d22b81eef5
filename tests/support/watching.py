"""Sees tensors of llama.cpp's graphs through its eval callback."""

from __future__ import annotations

import contextlib
import ctypes
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from kvcompose_gguf.native import library
from support.any_arch import GgmlTensor, ggml_base


class Watcher:
    """Copies every tensor ``NAME-LAYER`` that is computed while ``on`` is True, for one name.

    Attributes:
        seen: for each layer, the tensors in the order of their computation, float32.
    """

    def __init__(self, name: str) -> None:
        self.on, self.seen = False, defaultdict[int, list[np.ndarray]](list)
        self._prefix, self._base = f"{name}-", ggml_base()
        self._base.ggml_backend_tensor_get.argtypes = [
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_size_t,
            ctypes.c_size_t,
        ]
        self.callback = library.load().ggml_backend_sched_eval_callback(self._evaluated)

    def _evaluated(self, address: int, ask: bool, _: int | None) -> bool:
        tensor = ctypes.cast(address, ctypes.POINTER(GgmlTensor))
        name = self._base.ggml_get_name(tensor).decode()
        if not (self.on and name.startswith(self._prefix)):
            return not ask
        if not ask:
            data = np.empty(tuple(reversed(tensor.contents.ne)), np.float32)
            self._base.ggml_backend_tensor_get(address, data.ctypes.data, 0, data.nbytes)
            self.seen[int(name.removeprefix(self._prefix))].append(data[0])
        return True


@contextlib.contextmanager
def watched(name: str) -> Iterator[Watcher]:
    """Contexts that are created in the ``with`` block tell the watcher of their tensors, for as long as they live."""
    watcher, llama_cpp = Watcher(name), library.load()
    default = llama_cpp.llama_context_default_params

    def params() -> Any:
        found = default()
        found.cb_eval = watcher.callback
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llama_cpp.llama_cpp, "llama_context_default_params", params)
        patch.setattr(llama_cpp, "llama_context_default_params", params)
        yield watcher
