"""Keeps compressed contexts of evicted slots on disk, until a prompt begins with one of them."""

from __future__ import annotations

import hashlib
import logging
import struct
from collections.abc import Sequence
from pathlib import Path

from ...errors import StateError
from .saved import SlotFile, restore, save
from .shelf import Asked, Shelf
from .slot_llama import SlotLlama

log = logging.getLogger(__name__)


class IdleCaches(Shelf):
    """Saved contexts of evicted slots, for one model.

    Args:
        folder, llama: as for ``Shelf``.
        max_bytes: maximum bytes of all files of this model. The least recently used file is deleted first.
    """

    def __init__(self, folder: Path, max_bytes: int, llama: SlotLlama) -> None:
        super().__init__(folder, llama)
        self._max_bytes = max_bytes
        self.make_folder()
        self.trim(max_bytes)

    def keep(self, llama: SlotLlama) -> None:
        """Save a slot's compressed context if the file is missing or out of date. Failures are logged."""
        if not llama.n_context:
            return
        context, composed_by = llama.context_tokens, llama.composed_by
        digest = hashlib.sha256(struct.pack(f"<{len(context)}i", *context) + composed_by.encode())
        file = self.file(digest.hexdigest()[:32])
        if self.touch(file, llama.n_tokens):
            return
        try:
            saved = save(llama, file, self._max_bytes)
        except Exception as error:  # for example a full disk: only this context is lost
            log.warning("a context of %d tokens could not be saved: %s", len(context), error)
            return
        self.put(file, SlotFile(context, composed_by, llama.is_document, saved.n_tokens, saved.n_bytes))
        self.trim(self._max_bytes)


def exchange(
    llama: SlotLlama, asked: Asked, n_most: int | None, idle: IdleCaches | None, shelves: Sequence[Shelf]
) -> None:
    """Prepare a slot for a prompt: save the context that the prompt does not continue, restore one that it does.

    Args:
        n_most: maximum tokens to restore. None: as many as fit into the slot.
        idle: where contexts are saved. None: they are not.
        shelves: where contexts are looked for.
    """
    if idle is None and not any(shelf.n_bytes for shelf in shelves):
        return
    n_live = llama.continuation(asked.tokens, asked.method, asked.reuse).n_cached
    found = [(shelf, pair) for shelf in shelves if (pair := shelf.find(llama, asked, n_most)) is not None]
    best = max(found, key=lambda each: len(each[1][1].context), default=None)
    is_better = best is not None and len(best[1][1].context) > n_live
    if idle is not None and (is_better or n_live < llama.n_context):
        idle.keep(llama)
    if best is not None and is_better:
        shelf, (file, _) = best
        try:
            restore(llama, file)
        except StateError as error:
            log.warning("%s: %s", file, error)
            shelf.drop(file)
