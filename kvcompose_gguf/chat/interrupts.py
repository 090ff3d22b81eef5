"""Ctrl-C while the model works: the first ends the work at the next token or batch, the second ends it at once."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import TypeVar

from ..errors import KVComposeError

if sys.platform != "win32":
    import termios


T = TypeVar("T")


class Stopped(KVComposeError):
    """The user stopped what was being done."""


class Interrupts:
    """Notes Ctrl-C inside of its ``with`` block instead of raising ``KeyboardInterrupt`` anywhere.

    So a decode is never left half done, and what was said so far is kept. A second Ctrl-C raises.
    """

    def __init__(self) -> None:
        #: Ctrl-C was pressed
        self.pressed = False
        self._before: object = None

    def __enter__(self) -> Interrupts:
        self.pressed = False
        if threading.current_thread() is threading.main_thread():  # others may not set handlers
            self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)  # type: ignore[arg-type]
            self._before = None

    def check(self) -> None:
        """Stopped if Ctrl-C was pressed."""
        if self.pressed:
            raise Stopped("stopped by Ctrl-C")

    def until_pressed(self, items: Iterable[T]) -> Iterator[T]:
        """Yield items until Ctrl-C is pressed."""
        for item in items:
            yield item
            if self.pressed:
                return

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.pressed:
            raise KeyboardInterrupt
        self.pressed = True


@contextlib.contextmanager
def without_echo() -> Iterator[None]:
    """Keys that are pressed inside of the ``with`` block do not appear in the output; they are read afterwards."""
    if sys.platform == "win32" or not sys.stdin.isatty():
        yield
        return
    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    quiet = termios.tcgetattr(terminal)
    quiet[3] &= ~termios.ECHO
    termios.tcsetattr(terminal, termios.TCSADRAIN, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)
