"""Reads and writes session files: any later process continues from the saved context without reading its text again.

Layout, little-endian: MAGIC; uint32 format version; uint32 size of the header in bytes; the header (JSON); the
sections, each at a multiple of ALIGN bytes; the SHA-256 of everything before it. Sections: ``tokens``, int32;
``kept``, the tokens of the rows (``Rows.bits``), zlib-compressed; ``scores`` of the rows, float32, layer by layer;
``windows``, the state of the sliding-window layers; ``state``, llama.cpp's own bytes, loaded straight from the mapped
file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError, StateError
from ..models.identity import Identity
from ..plan.composed import Composed, Contents
from ..plan.report import KVReport
from ..plan.rows import Rows
from ..support.files import replaced, write_parts
from .info import SessionInfo, Snapshot

MAGIC, FORMAT = b"KVCSESS\n", 2
ALIGN = 64

_PREFIX = struct.Struct("<8sII")
_DIGEST_BYTES = 32
#: exceptions that a damaged or foreign header causes in the code below
_MALFORMED = (
    ConfigError,
    struct.error,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    OverflowError,
    RecursionError,
    zlib.error,
)


def save(snapshot: Snapshot, file: Path, max_bytes: int | None = None, name: str = "") -> SessionInfo:
    """Writes a session file that only this user can read; an old file stays until the new one is whole and on disk.

    Raises:
        ConfigError: ``extra`` is not JSON.
        StateError: the file cannot be written, or would be larger than ``max_bytes``.
    """
    sections = _sections_of(snapshot.contents)
    header = _header_of(snapshot, sections, time.time())
    try:
        head = json.dumps(header).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"extra={snapshot.extra!r} cannot be saved as JSON: {error}") from error

    parts: list[Any] = [_PREFIX.pack(MAGIC, FORMAT, len(head)), head]
    at = _PREFIX.size + len(head)
    for _, data in sections:
        parts += [bytes(-at % ALIGN), data]
        at += -at % ALIGN + memoryview(data).nbytes
    n_bytes = at + _DIGEST_BYTES
    if max_bytes is not None and n_bytes > max_bytes:
        raise StateError(f"{name or file} is not saved: it needs {n_bytes} bytes, the limit is {max_bytes}")
    try:
        with replaced(file) as unfinished:
            write_parts(unfinished, _with_digest(parts), mode=0o600)
    except OSError as error:
        raise StateError(f"{name or file} cannot be written: {error.strerror or error}") from error
    identity = snapshot.identity
    return SessionInfo(
        file, n_bytes, header["created"], len(snapshot.contents.tokens), header["n_context"], identity.model_name,
        identity.model_id, header["method"], snapshot.contents.report, snapshot.kv_bytes, snapshot.extra,
        identity.versions,
    )  # fmt: skip


def _sections_of(contents: Contents) -> list[tuple[str, Any]]:
    """Returns the names and bytes of the file's sections."""
    composed = contents.composed
    sections: list[tuple[str, Any]] = [("tokens", contents.tokens.astype("<i4"))]
    if composed is not None:
        sections.append(("kept", zlib.compress(composed.rows.bits().tobytes())))
        scores = np.concatenate([scores.ravel() for scores in composed.rows.scores])
        sections.append(("scores", scores.astype("<f4")))
        if composed.partial is not None:
            sections.append(("windows", composed.partial))
    return [*sections, ("state", contents.state)]


def _header_of(snapshot: Snapshot, sections: list[tuple[str, Any]], created: float) -> dict[str, Any]:
    identity, composed, report = snapshot.identity, snapshot.contents.composed, snapshot.contents.report
    return {
        "created": created,
        "model": {"name": identity.model_name, "id": identity.model_id},
        "settings": identity.settings,
        "versions": identity.versions,
        "n_context": 0 if composed is None else len(composed.tokens),
        "n_scored": 0 if composed is None else composed.rows.end,
        "n_head_kv": [] if composed is None else [len(positions) for positions in composed.rows.positions],
        "method": "" if composed is None else composed.choice,
        "report": None if report is None else report.to_json(),
        "first_image": snapshot.contents.first_image,
        "kv_bytes": snapshot.kv_bytes,
        "extra": snapshot.extra,
        "sections": [[name, memoryview(data).nbytes] for name, data in sections],
    }


def _with_digest(parts: list[Any]) -> Iterator[Any]:
    """Yields the parts, and then the SHA-256 of them all."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
        yield part
    yield digest.digest()


@contextlib.contextmanager
def opened(file: Path, name: str = "") -> Iterator[tuple[Snapshot, SessionInfo]]:
    """Checks a session file wholly, and yields it; arrays are views of the mapped file, valid in the ``with`` block.

    Args:
        name: name of the file in messages, by default its path.
    Raises:
        StateError: the file does not exist, is damaged, or has another format.
    """
    name = name or str(file)
    raw = _mapped(file, name)
    header, sections = _header(name, raw)
    _check_digest(name, raw)
    try:
        found = _snapshot(file, header, sections, raw.nbytes)
    except _MALFORMED as error:
        raise StateError(f"{name} is damaged: {error}") from error
    yield found


def describe(file: Path, check: bool = True, name: str = "") -> SessionInfo:
    """Returns the description of a session file.

    Args:
        name: name of the file in messages, by default its path.
        check: verify the checksum, which reads the whole file.
    Raises:
        StateError: in the same cases as ``opened``.
    """
    name = name or str(file)
    raw = _mapped(file, name)
    header, sections = _header(name, raw)
    if check:
        _check_digest(name, raw)
    try:
        return _info(file, header, sections, raw.nbytes)
    except _MALFORMED as error:
        raise StateError(f"{name} is damaged: {error}") from error


def _mapped(file: Path, name: str) -> npt.NDArray[np.uint8]:
    try:
        return np.memmap(file, dtype=np.uint8, mode="r")
    except OSError as error:
        raise StateError(f"{name} cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # an empty file cannot be mapped
        raise StateError(f"{name} is damaged: it is empty") from error


def _header(name: str, raw: npt.NDArray[np.uint8]) -> tuple[dict[str, Any], dict[str, npt.NDArray[np.uint8]]]:
    """Returns the header and views of the sections; checks only that the sections fit the file."""
    try:
        magic, version, n_head = _PREFIX.unpack(raw[: _PREFIX.size].tobytes())
        if magic != MAGIC:
            raise StateError(f"{name} is not a session file of kvcompose")
        if version != FORMAT:
            raise StateError(f"{name} has session format {version}, this version reads format {FORMAT}: make a new one")
        header = json.loads(raw[_PREFIX.size : _PREFIX.size + n_head].tobytes())
        at, sections = _PREFIX.size + n_head, {}
        for section, n_bytes in header["sections"]:
            if type(n_bytes) is not int or n_bytes < 0:
                raise ValueError(f"section {section!r} has {n_bytes!r} bytes")
            at += -at % ALIGN
            sections[str(section)] = raw[at : at + n_bytes]
            at += n_bytes
    except StateError:
        raise
    except _MALFORMED as error:
        raise StateError(f"{name} is damaged: {error}") from error
    if at + _DIGEST_BYTES != raw.nbytes:
        raise StateError(f"{name} is damaged: it has {raw.nbytes} bytes instead of {at + _DIGEST_BYTES}")
    return header, sections


def _check_digest(name: str, raw: npt.NDArray[np.uint8]) -> None:
    if hashlib.sha256(raw[:-_DIGEST_BYTES].data).digest() != raw[-_DIGEST_BYTES:].tobytes():
        raise StateError(f"{name} is damaged: its checksum is wrong")


def _info(file: Path, header: dict[str, Any], sections: dict[str, npt.NDArray[np.uint8]], n_bytes: int) -> SessionInfo:
    report, extra = header["report"], header["extra"]
    report = None if report is None else KVReport.from_json(report)
    if not isinstance(extra, dict):
        raise ValueError("extra is not an object")
    return SessionInfo(
        file, n_bytes, float(header["created"]), len(sections["tokens"]) // 4, int(header["n_context"]),
        str(header["model"]["name"]), str(header["model"]["id"]), str(header["method"]),
        report, int(header["kv_bytes"]), extra, dict(header["versions"]),
    )  # fmt: skip


def _snapshot(
    file: Path, header: dict[str, Any], sections: dict[str, npt.NDArray[np.uint8]], n_bytes: int
) -> tuple[Snapshot, SessionInfo]:
    info = _info(file, header, sections, n_bytes)
    tokens = sections["tokens"].view("<i4")
    composed = None
    if info.n_context:
        if not 0 < info.n_context <= len(tokens):
            raise ValueError(f"the context has {info.n_context} tokens, the cache {len(tokens)}")
        n_scored, n_head_kv = int(header["n_scored"]), [int(n) for n in header["n_head_kv"]]
        if not info.n_context <= n_scored <= len(tokens):
            raise ValueError(f"{n_scored} tokens were scored, the context has {info.n_context} of {len(tokens)}")
        n_bytes_head = -(-n_scored // 8)
        held = zlib.decompressobj().decompress(sections["kept"].tobytes(), sum(n_head_kv) * n_bytes_head)
        bits = np.frombuffer(held, dtype=np.uint8).reshape(-1, n_bytes_head)
        rows = Rows.from_bits(n_scored, n_head_kv, bits, sections["scores"].view("<f4").astype(np.float32))
        windows = sections["windows"].tobytes() if "windows" in sections else None
        composed = Composed(tokens[: info.n_context].copy(), info.method, rows, windows)
    identity = Identity(info.model_name, info.model_id, dict(header["settings"]), info.versions)
    image = header.get("first_image")  # older files have none
    contents = Contents(tokens, sections["state"], composed, info.report, None if image is None else int(image))
    return Snapshot(identity, contents, info.kv_bytes, info.extra), info
