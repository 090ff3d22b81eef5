"""Describes saved sessions, and finds their files."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..models.identity import Identity
from ..plan.composed import Contents
from ..plan.report import KVReport
from ..support.files import data_dir

ENDING = ".kvc"


@dataclass(frozen=True)
class SessionInfo:
    """The description of a session file.

    Attributes:
        path, n_bytes: the file and its size.
        created: time of writing, seconds since 1970.
        n_tokens: number of tokens in the cache, including the compressed context.
        n_context: number of tokens of the compressed context; 0: the cache is full.
        model_name, model_id: name and ``identity.model_id`` of the model's file.
        method: the method that compressed the context, with its options; empty: no method.
        report: figures of the compression, or None.
        kv_bytes: bytes of the cache when it was saved, as ``Llama.kv_bytes``.
        extra: the caller's own values.
        versions: versions of the programs that wrote the file.
    """

    path: Path
    n_bytes: int
    created: float
    n_tokens: int
    n_context: int
    model_name: str
    model_id: str
    method: str
    report: KVReport | None
    kv_bytes: int
    extra: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A context's cache and its metadata.

    Attributes:
        identity: the model, settings and versions.
        contents: the cache.
        kv_bytes, extra: as in ``SessionInfo``.
    """

    identity: Identity
    contents: Contents
    kv_bytes: int
    extra: dict[str, Any]


def sessions_dir() -> Path:
    """Returns the folder of the sessions that are saved by name."""
    return data_dir() / "sessions"


def session_path(name: str) -> Path:
    """Returns a session's file: ``name`` as a path if it has a separator or ends in .kvc, else in ``sessions_dir()``.

    Raises:
        ConfigError: the name is empty or begins with a dot.
    """
    if name.endswith(ENDING) or "/" in name or "\\" in name:
        return Path(name)
    if not name or name.startswith("."):
        raise ConfigError(f"session={name!r} must be a name without a leading dot, or a path that ends in {ENDING}")
    return sessions_dir() / f"{name}{ENDING}"


def list_sessions(folder: Path | None = None) -> list[Path]:
    """Returns the session files of a folder, newest first; the default is ``sessions_dir()``."""
    files = list((sessions_dir() if folder is None else folder).glob(f"*{ENDING}"))
    return sorted(files, key=lambda file: (-file.stat().st_mtime, file.name))
