"""Reports how far a prompt has been read and scored."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

Step = Literal["reading", "scoring"]


@dataclass(frozen=True)
class Progress:
    """The progress of one step: ``n_done`` of its ``n_total`` tokens are evaluated, in a cache of ``kv_bytes``."""

    step: Step
    n_done: int
    n_total: int
    kv_bytes: int = 0


class Meter:
    """Counts evaluated tokens and reports each batch.

    Args:
        report: called at the start of a step and after every batch, in the thread that decodes; None: no reports.
        kv_bytes: returns how many bytes the cache takes.
    """

    def __init__(
        self, report: Callable[[Progress], None] | None = None, kv_bytes: Callable[[], int] = lambda: 0
    ) -> None:
        self._report, self._kv_bytes = report, kv_bytes
        self._progress: Progress | None = None

    def begin(self, step: Step, n_total: int, n_done: int = 0) -> None:
        """Starts counting a step of ``n_total`` tokens, or goes on with one after ``n_done`` of them."""
        self._progress = Progress(step, n_done, n_total)
        self._tell()

    def add(self, n_tokens: int) -> None:
        """Adds evaluated tokens to the current step; before the first step it does nothing."""
        if self._progress is not None:
            n_done = min(self._progress.n_done + n_tokens, self._progress.n_total)
            self._progress = replace(self._progress, n_done=n_done)
            self._tell()

    @contextmanager
    def ignored(self) -> Iterator[None]:
        """Does not count what is evaluated in the ``with`` block."""
        progress, self._progress = self._progress, None
        try:
            yield
        finally:
            self._progress = progress

    def _tell(self) -> None:
        if self._report is not None and self._progress is not None:
            self._report(replace(self._progress, kv_bytes=self._kv_bytes()))
