"""Keeps compressed contexts of evicted slots on disk, until a prompt begins with one of them."""

from __future__ import annotations

import hashlib
import logging
import struct
from pathlib import Path

from .saved import SlotFile, save
from .shelf import Shelf
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
        held = llama.held
        if not held.context:
            return
        digest = hashlib.sha256(struct.pack(f"<{len(held.context)}i", *held.context) + held.composed_by.encode())
        file = self.file(digest.hexdigest()[:32])
        if self.touch(file, llama.n_tokens):
            return
        try:
            saved = save(llama, file, self._max_bytes)
        except Exception as error:  # for example a full disk: only this context is lost
            log.warning("a context of %d tokens could not be saved: %s", len(held.context), error)
            return
        self.put(file, SlotFile(held.context, held.composed_by, held.is_document, saved.n_tokens, saved.n_bytes))
        self.trim(self._max_bytes)
