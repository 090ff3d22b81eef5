"""The routes of llama-server, as an ASGI application."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from .. import __version__
from ..environment import system
from ..errors import StateError
from . import chat, formats
from .engine import Engine, Job, milliseconds
from .errors import RETRY_AFTER, ApiError, api_error, invalid, not_supported
from .formats import About
from .gate import Gate
from .generation import End, Generation, Progress, Token
from .metrics import Metrics
from .options import ServeOptions
from .params import Reader, grammar_of
from .saved import restore, save
from .schemas import (
    ChatRequest,
    CompletionRequest,
    CompressRequest,
    DetokenizeRequest,
    GenerationRequest,
    TokenizeRequest,
)
from .service import Step, run, steps
from .slots import Slot

#: routes that llama-server has and this one does not, with the reason
NOT_OFFERED = {
    "/rerank": "reranking", "/reranking": "reranking", "/v1/rerank": "reranking", "/v1/reranking": "reranking",
    "/embedding": "embeddings", "/embeddings": "embeddings", "/v1/embeddings": "embeddings",
    "/infill": "infill", "/responses": "the responses API", "/v1/responses": "the responses API",
    "/v1/messages": "Anthropic's API", "/v1/messages/count_tokens": "Anthropic's API",
    "/v1/audio/transcriptions": "audio", "/audio/transcriptions": "audio", "/tools": "tools of its own",
    "/cors-proxy": "a proxy", "/models/load": "loading other models", "/models/unload": "loading other models",
    "/v1/stream": "resuming streams", "/v1/streams/lookup": "resuming streams",
    "/v1/chat/completions/control": "controlling a completion",
}  # fmt: skip


class Server:
    """A model behind routes.

    Args:
        options: what it is started with.
        engine: of the model's slots; it is closed with the application.
    """

    def __init__(self, options: ServeOptions, engine: Engine) -> None:
        self.options, self.engine = options, engine
        self.llama = engine.llama
        self.metrics = Metrics(engine)
        self.reader = Reader(self.llama, options)
        self.created = int(time.time())
        self.fingerprint = f"b{__version__}-{system()['llama_cpp_commit'][:9]}"
        self.template = self._template()

    def _template(self) -> chat.ChatTemplate:
        source = self.options.chat_template or self.llama.metadata.get("tokenizer.chat_template") or "chatml"
        bos, eos = (self._text(token) for token in (self.llama.token_bos(), self.llama.token_eos()))
        return chat.ChatTemplate(source, bos, eos)

    def _text(self, token: int) -> str:
        return self.llama.piece(token, special=True).decode("utf-8", "replace") if token >= 0 else ""

    #
    # generations
    #

    def generation(self, request: GenerationRequest, tokens: Sequence[int], grammar: str | None = None) -> Generation:
        """What a request wants, checked as far as it can be without a slot."""
        n_ctx = self.llama.n_ctx()
        if len(tokens) >= n_ctx:
            raise ApiError(
                400, f"request ({len(tokens)} tokens) exceeds the available context size ({n_ctx} tokens), "
                "try increasing it", "exceed_context_size_error", n_prompt_tokens=len(tokens), n_ctx=n_ctx,
            )  # fmt: skip
        what = self.reader.generation(request, tokens, grammar)
        if not what.tokens:
            raise invalid('"prompt" must not be empty')
        return what

    def about(self, request: GenerationRequest, what: Generation, index: int, answer_id: str) -> About:
        """What answers to a request say."""
        return About(
            what=what, llama=self.llama, model=self.options.model_name, fingerprint=self.fingerprint,
            created=int(time.time()), id=answer_id, index=index, verbose=self.options.verbose or request.verbose,
            settings=formats.settings(what, request.stream, request.timings_per_token),
            return_tokens=request.return_tokens, response_fields=tuple(getattr(request, "response_fields", ())),
            logprobs=bool(getattr(request, "logprobs", False)),
        )  # fmt: skip

    async def events(self, what: Generation, id_slot: int = -1) -> AsyncIterator[tuple[int, Step]]:
        """As ``steps``, counted."""
        async for slot, step in steps(self.engine, what, id_slot):
            if isinstance(step, End):
                self.metrics.count(step)
            yield slot, step

    async def finish(self, http: Request, what: Generation, id_slot: int) -> tuple[int, End]:
        """The end of a generation, unless its client goes."""
        end: tuple[int, End] | None = None
        stream = self.events(what, id_slot)
        try:
            last = time.monotonic()
            async for slot, step in stream:
                if isinstance(step, End):
                    end = slot, step
                elif time.monotonic() - last > 0.5:
                    last = time.monotonic()
                    if await http.is_disconnected():
                        raise ApiError(499, "the client has gone")
        finally:
            await stream.aclose()  # type: ignore[attr-defined]
        assert end is not None
        return end


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

    @app.get("/", include_in_schema=False)
    @app.get("/index.html", include_in_schema=False)
    async def page() -> HTMLResponse:
        if not options.ui:
            raise ApiError(404, "File Not Found")
        return HTMLResponse(files(__package__).joinpath("page.html").read_text("utf-8"))

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
            "bos_token": server._text(server.llama.token_bos()), "eos_token": server._text(server.llama.token_eos()),
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

    @app.get("/slots")
    async def slots(fail_on_no_slot: int = 0) -> list[dict[str, Any]]:
        if not options.endpoint_slots:
            raise not_supported("This server does not support slots endpoint. Start it with `--slots`")
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
            return dict(await run(server.engine, Job(_erase, id_slot=number), http.is_disconnected))
        file = options.slot_save_path / slot_filename(await _filename(http))
        work = _save if action == "save" else _restore
        return dict(await run(server.engine, Job(lambda slot: work(slot, file), id_slot=number), http.is_disconnected))

    #
    # tokens
    #

    @app.post("/tokenize")
    async def tokenize(request: TokenizeRequest) -> dict[str, Any]:
        content, read = request.content, server.reader
        if isinstance(content, str):
            tokens = read.tokens(content, request.parse_special, request.add_special) if content else ()
        else:
            tokens = read.mixed(content, request.add_special, request.parse_special)
        if not request.with_pieces:
            return {"tokens": list(tokens)}
        return {"tokens": [{"id": token, "piece": _piece(server.llama.piece(token, special=True))} for token in tokens]}

    @app.post("/detokenize")
    async def detokenize(request: DetokenizeRequest) -> dict[str, str]:
        if any(not 0 <= token < server.llama.n_vocab() for token in request.tokens):
            raise invalid("Prompt contains invalid tokens")
        return {"content": formats.prompt_text(server.llama, request.tokens)}

    @app.post("/apply-template")
    async def apply_template(request: ChatRequest) -> dict[str, str]:
        return {"prompt": _chat_prompt(server, request)[0]}

    @app.post("/chat/completions/input_tokens")
    @app.post("/v1/chat/completions/input_tokens")
    async def input_tokens(request: ChatRequest) -> dict[str, Any]:
        prompt, _ = _chat_prompt(server, request)
        return {"input_tokens": len(server.reader.tokens(prompt)), "object": "response.input_tokens"}

    #
    # generations
    #

    @app.post("/completion")
    @app.post("/completions")
    async def completion(http: Request, request: CompletionRequest) -> Response:
        return await _completions(server, http, request, formats.native, formats.native_part, done=False)

    @app.post("/v1/completions")
    async def openai_completion(http: Request, request: CompletionRequest) -> Response:
        return await _completions(server, http, request, formats.text_completion, formats.text_completion_part)

    @app.post("/chat/completions")
    @app.post("/v1/chat/completions")
    async def chat_completion(http: Request, request: ChatRequest) -> Response:
        return await _chat(server, http, request)

    @app.post("/kv/compress")
    async def compress(http: Request, request: CompressRequest) -> dict[str, Any]:
        prompt = request.prompt
        tokens = server.reader.tokens(prompt) if isinstance(prompt, str) else server.reader.mixed(prompt)
        method = server.reader.method(request.kv_compress)
        if method is None:
            raise invalid("kv_compress: the server was started without a budget, give one")
        # all of it, and at once: what follows is another request's
        method = replace(method, keep_last=0)

        def work(slot: Slot) -> dict[str, Any]:
            report = slot.llama.compress_prompt(tokens, method)
            return {"id_slot": slot.id, "n_tokens": len(tokens), "kv": formats.compression(report)}

        return dict(await run(server.engine, Job(work, tokens), http.is_disconnected))

    def refuse(reason: str) -> Callable[[], Any]:
        async def route() -> None:
            raise not_supported(f"This server does not support {reason}")

        return route

    for path, reason in NOT_OFFERED.items():
        app.add_api_route(path, refuse(reason), methods=["GET", "POST", "DELETE"], include_in_schema=False)

    return Gate(app, options.api_keys, options.max_body_bytes)


#
# completions
#

Whole = Callable[..., dict[str, Any]]


async def _completions(
    server: Server, http: Request, request: CompletionRequest, whole: Whole, part: Whole, done: bool = True
) -> Response:
    prompts = server.reader.prompts(request.prompt)
    n = request.n or 1
    if n > len(server.engine.slots):
        raise invalid(f"Field 'n': Value must be between 1 <= value <= {len(server.engine.slots)}, but got {n}")
    asked = [_child(server.generation(request, tokens), k) for tokens in prompts for k in range(n)]
    answer_id = f"chatcmpl-{chat.random_id()}"
    abouts = [server.about(request, what, index, answer_id) for index, what in enumerate(asked)]
    if request.stream:
        chunks = _merged([_completion_chunks(server, request, about, whole, part) for about in abouts])
        return await _event_stream(chunks, done)
    ends = await asyncio.gather(*(server.finish(http, about.what, request.id_slot) for about in abouts))
    bodies = [whole(replace(about, id_slot=slot), end) for about, (slot, end) in zip(abouts, ends, strict=True)]
    if whole is formats.text_completion:
        return JSONResponse({**bodies[0], "choices": [choice for body in bodies for choice in body["choices"]]})
    return JSONResponse(bodies[0] if len(bodies) == 1 else bodies)


def _child(what: Generation, k: int) -> Generation:
    """One of several answers to the same prompt: each has its own seed, unless they are random."""
    from .sampling import RANDOM_SEED

    if k == 0 or what.sampling.seed == RANDOM_SEED:
        return what
    return replace(what, sampling=replace(what.sampling, seed=(what.sampling.seed + k) % 2**32))


async def _completion_chunks(
    server: Server, request: GenerationRequest, about: About, whole: Whole, part: Whole
) -> AsyncIterator[dict[str, Any]]:
    async for slot, step in server.events(about.what, request.id_slot):
        if isinstance(step, End):
            yield whole(replace(about, id_slot=slot), step, streamed=True)
        elif isinstance(step, Token) or request.return_progress:
            yield part(about, step, request.timings_per_token)


#
# chat
#


def _chat_prompt(server: Server, request: ChatRequest) -> tuple[str, list[dict[str, Any]]]:
    """The prompt of a chat, and the tools that the model may call."""
    messages = chat.check_messages(request.messages)
    tools, _ = chat.check_tools(request.tools, request.tool_choice, server.template)
    if tools and request.grammar:
        raise invalid("Cannot use custom grammar constraints with tools.")
    is_continued = bool(messages) and messages[-1]["role"] == "assistant"
    if is_continued and len(messages) > 1 and messages[-2]["role"] == "assistant":
        raise invalid("Cannot have 2 or more assistant messages at the end of the list.")
    if request.continue_final_message and request.add_generation_prompt:
        raise invalid("Cannot set both add_generation_prompt and continue_final_message to true.")
    if is_continued and messages[-1].get("tool_calls"):
        raise invalid("Cannot continue an assistant message that contains tool calls.")
    now = time.localtime()
    variables: dict[str, Any] = {
        "enable_thinking": True, "datetime": time.strftime("%b %d %Y", now),
        "date_string": time.strftime("%d %b %Y", now),
        **(request.chat_template_kwargs or {}),
    }  # fmt: skip
    if isinstance(variables["enable_thinking"], str):
        raise invalid('invalid type for "enable_thinking" (expected boolean, got string)')
    if tools:
        variables["tools"] = tools
    for name in ("messages", "add_generation_prompt", "bos_token", "eos_token"):
        variables.pop(name, None)
    if not is_continued:
        return server.template.render(messages, request.add_generation_prompt, **variables), tools
    prompt = server.template.render(messages[:-1], True, **variables)
    return prompt + messages[-1]["content"], tools


async def _chat(server: Server, http: Request, request: ChatRequest) -> Response:
    prompt, tools = _chat_prompt(server, request)
    _, choice = chat.check_tools(request.tools, request.tool_choice, server.template)
    if request.top_logprobs and not request.logprobs:
        raise invalid("top_logprobs requires logprobs to be set to true")
    if request.logprobs and request.n_probs is None:
        request.n_probs = 20 if request.top_logprobs is None else max(1, request.top_logprobs)
    grammar = _chat_grammar(request, tools if choice == "required" else [])
    if choice == "required":
        prompt += chat.CALL_BEGIN + "\n"
    n = request.n or 1
    if n > len(server.engine.slots):
        raise invalid(f"Field 'n': Value must be between 1 <= value <= {len(server.engine.slots)}, but got {n}")
    what = server.generation(request, server.reader.tokens(prompt), grammar)
    answer_id = f"chatcmpl-{chat.random_id()}"
    abouts = [server.about(request, _child(what, k), k, answer_id) for k in range(n)]
    reads_calls = bool(tools) and choice != "none"
    begun = chat.CALL_BEGIN if choice == "required" else ""
    if request.stream:
        chunks = _merged([_chat_chunks(server, request, about, reads_calls, begun) for about in abouts])
        return await _event_stream(chunks, done=True)
    ends = await asyncio.gather(*(server.finish(http, about.what, request.id_slot) for about in abouts))
    bodies = []
    for about, (slot, end) in zip(abouts, ends, strict=True):
        message = chat.parse_calls(begun + end.text) if reads_calls else chat.Message(end.text)
        bodies.append(formats.chat_completion(replace(about, id_slot=slot), end, message.content, message.tool_calls))
    return JSONResponse({**bodies[0], "choices": [choice for body in bodies for choice in body["choices"]]})


def _chat_grammar(request: ChatRequest, forced: list[dict[str, Any]]) -> str | None:
    """GBNF of a response format, or of a call of one of the ``forced`` tools; None: the request's own."""
    if forced:
        return grammar_of(chat.call_schema(forced))
    kind = (request.response_format or {}).get("type", "text")
    schema = request.json_schema
    if kind == "json_object":
        schema = (request.response_format or {}).get("schema", {} if schema is None else schema)
    elif kind == "json_schema":
        wrapped = (request.response_format or {}).get("json_schema")
        if not isinstance(wrapped, dict):
            raise invalid("response_format.json_schema is needed, an object with a schema")
        schema = wrapped.get("schema", {})
    elif kind not in ("text", "", None):
        raise invalid(f'response_format type must be one of "text" or "json_object", but got: {kind}')
    if schema is not None and request.grammar:
        raise invalid("Cannot use both json_schema and grammar")
    return None if schema is None else grammar_of(schema)


async def _chat_chunks(
    server: Server, request: ChatRequest, about: About, reads_calls: bool, begun: str
) -> AsyncIterator[dict[str, Any]]:
    has_role, held = False, begun
    async for _, step in server.events(about.what, request.id_slot):
        if isinstance(step, Progress):
            if request.return_progress:
                has_role = True
                yield formats.chat_part(about, {"role": "assistant", "content": None}, **formats.extras(step, False))
            continue
        if not has_role:
            has_role = True
            yield formats.chat_part(about, {"role": "assistant", "content": None})
        if isinstance(step, Token):
            text = step.text
            if reads_calls:
                text, held = _before_calls(held + step.text)
            if text:
                chunk = formats.chat_part(about, {"content": text}, **formats.extras(step, request.timings_per_token))
                if about.logprobs:
                    chunk["choices"][0]["logprobs"] = formats.chat_logprobs(about, step)
                yield chunk
            continue
        calls: tuple[dict[str, Any], ...] = ()
        if reads_calls:
            message = chat.parse_calls(held + step.rest)
            calls = message.tool_calls
            if message.content:
                yield formats.chat_part(about, {"content": message.content})
            for number, call in enumerate(calls):
                yield formats.chat_part(about, {"tool_calls": [{"index": number, **call}]})
        elif step.rest:
            yield formats.chat_part(about, {"content": step.rest})
        timings = {"timings": formats.timings(step.timings, step.report)}
        wants_usage = request.stream_options is not None and request.stream_options.include_usage
        last = formats.chat_part(about, {}, formats.chat_finish(step, calls))
        yield last if wants_usage else last | timings
        if wants_usage:
            yield formats.chat_usage(about, step) | timings


def _before_calls(text: str) -> tuple[str, str]:
    """What may be shown of a text that calls may be in, and what has to wait."""
    at = text.find(chat.CALL_BEGIN)
    if at < 0:
        beginnings = (n for n in range(len(chat.CALL_BEGIN) - 1, 0, -1) if text.endswith(chat.CALL_BEGIN[:n]))
        at = len(text) - next(beginnings, 0)
    return text[:at], text[at:]


#
# streams
#


async def _event_stream(chunks: AsyncIterator[dict[str, Any]], done: bool) -> StreamingResponse:
    """Server-sent events; what goes wrong before the first of them is an ordinary error."""
    first = await anext(chunks)

    async def lines() -> AsyncIterator[bytes]:
        try:
            yield _event(first)
            async for chunk in chunks:
                yield _event(chunk)
            if done:
                yield b"data: [DONE]\n\n"
        except ApiError as error:
            yield _event(error.body())
        finally:
            await chunks.aclose()  # type: ignore[attr-defined]

    return StreamingResponse(lines(), media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body, ensure_ascii=False).encode("utf-8", "replace") + b"\n\n"


async def _merged(streams: Iterable[AsyncIterator[dict[str, Any]]]) -> AsyncIterator[dict[str, Any]]:
    """Whatever comes first of several streams."""
    streams = list(streams)
    waiting = {asyncio.ensure_future(anext(stream)): stream for stream in streams}
    try:
        while waiting:
            ready, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for future in ready:
                stream = waiting.pop(future)
                try:
                    yield future.result()
                except StopAsyncIteration:
                    continue
                waiting[asyncio.ensure_future(anext(stream))] = stream
    finally:
        for future in waiting:
            future.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        for stream in streams:
            await stream.aclose()  # type: ignore[attr-defined]


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
            "kv_bytes": llama.kv_bytes, "kv": formats.compression(report) if report is not None else None,
        }  # fmt: skip
    return body


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
        "timings": {"save_ms": milliseconds(start)},
    }  # fmt: skip


def _restore(slot: Slot, file: Path) -> dict[str, Any]:
    start = time.perf_counter()
    try:
        saved = restore(slot.llama, file)
    except StateError as error:
        raise invalid(str(error)) from error
    return {
        "id_slot": slot.id, "filename": file.name, "n_restored": saved.n_tokens, "n_read": saved.n_bytes,
        "timings": {"restore_ms": milliseconds(start)},
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
