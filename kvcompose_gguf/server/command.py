"""Runs ``kvcompose serve``: makes the engine, opens the sockets, serves requests."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import socket

import uvicorn
from rich.console import Console

from ..errors import ConfigError
from ..native.vocab_only import n_ctx_trained, open_vocabulary
from .app import create_app
from .options import ServeOptions
from .slots.engine import Engine
from .slots.stores import StoreOptions

log = logging.getLogger(__name__)

#: llama.cpp allocates cache cells in multiples of this
N_PAD = 256

#: folders inside of ``slot_save_path``, for idle contexts and for documents; slots cannot be saved in them, since file
#: names are no paths
IDLE, DOCUMENTS = "idle", "documents"


def make_engine(options: ServeOptions) -> Engine:
    """Returns an engine with the model's slots.

    Each slot has an equal share of ``n_ctx``, but not more tokens than the model was trained for, as in llama-server.
    """
    with open_vocabulary(options.model_path) as vocabulary:
        n_trained = n_ctx_trained(vocabulary)
    n_share = max(1, (options.n_ctx or n_trained) // options.n_parallel)
    if n_share > n_trained:
        log.warning("each slot would have %d tokens, but the model was trained for %d: capping", n_share, n_trained)
    n_slot = -(-min(n_share, n_trained) // N_PAD) * N_PAD
    threads_batch = options.threads_batch or options.threads
    chosen = {"n_threads": options.threads, "n_threads_batch": threads_batch, "n_ubatch": options.n_ubatch}
    folder = options.slot_save_path
    stores = StoreOptions(
        memory_bytes=options.memory_bytes, idle_path=folder and folder / IDLE, idle_bytes=options.idle_bytes,
        documents_path=folder and folder / DOCUMENTS, documents_bytes=options.documents_bytes,
    )  # fmt: skip
    return Engine(
        options.model_path, options.n_parallel, options.n_queue, options.kv_budget, options.timeout, stores,
        n_ctx=n_slot, n_batch=options.n_batch, n_gpu_layers=options.n_gpu_layers, flash_attn=options.flash_attn,
        type_k=options.type_k, type_v=options.type_v, verbose=False,
        kv_compressor=options.method, embeddings=options.embeddings, pooling=options.pooling,
        **{name: n for name, n in chosen.items() if n is not None},
    )  # fmt: skip


def serve(options: ServeOptions) -> None:
    """Serve requests until the process gets a signal to stop.

    Raises:
        ConfigError: an address or the port cannot be used.
        Exception: the model cannot be loaded.
    """
    failures: list[Exception] = []

    def on_failure(error: Exception) -> None:
        failures.append(error)
        server.should_exit = True

    with contextlib.ExitStack() as listening:
        names = [name.strip() for name in options.host.split(",")]
        sockets = [listening.enter_context(_listen(name, options.port)) for name in names]
        is_local = all(ipaddress.ip_address(listener.getsockname()[0]).is_loopback for listener in sockets)
        app = create_app(options, lambda: make_engine(options), on_failure, is_local)
        # h11 does not change the case of headers
        config = uvicorn.Config(app, http="h11", log_level="warning", server_header=False, timeout_graceful_shutdown=3)
        server = uvicorn.Server(config)
        ports = [listener.getsockname()[1] for listener in sockets]
        where = ", ".join(f"http://{name}:{port}" for name, port in zip(names, ports, strict=True))
        Console(stderr=True).print(
            f"[bold]{options.model_name}[/] at {where}, {options.n_parallel} slots", highlight=False, soft_wrap=True
        )
        server.run(sockets)
    if failures:
        raise failures[0]


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=512)  # type: ignore[arg-type]
    except OSError as error:
        raise ConfigError(f"nothing can listen on {host}:{port}: {error}") from error
