"""Types that llama.cpp's KV cache can have."""

from __future__ import annotations

from ..errors import ConfigError
from . import library

#: names of the types (kv_cache_types in common/arg.cpp)
KV_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")


def ggml_type(name: str) -> int:
    """Returns the ``ggml_type`` of a name in ``KV_TYPES``.

    Raises:
        ConfigError: the name is not one of them.
    """
    if name not in KV_TYPES:
        raise ConfigError(f"{name!r} is not a type of a KV cache, use one of {', '.join(KV_TYPES)}")
    return int(getattr(library.load(), f"GGML_TYPE_{name.upper()}"))
