"""Routes for tokens: tokenize, detokenize, chat templates."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from ..api.descriptions import MESSAGES_BODY, RESPONSES_BODY
from ..api.errors import invalid
from ..api.parts import prompt_text
from ..api.schemas import ChatRequest, DetokenizeRequest, TokenizeRequest
from ..chat.other_apis import messages_request, n_prompt_tokens, responses_request
from ..chat.prompts import chat_prompt
from ..server import Serving

router = APIRouter()


@router.post("/tokenize")
def tokenize(server: Serving, request: TokenizeRequest) -> dict[str, Any]:
    content, read = request.content, server.reader
    if isinstance(content, str):
        tokens = read.tokens(content, request.parse_special, request.add_special) if content else ()
    else:
        tokens = read.mixed(content, request.add_special, request.parse_special)
    if not request.with_pieces:
        return {"tokens": list(tokens)}
    return {"tokens": [{"id": token, "piece": _piece(server.llama.piece(token, special=True))} for token in tokens]}


def _piece(raw: bytes) -> str | list[int]:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return list(raw)


@router.post("/detokenize")
def detokenize(server: Serving, request: DetokenizeRequest) -> dict[str, str]:
    if any(not 0 <= token < server.llama.n_vocab() for token in request.tokens):
        raise invalid("Prompt contains invalid tokens")
    return {"content": prompt_text(server.llama, request.tokens)}


@router.post("/apply-template")
async def apply_template(server: Serving, request: ChatRequest) -> dict[str, str]:
    prompt = await server.aside(chat_prompt, server, request)
    return {"prompt": prompt.rendered.prompt}


@router.post("/chat/completions/input_tokens")
@router.post("/v1/chat/completions/input_tokens")
async def input_tokens(server: Serving, request: ChatRequest) -> dict[str, Any]:
    return {"input_tokens": await n_prompt_tokens(server, request), "object": "response.input_tokens"}


@router.post("/responses/input_tokens")
@router.post("/v1/responses/input_tokens", openapi_extra=RESPONSES_BODY)
async def response_tokens(server: Serving, body: dict[str, Any]) -> dict[str, Any]:
    request = await server.aside(responses_request, body)
    return {"input_tokens": await n_prompt_tokens(server, request), "object": "response.input_tokens"}


@router.post("/v1/messages/count_tokens", openapi_extra=MESSAGES_BODY)
async def message_tokens(server: Serving, body: dict[str, Any]) -> dict[str, Any]:
    return {"input_tokens": await n_prompt_tokens(server, await server.aside(messages_request, body))}
