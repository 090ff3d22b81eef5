"""Slots on disk: session files (``kvcompose_gguf.sessions``) with what the server knows about a slot."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .. import sessions
from ..errors import StateError
from .slots import SlotLlama


@dataclass(frozen=True)
class Saved:
    """What was written or read: tokens of the conversation, those of a compressed context included, and bytes."""

    n_tokens: int
    n_bytes: int


@dataclass(frozen=True)
class SlotFile:
    """What a file of a slot says.

    Attributes:
        context: tokens of its compressed context; empty: its cache is a full one.
        composed_by: how that was compressed (``choice_of``).
        is_document: the context was compressed for itself.
        n_tokens: tokens of the conversation.
        n_bytes: size of the file.
    """

    context: tuple[int, ...]
    composed_by: str
    is_document: bool
    n_tokens: int
    n_bytes: int


def save(llama: SlotLlama, file: Path, max_bytes: int | None = None) -> Saved:
    """Write a slot's tokens and cache, for this user alone; the file is replaced when the new one is whole.

    Raises:
        StateError: the file cannot be written, or would have more than ``max_bytes``.
    """
    with _told("save"):
        info = llama.save_slot(file, max_bytes)
    return Saved(info.n_tokens, info.n_bytes)


def restore(llama: SlotLlama, file: Path) -> Saved:
    """Bring back what ``save`` wrote.

    Raises:
        StateError: there is no such file, it is damaged, of another model or setting, or too long for the slot; the
            slot keeps what it has.
    """
    with _told("restore"):
        info = llama.load_slot(file)
    return Saved(info.n_tokens, info.n_bytes)


def describe(llama: SlotLlama, file: Path) -> SlotFile:
    """Return what a file says, wholly checked.

    Raises:
        StateError: as ``restore``.
    """
    with _told("restore"), sessions.opened(file, file.name) as (saved, info):
        llama.identity.check_loads(saved.identity, file.name)
        composed = saved.composed
        return SlotFile(
            context=() if composed is None else composed.tokens, composed_by=info.method,
            is_document=info.extra.get("is_document") is True, n_tokens=info.n_tokens, n_bytes=info.n_bytes,
        )  # fmt: skip


def n_tokens_of(file: Path) -> int:
    """Return the tokens of a saved conversation, from the file's header alone.

    Raises:
        StateError: it cannot be read.
    """
    with _told("restore"):
        return sessions.describe(file, check=False, name=file.name).n_tokens


@contextmanager
def _told(action: str) -> Iterator[None]:
    """Errors inside of the ``with`` begin as llama-server's do."""
    try:
        yield
    except StateError as error:
        raise StateError(f"Unable to {action} slot: {error}") from error
