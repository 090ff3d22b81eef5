"""Generations for any number of clients: an event loop on one side, slots with their threads on the other."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any, TypeVar

from ..errors import KVComposeError
from .engine import Engine, Job
from .errors import api_error
from .generation import End, Generation, Progress, Token, generate
from .slots import Slot

T = TypeVar("T")

Step = Progress | Token | End


async def run(engine: Engine, job: Job) -> Any:
    """The result of a job; to stop waiting ends it.

    Raises:
        ApiError: what the client is told.
    """
    try:
        engine.submit(job)
        return await asyncio.wrap_future(job.future)
    except KVComposeError as error:
        raise api_error(error) from error
    finally:
        job.cancel()


async def steps(engine: Engine, what: Generation, id_slot: int = -1) -> AsyncIterator[tuple[int, Step]]:
    """What happens in a generation, and in which slot; to stop listening ends it.

    Raises:
        ApiError: what the client is told.
    """
    loop, queue = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Step] | None]()

    def tell(item: tuple[int, Step] | None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended, and who listened with it
            loop.call_soon_threadsafe(queue.put_nowait, item)

    def work(slot: Slot) -> None:
        end = generate(slot, what, lambda step: tell((slot.id, step)))
        tell((slot.id, end))

    job = Job(work, what.tokens, id_slot, what.n_most(engine.llama.n_ctx()), what.method, what.reuse)
    job.future.add_done_callback(lambda future: tell(None))
    try:
        engine.submit(job)
        while (item := await queue.get()) is not None:
            yield item
        if not job.future.cancelled() and (error := job.future.exception()) is not None:
            raise api_error(error) from error
    except KVComposeError as error:
        raise api_error(error) from error
    finally:
        job.cancel()
