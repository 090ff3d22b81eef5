"""Server-sent events, of one answer or several."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Coroutine, Iterable
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import Response, StreamingResponse

from .errors import ApiError

T = TypeVar("T")

#: seconds between two looks at whether a client is still there
POLL_SECONDS = 0.2


class JSONResponse(Response):
    """As Starlette's; halves of characters, which JSON can name and no text can have, are replaced."""

    media_type = "application/json; charset=utf-8"

    def render(self, content: Any) -> bytes:
        """Of anything that JSON has."""
        return json.dumps(content, ensure_ascii=False).encode("utf-8", "replace")


async def event_stream(http: Request, chunks: AsyncIterator[dict[str, Any]], done: bool) -> StreamingResponse:
    """Server-sent events; what goes wrong before the first of them is an ordinary error."""
    try:
        first = await while_connected(http, anext(chunks))
    except BaseException:
        await chunks.aclose()  # type: ignore[attr-defined]
        raise

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


async def while_connected(http: Request, work: Awaitable[T]) -> T:
    """The result of ``work``, which ends if the client goes.

    Raises:
        ApiError: it has gone; nobody reads that.
    """
    task = asyncio.ensure_future(work)
    try:
        while not (await asyncio.wait({task}, timeout=POLL_SECONDS))[0]:
            if await http.is_disconnected():
                raise ApiError(499, "the client has gone")
        return task.result()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


#: characters that end a line for some clients, in the middle of an event
LINE_ENDS = {ord(character): f"\\u{ord(character):04x}" for character in "\x85\u2028\u2029"}


def _event(body: dict[str, Any]) -> bytes:
    text = json.dumps(body, ensure_ascii=False).translate(LINE_ENDS)
    return b"data: " + text.encode("utf-8", "replace") + b"\n\n"


async def merged(streams: Iterable[AsyncIterator[dict[str, Any]]], n_most: int) -> AsyncIterator[dict[str, Any]]:
    """Whatever comes first of several streams, ``n_most`` of which run at a time."""
    left = list(streams)
    every = list(left)
    waiting: dict[asyncio.Future[dict[str, Any]], AsyncIterator[dict[str, Any]]] = {}
    try:
        while left or waiting:
            while left and len(waiting) < n_most:
                stream = left.pop(0)
                waiting[asyncio.ensure_future(anext(stream))] = stream
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
        for stream in every:
            await stream.aclose()  # type: ignore[attr-defined]


async def together(work: Iterable[Coroutine[Any, Any, T]], n_most: int) -> list[T]:
    """Results of all of ``work``, ``n_most`` of it at a time; what one of them raises ends the others."""
    turns = asyncio.Semaphore(n_most)

    async def in_turn(one: Coroutine[Any, Any, T]) -> T:
        async with turns:
            return await one

    tasks = [asyncio.ensure_future(in_turn(one)) for one in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
