"""Routes that compute: completions, chats, infill, embeddings."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response

from ...errors import KVComposeError
from ...kernels.types import FloatArray
from ..api import llama_server
from ..api.descriptions import MESSAGES_BODY, RESPONSES_BODY
from ..api.embeddings import native_body, normalized, openai_body, texts_of
from ..api.errors import api_error, invalid, not_supported
from ..api.infill import infill_prompt
from ..api.openai import text_completion, text_completion_part
from ..api.schemas import (
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    InfillRequest,
    OpenAICompletionRequest,
)
from ..api.streams import JSONResponse, while_connected
from ..chat.completions import answer_chat
from ..chat.other_apis import answer_messages, answer_responses
from ..completions import complete
from ..server import Server, Serving
from ..slots.embedder import Embedder

router = APIRouter()


@router.post("/completion")
@router.post("/completions")
async def completion(server: Serving, http: Request, request: CompletionRequest) -> Response:
    prompts = partial(server.prompts, request)
    whole, part = llama_server.completion, llama_server.completion_part
    return await complete(server, http, request, prompts, whole, part, done=False)


@router.post("/v1/completions")
async def openai_completion(server: Serving, http: Request, request: OpenAICompletionRequest) -> Response:
    if request.echo:
        raise invalid("Only no echo is supported")
    for name in ("suffix", "best_of"):
        if getattr(request, name) is not None:
            raise invalid(f"Unsupported param: {name}")
    prompts = partial(server.prompts, request)
    return await complete(server, http, request, prompts, text_completion, text_completion_part)


@router.post("/infill")
async def infill(server: Serving, http: Request, request: InfillRequest) -> Response:
    tokens = partial(
        infill_prompt, server.llama, server.reader, request.input_prefix, request.input_suffix, request.input_extra,
        request.prompt, request.n_predict or 0,
    )  # fmt: skip
    whole, part = llama_server.completion, llama_server.completion_part
    return await complete(server, http, request, lambda: [tokens()], whole, part, done=False)


@router.post("/chat/completions")
@router.post("/v1/chat/completions")
async def chat_completion(server: Serving, http: Request, request: ChatRequest) -> Response:
    return await answer_chat(server, http, request)


@router.post("/v1/messages", openapi_extra=MESSAGES_BODY)
async def messages(server: Serving, http: Request, body: dict[str, Any]) -> Response:
    """A chat of Anthropic's Messages API."""
    return await answer_messages(server, http, body)


@router.post("/responses")
@router.post("/v1/responses", openapi_extra=RESPONSES_BODY)
async def responses(server: Serving, http: Request, body: dict[str, Any]) -> Response:
    """A chat of OpenAI's Responses API; nothing is stored."""
    return await answer_responses(server, http, body)


@router.post("/embedding")
@router.post("/embeddings")
async def embedding(server: Serving, http: Request, request: EmbeddingRequest) -> JSONResponse:
    vectors, _ = await _embedded(server, http, request)
    return await server.aside(lambda: JSONResponse(native_body(vectors)))


@router.post("/v1/embeddings")
async def openai_embedding(server: Serving, http: Request, request: EmbeddingRequest) -> JSONResponse:
    if server.engine.embedder is not None and not server.engine.embedder.is_pooled:
        raise invalid("Pooling type 'none' is not OAI compatible. Please use a different pooling type")
    vectors, n_tokens = await _embedded(server, http, request)
    as_base64, model = request.encoding_format == "base64", request.model or server.options.model_name
    if request.input is None:
        return await server.aside(lambda: JSONResponse(native_body(vectors)))
    return await server.aside(lambda: JSONResponse(openai_body(vectors, n_tokens, model, as_base64)))


async def _embedded(server: Server, http: Request, request: EmbeddingRequest) -> tuple[list[FloatArray], int]:
    """Returns the vectors of a request's texts, and the number of their tokens."""
    embedder = server.engine.embedder
    if embedder is None:
        raise not_supported("This server does not support embeddings. Start it with `--embeddings`")
    texts = await server.aside(texts_of, server.reader, request.content if request.input is None else request.input)
    start = time.perf_counter()
    vectors = [await while_connected(http, _vectors(embedder, tokens)) for tokens in texts]
    if embedder.is_pooled:
        vectors = [normalized(rows, request.embd_normalize) for rows in vectors]
    n_tokens = sum(map(len, texts))
    server.metrics.count_vectors(n_tokens, time.perf_counter() - start)
    return vectors, n_tokens


async def _vectors(embedder: Embedder, tokens: Sequence[int]) -> FloatArray:
    try:
        return await asyncio.wrap_future(embedder.submit(tokens))
    except KVComposeError as error:
        raise api_error(error) from error
