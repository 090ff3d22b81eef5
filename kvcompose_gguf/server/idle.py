"""Compressed contexts that no slot has any more, on disk until a prompt begins with one."""

from __future__ import annotations

import hashlib
import logging
import struct
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import StateError
from .saved import describe, restore, save
from .slots import SlotLlama

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """A file.

    Attributes:
        context: tokens of the compressed context.
        composed_by: how it was compressed.
        n_tokens: of the conversation, the context's included.
        n_bytes: of the file.
    """

    context: tuple[int, ...]
    composed_by: str
    n_tokens: int
    n_bytes: int


class IdleCaches:
    """Contexts that slots had to give up.

    Args:
        folder: of the files, which is made; those that are there already are found again.
        max_bytes: of all files; whose was used longest ago goes first.
        llama: of the model that they have to be of; it is not used beyond this call.
    """

    def __init__(self, folder: Path, max_bytes: int, llama: SlotLlama) -> None:
        self._folder, self._max_bytes = folder, max_bytes
        self._lock = threading.Lock()
        self._entries: OrderedDict[Path, Entry] = OrderedDict()  # whose was used last is last
        folder.mkdir(parents=True, exist_ok=True)
        for file in sorted(folder.glob("*.kvc"), key=lambda file: file.stat().st_mtime):
            try:
                tokens, about = describe(llama, file)
            except StateError as error:
                log.warning("%s: %s", file, error)
                continue
            context = tuple(tokens[: about["n_compressed"]])
            self._entries[file] = Entry(context, about["composed_by"], len(tokens), file.stat().st_size)

    def __len__(self) -> int:
        return len(self._entries)

    def n_context(self, llama: SlotLlama, tokens: Sequence[int], composed_by: str) -> int:
        """Tokens of the longest saved context that a prompt begins with; 0: there is none."""
        found = self._find(llama, tokens, composed_by)
        return 0 if found is None else len(found[1].context)

    def exchange(self, llama: SlotLlama, tokens: Sequence[int], composed_by: str) -> None:
        """Before a prompt is read: save the slot's context if it is not the prompt's, bring back the prompt's own."""
        n_live = llama.n_reusable(tokens)
        found = self._find(llama, tokens, composed_by)
        is_better = found is not None and len(found[1].context) > n_live
        if is_better or n_live < llama.n_context:
            self.keep(llama)
        if found is not None and is_better:
            file, _ = found
            try:
                restore(llama, file)
            except StateError as error:
                log.warning("%s: %s", file, error)
                self._drop(file)

    def keep(self, llama: SlotLlama) -> None:
        """Save a slot's context, if it has a compressed one that is not here as it is now."""
        if not llama.n_context:
            return
        context, composed_by = tuple(llama.context_tokens), llama.composed_by
        digest = hashlib.sha256(struct.pack(f"<{len(context)}i", *context) + composed_by.encode())
        file = self._folder / f"{digest.hexdigest()[:32]}.kvc"
        with self._lock:
            if file in self._entries and self._entries[file].n_tokens == llama.n_tokens:
                self._entries.move_to_end(file)
                return
        try:
            saved = save(llama, file)
        except StateError as error:  # a full disk costs the context, nothing else
            log.warning("%s", error)
            return
        with self._lock:
            self._entries.pop(file, None)
            self._entries[file] = Entry(context, composed_by, saved.n_tokens, saved.n_bytes)
            while sum(entry.n_bytes for entry in self._entries.values()) > self._max_bytes:
                oldest, _ = self._entries.popitem(last=False)
                oldest.unlink(missing_ok=True)

    def _find(self, llama: SlotLlama, tokens: Sequence[int], composed_by: str) -> tuple[Path, Entry] | None:
        with self._lock:
            entries = [pair for pair in self._entries.items() if pair[1].composed_by == composed_by]
        suitable = [
            pair for pair in entries if pair[1].n_tokens < llama.n_ctx() and llama.begins(tokens, pair[1].context)
        ]
        return max(suitable, key=lambda pair: len(pair[1].context), default=None)

    def _drop(self, file: Path) -> None:
        with self._lock:
            self._entries.pop(file, None)
        file.unlink(missing_ok=True)
