"""Keeps in memory what slots held before other prompts took them, as llama-server's ``--cache-ram``."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable

from ...errors import StateError
from .shelf import Asked
from .slot_llama import Copy, Held, SlotLlama

log = logging.getLogger(__name__)


class PromptCache:
    """Copies of caches, full or compressed, which prompts that begin like them continue.

    Args:
        max_bytes: maximum bytes of all copies. The least recently used goes first.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._copies: list[Copy] = []  # least recently used first

    @property
    def n_bytes(self) -> int:
        """Bytes of all copies."""
        with self._lock:
            return _total(self._copies)

    def keep(self, llama: SlotLlama) -> None:
        """Copy what a slot holds, unless a copy has all of it, or it is too large."""
        if not llama.n_tokens or self._touch(llama.held):
            return
        try:
            copy = llama.copy(self._max_bytes)
        except MemoryError:
            log.warning("no memory for a copy of %d tokens", llama.n_tokens)
            return
        if copy is None:
            return
        with self._lock:
            self._copies = [each for each in self._copies if not copy.held.has_all_of(each.held)]
            self._copies.append(copy)
            while _total(self._copies) > self._max_bytes:
                self._copies.pop(0)

    def drop(self, held: Held) -> None:
        """Delete the copies of a conversation, also of its beginning and of what followed."""
        with self._lock:
            self._copies = [
                copy for copy in self._copies if not (held.has_all_of(copy.held) or copy.held.has_all_of(held))
            ]

    def find(self, llama: SlotLlama, asked: Asked, n_most: int) -> tuple[Copy | None, int]:
        """Returns the copy that has most of a prompt, and how many of its tokens need not be read; (None, 0): no copy.

        Args:
            llama: a ``Llama`` of the model.
            n_most: maximum tokens of a copy.
        """
        with self._lock:
            copies = [copy for copy in self._copies if len(copy.held.tokens) <= n_most]
        n_cached = [llama.continuation(asked.tokens, asked.method, asked.reuse, copy.held).n_cached for copy in copies]
        if not any(n_cached):
            return None, 0
        best = max(range(len(copies)), key=lambda i: n_cached[i])
        return copies[best], n_cached[best]

    def restore(self, llama: SlotLlama, copy: Copy) -> bool:
        """Fill a slot with a copy; returns False if llama.cpp refused it: the slot is empty then, and the copy gone."""
        try:
            llama.paste(copy)
        except StateError:
            with self._lock:
                self._copies = [each for each in self._copies if each is not copy]
            return False
        self._touch(copy.held)
        return True

    def _touch(self, held: Held) -> bool:
        """Returns whether there is a copy with all of ``held``; it is the most recently used one then."""
        with self._lock:
            for copy in self._copies:
                if copy.held.has_all_of(held):
                    self._copies.remove(copy)
                    self._copies.append(copy)
                    return True
        return False


def _total(copies: Iterable[Copy]) -> int:
    return sum(copy.n_bytes for copy in copies)
