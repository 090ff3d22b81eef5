"""Sends answers: server-sent events, several generations at a time, and clients that disconnect."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Coroutine, Iterable
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import Response, StreamingResponse

from .errors import ApiError

T = TypeVar("T")

#: seconds between two checks whether the client has disconnected
POLL_SECONDS = 0.2

#: seconds without an event after which a stream sends a comment. Clients and proxies give up on a silent connection,
#: and reading a long prompt takes minutes
ALIVE_SECONDS = 3.0


class JSONResponse(Response):
    """A JSON response that replaces lone surrogates: JSON can contain them, UTF-8 cannot."""

    media_type = "application/json; charset=utf-8"

    def render(self, content: Any) -> bytes:
        """Returns ``content`` as JSON."""
        return json.dumps(content, ensure_ascii=False).encode("utf-8", "replace")


async def event_stream(
    http: Request, chunks: AsyncGenerator[dict[str, Any], None], done: bool, named: bool = False
) -> StreamingResponse:
    """Returns server-sent events of ``chunks``, and a comment after every ``ALIVE_SECONDS`` without an event.

    An error within the first ``ALIVE_SECONDS`` is an ordinary error response, a later one is an event.

    Args:
        done: the last event is ``[DONE]``.
        named: every event has its ``type`` as its name.
    """
    waiting = asyncio.ensure_future(anext(chunks))
    try:
        await while_connected(http, asyncio.wait({waiting}, timeout=ALIVE_SECONDS))
        if waiting.done():
            waiting.result()
    except BaseException:
        await _close(chunks, waiting)
        raise

    async def lines() -> AsyncGenerator[bytes, None]:
        nonlocal waiting
        try:
            while True:
                while not (await asyncio.wait({waiting}, timeout=ALIVE_SECONDS))[0]:
                    yield b":\n\n"
                try:
                    chunk = waiting.result()
                except StopAsyncIteration:
                    break
                yield _event(chunk, named)
                waiting = asyncio.ensure_future(anext(chunks))
            if done:
                yield b"data: [DONE]\n\n"
        except ApiError as error:
            yield _event({"type": "error", **error.body()} if named else error.body(), named)
        finally:
            await _to_its_end(_close(chunks, waiting))

    return StreamingResponse(lines(), media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})


async def _close(chunks: AsyncGenerator[dict[str, Any], None], waiting: asyncio.Future[dict[str, Any]]) -> None:
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    await chunks.aclose()


async def _to_its_end(cleanup: Coroutine[Any, Any, None]) -> None:
    """Run ``cleanup``, which goes on in a task of its own if this call is cancelled.

    When a client disconnects, Starlette cancels the task that sends, at every ``await``, so also in ``finally``.
    """
    task = asyncio.ensure_future(cleanup)
    _cleanups.add(task)
    task.add_done_callback(_cleanups.discard)
    await asyncio.shield(task)


#: tasks that nobody may wait for; the event loop itself keeps weak references only
_cleanups: set[asyncio.Future[None]] = set()


async def while_connected(http: Request, work: Awaitable[T]) -> T:
    """Returns the result of ``work``. Cancels it, and waits for its end, if the client disconnects.

    Raises:
        ApiError: the client has disconnected. Nobody receives this.
    """
    task = asyncio.ensure_future(work)
    try:
        while not (await asyncio.wait({task}, timeout=POLL_SECONDS))[0]:
            if await http.is_disconnected():
                raise ApiError(499, "the client has disconnected")
        return task.result()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


#: characters that some clients take for the end of a line
LINE_ENDS = {ord(character): f"\\u{ord(character):04x}" for character in "\x85\u2028\u2029"}


def _event(body: dict[str, Any], named: bool = False) -> bytes:
    text = json.dumps(body, ensure_ascii=False).translate(LINE_ENDS)
    name = f"event: {body['type']}\n" if named else ""
    return f"{name}data: {text}\n\n".encode("utf-8", "replace")


async def merged(
    streams: Iterable[AsyncGenerator[dict[str, Any], None]], n_most: int
) -> AsyncGenerator[dict[str, Any], None]:
    """Yields the items of several streams as they come. Runs at most ``n_most`` streams at a time.

    When one stream raises, or this generator is closed, all streams are closed first, so that their slots are idle.
    """
    left = list(streams)
    every = list(left)
    waiting: dict[asyncio.Future[dict[str, Any]], AsyncGenerator[dict[str, Any], None]] = {}
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
        await _to_its_end(_close_all(every, list(waiting)))


async def _close_all(
    streams: Iterable[AsyncGenerator[dict[str, Any], None]], waiting: Iterable[asyncio.Future[dict[str, Any]]]
) -> None:
    for future in waiting:
        future.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    for stream in streams:
        await stream.aclose()


async def together(work: Iterable[Coroutine[Any, Any, T]], n_most: int) -> list[T]:
    """Returns the results of all of ``work``, in order. Runs at most ``n_most`` of it at a time.

    When one raises, the others are cancelled and have ended before this raises.
    """
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
