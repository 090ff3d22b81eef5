"""Runs generations and other jobs for HTTP handlers: the event loop waits here for the threads of the slots.

Guaranteed order: the slot of a job is idle before the handler gets the job's result or error. (If another job waits for
the slot, that job has it by then.) So no answer leaves before its slot is idle, and the client's next request finds the
slot with its cache.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable
from typing import Any

from ..errors import KVComposeError
from .api.errors import api_error
from .slots.engine import Engine
from .slots.generation import generate
from .slots.job import Busy, Job
from .slots.slot import Slot
from .slots.steps import End, Generation, Progress, Token

Step = Progress | Token | End
Tell = Callable[[Any], None]


async def run(engine: Engine, job: Job) -> Any:
    """Returns a job's result, after its slot is idle. Cancelling this call cancels the job.

    Raises:
        ApiError: the job failed, the queue is full, or there is no such slot.
    """
    try:
        engine.submit(job)
        return await asyncio.wrap_future(job.future)
    except KVComposeError as error:
        raise api_error(error) from error
    finally:
        await _stopped(job)


async def steps(engine: Engine, what: Generation, id_slot: int = -1) -> AsyncGenerator[tuple[int, Step], None]:
    """Yields the steps of a generation, each with the number of its slot.

    ``Progress`` and ``Token`` come while the slot works. ``End`` comes, or an error is raised, after the slot is idle.
    Closing the generator cancels the generation, and returns when the slot is idle: use ``contextlib.aclosing``.

    Raises:
        ApiError: the generation failed, the queue is full, or there is no such slot.
    """

    def job(tell: Tell) -> Job:
        def work(slot: Slot) -> tuple[int, End]:
            return slot.id, generate(slot, what, lambda step: tell((slot.id, step)))

        return Job(work, what.tokens, id_slot, what.n_most(engine.llama.n_ctx()), what.method, what.reuse)

    async with contextlib.aclosing(watched(engine, job)) as told:
        async for step in told:
            yield step


async def watched(engine: Engine, make_job: Callable[[Tell], Job]) -> AsyncGenerator[Any, None]:
    """Yields what a job tells while it works, and its result at the end, after its slot is idle.

    Closing the generator cancels the job, and returns when the slot is idle.

    Args:
        make_job: makes the job; it gets the function that the job tells with, from any thread.
    Raises:
        ApiError: the job failed, the queue is full, or there is no such slot.
    """
    loop, queue = asyncio.get_running_loop(), asyncio.Queue[Any]()
    ended = object()

    def tell(item: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            loop.call_soon_threadsafe(queue.put_nowait, item)

    job = make_job(tell)
    job.future.add_done_callback(lambda future: tell(ended))  # the engine has released the slot before
    try:
        engine.submit(job)
        while (item := await queue.get()) is not ended:
            yield item
        if job.future.cancelled():
            raise Busy("the server is about to end")
        if (error := job.future.exception()) is not None:
            raise api_error(error) from error
        yield job.future.result()
    except KVComposeError as refused:
        raise api_error(refused) from refused
    finally:
        await _stopped(job)


async def _stopped(job: Job) -> None:
    """Cancel a job if it is not done, and return when no slot works on it."""
    job.cancel()
    if job.future.done():
        return
    loop, done = asyncio.get_running_loop(), asyncio.Event()

    def on_done(future: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(done.set)

    job.future.add_done_callback(on_done)
    await done.wait()
