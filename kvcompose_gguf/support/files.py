"""The user's folders, and writing files so that a crash cannot damage them."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import platformdirs

#: age at which an unfinished file is taken for one that nobody writes any more
ABANDONED_SECONDS = 24 * 3600

_APP = "kvcompose-gguf"


def cache_dir() -> Path:
    """Returns the folder for what can be made or fetched again; it may not exist yet."""
    return Path(platformdirs.user_cache_dir(_APP))


def data_dir() -> Path:
    """Returns the folder for what the user wants to keep; it may not exist yet."""
    return Path(platformdirs.user_data_dir(_APP))


@contextlib.contextmanager
def replaced(file: Path) -> Iterator[Path]:
    """Yields a path to write to, and then moves it over ``file``; creates missing folders."""
    file.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(file.parent)
    with tempfile.TemporaryDirectory(prefix=".write-", dir=file.parent) as folder:
        unfinished = Path(folder) / file.name
        yield unfinished
        os.replace(unfinished, file)
    if hasattr(os, "O_DIRECTORY"):  # the new name is on the disk as well; Windows cannot open folders
        folder_fd = os.open(file.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder_fd)
        finally:
            os.close(folder_fd)


def _remove_abandoned(folder: Path) -> None:
    """Remove what processes that were killed while writing have left in ``folder``."""
    for left in folder.glob(".write-*"):
        with contextlib.suppress(OSError):
            if left.stat().st_mtime < time.time() - ABANDONED_SECONDS:
                shutil.rmtree(left, ignore_errors=True)


def write_file(file: Path, data: str | bytes, mode: int | None = None) -> None:
    """Replaces the contents of ``file`` by ``data``; a crash leaves the old contents. Creates missing folders.

    Args:
        mode: permissions of the file; None: the user's default.
    """
    with replaced(file) as unfinished:
        if mode is not None:
            unfinished.touch(mode)
        append_file(unfinished, data)


def write_parts(file: Path, parts: Iterable[bytes | memoryview], mode: int) -> None:
    """Write ``parts`` one after the other to a new file of these permissions; it is on the disk when this returns."""
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as stream:
        for part in parts:
            stream.write(part)
        stream.flush()
        os.fsync(stream.fileno())


def append_file(file: Path, data: str | bytes) -> None:
    """Appends ``data`` to ``file``, and returns when it is on the disk."""
    with file.open("ab") as stream:
        stream.write(data.encode() if isinstance(data, str) else data)
        stream.flush()
        os.fsync(stream.fileno())
