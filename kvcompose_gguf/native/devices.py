"""The devices that llama.cpp can compute on, and the libraries that compute there."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import LibraryError
from . import bindings

#: GGML_BACKEND_DEVICE_TYPE_CPU
CPU = 0


@dataclass(frozen=True)
class Device:
    """One device.

    Attributes:
        name: ggml's name, e.g. ``"CUDA0"``.
        description: the product, e.g. ``"NVIDIA H100 80GB HBM3"``.
        kind: ``"CPU"``, ``"GPU"``, ``"IGPU"`` (integrated), ``"ACCEL"``, or ``"type N"`` for a newer kind.
        n_bytes, n_bytes_free: its memory; 0 if the device does not say.
    """

    name: str
    description: str
    kind: str
    n_bytes: int
    n_bytes_free: int

    def __str__(self) -> str:
        parts = [self.description.strip() or self.kind]
        if self.n_bytes:
            parts.append(f"{self.n_bytes / 1e9:.1f} GB of memory, {self.n_bytes_free / 1e9:.1f} GB free")
        return f"{self.name}: {', '.join(parts)}"


def load_backends(lib: Any, folder: Path) -> None:
    """Loads what computes, if it is not part of ``lib``: a portable build has a library for every kind of CPU.

    Args:
        lib: the bindings' ``ctypes.CDLL``.
        folder: ggml takes the best library for this CPU that is there, and those of other devices.
    Raises:
        LibraryError: there is none for this CPU.
    """
    lib = bindings.declare_backends(lib)
    if not lib.ggml_backend_dev_by_type(CPU):
        lib.ggml_backend_load_all_from_path(os.fsencode(folder))
        if not lib.ggml_backend_dev_by_type(CPU):
            raise LibraryError(f"no library in {folder} computes on this CPU: build one with scripts/build_native.py")


def find_devices(lib: Any) -> list[Device]:
    """All devices of the loaded library, in ggml's order.

    Args:
        lib: the bindings' ``ctypes.CDLL``.
    """
    lib = bindings.declare_devices(lib)
    return [_device(lib, lib.ggml_backend_dev_get(i)) for i in range(lib.ggml_backend_dev_count())]


def _device(lib: Any, handle: Any) -> Device:
    n_free, n_total = ctypes.c_size_t(), ctypes.c_size_t()
    lib.ggml_backend_dev_memory(handle, ctypes.byref(n_free), ctypes.byref(n_total))
    kind = lib.ggml_backend_dev_type(handle)
    return Device(
        lib.ggml_backend_dev_name(handle).decode(errors="replace"),
        lib.ggml_backend_dev_description(handle).decode(errors="replace"),
        bindings.DEVICE_TYPE.get(kind, f"type {kind}"),
        n_total.value,
        n_free.value,
    )
