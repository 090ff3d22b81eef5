"""Keeps compressed contexts of evicted slots on disk, until a prompt begins with one of them."""

from __future__ import annotations

import hashlib
import logging
import struct
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from ...errors import StateError
from ...methods import Method
from ...methods.continuing import choice_of, is_read_again
from .saved import SlotFile, describe, restore, save
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


class IdleCaches:
    """Saved contexts of evicted slots, for one model.

    Args:
        folder: folder for the files. It is created. Files of the same model in it are used again.
        max_bytes: maximum bytes of all files of this model. The least recently used file is deleted first.
        llama: a ``Llama`` of the model, only used during this call.
    """

    def __init__(self, folder: Path, max_bytes: int, llama: SlotLlama) -> None:
        self._folder, self._max_bytes = folder / llama.identity.key, max_bytes
        self._lock = threading.Lock()
        self._entries: OrderedDict[Path, SlotFile] = OrderedDict()  # least recently used first
        for private in (folder, self._folder):
            private.mkdir(mode=0o700, parents=True, exist_ok=True)
        for file in sorted(self._folder.glob("*.kvc"), key=lambda file: file.stat().st_mtime):
            try:
                self._entries[file] = describe(llama, file)
            except StateError as error:
                log.warning("%s: %s", file, error)
                file.unlink(missing_ok=True)
        self._trim()

    def n_context(self, llama: SlotLlama, asked: Asked) -> int:
        """Returns the length of the longest saved context that the prompt can continue, 0: there is none."""
        found = self._find(llama, asked, None)
        return 0 if found is None else len(found[1].context)

    def exchange(self, llama: SlotLlama, asked: Asked, n_most: int | None) -> None:
        """Prepare a slot for a prompt: save the context that the prompt does not continue, restore one that it does.

        Args:
            n_most: maximum tokens to restore. None: as many as fit into the slot.
        """
        n_live = llama.continuation(asked.tokens, asked.method, asked.reuse).n_cached
        found = self._find(llama, asked, n_most)
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
        """Save a slot's compressed context if the file is missing or out of date. Failures are logged."""
        if not llama.n_context:
            return
        context, composed_by = llama.context_tokens, llama.composed_by
        digest = hashlib.sha256(struct.pack(f"<{len(context)}i", *context) + composed_by.encode())
        file = self._folder / f"{digest.hexdigest()[:32]}.kvc"
        with self._lock:
            if file in self._entries and self._entries[file].n_tokens == llama.n_tokens:
                self._entries.move_to_end(file)
                return
        try:
            saved = save(llama, file, self._max_bytes)
        except Exception as error:  # for example a full disk: only this context is lost
            log.warning("a context of %d tokens could not be saved: %s", len(context), error)
            return
        with self._lock:
            self._entries.pop(file, None)
            self._entries[file] = SlotFile(context, composed_by, llama.is_document, saved.n_tokens, saved.n_bytes)
            self._trim()

    def _trim(self) -> None:
        while sum(entry.n_bytes for entry in self._entries.values()) > self._max_bytes:
            oldest, _ = self._entries.popitem(last=False)
            oldest.unlink(missing_ok=True)

    def _find(self, llama: SlotLlama, asked: Asked, n_most: int | None) -> tuple[Path, SlotFile] | None:
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

    def _drop(self, file: Path) -> None:
        with self._lock:
            self._entries.pop(file, None)
        file.unlink(missing_ok=True)
