"""Models for the commands: find the file, load it, open its vocabulary."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ConfigError
from .methods import Method
from .models import hub, known

if TYPE_CHECKING:
    from .llama import Llama


def load_model(
    model_path: Path,
    n_ctx: int,
    method: Method | None,
    *,
    flash_attn: bool = True,
    threads: int | None = None,
    **options: Any,
) -> Llama:
    """A quiet ``Llama`` with more ``options`` of its own; ``threads=None`` leaves their number to llama-cpp-python.

    Raises:
        ConfigError: llama.cpp cannot load the file.
    """
    from .llama import Llama

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


def resolve_model(model: str) -> Path:
    """The path of a model; a model that is not on this machine is downloaded.

    Args:
        model: path of a .gguf file, a name that ``models.fetch`` knows, or ``hf://USER/REPO[:QUANT]``.
    Raises:
        ConfigError: there is no such file or name.
        DownloadError: the model could not be downloaded.
    """
    if model.startswith(hub.PREFIX):
        return hub.fetch_hub(model)
    if Path(model).is_file():
        return Path(model)
    if model in known.names():
        return known.fetch(model)
    raise ConfigError(
        f"model={model!r} is neither a file nor one of {', '.join(known.names())}: "
        "check the path, or load it from the Hugging Face hub with -hf USER/REPO"
    )


@contextlib.contextmanager
def open_vocabulary(model_path: Path) -> Iterator[Any]:
    """The bindings' ``LlamaModel`` with the vocabulary and metadata alone: its weights are not read.

    Raises:
        ConfigError: llama.cpp cannot load the file.
    """
    from .native import library

    llama_cpp = library.load()
    params = llama_cpp.llama_model_default_params()
    params.vocab_only = True
    try:
        vocabulary = llama_cpp._internals.LlamaModel(path_model=str(model_path), params=params, verbose=False)
    except ValueError as error:
        raise ConfigError(f"{model_path} cannot be used: {error}") from error
    with contextlib.closing(vocabulary):
        yield vocabulary


def n_ctx_trained(vocabulary: Any) -> int:
    """Tokens that the model of an opened vocabulary was made for, 0 if its file does not say."""
    # n_ctx_train() is 0 without the weights: llama-model.cpp, load_hparams, returns before it
    metadata = vocabulary.metadata()
    return int(metadata.get(f"{metadata.get('general.architecture')}.context_length", 0))
