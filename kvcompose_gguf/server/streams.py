"""Server-sent events, of one answer or several."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine, Iterable
from typing import Any, TypeVar

from fastapi.responses import StreamingResponse

from .errors import ApiError

T = TypeVar("T")


async def event_stream(chunks: AsyncIterator[dict[str, Any]], done: bool) -> StreamingResponse:
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


async def merged(streams: Iterable[AsyncIterator[dict[str, Any]]]) -> AsyncIterator[dict[str, Any]]:
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


async def together(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Results of all of ``work``; what one of them raises ends the others."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
