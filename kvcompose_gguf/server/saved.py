"""Saves slots: llama-server's header and tokens (server-common.cpp), then the cache, compressed or not."""

from __future__ import annotations

import ctypes
import hashlib
import json
import struct
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import StateError
from ..files import write_file
from ..kernels.types import FloatArray
from ..native import library
from ..report import KVReport
from .slots import SlotLlama

MAGIC, VERSION = 0x67677371, 3
#: before the tokens: the payload is not a bare list of tokens but has this layout
MARK = (-1, 1)
#: before the cache: marks files of this project
OURS = b"KVCG"


@dataclass(frozen=True)
class Saved:
    """Sizes of a saved slot: tokens of the conversation, including the compressed context, and bytes of the file."""

    n_tokens: int
    n_bytes: int


def save(llama: SlotLlama, file: Path, max_bytes: int | None = None) -> Saved:
    """Write a slot's tokens and cache, readable by this user only. The file appears when it is complete.

    Raises:
        StateError: the file cannot be written, or would have more than ``max_bytes``.
    """
    state = llama.save_state()
    tokens = [int(token) for token in state.input_ids[: state.n_tokens]]
    windows = b"" if state.kv_swa is None else bytes(state.kv_swa)
    data = state.llama_state + windows
    about = {
        "model": model_of(llama), "n_compressed": len(state.kv_compressed), "composed_by": llama.composed_by,
        "is_document": llama.is_document, "n_windows": len(windows), "sha256": _digest(tokens, data),
        "report": _told(llama.kv_report),
        "kept_shares": [round(float(share), 4) for share in llama.kept_shares],
    }  # fmt: skip
    payload = struct.pack("<iII", *MARK, len(tokens)) + struct.pack(f"<{len(tokens)}iI", *tokens, 0)
    head = json.dumps(about).encode()
    raw = struct.pack("<III", MAGIC, VERSION, len(payload) // 4) + payload + OURS + struct.pack("<I", len(head)) + head
    if max_bytes is not None and len(raw) + len(data) > max_bytes:
        raise StateError(f"Unable to save slot: {len(raw) + len(data)} bytes are more than {max_bytes}")
    try:
        write_file(file, raw + data, mode=0o600)
    except OSError as error:
        raise StateError(f"Unable to save slot: {error.strerror}") from error
    return Saved(len(tokens), len(raw) + len(data))


def restore(llama: SlotLlama, file: Path) -> Saved:
    """Restore what ``save`` wrote.

    Raises:
        StateError: the file is missing, damaged, of another model or too long for the slot, and the slot's cache is
            unchanged. Or llama.cpp refused the state, and the slot is empty.
    """
    tokens, about, data, n_bytes = _read(llama, file)
    n_state = len(data) - about["n_windows"]
    if len(tokens) >= llama.n_ctx():
        raise StateError("Unable to restore slot: Restored prompt does not fit in the slot context")
    input_ids = np.zeros(len(llama.input_ids), dtype=np.intc)
    input_ids[: len(tokens)] = tokens
    state: Any = library.load().LlamaState(
        input_ids=input_ids, scores=np.empty((0, 0), dtype=np.single), n_tokens=len(tokens),
        llama_state=data[:n_state], llama_state_size=n_state, seed=llama._seed,
    )  # fmt: skip
    state.kv_compressed = tokens[: about["n_compressed"]]
    if about["n_windows"]:
        state.kv_swa = (ctypes.c_uint8 * about["n_windows"]).from_buffer_copy(data[n_state:])
    llama.load_state(state)
    llama.kv_report = about["report"]
    llama.kept_shares = about["kept_shares"]
    llama.is_document = about["is_document"]
    llama.composed_by = about["composed_by"]
    return Saved(len(tokens), n_bytes)


def describe(llama: SlotLlama, file: Path) -> tuple[list[int], dict[str, Any]]:
    """Returns the tokens of a saved conversation and its properties: ``n_compressed``, ``composed_by`` and others.

    Raises:
        StateError: as for ``restore``.
    """
    tokens, about, _, _ = _read(llama, file)
    return tokens, about


def n_tokens_of(file: Path) -> int:
    """Returns the maximum number of tokens in a saved conversation, from the file's header alone.

    Raises:
        StateError: the file cannot be read.
    """
    try:
        with file.open("rb") as stream:
            return int(struct.unpack("<III", stream.read(12))[2])
    except (OSError, struct.error) as error:
        raise StateError("Unable to restore slot: invalid slot save file") from error


def _read(llama: SlotLlama, file: Path) -> tuple[list[int], dict[str, Any], bytes, int]:
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise StateError(f"Unable to restore slot: {error.strerror}") from error
    try:
        tokens, about, data = _parsed(raw)
        is_ours = about["model"] == model_of(llama)
        about["report"] = _report(about["report"])
        about["kept_shares"] = _shares(about["kept_shares"], about["n_compressed"])
        if tokens and not 0 <= min(tokens) <= max(tokens) < llama.n_vocab():
            raise ValueError("no tokens")
    except (struct.error, ValueError, LookupError, TypeError, OverflowError, RecursionError) as error:
        raise StateError("Unable to restore slot: invalid slot save file") from error
    if not is_ours:
        raise StateError("Unable to restore slot: it was saved by another model")
    return tokens, about, data, len(raw)


def _told(report: KVReport | None) -> dict[str, Any] | None:
    return None if report is None else {**vars(report), "n_kept": report.n_kept.tolist()}


def _report(told: dict[str, Any] | None) -> KVReport | None:
    """Returns the report that ``_told`` has written. Raises ValueError or TypeError if it is invalid."""
    if told is None:
        return None
    kinds = {field.name: int if field.type == "int" else float for field in fields(KVReport)}
    numbers = {name: kinds[name](value) for name, value in told.items() if name != "n_kept"}
    report = KVReport(**numbers, n_kept=np.array(told["n_kept"], dtype=np.int64))  # type: ignore[arg-type]
    if report.n_tokens < 1 or report.n_kept.ndim != 1 or not report.n_kept.size:
        raise ValueError("no context")
    return report


def _shares(told: list[float], n_tokens: int) -> FloatArray:
    """Returns the share of every token, or an empty array if the shares were unknown."""
    shares: FloatArray = np.array(told, dtype=np.float32)
    if shares.shape not in ((0,), (n_tokens,)) or not np.isfinite(shares).all():
        raise ValueError("no shares")
    return shares


def _parsed(raw: bytes) -> tuple[list[int], dict[str, Any], bytes]:
    """Returns tokens, properties and the cache. Raises ValueError and others if it is not one of our files."""
    magic, version, n_words = struct.unpack_from("<III", raw)
    payload = struct.unpack_from(f"<{n_words}i", raw, 12)
    if (magic, version) != (MAGIC, VERSION):
        raise ValueError("another kind of file")
    # a bare list of tokens is allowed as well
    tokens = list(payload[3 : 3 + payload[2]]) if payload[:1] == MARK[:1] else list(payload)
    at = 12 + 4 * n_words
    (n_head,) = struct.unpack_from("<I", raw, at + len(OURS))
    begin = at + len(OURS) + 4
    about, data = json.loads(raw[begin : begin + n_head]), raw[begin + n_head :]
    if raw[at : at + len(OURS)] != OURS or about["sha256"] != _digest(tokens, data):
        raise ValueError("damaged")
    kinds = {"n_windows": int, "n_compressed": int, "composed_by": str, "is_document": bool}
    if any(type(about[name]) is not kind for name, kind in kinds.items()):
        raise ValueError("no numbers")
    if not 0 <= about["n_windows"] <= len(data) or not 0 <= about["n_compressed"] <= len(tokens):
        raise ValueError("numbers that cannot be")
    return tokens, about, data


def _digest(tokens: list[int], data: bytes) -> str:
    digest = hashlib.sha256(struct.pack(f"<{len(tokens)}i", *tokens))
    digest.update(data)
    return digest.hexdigest()


def model_of(llama: SlotLlama) -> str:
    """Returns a text that tells models apart. llama.cpp checks the cache's layout itself."""
    model = llama._model
    return f"{model.desc()} {model.n_params()} {model.size()} {llama.n_vocab()}"
