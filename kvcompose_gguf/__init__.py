"""Runs long-context GGUF models in a fraction of the KV cache's memory.

>>> from kvcompose_gguf import Llama, KVCompose
>>> llm = Llama(model_path="model.gguf", n_ctx=8192, kv_compressor=KVCompose(compression_ratio=0.75))

Importing the package loads nothing; the first use of ``Llama`` loads the native library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import moved
from .errors import (
    ConfigError,
    ContextLengthError,
    DownloadError,
    KVComposeError,
    LibraryError,
    NativeError,
    StateError,
    UnsupportedError,
)
from .plan.composition import CompositionPlan
from .plan.report import KVReport
from .sessions import SessionInfo
from .support.progress import Progress

if TYPE_CHECKING:
    from .llama import Llama
    from .methods.kvcompose import KVCompose
    from .native.rpc import add_rpc_server

__version__ = "0.1.0"

__all__ = [
    "CompositionPlan",
    "ConfigError",
    "ContextLengthError",
    "DownloadError",
    "KVCompose",
    "KVComposeError",
    "KVReport",
    "LibraryError",
    "Llama",
    "NativeError",
    "Progress",
    "SessionInfo",
    "StateError",
    "UnsupportedError",
    "add_rpc_server",
]

moved.register()


def __getattr__(name: str) -> Any:
    if name == "Llama":
        from .llama import Llama

        return Llama
    if name == "KVCompose":
        from .methods.kvcompose import KVCompose

        return KVCompose
    if name == "add_rpc_server":
        from .native.rpc import add_rpc_server

        return add_rpc_server
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
