"""Saves a live context as a session file, and loads such a file into one."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..context import Context
from ..errors import ConfigError, StateError, UnsupportedError
from ..models.identity import Identity
from .file import opened, save
from .info import SessionInfo, Snapshot


def save_context(
    context: Context,
    identity: Identity,
    file: Path,
    extra: Mapping[str, Any],
    *,
    allow_empty: bool = False,
    max_bytes: int | None = None,
    name: str = "",
) -> SessionInfo:
    """Writes a session file, as ``sessions.save``.

    Args:
        identity: the model, settings and versions of the context.
        extra: the caller's own values, stored as JSON.
        allow_empty: also save a cache without tokens.
        max_bytes: maximum bytes of the file.
        name: name of the file in messages, by default its path.
    Raises:
        StateError: the file cannot be written, or would be larger than ``max_bytes``.
        ConfigError: ``extra`` is not JSON, or the cache is empty.
    """
    if not context.n_tokens and not allow_empty:
        raise ConfigError("the cache is empty: evaluate a prompt before you save it")
    kv_bytes = 0
    with contextlib.suppress(UnsupportedError):  # the model supports saving, but not compression
        kv_bytes = context.session.state().n_bytes
    return save(Snapshot(identity, context.save(), kv_bytes, dict(extra)), file, max_bytes, name)


def load_context(
    context: Context, identity: Identity, file: Path, choice: str | None = None, name: str = ""
) -> SessionInfo:
    """Loads a session file; nothing changes unless the file is whole and fits.

    Args:
        identity: as for ``save_context``; the file's must match.
        choice: the name under which a compressed context continues (``choice_of``); None: only the saved one.
        name: name of the file in messages, by default its path.
    Raises:
        StateError: the file is missing or damaged, or was made with another model, cache type, setting or version. The
            cache is empty if llama.cpp itself refuses the rows, e.g. without memory for them.
    """
    name = name or str(file)
    with opened(file, name) as (saved, info):
        identity.check_loads(saved.identity, name)
        tokens = saved.contents.tokens
        if len(tokens) >= context.n_ctx:
            raise StateError(f"{name} has {len(tokens)} tokens, n_ctx={context.n_ctx} is too small: raise it")
        if not 0 <= tokens.min(initial=0) <= tokens.max(initial=0) < context.vocabulary.n_tokens:
            raise StateError(f"{name} has tokens that are not in the vocabulary of this model")
        context.load(saved.contents, choice)
        return info
