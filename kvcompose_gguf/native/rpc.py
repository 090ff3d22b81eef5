"""llama.cpp's RPC backend: runs layers of a model, and their part of the KV cache, in other processes or machines.

Each machine runs ``kvcompose rpc-server``. The machine with the model calls :func:`add_rpc_server` for each of them and
loads the model with ``n_gpu_layers=-1``, or with a smaller number to keep the other layers. The protocol is llama.cpp's
and has no authentication or encryption, so use it only in trusted networks.
"""

from __future__ import annotations

import ctypes
import socket
from typing import Any

from ..errors import ConfigError, LibraryError
from . import library

_DEVICE_TYPE_CPU = 0  # enum ggml_backend_dev_type


def add_rpc_server(endpoint: str, timeout: float = 5.0) -> None:
    """Adds a server's devices to every model that is loaded from now on with ``n_gpu_layers`` != 0.

    Args:
        endpoint: ``"host:port"``.
        timeout: seconds to wait for an answer.
    Raises:
        ConfigError: no server listens there.
        LibraryError: the library was built without RPC.
    """
    host, separator, port = endpoint.rpartition(":")
    if not separator or not host or not port.isdigit():
        raise ConfigError(f"endpoint={endpoint!r} is not host:port")
    try:  # ggml ends the process when it cannot connect
        socket.create_connection((host, int(port)), timeout).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(f"endpoint={endpoint!r}: no answer, is kvcompose rpc-server running? ({error})") from error
    lib = _library()
    registry = lib.ggml_backend_rpc_add_server(endpoint.encode())
    if not registry:
        raise ConfigError(f"endpoint={endpoint!r} is not an RPC server of this version")
    lib.ggml_backend_register(registry)


def serve(host: str, port: int, n_threads: int) -> None:
    """Offers this machine's CPU to other processes; returns when the server is stopped.

    Raises:
        ConfigError: the address is taken, or does not belong to this machine.
        LibraryError: the library was built without RPC.
    """
    lib = _library()
    try:  # ggml only prints an error if it cannot listen
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except (OSError, OverflowError) as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {error}") from error
    devices = (ctypes.c_void_p * 1)(lib.ggml_backend_dev_by_type(_DEVICE_TYPE_CPU))
    lib.ggml_backend_rpc_start_server(f"{host}:{port}".encode(), None, n_threads, 1, devices)


def _library() -> Any:
    lib = library.load().llama_cpp._lib
    if not library.load().llama_supports_rpc():
        raise LibraryError("the library was built without RPC: build it with -DGGML_RPC=ON")
    # ggml_backend_reg_t ggml_backend_rpc_add_server(const char * endpoint);
    lib.ggml_backend_rpc_add_server.restype = ctypes.c_void_p
    lib.ggml_backend_rpc_add_server.argtypes = [ctypes.c_char_p]
    # void ggml_backend_register(ggml_backend_reg_t reg);
    lib.ggml_backend_register.restype = None
    lib.ggml_backend_register.argtypes = [ctypes.c_void_p]
    # ggml_backend_dev_t ggml_backend_dev_by_type(enum ggml_backend_dev_type type);
    lib.ggml_backend_dev_by_type.restype = ctypes.c_void_p
    lib.ggml_backend_dev_by_type.argtypes = [ctypes.c_int]
    # void ggml_backend_rpc_start_server(const char * endpoint, const char * cache_dir, size_t n_threads,
    #         size_t n_devices, ggml_backend_dev_t * devices);
    lib.ggml_backend_rpc_start_server.restype = None
    lib.ggml_backend_rpc_start_server.argtypes = [
        ctypes.c_char_p,
        ctypes.c_char_p,
        ctypes.c_size_t,
        ctypes.c_size_t,
        ctypes.POINTER(ctypes.c_void_p),
    ]
    return lib
