"""Answers chats of Anthropic's Messages API and OpenAI's Responses API.

llama.cpp turns their bodies into those of chat completions; the answers are formatted here.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from typing import Any

from fastapi import Request
from fastapi.responses import Response
from pydantic import ValidationError

from ...errors import ConfigError
from ...native import chat_library
from ...native.answer_stream import AnswerStream
from ..api.anthropic import MessageForm
from ..api.errors import invalid, invalid_fields
from ..api.parts import About, extras
from ..api.responses import ResponseForm
from ..api.schemas import ChatRequest
from ..api.streams import JSONResponse, event_stream, while_connected
from ..server import Server
from ..slots.steps import End, Progress, Token
from .completions import answer_stream, ask
from .prompts import chat_prompt

#: fields of this server, which llama.cpp's conversion of Anthropic's bodies does not know
OWN_FIELDS = (
    "kv_compress",
    "kv_documents",
    "id_slot",
    "cache_prompt",
    "return_progress",
    "seed",
    "min_p",
    "repeat_penalty",
)

Convert = Callable[[Mapping[str, Any]], dict[str, Any]]


def messages_request(body: Mapping[str, Any]) -> ChatRequest:
    """Returns a body of Anthropic's API as one of chat completions; raises ApiError."""
    if not isinstance(body.get("tools") or [], list):
        raise invalid("Failed to parse tools: 'tools' must be an array")
    more = {name: body[name] for name in OWN_FIELDS if name in body}
    choice = body.get("tool_choice")
    if isinstance(choice, dict) and choice.get("type") == "none":  # llama.cpp knows "auto", "any" and "tool"
        more["tool_choice"] = "none"
    if isinstance(choice, dict) and choice.get("type") == "tool":
        more["tool_choice"] = {"type": "function", "function": {"name": choice.get("name")}}
    return _converted(lambda given: {**chat_library.body_of_messages(given), **more}, body)


def responses_request(body: Mapping[str, Any]) -> ChatRequest:
    """Returns a body of the Responses API as one of chat completions; raises ApiError."""
    for name in ("previous_response_id", "conversation", "background", "prompt"):
        if body.get(name):
            raise invalid(f"{name} is not supported: this server stores no responses; send the whole conversation")
    return _converted(lambda given: {**chat_library.body_of_responses(given), **_what_is_left(given)}, body)


def _what_is_left(body: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of the Responses API that llama.cpp does not convert, as those of chat completions."""
    out: dict[str, Any] = {}
    text, choice = body.get("text"), body.get("tool_choice")
    form = text.get("format") if isinstance(text, dict) else None
    if isinstance(form, dict):
        out["response_format"] = {"type": form.get("type"), "json_schema": form} if "schema" in form else form
    if isinstance(choice, dict) and isinstance(choice.get("name"), str):
        out["tool_choice"] = {"type": "function", "function": {"name": choice["name"]}}
    return out


def _converted(convert: Convert, body: Mapping[str, Any]) -> ChatRequest:
    try:
        return ChatRequest.model_validate(convert(body))
    except ConfigError as error:
        raise invalid(str(error)) from error
    except ValidationError as error:
        raise invalid_fields(error.errors()) from error


async def answer_messages(server: Server, http: Request, body: Mapping[str, Any]) -> Response:
    """Answer a chat of Anthropic's API, whole or streamed."""
    return await _answer(server, http, await server.aside(messages_request, body), MessageForm)


async def answer_responses(server: Server, http: Request, body: Mapping[str, Any]) -> Response:
    """Answer a chat of the Responses API, whole or streamed."""
    request = await server.aside(responses_request, body)
    return await _answer(server, http, request, lambda about: ResponseForm(about, body))


async def n_prompt_tokens(server: Server, request: ChatRequest) -> int:
    """Returns how many tokens the prompt of a chat has."""
    prompt = await server.aside(chat_prompt, server, request)
    return len(await server.aside(server.reader.tokens, prompt.rendered.prompt))


Form = MessageForm | ResponseForm


async def _answer(server: Server, http: Request, request: ChatRequest, make_form: Callable[[About], Form]) -> Response:
    asked = await server.aside(ask, server, request)
    about = server.abouts(request, [asked.what])[0]
    form, reader = make_form(about), answer_stream(server, request, asked.prompt)
    if request.stream:
        return await event_stream(http, _events(server, request, about, form, reader), done=False, named=True)
    _, end = await while_connected(http, server.finish(about.what, request.id_slot))
    form.add(_deltas_of(reader.whole(end.text)))
    return JSONResponse(form.whole(end))


def _deltas_of(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns a whole message of OpenAI's as deltas."""
    fields = ({name: message[name]} for name in ("reasoning_content", "content", "tool_calls") if message.get(name))
    return list(fields)


async def _events(
    server: Server, request: ChatRequest, about: About, form: Form, reader: AnswerStream
) -> AsyncGenerator[dict[str, Any], None]:
    has_begun = False
    async with aclosing(server.events(about.what, request.id_slot)) as steps:
        async for _, step in steps:
            events = []
            if not has_begun:
                has_begun = True
                events = form.begin(step.cache if isinstance(step, Progress) else step.timings.cache_n)
            if isinstance(step, Token):
                events += form.add(reader.add(step.text))
            elif isinstance(step, End):
                events += [*form.add(reader.end()), *form.end(step)]
            elif request.return_progress:
                events += form.progress()
            if events and (isinstance(step, Token) or (isinstance(step, Progress) and request.return_progress)):
                events[-1] = events[-1] | extras(step, request.timings_per_token)
            for event in events:
                yield event
