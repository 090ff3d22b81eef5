"""Separates the thoughts of a model from its answer (``reasoning_content``)."""

from __future__ import annotations

#: texts that models write before and after their thoughts
PAIRS = {"<think>": "</think>", "<|START_THINKING|>": "<|END_THINKING|>"}


def closed(prompt: str) -> str:
    """Returns a prompt that ends the thoughts it begins, so that the model does not think."""
    for begin, end in PAIRS.items():
        if prompt.rstrip().endswith(begin):
            return prompt + end
    return prompt


class Thoughts:
    """Divides a streamed answer into thoughts and content.

    Args:
        prompt: the end of the prompt, which may begin the thoughts.
        is_wanted: whether to separate thoughts. If not, everything is content.
    """

    def __init__(self, prompt: str, is_wanted: bool = True) -> None:
        self._held, self._is_decided = "", not is_wanted
        self._end = ""
        self._strips = False
        for begin, end in PAIRS.items():
            if is_wanted and prompt.rstrip().endswith(begin):
                self._is_decided, self._end, self._strips = True, end, True

    def add(self, text: str) -> tuple[str, str]:
        """Returns the additional thoughts and content that are certain after ``text``."""
        self._held += text
        if not self._is_decided:
            beginning = self._held.lstrip()
            if any(begin.startswith(beginning) and begin != beginning for begin in PAIRS):
                return "", ""  # may become the beginning of thoughts
            self._is_decided = True
            for begin, end in PAIRS.items():
                if beginning.startswith(begin):
                    self._held, self._end, self._strips = beginning[len(begin) :], end, True
        thoughts = ""
        if self._end:
            before, found, after = self._held.partition(self._end)
            if not found:
                n_open = next((n for n in range(len(self._end) - 1, 0, -1) if before.endswith(self._end[:n])), 0)
                # hold back what may be the end marker, and spaces before it
                n_sure = len(before[: len(before) - n_open].rstrip())
                thoughts, self._held = before[:n_sure], before[n_sure:]
                return self._stripped(thoughts), ""
            thoughts, self._held, self._end = self._stripped(before.rstrip()), after, ""
            self._strips = True
        content, self._held = self._stripped(self._held), ""
        return thoughts, content

    def end(self) -> tuple[str, str]:
        """Returns the thoughts and content that were held back, at the end."""
        held, self._held = self._held, ""
        return (held.rstrip(), "") if self._end else ("", held)

    def _stripped(self, text: str) -> str:
        """Removes white space at the beginning of the thoughts and of the content after them."""
        if self._strips:
            text = text.lstrip()
            self._strips = not text
        return text
