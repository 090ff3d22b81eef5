"""Makes text from tokens: only whole characters, and nothing of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class TextStream:
    """The text of a generation, as far as it is certain.

    A token may end inside of a character, and a text may be the beginning of a stop string. Both are held back until
    later tokens decide.

    Args:
        stops: stop strings. They end the generation and are not part of its text.
    Attributes:
        text: the text that can be shown, so far.
        stop: the stop string that was found, or None.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._stops = [stop for stop in stops if stop]
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self.text = ""
        self.stop: str | None = None

    def add(self, piece: bytes) -> str:
        """Add the bytes of a token; returns the text that can be shown now. Sets ``stop`` if there is a stop string."""
        if self.stop is not None:
            return ""
        self._held += self._decoder.decode(piece)
        found = [(at, -len(stop), stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            at, _, self.stop = min(found)
            return self._show(at, drop=True)
        return self._show(len(self._held) - self._n_uncertain())

    def end(self) -> str:
        """Returns the text that was held back, at the end. An incomplete character becomes U+FFFD."""
        if self.stop is not None:
            return ""
        self._held += self._decoder.decode(b"", final=True)
        return self._show(len(self._held))

    @property
    def is_whole(self) -> bool:
        """Whether nothing is held back."""
        return not self._held and not self._decoder.getstate()[0]

    def _show(self, n: int, drop: bool = False) -> str:
        shown, self._held = self._held[:n], "" if drop else self._held[n:]
        self.text += shown
        return shown

    def _n_uncertain(self) -> int:
        """Returns the number of characters at the end that may begin a stop string."""
        longest = max(map(len, self._stops), default=1) - 1
        for n in range(min(longest, len(self._held)), 0, -1):
            end = self._held[-n:]
            if any(stop.startswith(end) for stop in self._stops):
                return n
        return 0
