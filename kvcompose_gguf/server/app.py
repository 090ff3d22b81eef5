"""Builds the ASGI application that has llama-server's HTTP interface."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from .. import __version__
from .api.errors import RETRY_AFTER, ApiError, api_error, invalid_fields, not_supported
from .api.streams import JSONResponse
from .gate import Gate
from .options import ServeOptions
from .routes import compress, documents, generate, info, slots, tokens
from .routes.page import page
from .server import Server
from .slots.engine import Engine

#: routes that llama-server has and this server does not, with what they are for
NOT_OFFERED = {
    "/rerank": "reranking", "/reranking": "reranking", "/v1/rerank": "reranking", "/v1/reranking": "reranking",
    "/v1/audio/transcriptions": "audio", "/audio/transcriptions": "audio", "/tools": "tools of its own",
    "/cors-proxy": "a proxy", "/models/load": "loading other models", "/models/unload": "loading other models",
    "/models/sse": "loading other models", "/v1/stream": "resuming streams", "/v1/streams/lookup": "resuming streams",
    "/v1/chat/completions/control": "controlling a completion", "/predict": "Google's prediction API",
}  # fmt: skip


def create_app(
    options: ServeOptions,
    make_engine: Callable[[], Engine],
    on_failure: Callable[[Exception], None] | None = None,
    local_only: bool = False,
) -> Any:
    """Returns the application. Until the model is loaded, it answers 503.

    Args:
        on_failure: called with the error if the model cannot be loaded. None: startup waits for the model and raises.
        local_only: the server listens on loopback addresses only.
    """

    async def load(app: FastAPI) -> Engine | None:
        try:
            engine = await asyncio.to_thread(make_engine)
            try:
                app.state.server = await asyncio.to_thread(Server, options, engine)
            except BaseException:
                await asyncio.to_thread(engine.close)
                raise
        except Exception as error:
            if on_failure is None:
                raise
            on_failure(error)
            return None
        return engine

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.create_task(load(app))
        if on_failure is None:
            await loading
        try:
            yield
        finally:
            engine = await loading
            if engine is not None:
                await asyncio.to_thread(engine.close)

    # FastAPI's documentation pages load scripts from other hosts
    app = FastAPI(title="kvcompose", version=__version__, lifespan=life, docs_url=None, redoc_url=None)
    app.state.server = None
    for routes in (info, slots, tokens, generate, compress, documents):
        app.include_router(routes.router)
    app.include_router(page(options.ui))
    for path, reason in NOT_OFFERED.items():
        app.add_api_route(path, _refuse(reason), methods=["GET", "POST", "DELETE"], include_in_schema=False)
    _handle_errors(app)
    # without a key, web pages of other hosts could read the answers
    origins = options.cors_origins or ("*" if options.api_keys else "localhost")
    return Gate(
        app, options.api_keys, options.max_body_bytes, origins, options.timeout,
        is_ready=lambda: app.state.server is not None, local_only=local_only and origins == "localhost",
    )  # fmt: skip


def _refuse(reason: str) -> Callable[[], Any]:
    async def route() -> None:
        raise not_supported(f"This server does not support {reason}")

    return route


def _handle_errors(app: FastAPI) -> None:
    """Answer every error with llama-server's error object."""

    @app.exception_handler(ApiError)
    async def on_api_error(http: Request, error: ApiError) -> JSONResponse:
        headers = {"Retry-After": str(RETRY_AFTER)} if error.code == 503 else None
        return JSONResponse(error.body(), error.code, headers)

    @app.exception_handler(RequestValidationError)
    async def on_bad_body(http: Request, error: RequestValidationError) -> JSONResponse:
        wrong = invalid_fields(error.errors(), n_skip=1)
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
