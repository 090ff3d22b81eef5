"""``kvcompose serve``."""

from __future__ import annotations

from pathlib import Path

import uvicorn
from rich.console import Console

from ..errors import ConfigError
from ..run import n_ctx_trained, open_vocabulary
from .app import create_app
from .engine import Engine
from .options import ServeOptions

#: cells of a cache come in so many
N_PAD = 256


def make_engine(options: ServeOptions) -> Engine:
    """The model's slots, each with its share of ``n_ctx``, as llama-server divides it."""
    with open_vocabulary(options.model_path) as vocabulary:
        n_ctx = options.n_ctx or n_ctx_trained(vocabulary)
    n_slot = -(-max(1, n_ctx // options.n_parallel) // N_PAD) * N_PAD
    threads = {} if options.threads is None else {"n_threads": options.threads, "n_threads_batch": options.threads}
    return Engine(
        options.model_path, options.n_parallel, options.n_queue, options.kv_budget, n_ctx=n_slot,
        n_batch=options.n_batch,
        flash_attn=options.flash_attn, type_k=options.type_k, type_v=options.type_v, verbose=False,
        kv_compressor=options.method, embeddings=options.embeddings, pooling=options.pooling, **threads,
    )  # fmt: skip


def read_keys(keys: str, file: Path | None) -> tuple[str, ...]:
    """Keys of a text with commas between, and of a file's lines.

    Raises:
        ConfigError: the file cannot be read, or has no key.
    """
    found = [key.strip() for key in keys.split(",")]
    if file is not None:
        try:
            lines = [line.strip() for line in file.read_text("utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"api_key_file={str(file)!r} cannot be read: {error}") from error
        if not any(lines):
            raise ConfigError(f"api_key_file={str(file)!r} has no key")
        found += lines
    return tuple(key for key in found if key)


def serve(options: ServeOptions, host: str, port: int) -> None:
    """Answer requests until the process is told to end."""
    console = Console(stderr=True)
    console.print(f"[bold]{options.model_name}[/] at http://{host}:{port}, {options.n_parallel} slots", highlight=False)
    app = create_app(options, lambda: make_engine(options))
    uvicorn.run(app, host=host, port=port, log_level="warning", timeout_graceful_shutdown=3)
