"""Routes for slots: their state, their compressed contexts, their files."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request

from ...errors import StateError
from ...support.text_stream import TextStream
from ..api.errors import ApiError, invalid, not_supported
from ..api.state import slot_state
from ..api.streams import while_connected
from ..server import Server, Serving
from ..slots.job import Job
from ..slots.saved import n_tokens_of, restore, save
from ..slots.slot import Slot
from ..waiting import run

router = APIRouter()


def _check_slots(server: Server) -> None:
    if not server.options.endpoint_slots:
        raise not_supported("This server does not support slots endpoint. Start it with `--slots`")


@router.get("/slots")
async def slots(server: Serving, fail_on_no_slot: int = 0) -> list[dict[str, Any]]:
    _check_slots(server)
    if fail_on_no_slot and server.engine.n_busy == len(server.engine.slots):
        raise ApiError(503, "no slot available")
    return [slot_state(slot) for slot in server.engine.slots]


@router.get("/kv/slots")
async def kv_slots(server: Serving) -> list[dict[str, Any]]:
    """Returns all slots, most recently used first."""
    _check_slots(server)
    ordered = sorted(server.engine.slots, key=lambda slot: (slot.is_idle, -slot.last_used))
    return [slot_state(slot) for slot in ordered]


@router.get("/kv/slots/{id_slot}")
def kv_slot(server: Serving, id_slot: int) -> dict[str, Any]:
    """Returns the texts of the tokens in a slot's compressed context, and for each the share of heads that keep it."""
    _check_slots(server)
    if not 0 <= id_slot < len(server.engine.slots):
        raise invalid("Invalid slot ID")
    llama = server.engine.slots[id_slot].llama
    shares, tokens = llama.kept_shares, llama.held.context
    stream = TextStream()  # a character that spans tokens is in the piece of its last byte
    pieces = [stream.add(llama.piece(token, special=True)) for token in tokens[: len(shares)]]
    if pieces:
        pieces[-1] += stream.end()
    return {"id": id_slot, "pieces": pieces, "shares": [round(float(share), 4) for share in shares]}


FILENAME = {"type": "object", "properties": {"filename": {"type": "string"}}}


@router.post("/slots/{id_slot}", openapi_extra={"requestBody": {"content": {"application/json": {"schema": FILENAME}}}})
async def slot_action(server: Serving, http: Request, id_slot: str, action: str = "") -> dict[str, Any]:
    folder = server.options.slot_save_path
    if folder is None:
        raise not_supported("This server does not support slots action. Start it with `--slot-save-path`")
    if not id_slot.isdecimal():
        raise invalid("Invalid slot ID")
    if action not in ("save", "restore", "erase"):
        raise invalid("Invalid action")
    number = int(id_slot) % len(server.engine.slots)
    if action == "erase":
        job = Job(lambda slot: _erase(server, slot), id_slot=number)
    else:
        file = folder / slot_filename(await _filename(http))
        work = _save if action == "save" else _restore
        n_tokens = await server.aside(_n_tokens, file) if action == "restore" else 0
        job = Job(lambda slot: work(slot, file), id_slot=number, n_tokens=n_tokens)
    return dict(await while_connected(http, run(server.engine, job)))


async def _filename(http: Request) -> str:
    try:
        name = json.loads(await http.body())["filename"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise invalid("Invalid filename") from error
    return name if isinstance(name, str) else ""


def _save(slot: Slot, file: Path) -> dict[str, Any]:
    start = time.perf_counter()
    saved = save(slot.llama, file)
    return {
        "id_slot": slot.id, "filename": file.name, "n_saved": saved.n_tokens, "n_written": saved.n_bytes,
        "timings": {"save_ms": 1000 * (time.perf_counter() - start)},
    }  # fmt: skip


def _n_tokens(file: Path) -> int:
    try:
        return n_tokens_of(file)
    except StateError as error:
        raise invalid(str(error)) from error


def _restore(slot: Slot, file: Path) -> dict[str, Any]:
    start = time.perf_counter()
    try:
        saved = restore(slot.llama, file)
    except StateError as error:
        raise invalid(str(error)) from error
    return {
        "id_slot": slot.id, "filename": file.name, "n_restored": saved.n_tokens, "n_read": saved.n_bytes,
        "timings": {"restore_ms": 1000 * (time.perf_counter() - start)},
    }  # fmt: skip


def _erase(server: Server, slot: Slot) -> dict[str, Any]:
    n_erased = slot.llama.n_tokens
    server.engine.stores.memory.drop(slot.llama.held)
    slot.llama.reset()
    return {"id_slot": slot.id, "n_erased": n_erased}


def slot_filename(name: str) -> str:
    """Returns ``name`` if it is a file name and not a path (fs_validate_filename).

    Raises:
        ApiError: it is not a valid file name.
    """
    bad = not name or len(name) > 255 or name != name.strip(" ") or name.endswith(".") or ".." in name
    if bad or not name.isprintable() or re.search(r'[\x00-\x1f\x7f/\\:*?"<>|]', name):
        raise invalid("Invalid filename")
    return name
