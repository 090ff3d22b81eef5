"""Hashes files, and remembers the hashes of models in the user's cache."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from ..errors import ConfigError
from ..support.files import cache_dir, write_file

BLOCK = 1 << 20  # bytes hashed at a time


def sha256(file: Path) -> str:
    """Returns the hexadecimal SHA-256 of a file's contents."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def model_sha256(model_path: Path) -> str:
    """Returns the sha256 of a file; hashes it again only if its path, size or modification time changed.

    Raises:
        ConfigError: the file cannot be read.
    """
    return remembered(model_path, "", sha256)


def remembered(model_path: Path, what: str, compute: Callable[[Path], str]) -> str:
    """Returns ``compute(model_path)``; computes it again only if the file's path, size or modification time changed.

    Args:
        what: name of the result, different for every ``compute``; empty: the sha256.
    Raises:
        ConfigError: the file cannot be read.
    """
    try:
        status = model_path.stat()
        key = f"{model_path.resolve()} {status.st_size} {status.st_mtime_ns} {what}".rstrip()
        memory = _memory()
        known: dict[str, str] = {}
        with contextlib.suppress(OSError, ValueError):
            known = dict(json.loads(memory.read_text("utf-8")))
        if key not in known:
            known[key] = compute(model_path)
            with contextlib.suppress(OSError):  # the folder is not writable: the next call hashes again
                write_file(memory, json.dumps(known, indent=1))
        return known[key]
    except OSError as error:
        raise ConfigError(f"{model_path} cannot be read: {error}") from error


def _memory() -> Path:
    """Returns the file of the known hashes; it is beside the calibrations, which are named by these hashes."""
    return cache_dir() / "calibrations" / "sha256.json"
