"""Names for documents that were compressed, so that they need not be sent again."""

from __future__ import annotations

import hashlib
import struct
import threading
from array import array
from collections import OrderedDict
from collections.abc import Sequence

from .errors import ApiError

#: tokens of all documents that are remembered, 4 bytes each; the cache itself is a slot's, or on disk
MAX_TOKENS = 1 << 22


class Prefixes:
    """Tokens of documents by an id that only depends on them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tokens: OrderedDict[str, array[int]] = OrderedDict()

    def add(self, tokens: Sequence[int]) -> str:
        """The id of a document; the one that was used longest ago is forgotten for it if there are too many."""
        name = "kvp-" + hashlib.sha256(struct.pack(f"<{len(tokens)}i", *tokens)).hexdigest()[:32]
        with self._lock:
            self._tokens[name] = array("i", tokens)
            self._tokens.move_to_end(name)
            while len(self._tokens) > 1 and sum(map(len, self._tokens.values())) > MAX_TOKENS:
                self._tokens.popitem(last=False)
        return name

    def tokens(self, name: str) -> tuple[int, ...]:
        """The document.

        Raises:
            ApiError: there is none of that name.
        """
        with self._lock:
            if name not in self._tokens:
                raise ApiError(404, f"kv_prefix: there is no {name[:64]!r}, or it was forgotten: POST /kv/compress")
            self._tokens.move_to_end(name)
            return tuple(self._tokens[name])
