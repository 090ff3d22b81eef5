"""The devices that llama.cpp can compute on."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

from . import bindings


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
