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
from . import bindings, library
from .devices import CPU


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
    lib = _library()
    # ggml_backend_reg_t ggml_backend_rpc_add_server(const char * endpoint);
    add_server = _function(lib, "ggml_backend_rpc_add_server", ctypes.c_void_p, [ctypes.c_char_p])
    try:  # ggml ends the process when it cannot connect
        socket.create_connection((host, int(port)), timeout).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(f"endpoint={endpoint!r}: no answer, is kvcompose rpc-server running? ({error})") from error
    registry = add_server(endpoint.encode())
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
    # void ggml_backend_rpc_start_server(const char * endpoint, const char * cache_dir, size_t n_threads,
    #         size_t n_devices, ggml_backend_dev_t * devices);
    start_server = _function(
        lib, "ggml_backend_rpc_start_server", None,
        [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.POINTER(ctypes.c_void_p)],
    )  # fmt: skip
    try:  # ggml only prints an error if it cannot listen
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except (OSError, OverflowError) as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {error}") from error
    devices = (ctypes.c_void_p * 1)(lib.ggml_backend_dev_by_type(CPU))
    start_server(f"{host}:{port}".encode(), None, n_threads, 1, devices)


def _function(lib: Any, name: str, restype: Any, argtypes: list[Any]) -> Any:
    """Returns a function of the RPC backend, which may be a library of its own."""
    registry = lib.ggml_backend_reg_by_name(b"RPC")
    address = lib.ggml_backend_reg_get_proc_address(registry, name.encode()) if registry else None
    if not address:
        raise LibraryError("the library was built without RPC: build it with -DGGML_RPC=ON")
    return ctypes.CFUNCTYPE(restype, *argtypes)(address)


def _library() -> Any:
    return bindings.declare_backends(library.load().llama_cpp._lib)
