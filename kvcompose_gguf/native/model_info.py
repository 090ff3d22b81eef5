"""What llama.cpp knows about a ``llama_model``."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

from . import library


@dataclass(frozen=True)
class ModelInfo:
    """Facts about a model.

    Attributes:
        vocab_type: ``llama_vocab_type``.
        n_params: number of parameters.
        n_bytes: bytes of all tensors.
        description: architecture, size and type of the weights, e.g. ``llama 1B Q4_K - Medium``.
    """

    vocab_type: int
    n_params: int
    n_bytes: int
    description: str


def model_info(model: Any) -> ModelInfo:
    """Returns the facts about a model."""
    llama_cpp = library.load()
    text = ctypes.create_string_buffer(1024)
    llama_cpp.llama_model_desc(model, text, len(text))
    return ModelInfo(
        vocab_type=int(llama_cpp.llama_vocab_type(llama_cpp.llama_model_get_vocab(model))),
        n_params=int(llama_cpp.llama_model_n_params(model)),
        n_bytes=int(llama_cpp.llama_model_size(model)),
        description=text.value.decode("utf-8"),
    )


def infill_token(model: Any, name: str) -> int | None:
    """Returns a token for infill: ``pre``, ``suf``, ``mid``, ``pad``, ``rep`` or ``sep``. None: the model has none."""
    llama_cpp = library.load()
    token = int(getattr(llama_cpp, f"llama_vocab_fim_{name}")(llama_cpp.llama_model_get_vocab(model)))
    return token if token >= 0 else None
