"""POST /kv/compress: compresses a document for later requests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request

from ..api.errors import invalid
from ..api.parts import compression
from ..api.reader import NO_BUDGET
from ..api.schemas import CompressRequest
from ..api.streams import while_connected
from ..server import Serving
from ..slots.job import Job
from ..slots.slot import Slot
from ..waiting import run

router = APIRouter()


@router.post("/kv/compress")
async def compress(server: Serving, http: Request, request: CompressRequest) -> dict[str, Any]:
    """Read and compress a document now. Later requests can use its ``id`` as ``kv_prefix``."""
    prompt = request.prompt
    read = server.reader.tokens if isinstance(prompt, str) else server.reader.mixed
    tokens = await server.aside(read, prompt)
    if len(tokens) >= server.llama.n_ctx():
        raise server.too_long(tokens)
    method = await server.aside(server.reader.method, request.kv_compress)
    if method is None:
        raise invalid(NO_BUDGET)
    # compress all tokens: what follows belongs to later requests
    method = replace(method, keep_last=0)

    def work(slot: Slot) -> dict[str, Any]:
        report = slot.llama.compress_prompt(tokens, method)
        return {"id_slot": slot.id, "n_tokens": len(tokens), "kv": compression(report)}

    job = Job(work, tokens, n_tokens=len(tokens), method=method)
    told = await while_connected(http, run(server.engine, job))
    return {"id": server.prefixes.add(tokens), **told}
