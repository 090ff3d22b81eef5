"""What a model thinks before it answers, apart from the answer (reasoning_content)."""

from __future__ import annotations

#: what models put around it
PAIRS = {"<think>": "</think>", "<|START_THINKING|>": "<|END_THINKING|>"}


def closed(prompt: str) -> str:
    """A prompt in which thinking that has just begun has ended again: the model shall not."""
    for begin, end in PAIRS.items():
        if prompt.rstrip().endswith(begin):
            return prompt + end
    return prompt


class Thoughts:
    """Divides an answer that comes in pieces.

    Args:
        prompt: what the answer follows, in which the thinking may have begun.
        is_wanted: whether it is divided at all; if not, everything is content.
    """

    def __init__(self, prompt: str, is_wanted: bool = True) -> None:
        self._held, self._is_decided = "", not is_wanted
        self._end = ""
        self._strips = False
        for begin, end in PAIRS.items():
            if is_wanted and prompt.rstrip().endswith(begin):
                self._is_decided, self._end, self._strips = True, end, True

    def add(self, text: str) -> tuple[str, str]:
        """What is certain now: more of the thoughts, and more of the content."""
        self._held += text
        if not self._is_decided:
            beginning = self._held.lstrip()
            if any(begin.startswith(beginning) and begin != beginning for begin in PAIRS):
                return "", ""  # may become one
            self._is_decided = True
            for begin, end in PAIRS.items():
                if beginning.startswith(begin):
                    self._held, self._end, self._strips = beginning[len(begin) :], end, True
        thoughts = ""
        if self._end:
            before, found, after = self._held.partition(self._end)
            if not found:
                n_open = next((n for n in range(len(self._end) - 1, 0, -1) if before.endswith(self._end[:n])), 0)
                # what may be the end waits, and so do spaces that may be its
                n_sure = len(before[: len(before) - n_open].rstrip())
                thoughts, self._held = before[:n_sure], before[n_sure:]
                return self._stripped(thoughts), ""
            thoughts, self._held, self._end = self._stripped(before.rstrip()), after, ""
            self._strips = True
        content, self._held = self._stripped(self._held), ""
        return thoughts, content

    def end(self) -> tuple[str, str]:
        """What was held back, when nothing more comes."""
        held, self._held = self._held, ""
        return (held.rstrip(), "") if self._end else ("", held)

    def _stripped(self, text: str) -> str:
        """Without the white space at the beginning of thoughts, and of what follows them."""
        if self._strips:
            text = text.lstrip()
            self._strips = not text
        return text
