"""Opens the vocabulary of a model without its weights."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..models.identity import model_id
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


#: metadata that files of one model share, whatever their quantization; parts of the name without the architecture
FAMILY = (
    "general.architecture", "general.name", "general.basename", "general.finetune", "general.version",
    "general.size_label", "tokenizer.ggml.model", "tokenizer.ggml.pre",
)  # fmt: skip
FAMILY_OF_ARCHITECTURE = (
    "block_count", "embedding_length", "feed_forward_length", "attention.head_count", "attention.head_count_kv",
    "attention.key_length", "attention.value_length", "attention.sliding_window", "vocab_size", "rope.dimension_count",
    "rope.freq_base", "rope.scaling.type", "rope.scaling.factor",
)  # fmt: skip


def family_of(model_path: Path) -> str:
    """Returns a model's name and a hash of its name, shapes, RoPE and tokenizer: the same for all its quantizations.

    A model without a name has one for each file.

    Raises:
        ConfigError: llama.cpp cannot load the file.
    """
    with open_vocabulary(model_path) as vocabulary:
        metadata = vocabulary.metadata()
        architecture = metadata.get("general.architecture")
        names = [*FAMILY, *(f"{architecture}.{name}" for name in FAMILY_OF_ARCHITECTURE)]
        facts = {name: metadata[name] for name in names if name in metadata} | {"n_vocab": vocabulary.n_vocab()}
    if "general.name" not in facts:  # other models may have the same shapes
        facts["file"] = model_id(model_path)
    name = re.sub(r"[^\w.]+", "-", facts.get("general.name", model_path.stem), flags=re.ASCII).strip("-.")[:60]
    return f"{name}-{hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]}"


def n_ctx_trained(vocabulary: Any) -> int:
    """Returns the context length, in tokens, that a model was trained for; 0: its file does not say."""
    # n_ctx_train() is 0 without the weights: llama-model.cpp, load_hparams, returns before it
    metadata = vocabulary.metadata()
    return int(metadata.get(f"{metadata.get('general.architecture')}.context_length", 0))
