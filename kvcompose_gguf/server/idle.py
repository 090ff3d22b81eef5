"""Compressed contexts that no slot has any more, on disk until a prompt begins with one."""

from __future__ import annotations

import hashlib
import logging
import struct
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from ..errors import StateError
from ..methods import Method
from ..methods.base import choice_of
from .saved import SlotFile, describe, restore, save
from .slots import SlotLlama, has_grown

log = logging.getLogger(__name__)


class Asked(Protocol):
    """A prompt, and how it is to be read."""

    @property
    def tokens(self) -> Sequence[int]:
        """Of the prompt."""

    @property
    def method(self) -> Method | None:
        """That compresses it."""

    @property
    def reuse(self) -> bool:
        """Whether what is here may be used."""


class IdleCaches:
    """Contexts that slots had to give up.

    Args:
        folder: of the files, which is made; those of the same model that are there already are found again.
        max_bytes: of all files of this model; whose was used longest ago goes first.
        llama: of the model that they have to be of; it is not used beyond this call.
    """

    def __init__(self, folder: Path, max_bytes: int, llama: SlotLlama) -> None:
        self._folder, self._max_bytes = folder / llama.identity.key, max_bytes
        self._lock = threading.Lock()
        self._entries: OrderedDict[Path, SlotFile] = OrderedDict()  # whose was used last is last
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
        """Tokens of the longest saved context that a prompt can continue; 0: there is none."""
        found = self._find(llama, asked, None)
        return 0 if found is None else len(found[1].context)

    def exchange(self, llama: SlotLlama, asked: Asked, n_most: int | None) -> None:
        """Before a prompt is read: save the slot's context if it is not the prompt's, bring back the prompt's own.

        Args:
            n_most: tokens that there is memory for; None: as many as the slot's context has.
        """
        n_live = llama.n_continued(asked.tokens, asked.method) if asked.reuse else 0
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
        """Save a slot's context, if it has a compressed one that is not here as it is now; what fails is logged."""
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
            saved = save(llama, file, self._max_bytes)
        except Exception as error:  # a full disk or memory costs the context, nothing else
            log.warning("a context of %d tokens is not kept: %s", len(context), error)
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
                and (entry.is_document or not has_grown(n_tokens, n_context, asked.method))
                and llama.begins(asked.tokens, entry.context)
            )  # fmt: skip

        with self._lock:
            entries = list(self._entries.items()) if asked.reuse else []
        return max((pair for pair in entries if suits(pair[1])), key=lambda pair: len(pair[1].context), default=None)

    def _drop(self, file: Path) -> None:
        with self._lock:
            self._entries.pop(file, None)
        file.unlink(missing_ok=True)
