"""Loads models for the commands."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import kernels
from .errors import ConfigError
from .methods import Method

if TYPE_CHECKING:
    from .llama import Llama


def load_model(
    model_path: Path,
    n_ctx: int,
    method: Method | None = None,
    *,
    fast_attention: bool = False,
    flash_attn: bool = True,
    threads: int | None = None,
    **options: Any,
) -> Llama:
    """Returns a ``Llama`` that prints nothing.

    Args:
        method: compresses prompts; None: the caller observes and composes by itself, or compresses nothing.
        fast_attention: use the package's own kernel for flash attention; a ``method`` turns it on itself.
        threads: None: llama-cpp-python's default.
        **options: further options of ``Llama``.
    Raises:
        ConfigError: llama.cpp cannot load the file.
        UnsupportedError: the model or its cache cannot be compressed, and ``method`` or ``fast_attention`` is given.
    """
    from .llama import Llama

    if threads is not None:
        options |= {"n_threads": threads, "n_threads_batch": threads}
    try:
        llama = Llama(
            str(model_path), n_ctx=n_ctx, flash_attn=flash_attn, kv_compressor=method, verbose=False, **options
        )
    except ConfigError:
        raise
    except ValueError as error:  # the bindings' only exception for a file or a context that llama.cpp refused
        raise ConfigError(f"{model_path} cannot be used: {error}") from error
    if fast_attention:
        try:
            llama.context.set_fast_attention(True)
            kernels.warm_up()
        except Exception:
            llama.close()
            raise
    return llama
