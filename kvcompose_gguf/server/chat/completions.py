"""Answers /v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from ...native.answer_stream import AnswerStream
from ...native.chat_library import AnswerParser
from ..api import openai
from ..api.errors import invalid
from ..api.parts import About, extras, n_reported, timings, token_probabilities, usage
from ..api.schemas import ChatRequest
from ..api.streams import JSONResponse, event_stream, merged, together, while_connected
from ..server import Server
from ..slots.steps import End, Generation, Progress, Token
from .prompts import ChatPrompt, chat_generation, chat_prompt, reasoning_format


@dataclass(frozen=True)
class Asked:
    """A chat that is ready to be answered: its prompt, and the generation of its answer."""

    prompt: ChatPrompt
    what: Generation


def ask(server: Server, request: ChatRequest) -> Asked:
    """Returns a chat that is ready to be answered; raises ApiError."""
    prompt = chat_prompt(server, request)
    return Asked(prompt, chat_generation(server, request, prompt))


def answer_stream(server: Server, request: ChatRequest, prompt: ChatPrompt) -> AnswerStream:
    """Returns a parser for the model's answer."""
    form = reasoning_format(server, request)
    return AnswerStream(AnswerParser(
        prompt.rendered, reasoning_format=form, reasoning_in_content=request.stream and form == "deepseek-legacy",
        parse_tool_calls=prompt.calls, is_continuation=prompt.is_continued,
        echo=request.echo or not request.continue_final_message,
    ))  # fmt: skip


async def answer_chat(server: Server, http: Request, request: ChatRequest) -> Response:
    """Answer a chat, whole or streamed."""
    if request.top_logprobs and not request.logprobs:
        raise invalid("top_logprobs requires logprobs to be set to true")
    if request.logprobs and request.n_probs is None:
        request.n_probs = 20 if request.top_logprobs is None else max(1, request.top_logprobs)
    asked = await server.aside(ask, server, request)
    if asked.prompt.calls and request.stream and request.logprobs:
        raise invalid("logprobs is not supported with tools + stream")
    abouts = server.abouts(request, [asked.what])
    readers = [answer_stream(server, request, asked.prompt) for _ in abouts]
    if request.stream:
        return await event_stream(http, _all_chunks(server, request, abouts, readers), done=True)
    work = (server.finish(about.what, request.id_slot) for about in abouts)
    ends = await while_connected(http, together(work, len(server.engine.slots)))

    def answer() -> JSONResponse:
        placed = [(replace(about, id_slot=slot), end) for about, (slot, end) in zip(abouts, ends, strict=True)]
        bodies = [
            openai.chat_completion(about, end, reader.whole(end.text))
            for (about, end), reader in zip(placed, readers, strict=True)
        ]
        choices = [choice for body in bodies for choice in body["choices"]]
        return JSONResponse({**bodies[0], "choices": choices, "usage": usage(*placed)})

    return await server.aside(answer)  # many probabilities take long to format


async def _all_chunks(
    server: Server, request: ChatRequest, abouts: Sequence[About], readers: Sequence[AnswerStream]
) -> AsyncGenerator[dict[str, Any], None]:
    """Yields the chunks of all answers as they come; the last one has the usage of all, if the request wants it."""
    ended: list[tuple[About, End]] = []
    pairs = zip(abouts, readers, strict=True)
    streams = [_chat_chunks(server, request, about, reader, ended) for about, reader in pairs]
    async with aclosing(merged(streams, len(server.engine.slots))) as chunks:
        async for chunk in chunks:
            yield chunk
    if _wants_usage(request):
        yield openai.chat_usage(*ended)


async def _chat_chunks(
    server: Server,
    request: ChatRequest,
    about: About,
    reader: AnswerStream,
    ended: list[tuple[About, End]],
) -> AsyncGenerator[dict[str, Any], None]:
    has_role, n_sent = False, 0
    held_back: list[dict[str, Any]] = []  # probabilities of tokens whose text has not been sent
    async with aclosing(server.events(about.what, request.id_slot)) as steps:
        async for _, step in steps:
            if isinstance(step, Progress):
                if request.return_progress:
                    has_role = True
                    more = extras(step, request.timings_per_token)
                    yield openai.chat_part(about, {"role": "assistant", "content": None}, **more)
                continue
            if not has_role:
                has_role = True
                yield openai.chat_part(about, {"role": "assistant", "content": None})
            deltas = reader.add(step.text) if isinstance(step, Token) else reader.end()
            if about.logprobs:
                if isinstance(step, Token):
                    held_back.append(token_probabilities(about, step.chosen, step.text))
                else:
                    held_back = held_back[: max(0, n_reported(about, step) - n_sent)]
                    deltas += [{}] if held_back and not deltas else []
            for delta in deltas:
                chunk = openai.chat_part(about, delta)
                if delta is deltas[-1]:  # what belongs to tokens goes once
                    chunk |= extras(step, request.timings_per_token) if isinstance(step, Token) else {}
                    if about.logprobs:
                        chunk["choices"][0]["logprobs"] = {"content": held_back}
                        n_sent, held_back = n_sent + len(held_back), []
                yield chunk
            if isinstance(step, End):
                ended.append((about, step))
                last = openai.chat_part(about, {}, openai.chat_finish(step, reader.n_calls > 0))
                yield last if _wants_usage(request) else last | {"timings": timings(step.timings, step.report)}


def _wants_usage(request: ChatRequest) -> bool:
    return request.stream_options is not None and request.stream_options.include_usage
