"""Text out of tokens: characters that are whole, and nothing of a stop text."""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class TextStream:
    """The text of a generation, as far as it is certain.

    Tokens may end inside of a character, and what looks like the beginning of a stop text may turn out to be one:
    both are held back until the next token decides.

    Args:
        stops: texts that end the generation; they are no part of it.
    Attributes:
        text: all that may be shown, so far.
        stop: the stop text that was found, or None.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._stops = [stop for stop in stops if stop]
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self.text = ""
        self.stop: str | None = None

    def add(self, piece: bytes) -> str:
        """What may be shown now that ``piece``, the bytes of a token, has come; sets ``stop``."""
        if self.stop is not None:
            return ""
        self._held += self._decoder.decode(piece)
        found = [(at, -len(stop), stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            at, _, self.stop = min(found)
            return self._show(at, drop=True)
        return self._show(len(self._held) - self._n_uncertain())

    def end(self) -> str:
        """What was held back, now that no more tokens come; a character that is not whole becomes U+FFFD."""
        if self.stop is not None:
            return ""
        self._held += self._decoder.decode(b"", final=True)
        return self._show(len(self._held))

    @property
    def is_whole(self) -> bool:
        """Nothing is held back."""
        return not self._held and not self._decoder.getstate()[0]

    def _show(self, n: int, drop: bool = False) -> str:
        shown, self._held = self._held[:n], "" if drop else self._held[n:]
        self.text += shown
        return shown

    def _n_uncertain(self) -> int:
        """Characters at the end that a stop text begins with."""
        longest = max(map(len, self._stops), default=1) - 1
        for n in range(min(longest, len(self._held)), 0, -1):
            end = self._held[-n:]
            if any(stop.startswith(end) for stop in self._stops):
                return n
        return 0
