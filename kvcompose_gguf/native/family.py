"""Recognizes a model in all its quantizations."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

from ..models.identity import model_id
from .vocab_only import open_vocabulary

#: names of metadata that all quantizations of a model have alike
SHARED = (
    "general.architecture", "general.name", "general.basename", "general.finetune", "general.version",
    "general.size_label", "tokenizer.ggml.model", "tokenizer.ggml.pre",
)  # fmt: skip
#: the same, without the architecture's name before them
SHARED_OF_ARCHITECTURE = (
    "block_count", "embedding_length", "feed_forward_length", "attention.head_count", "attention.head_count_kv",
    "attention.key_length", "attention.value_length", "attention.sliding_window", "vocab_size", "rope.dimension_count",
    "rope.freq_base", "rope.scaling.type", "rope.scaling.factor",
)  # fmt: skip


def family_of(model_path: Path) -> str:
    """Returns a model's name and a hash of its name, shapes, RoPE and tokenizer: the same for all its quantizations.

    Files without a model's name have a family of their own.

    Raises:
        ConfigError: llama.cpp cannot load the file.
    """
    with open_vocabulary(model_path) as vocabulary:
        metadata = vocabulary.metadata()
        architecture = metadata.get("general.architecture")
        names = [*SHARED, *(f"{architecture}.{name}" for name in SHARED_OF_ARCHITECTURE)]
        facts = {name: metadata[name] for name in names if name in metadata} | {"n_vocab": vocabulary.n_vocab()}
    if "general.name" not in facts:  # other models may have the same shapes
        facts["file"] = model_id(model_path)
    name = re.sub(r"[^\w.]+", "-", facts.get("general.name", model_path.stem), flags=re.ASCII).strip("-.")[:60]
    return f"{name}-{hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]}"
