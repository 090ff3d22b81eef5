"""Seeded tiny models of any architecture: from its metadata, llama.cpp itself says which tensors a model has.

``tiny.py`` has a numpy twin for some of them. The others are compared with what llama.cpp itself computes.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kvcompose_gguf.native import library
from support.gguf_file import N_VOCAB, write_file

N_HEAD, N_HEAD_KV, N_EMBD_HEAD = 4, 2, 32


@dataclass(frozen=True)
class AnyArch:
    """An architecture, and the metadata in which its tiny model differs from ``_METADATA``.

    Attributes:
        name: what llama.cpp calls it.
        more: keys, mostly without the architecture's name, and their values.
        owners: layers that read another layer's rows, and that layer.
    """

    name: str
    more: dict[str, Any] = field(default_factory=dict)
    owners: dict[int, int] = field(default_factory=dict)
    seed: int = 5


#: values that many architectures need; llama.cpp ignores those that it does not know
_METADATA: dict[str, Any] = {
    "vocab_size": N_VOCAB,
    "context_length": 4096,
    "embedding_length": N_HEAD * N_EMBD_HEAD,
    "block_count": 4,
    "feed_forward_length": 96,
    "attention.head_count": N_HEAD,
    "attention.head_count_kv": N_HEAD_KV,
    "attention.key_length": N_EMBD_HEAD,
    "attention.value_length": N_EMBD_HEAD,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "attention.layer_norm_epsilon": 1e-5,
    "rope.dimension_count": N_EMBD_HEAD,
    "rope.dimension_sections": [8, 4, 4, 0],
    "rope.freq_base": 10000.0,
    "expert_count": 4,
    "expert_used_count": 2,
    "expert_shared_count": 1,
    "expert_feed_forward_length": 48,
    "expert_shared_feed_forward_length": 48,
    "expert_gating_func": 2,
    "leading_dense_block_count": 1,
    "full_attention_interval": 2,
    "expert_group_scale": 1.0,
    "experts_per_group": 1,
    "interleave_moe_layer_step": 2,
    "use_parallel_residual": False,
    "logit_scale": 1.0,
    "residual_scale": 1.0,
    "wkv.head_size": N_EMBD_HEAD,
    "time_mix_extra_dim": 16,
    "time_decay_extra_dim": 16,
    "ssm.conv_kernel": 4,
    "ssm.inner_size": 2 * N_HEAD * N_EMBD_HEAD,
    "ssm.state_size": 32,
    "ssm.time_step_rank": 4,
    "ssm.group_count": 2,
    "shortconv.l_cache": 3,
}


def write(arch: AnyArch, path: Path) -> Path:
    """Writes the model as a GGUF file; returns ``path``.

    Raises:
        ValueError: llama.cpp does not take the metadata.
    """
    metadata = {**_METADATA, **arch.more}
    write_file(path, arch.name, metadata, {})
    return write_file(path, arch.name, metadata, _tensors(path, arch.seed))


class GgmlTensor(ctypes.Structure):
    """The beginning of ``ggml_tensor`` (ggml.h)."""

    _fields_ = (("type", ctypes.c_int), ("buffer", ctypes.c_void_p), ("ne", ctypes.c_int64 * 4))


class _InitParams(ctypes.Structure):
    """``gguf_init_params`` (gguf.h)."""

    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))


def ggml_base() -> ctypes.CDLL:
    """Returns the library with ggml's functions for tensors."""
    base = ctypes.CDLL(str(next(library.library_dir().glob("libggml-base.*"))))
    base.ggml_get_name.restype, base.ggml_get_name.argtypes = ctypes.c_char_p, [ctypes.POINTER(GgmlTensor)]
    return base


_Set = ctypes.CFUNCTYPE(None, ctypes.POINTER(GgmlTensor), ctypes.c_void_p)


def _tensors(path: Path, seed: int) -> dict[str, np.ndarray]:
    """Returns a seeded array for every tensor that a model with a file's metadata has."""
    llama_cpp = library.load()
    base = ggml_base()
    init = ctypes.CDLL(llama_cpp.llama_cpp._lib._name).llama_model_init_from_user
    init.restype = ctypes.c_void_p
    init.argtypes = [ctypes.c_void_p, _Set, ctypes.c_void_p, llama_cpp.llama_model_params]
    found: dict[str, np.ndarray] = {}

    def fill(tensor: Any, _: int | None) -> None:
        name = base.ggml_get_name(tensor).decode()
        shape = tuple(n for n in reversed(tensor.contents.ne))
        while len(shape) > 1 and shape[0] == 1:
            shape = shape[1:]
        found[name] = _values(name, shape, seed)

    callback = _Set(fill)
    with _header(base, path) as header:
        model = init(header, callback, None, llama_cpp.llama_model_default_params())
    if not model:
        raise ValueError(f"llama.cpp makes no model of {path}")
    llama_cpp.llama_model_free(model)
    # without the scales of quantized weights
    return {name: data for name, data in found.items() if not (name.endswith("scale") and data.size == 1)}


@contextlib.contextmanager
def _header(base: ctypes.CDLL, path: Path) -> Iterator[int]:
    base.gguf_init_from_file.restype = ctypes.c_void_p
    base.gguf_init_from_file.argtypes = [ctypes.c_char_p, _InitParams]
    base.gguf_free.argtypes = [ctypes.c_void_p]
    header = base.gguf_init_from_file(str(path).encode(), _InitParams(True, None))
    try:
        yield header
    finally:
        base.gguf_free(header)


def _values(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Returns values with which attention is peaked, and no layer's output grows."""
    noise = np.random.default_rng([seed, *name.encode()]).standard_normal(shape)
    if name.endswith(("ssm_a", "ssm_a.weight")):
        values = -np.abs(noise)  # a state that decays
    elif ("norm" in name and not name.endswith("bias")) or "rope_freqs" in name or name.endswith("scale"):
        values = 1 + 0.1 * noise
    elif len(shape) == 1:
        values = 0.1 * noise
    else:
        values = noise * _scale(name) / np.sqrt(shape[-1])
    return values.astype(np.float32)


def _scale(name: str) -> float:
    if "token_embd" in name:
        return float(np.sqrt(N_HEAD * N_EMBD_HEAD))
    return 1.7 if any(part in name for part in ("attn_q", "attn_k")) else 1.0
