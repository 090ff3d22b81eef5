"""Saves slots as session files (``kvcompose_gguf.sessions``), with what the server knows about a slot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ... import sessions
from ...errors import StateError
from .slot_llama import SlotLlama


@dataclass(frozen=True)
class Saved:
    """What was written or read: tokens of the conversation, those of a compressed context included, and bytes."""

    n_tokens: int
    n_bytes: int


@dataclass(frozen=True)
class SlotFile:
    """Facts about the file of a slot.

    Attributes:
        context: tokens of the compressed context. Empty: the cache is a full one.
        composed_by: the method that compressed it (``choice_of``).
        is_document: whether /kv/compress made it.
        n_tokens: tokens of the whole conversation, including the context.
        n_bytes: bytes of the file.
        about: what else was saved with it.
    """

    context: tuple[int, ...]
    composed_by: str
    is_document: bool
    n_tokens: int
    n_bytes: int
    about: Mapping[str, Any] = field(default_factory=dict)


def save(llama: SlotLlama, file: Path, max_bytes: int | None = None, about: Mapping[str, Any] | None = None) -> Saved:
    """Write a slot's tokens and cache, readable by this user only. The file appears when it is complete.

    Args:
        about: further values to save with it.
    Raises:
        StateError: the file cannot be written, or would have more than ``max_bytes``.
    """
    with _told("save"):
        info = llama.save_slot(file, max_bytes, about or {})
    return Saved(info.n_tokens, info.n_bytes)


def restore(llama: SlotLlama, file: Path) -> Saved:
    """Restore what ``save`` wrote.

    Raises:
        StateError: the file is missing, damaged, of another model or setting, or too long for the slot, and the slot's
            cache is unchanged. Or llama.cpp refused the state, and the slot is empty.
    """
    with _told("restore"):
        info = llama.load_slot(file)
    return Saved(info.n_tokens, info.n_bytes)


def describe(llama: SlotLlama, file: Path) -> SlotFile:
    """Returns the facts about a file, after all of it was checked.

    Raises:
        StateError: as ``restore``.
    """
    with _told("restore"), sessions.opened(file, file.name) as (saved, info):
        llama.identity.check_loads(saved.identity, file.name)
        composed = saved.contents.composed
        return SlotFile(
            context=() if composed is None else tuple(composed.tokens.tolist()), composed_by=info.method,
            is_document=info.extra.get("is_document") is True, n_tokens=info.n_tokens, n_bytes=info.n_bytes,
            about=info.extra,
        )  # fmt: skip


def n_tokens_of(file: Path) -> int:
    """Returns the number of tokens in a saved conversation, from the file's header alone.

    Raises:
        StateError: it cannot be read.
    """
    with _told("restore"):
        return sessions.describe(file, check=False, name=file.name).n_tokens


@contextmanager
def _told(action: str) -> Iterator[None]:
    """Errors raised inside of the ``with`` begin like llama-server's."""
    try:
        yield
    except StateError as error:
        raise StateError(f"Unable to {action} slot: {error}") from error
