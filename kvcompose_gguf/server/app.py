"""The routes of llama-server, as an ASGI application."""

from __future__ import annotations

import asyncio
import json
import mimetypes
import re
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from .. import __version__
from ..errors import StateError
from ..kernels.types import FloatArray
from . import formats
from .chats import answer_chat, chat_prompt
from .completions import complete
from .embeddings import native_body, normalized, openai_body, texts_of
from .engine import Engine, Job
from .errors import RETRY_AFTER, ApiError, api_error, invalid, not_supported
from .gate import Gate
from .generation import Generation
from .infill import infill_prompt
from .options import ServeOptions
from .saved import restore, save
from .schemas import (
    ChatRequest,
    CompletionRequest,
    CompressRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    InfillRequest,
    TokenizeRequest,
)
from .server import Server
from .service import run
from .slots import Slot
from .streams import while_connected
from .text import TextStream

#: routes that llama-server has and this one does not, with the reason
NOT_OFFERED = {
    "/rerank": "reranking", "/reranking": "reranking", "/v1/rerank": "reranking", "/v1/reranking": "reranking",
    "/responses": "the responses API", "/v1/responses": "the responses API",
    "/v1/messages": "Anthropic's API", "/v1/messages/count_tokens": "Anthropic's API",
    "/v1/audio/transcriptions": "audio", "/audio/transcriptions": "audio", "/tools": "tools of its own",
    "/cors-proxy": "a proxy", "/models/load": "loading other models", "/models/unload": "loading other models",
    "/v1/stream": "resuming streams", "/v1/streams/lookup": "resuming streams",
    "/v1/chat/completions/control": "controlling a completion",
}  # fmt: skip


def create_app(options: ServeOptions, make_engine: Callable[[], Engine]) -> Any:
    """The application; the model is loaded when it starts."""
    server: Server

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        nonlocal server
        engine = await asyncio.to_thread(make_engine)
        try:
            server = Server(options, engine)
            yield
        finally:
            await asyncio.to_thread(engine.close)

    app = FastAPI(title="kvcompose", version=__version__, lifespan=life)

    #
    # errors
    #

    @app.exception_handler(ApiError)
    async def on_api_error(http: Request, error: ApiError) -> JSONResponse:
        headers = {"Retry-After": str(RETRY_AFTER)} if error.code == 503 else None
        return JSONResponse(error.body(), error.code, headers)

    @app.exception_handler(RequestValidationError)
    async def on_bad_body(http: Request, error: RequestValidationError) -> JSONResponse:
        problems = [f"Field '{'.'.join(map(str, e['loc'][1:]))}': {e['msg']}" for e in error.errors()]
        wrong = invalid("; ".join(problems[:3]))
        return JSONResponse(wrong.body(), wrong.code)

    @app.exception_handler(HTTPException)
    async def on_http_error(http: Request, error: HTTPException) -> JSONResponse:
        if error.status_code in (404, 405):
            wrong = ApiError(404, "File Not Found")
        else:
            wrong = ApiError(error.status_code, str(error.detail))
        return JSONResponse(wrong.body(), wrong.code)

    @app.exception_handler(Exception)
    async def on_error(http: Request, error: Exception) -> JSONResponse:
        wrong = api_error(error)
        return JSONResponse(wrong.body(), wrong.code)

    #
    # the server
    #

    @app.get("/health")
    @app.get("/v1/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    def page_file(name: str) -> Callable[[], Any]:
        async def route() -> Response:
            if not options.ui:
                raise ApiError(404, "File Not Found")
            kind = mimetypes.guess_type(name)[0]
            # nothing from elsewhere, and no script that is not ours
            policy = {"Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'"}
            return Response(files(__package__).joinpath("page", name).read_bytes(), media_type=kind, headers=policy)

        return route

    for path, name in (("/", "index.html"), *((f"/{name}", name) for name in ("index.html", "page.css", "page.js"))):
        app.add_api_route(path, page_file(name), include_in_schema=False)

    @app.get("/props")
    async def props() -> dict[str, Any]:
        what = Generation(tokens=(), sampling=options.sampling)
        params = formats.settings(what, stream=False, timings_per_token=False)
        caps = {"supports_tools": server.template.has_tools, "supports_system_role": True}
        return {
            "default_generation_settings": {"params": params, "n_ctx": server.llama.n_ctx()},
            "total_slots": len(server.engine.slots), "model_alias": options.model_name,
            "model_path": str(options.model_path),
            "modalities": {"vision": False, "video": False, "audio": False}, "media_marker": "",
            "endpoint_slots": options.endpoint_slots, "endpoint_props": False,
            "endpoint_metrics": options.endpoint_metrics, "ui": options.ui, "ui_settings": {},
            "chat_template": server.template.source, "chat_template_caps": caps,
            "bos_token": server.text(server.llama.token_bos()), "eos_token": server.text(server.llama.token_eos()),
            "build_info": server.fingerprint, "is_sleeping": False, "cors_proxy_enabled": False,
            "kv_compress": repr(options.method) if options.method is not None else None,
        }  # fmt: skip

    @app.post("/props")
    async def post_props() -> None:
        raise not_supported("This server does not support changing global properties.")

    @app.get("/models")
    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        llama, name = server.llama, options.model_name
        meta = {
            "vocab_type": llama._model.vocab_type(), "n_vocab": llama.n_vocab(), "n_ctx": llama.n_ctx(),
            "n_ctx_train": llama.n_ctx_train, "n_embd": llama.n_embd(), "n_params": llama._model.n_params(),
            "size": llama._model.size(), "ftype": llama._model.desc(),
        }  # fmt: skip
        details = {
            "parent_model": "", "format": "gguf", "family": "", "families": [""], "parameter_size": "",
            "quantization_level": "",
        }  # fmt: skip
        return {
            "models": [{
                "name": name, "model": name, "modified_at": "", "size": "", "digest": "", "type": "model",
                "description": "", "tags": [""], "capabilities": ["completion"], "parameters": "", "details": details,
            }],
            "object": "list",
            "data": [{
                "id": name, "aliases": options.aliases, "tags": [], "object": "model", "created": server.created,
                "owned_by": "llamacpp", "meta": meta,
            }],
        }  # fmt: skip

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        if not options.endpoint_metrics:
            raise not_supported("This server does not support metrics endpoint. Start it with `--metrics`")
        start = {"Process-Start-Time-Unix": str(server.created)}
        return Response(server.metrics.text(), media_type="text/plain; version=0.0.4", headers=start)

    def check_slots() -> None:
        if not options.endpoint_slots:
            raise not_supported("This server does not support slots endpoint. Start it with `--slots`")

    @app.get("/slots")
    async def slots(fail_on_no_slot: int = 0) -> list[dict[str, Any]]:
        check_slots()
        if fail_on_no_slot and server.engine.n_busy == len(server.engine.slots):
            raise ApiError(503, "no slot available")
        return [_slot(slot) for slot in server.engine.slots]

    @app.post("/slots/{id_slot}")
    async def slot_action(http: Request, id_slot: str, action: str = "") -> dict[str, Any]:
        if options.slot_save_path is None:
            raise not_supported("This server does not support slots action. Start it with `--slot-save-path`")
        if not id_slot.isdecimal():
            raise invalid("Invalid slot ID")
        if action not in ("save", "restore", "erase"):
            raise invalid("Invalid action")
        number = int(id_slot) % len(server.engine.slots)
        if action == "erase":
            job = Job(_erase, id_slot=number)
        else:
            file = options.slot_save_path / slot_filename(await _filename(http))
            work = _save if action == "save" else _restore
            # what a file holds is not known before it is read
            n_tokens = server.llama.n_ctx() if action == "restore" else 0
            job = Job(lambda slot: work(slot, file), id_slot=number, n_tokens=n_tokens)
        return dict(await while_connected(http, run(server.engine, job)))

    #
    # tokens
    #

    @app.post("/tokenize")
    def tokenize(request: TokenizeRequest) -> dict[str, Any]:
        content, read = request.content, server.reader
        if isinstance(content, str):
            tokens = read.tokens(content, request.parse_special, request.add_special) if content else ()
        else:
            tokens = read.mixed(content, request.add_special, request.parse_special)
        if not request.with_pieces:
            return {"tokens": list(tokens)}
        return {"tokens": [{"id": token, "piece": _piece(server.llama.piece(token, special=True))} for token in tokens]}

    @app.post("/detokenize")
    def detokenize(request: DetokenizeRequest) -> dict[str, str]:
        if any(not 0 <= token < server.llama.n_vocab() for token in request.tokens):
            raise invalid("Prompt contains invalid tokens")
        return {"content": formats.prompt_text(server.llama, request.tokens)}

    @app.post("/apply-template")
    async def apply_template(request: ChatRequest) -> dict[str, str]:
        return {"prompt": (await server.aside(chat_prompt, server, request))[0]}

    @app.post("/chat/completions/input_tokens")
    @app.post("/v1/chat/completions/input_tokens")
    async def input_tokens(request: ChatRequest) -> dict[str, Any]:
        prompt, *_ = await server.aside(chat_prompt, server, request)
        return {
            "input_tokens": len(await server.aside(server.reader.tokens, prompt)),
            "object": "response.input_tokens",
        }

    #
    # generations
    #

    @app.post("/completion")
    @app.post("/completions")
    async def completion(http: Request, request: CompletionRequest) -> Response:
        prompts = partial(server.reader.prompts, request.prompt)
        return await complete(server, http, request, prompts, formats.native, formats.native_part, done=False)

    @app.post("/v1/completions")
    async def openai_completion(http: Request, request: CompletionRequest) -> Response:
        prompts = partial(server.reader.prompts, request.prompt)
        return await complete(server, http, request, prompts, formats.text_completion, formats.text_completion_part)

    @app.post("/infill")
    async def infill(http: Request, request: InfillRequest) -> Response:
        tokens = partial(
            infill_prompt, server.llama, server.reader, request.input_prefix, request.input_suffix, request.input_extra,
            request.prompt, request.n_predict or 0,
        )  # fmt: skip
        return await complete(
            server, http, request, lambda: [tokens()], formats.native, formats.native_part, done=False
        )

    @app.post("/embedding")
    @app.post("/embeddings")
    async def embedding(http: Request, request: EmbeddingRequest) -> JSONResponse:
        return JSONResponse(native_body((await _embedded(server, http, request))[0]))

    @app.post("/v1/embeddings")
    async def openai_embedding(http: Request, request: EmbeddingRequest) -> JSONResponse:
        if server.engine.embedder is not None and not server.engine.embedder.is_pooled:
            raise invalid("Pooling type 'none' is not OAI compatible. Please use a different pooling type")
        vectors, n_tokens = await _embedded(server, http, request)
        if request.input is None:
            return JSONResponse(native_body(vectors))
        as_base64 = request.encoding_format == "base64"
        return JSONResponse(openai_body(vectors, n_tokens, request.model or options.model_name, as_base64))

    @app.post("/chat/completions")
    @app.post("/v1/chat/completions")
    async def chat_completion(http: Request, request: ChatRequest) -> Response:
        return await answer_chat(server, http, request)

    @app.post("/kv/compress")
    async def compress(http: Request, request: CompressRequest) -> dict[str, Any]:
        prompt = request.prompt
        read = server.reader.tokens if isinstance(prompt, str) else server.reader.mixed
        tokens = await server.aside(read, prompt)
        method = await server.aside(server.reader.method, request.kv_compress)
        if method is None:
            raise invalid("kv_compress: the server was started without a budget, give one")
        # all of it, and at once: what follows is another request's
        method = replace(method, keep_last=0)

        def work(slot: Slot) -> dict[str, Any]:
            report = slot.llama.compress_prompt(tokens, method)
            return {"id_slot": slot.id, "n_tokens": len(tokens), "kv": formats.compression(report)}

        job = Job(work, tokens, n_tokens=len(tokens))
        return dict(await while_connected(http, run(server.engine, job)))

    @app.get("/kv/slots")
    async def kv_slots() -> list[dict[str, Any]]:
        """Slots, those whose work was latest first."""
        check_slots()
        slots = sorted(server.engine.slots, key=lambda slot: (slot.is_idle, -slot.last_used))
        return [_slot(slot) for slot in slots]

    @app.get("/kv/slots/{id_slot}")
    def kv_slot(id_slot: int) -> dict[str, Any]:
        """The compressed context of a slot: its tokens' texts, and the share of heads that keeps each of them."""
        check_slots()
        if not 0 <= id_slot < len(server.engine.slots):
            raise invalid("Invalid slot ID")
        llama = server.engine.slots[id_slot].llama
        shares, tokens = llama.kept_shares, llama.context_tokens
        stream = TextStream()  # a character stands where its last byte is
        pieces = [stream.add(llama.piece(token, special=True)) for token in tokens[: len(shares)]]
        if pieces:
            pieces[-1] += stream.end()
        return {"id": id_slot, "pieces": pieces, "shares": [round(float(share), 4) for share in shares]}

    def refuse(reason: str) -> Callable[[], Any]:
        async def route() -> None:
            raise not_supported(f"This server does not support {reason}")

        return route

    for path, reason in NOT_OFFERED.items():
        app.add_api_route(path, refuse(reason), methods=["GET", "POST", "DELETE"], include_in_schema=False)

    # without a key, pages of other hosts could read what was asked here
    return Gate(app, options.api_keys, options.max_body_bytes, local_only=not options.api_keys)


#
# parts
#


def _slot(slot: Slot) -> dict[str, Any]:
    llama = slot.llama
    body: dict[str, Any] = {
        "id": slot.id, "n_ctx": llama.n_ctx(), "speculative": False, "is_processing": not slot.is_idle
    }  # fmt: skip
    if slot.n_decodes:
        report = llama.kv_report if llama.n_context else None
        body |= {
            "n_prompt_tokens": llama.n_tokens, "next_token": [{"has_next_token": not slot.is_idle, "n_remain": -1}],
            "kv_bytes": slot.kv_bytes, "kv": formats.compression(report) if report is not None else None,
        }  # fmt: skip
    return body


async def _embedded(server: Server, http: Request, request: EmbeddingRequest) -> tuple[list[FloatArray], int]:
    """Vectors of a request's texts, and how many tokens these have."""
    embedder = server.engine.embedder
    if embedder is None:
        raise not_supported("This server does not support embeddings. Start it with `--embeddings`")
    texts = await server.aside(texts_of, server.reader, request.content if request.input is None else request.input)
    vectors = [await while_connected(http, server.aside(embedder.embed, tokens)) for tokens in texts]
    if embedder.is_pooled:
        vectors = [normalized(rows, request.embd_normalize) for rows in vectors]
    return vectors, sum(map(len, texts))


async def _filename(http: Request) -> str:
    try:
        name = json.loads(await http.body())["filename"]
    except (ValueError, KeyError, TypeError) as error:
        raise invalid("Invalid filename") from error
    return name if isinstance(name, str) else ""


def _save(slot: Slot, file: Path) -> dict[str, Any]:
    start = time.perf_counter()
    saved = save(slot.llama, file)
    return {
        "id_slot": slot.id, "filename": file.name, "n_saved": saved.n_tokens, "n_written": saved.n_bytes,
        "timings": {"save_ms": 1000 * (time.perf_counter() - start)},
    }  # fmt: skip


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


def _erase(slot: Slot) -> dict[str, Any]:
    n_erased = slot.llama.n_tokens
    slot.llama.reset()
    return {"id_slot": slot.id, "n_erased": n_erased}


def _piece(raw: bytes) -> str | list[int]:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return list(raw)


def slot_filename(name: str) -> str:
    """A file's name that is no path (fs_validate_filename).

    Raises:
        ApiError: it is not one.
    """
    bad = not name or len(name) > 255 or name != name.strip(" ") or name.endswith(".") or ".." in name
    if bad or re.search(r'[\x00-\x1f\x7f/\\:*?"<>|]', name):
        raise invalid("Invalid filename")
    return name
