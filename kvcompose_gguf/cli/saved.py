"""What ``kvcompose compress`` and ``kvcompose sessions`` do: they write, show and delete saved sessions."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .. import sessions
from ..errors import ConfigError, KVComposeError, StateError
from ..sessions import SessionInfo, describe, list_sessions, session_path, sessions_dir
from ..support.printing import layer_bars, megabytes

if TYPE_CHECKING:
    from ..chat.options import ChatOptions


def compress_files(options: ChatOptions, out: str, console: Console | None = None) -> SessionInfo:
    """Read and compress the files of ``options``, and save the result as a session.

    Args:
        out: path of the session, or a name in ``sessions_dir()``.
    Raises:
        ConfigError: there is no file to read, or ``out`` cannot be a session.
        KVComposeError: a file, the model or an option cannot be used, or the session cannot be written.
    """
    from ..chat.opening import open_conversation
    from ..chat.screen import Screen
    from ..support.documents import read_documents

    console = console or Console(highlight=False)
    if not options.files:
        raise ConfigError("files: no document is given, name at least one, or `-` for standard input")
    path = session_path(out)
    if path.suffix != sessions.ENDING:
        raise ConfigError(f"--output {out} does not end in {sessions.ENDING}, as the path of a session does")
    if path.is_dir():
        raise ConfigError(f"--output {out} is a folder")
    documents = read_documents(options.files)
    screen = Screen(console, Console(stderr=True, highlight=False))
    with open_conversation(options, documents) as conversation:
        with screen.progress() as on_progress:
            conversation.read(documents, on_progress)
        info = conversation.save(path)
    console.print(escape(summary(info)), soft_wrap=True)
    console.print(escape(f"Saved to {info.path}. Go on with: kvcompose chat MODEL --session {out}"), soft_wrap=True)
    return info


def summary(info: SessionInfo) -> str:
    """A sentence about the sizes of a session."""
    text = f"{info.n_tokens:,} tokens in a file of {megabytes(info.n_bytes)}"
    if info.report is None:
        return f"{text}, not compressed."
    report = info.report
    return (
        f"{text}: {megabytes(report.kv_bytes_kept)} of KV cache instead of {megabytes(report.kv_bytes_full)} "
        f"({report.compression_ratio:.0%} removed)."
    )


@dataclass(frozen=True)
class Entry:
    """A file in the folder of sessions; ``info`` is None if it is damaged, and ``problem`` says how."""

    name: str
    info: SessionInfo | None
    problem: str = ""


def entries(folder: Path | None = None) -> list[Entry]:
    """All sessions of a folder, the newest first.

    Only the heads of the files are read: ``show`` verifies the checksum.
    """
    out = []
    for path in list_sessions(folder):
        try:
            out.append(Entry(path.stem, describe(path, check=False)))
        except KVComposeError as error:
            out.append(Entry(path.stem, None, str(error).removeprefix(f"{path} ")))
    return out


def print_sessions(console: Console | None = None) -> None:
    """Print a table of the saved sessions."""
    console = console or Console()
    found = entries()
    if not found:
        console.print(
            f"There are no sessions in {sessions_dir()}. Save one with `kvcompose compress` or /save in a chat."
        )
        return
    table = Table("name", "model", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in ("tokens", "size", "removed", "age"):
        table.add_column(title, justify="right", no_wrap=True)
    now = time.time()
    for entry in found:
        if entry.info is None:
            table.add_row(escape(entry.name), f"[red]{escape(entry.problem)}[/]", "", "", "", "")
            continue
        info = entry.info
        table.add_row(
            escape(entry.name), escape(info.model_name), f"{info.n_tokens:,}", megabytes(info.n_bytes), _removed(info),
            age(now - info.created),
        )  # fmt: skip
    console.print(table)


def print_session(name: str, console: Console | None = None) -> None:
    """Print what a session holds, after its checksum was verified.

    Raises:
        StateError: it is missing or damaged.
    """
    console = console or Console()
    info = describe(existing(name))
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(overflow="fold")
    for title, value in facts(info):
        table.add_row(title, escape(value))
    console.print(table)
    if info.report is not None:
        console.print(layer_bars(info.report.n_kept.tolist(), info.report.n_tokens))


def facts(info: SessionInfo) -> list[tuple[str, str]]:
    """Names and values of what a session says about itself."""
    chat = info.extra.get("chat")
    documents = chat.get("documents") if isinstance(chat, dict) else None
    rows = [
        ("file", str(info.path)),
        (
            "saved",
            f"{time.strftime('%Y-%m-%d %H:%M', time.localtime(info.created))}, {age(time.time() - info.created)} ago",
        ),
        ("model", info.model_name),
        ("tokens", f"{info.n_tokens:,}, {info.n_context:,} of them compressed"),
        ("size", summary(info)),
        ("method", info.method or "none"),
    ]
    if isinstance(documents, list) and documents:
        rows.append(("documents", ", ".join(map(str, documents))))
    rows.append(("made by", ", ".join(f"{name} {version}" for name, version in info.versions.items())))
    return rows


def delete_sessions(names: Sequence[str], yes: bool = False) -> None:
    """Delete sessions, after a question for each unless ``yes``.

    Raises:
        StateError: there is no session of one of the names; none is deleted then.
        ConfigError: a path is not that of a session.
    """
    import typer

    paths = [existing(name) for name in names]
    for name, path in zip(names, paths, strict=True):
        if not yes and not typer.confirm(f"Delete the session {name} ({megabytes(path.stat().st_size)})?", err=True):
            continue
        try:
            path.unlink()
        except OSError as error:
            raise StateError(f"{path} cannot be deleted: {error.strerror or error}") from error
        typer.echo(f"Deleted {path}")


def existing(name: str) -> Path:
    """The file of a session.

    Raises:
        StateError: there is none of this name.
        ConfigError: ``name`` is a path of another kind of file.
    """
    path = session_path(name)
    if path.suffix != sessions.ENDING:
        raise ConfigError(f"session={name!r} does not end in {sessions.ENDING}, as the path of a session does")
    if not path.is_file():
        raise StateError(f"there is no session {name!r} ({path}): `kvcompose sessions` lists the saved ones")
    return path


def age(seconds: float) -> str:
    """A time span in its largest unit, e.g. ``"3 h"``."""
    for n, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= n:
            count = int(seconds // n)
            return f"{count} {'day' if unit == 'days' and count == 1 else unit}"
    return "now" if seconds < 1 else f"{int(seconds)} s"


def _removed(info: SessionInfo) -> str:
    return "-" if info.report is None else f"{info.report.compression_ratio:.0%}"
