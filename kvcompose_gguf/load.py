"""Loads models for the commands."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ConfigError
from .methods import Method, make_method

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
        fast_attention: without a ``method``, decode with the kernels that a compressing Llama uses.
        threads: None: llama-cpp-python's default.
        **options: further options of ``Llama``.
    Raises:
        ConfigError: llama.cpp cannot load the file.
    """
    from .llama import Llama

    if method is None and fast_attention:
        # any method switches the kernels on, and this one reads no measurements; no prompt is as long as min_tokens
        method = make_method("kvcompose,scoring=repeat", compression_ratio=0.0, min_tokens=1 << 31)
    if threads is not None:
        options |= {"n_threads": threads, "n_threads_batch": threads}
    try:
        return Llama(
            str(model_path), n_ctx=n_ctx, flash_attn=flash_attn, kv_compressor=method, verbose=False, **options
        )
    except ConfigError:
        raise
    except ValueError as error:  # the bindings' only exception for a file or a context that llama.cpp refused
        raise ConfigError(f"{model_path} cannot be used: {error}") from error
