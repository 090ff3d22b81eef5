"""Files that survive a crash."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def write_file(file: Path, text: str) -> None:
    """``text`` instead of what was in ``file``, or, after a crash, what was; folders that are missing are made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".write-", dir=file.parent) as folder:
        unfinished = Path(folder) / file.name
        append_file(unfinished, text)
        os.replace(unfinished, file)


def append_file(file: Path, text: str) -> None:
    """``text`` at the end of ``file``; it is on the disk when this returns."""
    with file.open("ab") as stream:
        stream.write(text.encode())
        stream.flush()
        os.fsync(stream.fileno())
