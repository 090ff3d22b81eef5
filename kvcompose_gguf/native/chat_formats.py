"""Chat formats that llama.cpp has by name."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from . import library


def names() -> list[str]:
    """Returns the names of all formats."""
    llama_cpp = library.load()
    found = (ctypes.c_char_p * llama_cpp.llama_chat_builtin_templates(None, 0))()
    llama_cpp.llama_chat_builtin_templates(found, len(found))
    return [(name or b"").decode() for name in found]


def render(name: str, messages: Sequence[tuple[str, str]], add_generation_prompt: bool) -> str | None:
    """Returns the prompt for messages in a format (llama_chat_apply_template). None: llama.cpp cannot apply it.

    Args:
        messages: pairs of a role and a text.
        add_generation_prompt: end with the beginning of the assistant's message.
    """
    llama_cpp = library.load()
    pairs = [tuple(text.encode("utf-8", "replace") for text in message) for message in messages]
    chat = (llama_cpp.llama_chat_message * len(pairs))(*pairs)
    arguments = (name.encode(), chat, len(pairs), add_generation_prompt)
    size = llama_cpp.llama_chat_apply_template(*arguments, None, 0)
    if size < 0:
        return None
    buffer = ctypes.create_string_buffer(size)
    llama_cpp.llama_chat_apply_template(*arguments, buffer, size)
    return buffer.raw[:size].decode("utf-8", "replace")
