"""Answers /completion, /v1/completions and /infill."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from .api.openai import text_completion
from .api.parts import About, usage
from .api.schemas import GenerationRequest
from .api.streams import JSONResponse, event_stream, merged, together, while_connected
from .server import Server
from .slots.steps import End, Token

Whole = Callable[..., dict[str, Any]]


async def complete(
    server: Server,
    http: Request,
    request: GenerationRequest,
    prompts: Callable[[], Sequence[Sequence[int]]],
    whole: Whole,
    part: Whole,
    done: bool = True,
) -> Response:
    """Continue every prompt and return the answer.

    Args:
        prompts: returns the tokens of every prompt.
        whole: formats a generation's end.
        part: formats a step of a streamed generation.
        done: whether a stream ends with ``[DONE]``.
    """
    asked = await server.aside(lambda: [server.generation(request, tokens) for tokens in prompts()])
    abouts = server.abouts(request, asked)
    if request.stream:
        ended: list[tuple[About, End]] = []
        streams = [_completion_chunks(server, request, about, whole, part, ended, len(abouts)) for about in abouts]
        chunks = merged(streams, len(server.engine.slots))
        return await event_stream(http, chunks, done)
    work = (server.finish(about.what, request.id_slot) for about in abouts)
    ends = await while_connected(http, together(work, len(server.engine.slots)))
    placed = [(replace(about, id_slot=slot), end) for about, (slot, end) in zip(abouts, ends, strict=True)]
    # the answer contains the prompt as text: a long one takes time
    return await server.aside(_answer, whole, placed)


def _answer(whole: Whole, placed: Sequence[tuple[About, End]]) -> JSONResponse:
    bodies = [whole(about, end) for about, end in placed]
    if whole is text_completion:
        choices = [choice for body in bodies for choice in body["choices"]]
        return JSONResponse({**bodies[0], "choices": choices, "usage": usage(*placed)})
    return JSONResponse(bodies[0] if len(bodies) == 1 else bodies)


async def _completion_chunks(
    server: Server,
    request: GenerationRequest,
    about: About,
    whole: Whole,
    part: Whole,
    ended: list[tuple[About, End]],
    n_answers: int,
) -> AsyncGenerator[dict[str, Any], None]:
    """Yields the chunks of one of a request's answers; the last chunk of all has the usage of all."""
    async with aclosing(server.events(about.what, request.id_slot)) as told:
        async for slot, step in told:
            if isinstance(step, End):
                last = await server.aside(partial(whole, replace(about, id_slot=slot), step, streamed=True))
                ended.append((about, step))
                if last.pop("usage", None) and len(ended) == n_answers:
                    last["usage"] = usage(*ended)
                yield last
            elif isinstance(step, Token) or request.return_progress:
                yield part(about, step, request.timings_per_token)
