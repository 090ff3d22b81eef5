"""Chat formats that llama.cpp has by name."""

from __future__ import annotations

import ctypes

from . import library


def names() -> list[str]:
    """Returns the names of all formats."""
    llama_cpp = library.load()
    found = (ctypes.c_char_p * llama_cpp.llama_chat_builtin_templates(None, 0))()
    llama_cpp.llama_chat_builtin_templates(found, len(found))
    return [(name or b"").decode() for name in found]
