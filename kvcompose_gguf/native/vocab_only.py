"""Opens the vocabulary of a model without its weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from . import library


@contextlib.contextmanager
def open_vocabulary(model_path: Path) -> Iterator[Any]:
    """Yields the bindings' ``LlamaModel`` with the vocabulary and metadata only; reads no weights.

    Raises:
        ConfigError: llama.cpp cannot load the file.
    """
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
    """Returns the context length, in tokens, that a model was trained for; 0: its file does not say."""
    # n_ctx_train() is 0 without the weights: llama-model.cpp, load_hparams, returns before it
    metadata = vocabulary.metadata()
    return int(metadata.get(f"{metadata.get('general.architecture')}.context_length", 0))
