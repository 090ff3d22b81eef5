"""Where contexts are kept that no slot holds: in memory, on disk, and as documents."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from ...errors import StateError
from .documents import Documents
from .idle import IdleCaches
from .prompt_cache import PromptCache
from .saved import restore
from .shelf import Asked, Shelf
from .slot_llama import SlotLlama

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class StoreOptions:
    """What is kept, and where.

    Attributes:
        memory_bytes: maximum bytes of the copies in memory of what slots held. 0: there are none.
        idle_path: folder for the compressed contexts of evicted slots.
        idle_bytes: maximum bytes of all files in that folder. 0: evicted contexts are not saved.
        documents_path: folder for documents. None: a folder of the engine's own, for as long as it lives.
        documents_bytes: maximum bytes of all documents.
    """

    memory_bytes: int = 0
    idle_path: Path | None = None
    idle_bytes: int = 0
    documents_path: Path | None = None
    documents_bytes: int = 4 << 30


class Stores:
    """All places where contexts are kept.

    Args:
        llama: a ``Llama`` of the model, only used during this call.
    """

    def __init__(self, options: StoreOptions, llama: SlotLlama) -> None:
        self.memory = PromptCache(options.memory_bytes)
        self.idle: IdleCaches | None = None
        if options.idle_path is not None and options.idle_bytes:
            self.idle = IdleCaches(options.idle_path, options.idle_bytes, llama)
        self.documents = Documents(options.documents_path, options.documents_bytes, llama)
        self._shelves: list[Shelf] = [self.documents] if self.idle is None else [self.documents, self.idle]

    def close(self) -> None:
        """Delete what was only for the life of the engine."""
        self.documents.close()

    def n_kept(self, llama: SlotLlama, asked: Asked) -> int:
        """Returns how many tokens of a prompt a slot would have if it were filled from here."""
        return max(self._saved(llama, asked, None)[1], self.memory.find(llama, asked, llama.n_ctx() - 1)[1])

    def keep(self, llama: SlotLlama) -> None:
        """Keep what a slot holds, because it will be lost."""
        self.memory.keep(llama)
        if self.idle is not None:
            self.idle.keep(llama)

    def exchange(self, llama: SlotLlama, asked: Asked, n_most: int | None = None) -> None:
        """Prepare a slot for a prompt: keep what the prompt does not continue, and restore what it does.

        Args:
            n_most: maximum tokens to restore. None: as many as fit into the slot.
        """
        n_live = llama.continuation(asked.tokens, asked.method, asked.reuse).n_cached
        saved, n_saved = self._saved(llama, asked, n_most)
        copy, n_copied = self.memory.find(llama, asked, llama.n_ctx() - 1 if n_most is None else n_most)
        # of what a slot holds, the tokens behind a prompt's beginning are an answer, and mostly few
        if max(n_saved, n_copied) > n_live or n_live < max(llama.n_context, llama.n_tokens // 2):
            self.keep(llama)
        if copy is not None and n_copied > n_live and n_copied >= n_saved and self.memory.restore(llama, copy):
            return
        if saved is not None and n_saved > n_live:
            shelf, file = saved
            try:
                restore(llama, file)
            except StateError as error:
                log.warning("%s: %s", file, error)
                shelf.drop(file)

    def _saved(self, llama: SlotLlama, asked: Asked, n_most: int | None) -> tuple[tuple[Shelf, Path] | None, int]:
        """Returns the file with the longest context that a prompt begins with, its shelf, and the context's length."""
        found = [(shelf, pair) for shelf in self._shelves if (pair := shelf.find(llama, asked, n_most)) is not None]
        if not found:
            return None, 0
        shelf, (file, entry) = max(found, key=lambda each: len(each[1][1].context))
        return (shelf, file), len(entry.context)
