"""Files that survive a crash."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replaced(file: Path) -> Iterator[Path]:
    """A path to write to, which then takes the place of ``file``; folders that are missing are made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".write-", dir=file.parent) as folder:
        unfinished = Path(folder) / file.name
        yield unfinished
        os.replace(unfinished, file)


def write_file(file: Path, data: str | bytes, mode: int | None = None) -> None:
    """``data`` instead of what was in ``file``, or, after a crash, what was; folders that are missing are made.

    Args:
        mode: permissions of the file; None: the user's usual ones.
    """
    with replaced(file) as unfinished:
        if mode is not None:
            unfinished.touch(mode)
        append_file(unfinished, data)


def append_file(file: Path, data: str | bytes) -> None:
    """``data`` at the end of ``file``; it is on the disk when this returns."""
    with file.open("ab") as stream:
        stream.write(data.encode() if isinstance(data, str) else data)
        stream.flush()
        os.fsync(stream.fileno())
