"""Routes for documents: read and compressed once, for any number of conversations."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import asdict, replace
from typing import Any

from fastapi import APIRouter, Request, Response

from ...methods import Method
from ...methods.continuing import choice_of
from ...support.progress import Progress
from ..api.errors import ApiError, invalid
from ..api.parts import compression
from ..api.reader import NO_BUDGET
from ..api.schemas import DocumentRequest
from ..api.streams import JSONResponse, event_stream, while_connected
from ..chat.documents import document_prompt, found_document, text_and_title
from ..server import Server, Serving
from ..slots.documents import Document, document_id
from ..slots.job import Job
from ..slots.saved import SlotFile
from ..slots.slot import Slot
from ..waiting import Tell, watched

router = APIRouter()


@router.get("/kv/documents")
def documents(server: Serving) -> dict[str, Any]:
    """Returns the documents, the latest first."""
    return {"documents": [_told(document, file) for document, file in server.engine.stores.documents.all()]}


@router.get("/kv/documents/{name}")
def document(server: Serving, name: str) -> dict[str, Any]:
    """Returns a document with its text."""
    return asdict(found_document(server, name))


@router.delete("/kv/documents/{name}")
def forget(server: Serving, name: str) -> dict[str, str]:
    found_document(server, name)
    server.engine.stores.documents.remove(name)
    return {"deleted": name}


@router.post("/kv/documents")
async def read(server: Serving, http: Request, request: DocumentRequest) -> Response:
    """Read and compress a document now, or find it; a chat begins with it if ``kv_documents`` names its ``id``."""
    method = await server.aside(server.reader.method, request.kv_compress)
    if method is None:
        raise invalid(NO_BUDGET)
    chunks = _read(server, request, replace(method, keep_last=0, min_tokens=1))
    if request.stream:
        return await event_stream(http, chunks, done=False)
    return JSONResponse(await while_connected(http, _last(chunks)))


async def _last(chunks: AsyncGenerator[dict[str, Any], None]) -> dict[str, Any]:
    async with aclosing(chunks) as told:
        return [chunk async for chunk in told][-1]


async def _read(server: Server, request: DocumentRequest, method: Method) -> AsyncGenerator[dict[str, Any], None]:
    """Yields the progress of reading, and the document at the end."""
    shelf = server.engine.stores.documents
    assert shelf is not None  # the engine has loaded the model
    text, title = await server.aside(text_and_title, request)
    name = document_id(text, request.system, choice_of(method))
    known = next((pair for pair in shelf.all() if pair[0].id == name), None)
    if known is not None:
        yield _told(*known)
        return
    prompt = await server.aside(document_prompt, server, text, request.system)
    tokens = await server.aside(server.reader.tokens, prompt)
    if len(tokens) >= server.llama.n_ctx():
        raise server.too_long(tokens)

    def job(tell: Tell) -> Job:
        def work(slot: Slot) -> None:
            report = slot.llama.compress_prompt(tokens, method, tell)
            shelf.add(slot.llama, Document(
                id=name, title=title, text=text,
                system=request.system, created=0, kv=compression(report),
                kv_compress=None if request.kv_compress is None else request.kv_compress.model_dump(exclude_none=True),
            ))  # fmt: skip

        return Job(work, tokens, n_tokens=len(tokens), method=method)

    async with aclosing(watched(server.engine, job)) as told:
        async for step in told:
            if isinstance(step, Progress):
                yield {"prompt_progress": {
                    "step": step.step, "total": step.n_total, "processed": step.n_done, "kv_bytes": step.kv_bytes
                }}  # fmt: skip
    done = next((pair for pair in shelf.all() if pair[0].id == name), None)
    if done is None:
        raise ApiError(404, "the document was deleted while it was read")
    yield _told(*done)


def _told(document: Document, file: SlotFile) -> dict[str, Any]:
    kv = {name: value for name, value in document.kv.items() if name != "n_kept"}
    return {
        "id": document.id, "title": document.title, "system": document.system, "created": document.created,
        "n_tokens": len(file.context), "n_bytes": file.n_bytes, "kv": kv,
    }  # fmt: skip
