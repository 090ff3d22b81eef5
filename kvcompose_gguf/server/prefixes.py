"""Remembers compressed documents by an id, so that clients need not send them again."""

from __future__ import annotations

import hashlib
import struct
import threading
from array import array
from collections import OrderedDict
from collections.abc import Sequence

from .api.errors import ApiError

#: maximum tokens of all remembered documents, 4 bytes each; their caches are in slots or on disk
MAX_TOKENS = 1 << 22


class Prefixes:
    """Tokens of documents, by an id that is a hash of the tokens."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tokens: OrderedDict[str, array[int]] = OrderedDict()

    def add(self, tokens: Sequence[int]) -> str:
        """Remember a document and return its id. The least recently used ones are forgotten if there are too many."""
        name = "kvp-" + hashlib.sha256(struct.pack(f"<{len(tokens)}i", *tokens)).hexdigest()[:32]
        with self._lock:
            self._tokens[name] = array("i", tokens)
            self._tokens.move_to_end(name)
            while len(self._tokens) > 1 and sum(map(len, self._tokens.values())) > MAX_TOKENS:
                self._tokens.popitem(last=False)
        return name

    def tokens(self, name: str) -> tuple[int, ...]:
        """Returns the tokens of a document.

        Raises:
            ApiError: no document has this id.
        """
        with self._lock:
            if name not in self._tokens:
                raise ApiError(404, f"kv_prefix={name[:64]!r} is unknown or forgotten: use /kv/compress again")
            self._tokens.move_to_end(name)
            return tuple(self._tokens[name])
