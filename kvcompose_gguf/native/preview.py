"""What the caches of a model will be, from its file's header alone: llama.cpp simulates them, and reads no weights."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import ConfigError, UnsupportedError
from ..plan.geometry import LayerGeometry
from ..support.loggers import silenced
from . import library
from .log import LOGGER
from .session import KVSession

#: ``LLAMA_LOAD_MODE_NONE``: a file that is mapped cannot be loaded without its weights
_LOAD_MODE_NONE = 0


@dataclass(frozen=True)
class Preview:
    """A model, and the caches that it will have.

    Attributes:
        architecture: as its file says.
        n_layer: number of its layers.
        n_ctx_train: tokens that it was trained for.
        layers: the layers that compression covers, with rows of f16.
        recurrent: whether there are also recurrent layers.
        windows: whether there are also layers with a sliding window.
        refused: why it cannot be compressed; empty: it can.
    """

    architecture: str
    n_layer: int
    n_ctx_train: int
    layers: tuple[LayerGeometry, ...] = ()
    recurrent: bool = False
    windows: bool = False
    refused: str = ""

    @property
    def n_bytes_token(self) -> int:
        """Bytes of a token in the layers that compression covers."""
        return sum(layer.n_bytes_row for layer in self.layers)


def preview(path: Path) -> Preview:
    """Returns what is known of a model's caches before it is loaded.

    Raises:
        ConfigError: llama.cpp cannot load the file.
    """
    llama_cpp = library.load()
    with silenced(LOGGER), _model(llama_cpp, path) as model, _context(llama_cpp, model, path) as context:
        bare = Preview(
            _metadata(llama_cpp, model, "general.architecture"), llama_cpp.llama_model_n_layer(model),
            llama_cpp.llama_model_n_ctx_train(model),
        )  # fmt: skip
        try:
            session = KVSession(context)
        except UnsupportedError as error:
            return replace(bare, refused=str(error))
        with contextlib.closing(session):
            state = session.state()
            return replace(bare, layers=session.layers, recurrent=state.recurrent, windows=state.n_cells_swa > 0)


@contextlib.contextmanager
def _model(llama_cpp: Any, path: Path) -> Iterator[Any]:
    params = llama_cpp.llama_model_default_params()
    params.no_alloc, params.load_mode, params.n_gpu_layers = True, _LOAD_MODE_NONE, 0
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        raise ConfigError(f"{path} cannot be used: it is no model that this llama.cpp knows, or it is damaged")
    try:
        yield model
    finally:
        llama_cpp.llama_model_free(model)


@contextlib.contextmanager
def _context(llama_cpp: Any, model: Any, path: Path) -> Iterator[Any]:
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = 256
    context = llama_cpp.llama_init_from_model(model, params)
    if not context:
        raise ConfigError(f"{path} cannot be used: llama.cpp makes no context of it")
    try:
        yield context
    finally:
        llama_cpp.llama_free(context)


def _metadata(llama_cpp: Any, model: Any, key: str) -> str:
    buffer = ctypes.create_string_buffer(256)
    llama_cpp.llama_model_meta_val_str(model, key.encode(), buffer, len(buffer))
    return bytes(buffer.value).decode()
