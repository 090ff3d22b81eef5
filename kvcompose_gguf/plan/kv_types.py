"""The types of cached keys and values, by llama.cpp's names."""

from __future__ import annotations

from ..errors import ConfigError

#: types that a KV cache can have
KV_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")

#: types that are not quantized; only they allow per-cell biases and writes
PLAIN_TYPES = ("f32", "f16", "bf16")


def ggml_type(option: str, name: str) -> int:
    """Returns the number of the ggml type ``name``, e.g. ``"q8_0"``, in any case.

    Args:
        option: where the name comes from, for the error.
    Raises:
        ConfigError: there is no such type.
    """
    from gguf import GGMLQuantizationType

    try:
        return int(GGMLQuantizationType[name.upper()])
    except KeyError as error:
        raise ConfigError(f"{option}={name!r} is not a ggml type; use for example f16 or q8_0") from error
