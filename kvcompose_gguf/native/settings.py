"""Names the settings and versions that the stored rows of a context depend on."""

from __future__ import annotations

from typing import Any

from . import bindings, library

#: context options that change the rotation of the keys
_ROPE_SETTINGS = (
    "rope_scaling_type", "rope_freq_base", "rope_freq_scale", "yarn_ext_factor", "yarn_attn_factor", "yarn_beta_fast",
    "yarn_beta_slow", "yarn_orig_ctx",
)  # fmt: skip


def stored_as(params: Any, **more: Any) -> dict[str, Any]:
    """Returns the context options that change the stored rows, by their names in ``Llama(...)``.

    Args:
        params: the bindings' ``llama_context_params``.
        **more: further options that change the rows.
    """
    from gguf import GGMLQuantizationType as Kinds

    return {
        "type_k": Kinds(params.type_k).name.lower(),
        "type_v": Kinds(params.type_v).name.lower(),
        "flash_attn": params.flash_attn_type == library.load().LLAMA_FLASH_ATTN_TYPE_ENABLED,
        "swa_full": bool(params.swa_full),
        **more,
        **{name: getattr(params, name) for name in _ROPE_SETTINGS},
    }


def versions() -> dict[str, str]:
    """Returns the versions of the native library and the bindings."""
    llama_cpp = library.load()
    return {
        "llama.cpp": bindings.declare(llama_cpp.llama_cpp._lib).llama_kvc_commit().decode(),
        "llama-cpp-python": llama_cpp.__version__,
    }
