"""Writes files so that a crash cannot damage them."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replaced(file: Path) -> Iterator[Path]:
    """Yields a path to write to, and then moves it over ``file``; creates missing folders."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".write-", dir=file.parent) as folder:
        unfinished = Path(folder) / file.name
        yield unfinished
        os.replace(unfinished, file)


def write_file(file: Path, data: str | bytes, mode: int | None = None) -> None:
    """Replaces the contents of ``file`` by ``data``; a crash leaves the old contents. Creates missing folders.

    Args:
        mode: permissions of the file; None: the user's default.
    """
    with replaced(file) as unfinished:
        if mode is not None:
            unfinished.touch(mode)
        append_file(unfinished, data)


def append_file(file: Path, data: str | bytes) -> None:
    """Appends ``data`` to ``file``, and returns when it is on the disk."""
    with file.open("ab") as stream:
        stream.write(data.encode() if isinstance(data, str) else data)
        stream.flush()
        os.fsync(stream.fileno())
