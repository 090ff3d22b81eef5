"""The state that all routes share: options, engine, metrics, chat template."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request

from .. import __version__
from ..native import chat_formats
from ..native.chat_library import ChatTemplate
from ..native.environment import system
from .api.errors import ApiError, invalid
from .api.ids import random_id
from .api.parts import About
from .api.reader import Reader
from .api.schemas import CompletionRequest, GenerationRequest
from .api.state import settings
from .metrics import Metrics
from .options import ServeOptions
from .prefixes import Prefixes
from .slots.constraint import Constraint, Thinking
from .slots.engine import Engine
from .slots.sampling import RANDOM_SEED
from .slots.steps import N_UNBOUNDED, End, Generation
from .waiting import Step, steps

T = TypeVar("T")


class Server:
    """The state that all routes share.

    Args:
        options: the server's options.
        engine: the model's slots. The application closes it.
    """

    def __init__(self, options: ServeOptions, engine: Engine) -> None:
        self.options, self.engine = options, engine
        self.llama = engine.llama
        self.metrics = Metrics(engine)
        self.reader = Reader(self.llama, options)
        self.prefixes = Prefixes()
        self.created_us = time.time_ns() // 1000
        self.created = self.created_us // 1_000_000
        self.fingerprint = f"b{__version__}-{system()['llama_cpp_commit'][:9]}"
        self.template = self._template()

    def _template(self) -> ChatTemplate:
        source = self.options.chat_template or self.llama.metadata.get("tokenizer.chat_template") or "chatml"
        bos, eos = (self.reader.text(token) for token in (self.llama.token_bos(), self.llama.token_eos()))
        is_name = source != "chatml" and source in chat_formats.names()
        return ChatTemplate(source, bos, eos, self.llama.adds_bos, is_name)

    #
    # generations
    #

    def generation(
        self,
        request: GenerationRequest,
        tokens: Sequence[int],
        constraint: Constraint | None = None,
        thinking: Thinking | None = None,
    ) -> Generation:
        """Returns the generation for a request, checked as far as possible without a slot."""
        if len(tokens) >= self.llama.n_ctx():
            raise self.too_long(tokens)
        what = self.reader.generation(request, tokens, constraint, thinking)
        if self.options.kv_budget is not None and what.n_predict < 0:
            what = replace(what, n_predict=N_UNBOUNDED)
        if not what.tokens:
            raise invalid('"prompt" must not be empty')
        return what

    def prompts(self, request: CompletionRequest) -> list[tuple[int, ...]]:
        """Returns the tokens of every prompt of a request, with the document of ``kv_prefix`` before each."""
        before = self.prefixes.tokens(request.kv_prefix) if request.kv_prefix is not None else ()
        return [(*before, *tokens) for tokens in self.reader.prompts(request.prompt, begin=not before)]

    def too_long(self, tokens: Sequence[int]) -> ApiError:
        """Returns the error for a prompt that does not fit into a slot."""
        n_ctx = self.llama.n_ctx()
        return ApiError(
            400, f"request ({len(tokens)} tokens) exceeds the available context size ({n_ctx} tokens), "
            "try increasing it", "exceed_context_size_error", n_prompt_tokens=len(tokens), n_ctx=n_ctx,
        )  # fmt: skip

    def abouts(self, request: GenerationRequest, asked: Sequence[Generation]) -> list[About]:
        """Returns an ``About`` for every answer to a request, ``n`` for each generation.

        Raises:
            ApiError: ``n`` is larger than the number of slots.
        """
        n, n_slots = request.n or 1, len(self.engine.slots)
        if n > n_slots:
            raise invalid(f"Field 'n': Value must be between 1 <= value <= {n_slots}, but got {n}")
        answer_id, created = f"chatcmpl-{random_id()}", int(time.time())
        return [
            About(
                what=what, llama=self.llama, model=self.options.model_name, fingerprint=self.fingerprint,
                created=created, id=answer_id, index=index, verbose=self.options.verbose or request.verbose,
                settings=settings(what, request.stream, request.timings_per_token),
                return_tokens=request.return_tokens, response_fields=tuple(request.response_fields),
                logprobs=bool(getattr(request, "logprobs", False)),
            )
            for index, what in enumerate(_child(what, k) for what in asked for k in range(n))
        ]  # fmt: skip

    async def aside(self, function: Callable[..., T], *args: Any) -> T:
        """Returns the result of a function that may take long. It runs in a thread, so that others are served."""
        return await asyncio.to_thread(function, *args)

    async def events(self, what: Generation, id_slot: int = -1) -> AsyncGenerator[tuple[int, Step], None]:
        """Yields the steps of a generation as ``waiting.steps`` does, and adds its end to the metrics."""
        async with aclosing(steps(self.engine, what, id_slot)) as told:
            async for slot, step in told:
                if isinstance(step, End):
                    self.metrics.count(step)
                yield slot, step

    async def finish(self, what: Generation, id_slot: int) -> tuple[int, End]:
        """Returns the number of the slot and the end of a generation, when the slot is idle."""
        async with aclosing(self.events(what, id_slot)) as told:
            async for slot, step in told:
                if isinstance(step, End):
                    return slot, step
        raise ApiError(500, "the generation has no end")


def _child(what: Generation, k: int) -> Generation:
    """Returns the generation of the k-th answer to a prompt: with its own seed, unless seeds are random."""
    if k == 0 or what.sampling.seed == RANDOM_SEED:
        return what
    return replace(what, sampling=replace(what.sampling, seed=(what.sampling.seed + k) % 2**32))


async def _server_of(http: Request) -> Server:
    server: Server = http.app.state.server
    return server


#: type of the route parameter that receives the server
Serving = Annotated[Server, Depends(_server_of)]
