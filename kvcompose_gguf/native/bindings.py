"""Declarations of llama-kvc.h (patches/src) and some of ggml-backend.h, each below its C declaration."""

from __future__ import annotations

import ctypes
from typing import Any

from ..errors import ConfigError, StateError, UnsupportedError

c_uint32_p = ctypes.POINTER(ctypes.c_uint32)
c_int32_p = ctypes.POINTER(ctypes.c_int32)
c_float_p = ctypes.POINTER(ctypes.c_float)

# enum llama_kvc_status
OK = 0
ERR_ARGUMENT = -1
ERR_UNSUPPORTED = -2
ERR_STATE = -3
ERR_MEMORY = -4
ERR_INTERNAL = -5

#: what a status raises; the others are a NativeError
EXCEPTIONS: dict[int, type[Exception]] = {
    ERR_ARGUMENT: ConfigError,
    ERR_UNSUPPORTED: UnsupportedError,
    ERR_STATE: StateError,
}

# enum llama_kvc_agg
AGG = {"max": 0, "sum": 1}

# enum llama_kvc_tap
TAP = {"queries": 1, "outputs": 2}


# struct llama_kvc_cache_info
class CacheInfo(ctypes.Structure):
    _fields_ = [
        ("n_layer", ctypes.c_uint32),
        ("n_cells", ctypes.c_uint32),
        ("n_cells_alloc", ctypes.c_uint32),
        ("n_cells_used", ctypes.c_uint32),
        ("n_composed", ctypes.c_uint32),
        ("scoring", ctypes.c_int32),
        ("n_cells_swa", ctypes.c_uint32),
        ("recurrent", ctypes.c_uint32),
        ("n_bytes", ctypes.c_uint64),
    ]


# struct llama_kvc_layer_info
class LayerInfo(ctypes.Structure):
    _fields_ = [
        ("il", ctypes.c_int32),
        ("n_head", ctypes.c_int32),
        ("n_head_kv", ctypes.c_int32),
        ("n_embd_head_k", ctypes.c_int32),
        ("n_embd_head_v", ctypes.c_int32),
        ("type_k", ctypes.c_int32),
        ("type_v", ctypes.c_int32),
        ("v_trans", ctypes.c_int32),
        ("v_in_k", ctypes.c_int32),
        ("n_rows", ctypes.c_uint32),
        ("n_rows_used", ctypes.c_uint32),
        ("n_bytes", ctypes.c_uint64),
        ("n_bytes_row", ctypes.c_uint64),
        ("k", ctypes.c_void_p),
        ("v", ctypes.c_void_p),
        ("buffer", ctypes.c_char_p),
    ]


_CONTEXT = ctypes.c_void_p

_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    # uint32_t llama_kvc_abi(void);
    "llama_kvc_abi": (ctypes.c_uint32, []),
    # const char * llama_kvc_commit(void);
    "llama_kvc_commit": (ctypes.c_char_p, []),
    # const char * llama_kvc_last_error(void);
    "llama_kvc_last_error": (ctypes.c_char_p, []),
    # void llama_kvc_log(enum ggml_log_level level);
    "llama_kvc_log": (None, [ctypes.c_int]),
    # int32_t llama_kvc_supported(struct llama_context * ctx);
    "llama_kvc_supported": (ctypes.c_int32, [_CONTEXT]),
    # int32_t llama_kvc_get_cache(struct llama_context * ctx, struct llama_kvc_cache_info * info, size_t size);
    "llama_kvc_get_cache": (ctypes.c_int32, [_CONTEXT, ctypes.POINTER(CacheInfo), ctypes.c_size_t]),
    # int32_t llama_kvc_get_layer(struct llama_context * ctx, uint32_t ikv, struct llama_kvc_layer_info * info, size_t size);
    "llama_kvc_get_layer": (
        ctypes.c_int32,
        [_CONTEXT, ctypes.c_uint32, ctypes.POINTER(LayerInfo), ctypes.c_size_t],
    ),
    # int32_t llama_kvc_get_tensor(struct llama_context * ctx, uint32_t ikv, int32_t is_v, void * dst, size_t offset, size_t size);
    "llama_kvc_get_tensor": (
        ctypes.c_int32,
        [_CONTEXT, ctypes.c_uint32, ctypes.c_int32, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t],
    ),
    # int32_t llama_kvc_set_tensor(struct llama_context * ctx, uint32_t ikv, int32_t is_v, const void * src, size_t offset, size_t size);
    "llama_kvc_set_tensor": (
        ctypes.c_int32,
        [_CONTEXT, ctypes.c_uint32, ctypes.c_int32, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t],
    ),
    # void llama_kvc_set_start_cells(uint32_t n_cells);
    "llama_kvc_set_start_cells": (None, [ctypes.c_uint32]),
    # int32_t llama_kvc_reserve(struct llama_context * ctx, uint32_t n_cells);
    "llama_kvc_reserve": (ctypes.c_int32, [_CONTEXT, ctypes.c_uint32]),
    # int32_t llama_kvc_set_fast_attention(struct llama_context * ctx, int32_t on);
    "llama_kvc_set_fast_attention": (ctypes.c_int32, [_CONTEXT, ctypes.c_int32]),
    # int32_t llama_kvc_skip_to(struct llama_context * ctx, llama_pos pos);
    "llama_kvc_skip_to": (ctypes.c_int32, [_CONTEXT, ctypes.c_int32]),
    # int32_t llama_kvc_decode_joint(struct llama_context * const * ctxs, const llama_token * tokens, const llama_pos * pos, uint32_t n);
    "llama_kvc_decode_joint": (
        ctypes.c_int32,
        [ctypes.POINTER(ctypes.c_void_p), c_int32_p, c_int32_p, ctypes.c_uint32],
    ),
    # int32_t llama_kvc_scores_begin(struct llama_context * ctx, int32_t agg, uint32_t n_cells, size_t max_bytes);
    "llama_kvc_scores_begin": (ctypes.c_int32, [_CONTEXT, ctypes.c_int32, ctypes.c_uint32, ctypes.c_size_t]),
    # int32_t llama_kvc_scores_n_rows(struct llama_context * ctx, uint32_t ikv, uint32_t * n_rows);
    "llama_kvc_scores_n_rows": (ctypes.c_int32, [_CONTEXT, ctypes.c_uint32, c_uint32_p]),
    # int32_t llama_kvc_scores_get(struct llama_context * ctx, uint32_t ikv, float * dst, size_t n);
    "llama_kvc_scores_get": (ctypes.c_int32, [_CONTEXT, ctypes.c_uint32, c_float_p, ctypes.c_size_t]),
    # int32_t llama_kvc_scores_end(struct llama_context * ctx);
    "llama_kvc_scores_end": (ctypes.c_int32, [_CONTEXT]),
    # int32_t llama_kvc_taps_begin(struct llama_context * ctx, int32_t what, uint32_t n_tokens);
    "llama_kvc_taps_begin": (ctypes.c_int32, [_CONTEXT, ctypes.c_int32, ctypes.c_uint32]),
    # int32_t llama_kvc_taps_get(struct llama_context * ctx, uint32_t ikv, int32_t what, float * dst, size_t n);
    "llama_kvc_taps_get": (
        ctypes.c_int32,
        [_CONTEXT, ctypes.c_uint32, ctypes.c_int32, c_float_p, ctypes.c_size_t],
    ),
    # int32_t llama_kvc_taps_end(struct llama_context * ctx);
    "llama_kvc_taps_end": (ctypes.c_int32, [_CONTEXT]),
    # int32_t llama_kvc_set_bias(struct llama_context * ctx, uint32_t ikv, const float * bias, uint32_t n_rows);
    "llama_kvc_set_bias": (ctypes.c_int32, [_CONTEXT, ctypes.c_uint32, c_float_p, ctypes.c_uint32]),
    # int32_t llama_kvc_rope(struct llama_context * ctx, uint32_t ikv, float * rows, uint32_t n_rows, const int32_t * pos, int32_t inverse);
    "llama_kvc_rope": (
        ctypes.c_int32,
        [_CONTEXT, ctypes.c_uint32, c_float_p, ctypes.c_uint32, c_int32_p, ctypes.c_int32],
    ),
    # int32_t llama_kvc_compose(struct llama_context * ctx, uint32_t n_tokens, uint32_t n_tail, uint32_t n_layer,
    #         const uint32_t * n_kept, const int32_t * rows, size_t n_rows_total, uint32_t n_room, llama_kvc_gather_t gather);
    "llama_kvc_compose": (
        ctypes.c_int32,
        [
            _CONTEXT,
            ctypes.c_uint32,
            ctypes.c_uint32,
            ctypes.c_uint32,
            c_uint32_p,
            c_int32_p,
            ctypes.c_size_t,
            ctypes.c_uint32,
            ctypes.c_void_p,
        ],
    ),
}

# enum ggml_backend_dev_type (ggml-backend.h)
DEVICE_TYPE = {0: "CPU", 1: "GPU", 2: "IGPU", 3: "ACCEL"}

_DEVICE = ctypes.c_void_p
c_size_t_p = ctypes.POINTER(ctypes.c_size_t)

_DEVICE_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    # size_t ggml_backend_dev_count(void);
    "ggml_backend_dev_count": (ctypes.c_size_t, []),
    # ggml_backend_dev_t ggml_backend_dev_get(size_t index);
    "ggml_backend_dev_get": (_DEVICE, [ctypes.c_size_t]),
    # const char * ggml_backend_dev_name(ggml_backend_dev_t device);
    "ggml_backend_dev_name": (ctypes.c_char_p, [_DEVICE]),
    # const char * ggml_backend_dev_description(ggml_backend_dev_t device);
    "ggml_backend_dev_description": (ctypes.c_char_p, [_DEVICE]),
    # enum ggml_backend_dev_type ggml_backend_dev_type(ggml_backend_dev_t device);
    "ggml_backend_dev_type": (ctypes.c_int, [_DEVICE]),
    # void ggml_backend_dev_memory(ggml_backend_dev_t device, size_t * free, size_t * total);
    "ggml_backend_dev_memory": (None, [_DEVICE, c_size_t_p, c_size_t_p]),
}

_REGISTRY = ctypes.c_void_p

_BACKEND_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    # void ggml_backend_load_all_from_path(const char * dir_path);
    "ggml_backend_load_all_from_path": (None, [ctypes.c_char_p]),
    # void ggml_backend_register(ggml_backend_reg_t reg);
    "ggml_backend_register": (None, [_REGISTRY]),
    # ggml_backend_reg_t ggml_backend_reg_by_name(const char * name);
    "ggml_backend_reg_by_name": (_REGISTRY, [ctypes.c_char_p]),
    # void * ggml_backend_reg_get_proc_address(ggml_backend_reg_t reg, const char * name);
    "ggml_backend_reg_get_proc_address": (ctypes.c_void_p, [_REGISTRY, ctypes.c_char_p]),
    # ggml_backend_dev_t ggml_backend_dev_by_type(enum ggml_backend_dev_type type);
    "ggml_backend_dev_by_type": (_DEVICE, [ctypes.c_int]),
}


def declare(lib: ctypes.CDLL) -> ctypes.CDLL:
    """Sets the C types of every llama_kvc_* function of ``lib``; returns ``lib``."""
    return _declare(lib, _FUNCTIONS)


def declare_devices(lib: ctypes.CDLL) -> ctypes.CDLL:
    """Sets the C types of ggml's functions about devices; returns ``lib``."""
    return _declare(lib, _DEVICE_FUNCTIONS)


def declare_backends(lib: ctypes.CDLL) -> ctypes.CDLL:
    """Sets the C types of ggml's functions that load and find backends; returns ``lib``."""
    return _declare(lib, _BACKEND_FUNCTIONS)


def _declare(lib: ctypes.CDLL, functions: dict[str, tuple[Any, list[Any]]]) -> ctypes.CDLL:
    for name, (restype, argtypes) in functions.items():
        function = getattr(lib, name)
        function.restype = restype
        function.argtypes = argtypes
    return lib
