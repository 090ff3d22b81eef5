"""Compressed contexts in files, which prompts that begin with them continue."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from ...errors import StateError
from ...methods import Method
from ...methods.continuing import choice_of, is_read_again
from .saved import SlotFile, describe
from .slot_llama import SlotLlama

log = logging.getLogger(__name__)


class Asked(Protocol):
    """A prompt and how to read it."""

    @property
    def tokens(self) -> Sequence[int]:
        """The prompt's tokens."""

    @property
    def method(self) -> Method | None:
        """The method that compresses the prompt."""

    @property
    def reuse(self) -> bool:
        """Whether a saved context may be used."""


class Shelf:
    """Saved contexts of one model.

    Args:
        folder: folder for the files of all models. Files of the same model in it are used again.
        llama: a ``Llama`` of the model, only used during this call.
    """

    def __init__(self, folder: Path, llama: SlotLlama) -> None:
        self._folder = folder / llama.identity.key
        self._lock = threading.Lock()
        self._entries: OrderedDict[Path, SlotFile] = OrderedDict()  # least recently used first
        for file in sorted(self._folder.glob("*.kvc"), key=lambda file: file.stat().st_mtime):
            try:
                self._entries[file] = describe(llama, file)
            except StateError as error:
                log.warning("%s: %s", file, error)
                file.unlink(missing_ok=True)

    def file(self, name: str) -> Path:
        """Returns the file of a context with a name."""
        return self._folder / f"{name}.kvc"

    def entries(self) -> list[SlotFile]:
        """Returns the contexts, the least recently used first."""
        with self._lock:
            return list(self._entries.values())

    def put(self, file: Path, entry: SlotFile) -> None:
        """Remember a file that was written."""
        with self._lock:
            self._entries.pop(file, None)
            self._entries[file] = entry

    def touch(self, file: Path, n_tokens: int) -> bool:
        """Returns whether a file has so many tokens; it is the most recently used one then."""
        with self._lock:
            if file not in self._entries or self._entries[file].n_tokens != n_tokens:
                return False
            self._entries.move_to_end(file)
            return True

    def trim(self, max_bytes: int) -> None:
        """Delete the least recently used files until all together have at most ``max_bytes``."""
        with self._lock:
            while sum(entry.n_bytes for entry in self._entries.values()) > max_bytes:
                oldest, _ = self._entries.popitem(last=False)
                oldest.unlink(missing_ok=True)

    def make_folder(self) -> None:
        """Make the folder, readable by this user only, if it is missing."""
        for private in (self._folder.parent, self._folder):
            private.mkdir(mode=0o700, parents=True, exist_ok=True)

    @property
    def n_bytes(self) -> int:
        """Bytes of all files of this model."""
        with self._lock:
            return sum(entry.n_bytes for entry in self._entries.values())

    def find(self, llama: SlotLlama, asked: Asked, n_most: int | None = None) -> tuple[Path, SlotFile] | None:
        """Returns the longest saved context that a prompt can continue.

        Args:
            n_most: maximum tokens to restore. None: as many as fit into the slot.
        """
        choice, n_tokens = choice_of(asked.method), len(asked.tokens)
        most = llama.n_ctx() - 1 if n_most is None else n_most

        def suits(entry: SlotFile) -> bool:
            n_context = len(entry.context)
            return (
                entry.composed_by == choice and entry.n_tokens <= most and n_context < n_tokens
                and (entry.is_document or not is_read_again(n_tokens, n_context, asked.method))
                and llama.begins(asked.tokens, entry.context)
            )  # fmt: skip

        with self._lock:
            entries = list(self._entries.items()) if asked.reuse else []
        return max((pair for pair in entries if suits(pair[1])), key=lambda pair: len(pair[1].context), default=None)

    def drop(self, file: Path) -> None:
        """Deletes a file, if it is there."""
        with self._lock:
            self._entries.pop(file, None)
        file.unlink(missing_ok=True)
