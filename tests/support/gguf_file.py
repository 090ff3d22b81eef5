"""Writes GGUF files with a token for every byte."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

#: <unk>, <s>, </s> and a token for every byte
N_VOCAB = 3 + 256


def write_file(path: Path, arch: str, metadata: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Path:
    """Writes a model; returns ``path``. Keys are without the architecture's name; those of ``xielu`` never have it."""
    writer, kinds = gguf.GGUFWriter(path, arch), gguf.TokenType
    for key, value in metadata.items():
        _add(writer, key if key.startswith("xielu.") else f"{arch}.{key}", value)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))])
    writer.add_token_scores([0.0] * N_VOCAB)
    writer.add_token_types([kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL, *[kinds.BYTE] * 256])
    writer.add_add_space_prefix(False)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_uint32(key, value)
