"""Answers /v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from ...models.templates import CALL_BEGIN, TemplateError
from ...plan import seam
from ...support import reasoning
from ..api import openai
from ..api.errors import invalid
from ..api.grammars import grammar_of
from ..api.parts import About, extras, n_reported, timings, token_probabilities, usage
from ..api.schemas import ChatRequest
from ..api.streams import JSONResponse, event_stream, merged, together, while_connected
from ..options import REASONING_FORMATS
from ..server import Server
from ..slots.steps import End, Generation, Progress, Token
from . import tools
from .message_stream import MessageStream
from .messages import check_messages


@dataclass(frozen=True, kw_only=True)
class ChatPrompt:
    """The prompt of a chat and its tools.

    Attributes:
        text: the prompt, up to the assistant's message.
        begun: the beginning of the assistant's message, if the request gives one to continue.
        tools: tools that the model may call.
        choice: whether the model may ("auto"), must not ("none") or has to ("required") call one.
        opening: what the prompt begins with whatever the user says: system messages and tools.
    """

    text: str
    begun: str
    tools: list[dict[str, Any]]
    choice: str
    opening: str = ""


def chat_prompt(server: Server, request: ChatRequest) -> ChatPrompt:
    """Returns the prompt of a chat.

    Raises:
        ApiError: messages or tools are invalid, or the template refuses them.
    """
    messages = check_messages(request.messages)
    offered, choice = tools.check_tools(request.tools, request.tool_choice, server.template)
    if offered and request.grammar:
        raise invalid("Cannot use custom grammar constraints with tools.")
    is_continued = bool(messages) and messages[-1]["role"] == "assistant"
    if is_continued and len(messages) > 1 and messages[-2]["role"] == "assistant":
        raise invalid("Cannot have 2 or more assistant messages at the end of the list.")
    if request.continue_final_message and request.add_generation_prompt:
        raise invalid("Cannot set both add_generation_prompt and continue_final_message to true.")
    if is_continued and messages[-1].get("tool_calls"):
        raise invalid("Cannot continue an assistant message that contains tool calls.")
    now = time.localtime()
    variables: dict[str, Any] = {
        "enable_thinking": server.options.reasoning, "datetime": time.strftime("%b %d %Y", now),
        "date_string": time.strftime("%d %b %Y", now),
        **(request.chat_template_kwargs or {}),
    }  # fmt: skip
    thinks = variables["enable_thinking"]
    if isinstance(thinks, str):
        raise invalid('invalid type for "enable_thinking" (expected boolean, got string)')
    if offered:
        variables["tools"] = offered
    last = messages.pop() if is_continued else {}
    try:
        prompt = server.template.render(messages, is_continued or request.add_generation_prompt, variables)
    except TemplateError as error:
        raise invalid(str(error)) from error
    return ChatPrompt(
        text=prompt if thinks else reasoning.closed(prompt), begun=str(last.get("prefill", last.get("content", ""))),
        tools=offered, choice=choice, opening=_opening(server, messages, variables),
    )  # fmt: skip


def _opening(server: Server, messages: Sequence[dict[str, Any]], variables: dict[str, Any]) -> str:
    """Returns what a chat begins with whatever the user says: system messages and tools; empty: there are none."""
    n_system = next((n for n, message in enumerate(messages) if message["role"] != "system"), len(messages))
    if not n_system and "tools" not in variables:
        return ""
    said = ([*messages[:n_system], {"role": "user", "content": text}] for text in ("A", "Z"))
    try:
        one, other = (server.template.render(each, False, variables) for each in said)
    except TemplateError:  # it allows no such chat
        return ""
    return one[: next((n for n, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), 0)]


@dataclass(frozen=True)
class _Asked:
    """A chat that is ready to be answered.

    Attributes:
        what: the generation.
        tail: the last characters of the prompt, before the assistant's message.
        begun: the beginning of the assistant's message that the prompt contains.
        echoes: whether the answer repeats ``begun``.
        names: names of the tools that the model may call.
    """

    what: Generation
    tail: str
    begun: str
    echoes: bool
    names: frozenset[str]


def _asked(server: Server, request: ChatRequest) -> _Asked:
    asked = chat_prompt(server, request)
    prompt, begun, grammar = asked.text, asked.begun, _chat_grammar(request)
    if asked.choice == "required":
        key = "parameters" if server.template.names_parameters else "arguments"
        grammar = grammar_of(tools.call_schema(asked.tools, key))
        begun += CALL_BEGIN + "\n" if server.template.tags_calls else ""
    if grammar is not None or request.grammar:
        prompt = reasoning.closed(prompt)  # the grammar does not allow thinking
    calls = asked.tools if asked.choice != "none" else []
    what = server.generation(request, server.reader.tokens(prompt + begun), grammar)
    if what.method is not None and asked.opening:
        n_first = seam.common_prefix(server.reader.tokens(asked.opening), what.tokens)
        what = replace(what, method=replace(what.method, protect_first=max(n_first, what.method.protect_first)))
    return _Asked(
        what, prompt[-64:], begun,
        not request.continue_final_message or request.echo,
        frozenset(tool["function"]["name"] for tool in calls),
    )  # fmt: skip


def _message_stream(server: Server, request: ChatRequest, asked: _Asked) -> MessageStream:
    """Returns a parser for the model's answer."""
    form = request.reasoning_format or server.options.reasoning_format
    if form not in REASONING_FORMATS:
        raise invalid(f"Unknown reasoning format: {form}")
    calls: tools.CallStream | tools.BareCalls | None = None
    if asked.names:
        calls = tools.CallStream() if server.template.tags_calls else tools.BareCalls(asked.names)
    return MessageStream(reasoning.Thoughts(asked.tail, form != "none"), calls)


async def answer_chat(server: Server, http: Request, request: ChatRequest) -> Response:
    """Answer a chat, whole or streamed."""
    if request.top_logprobs and not request.logprobs:
        raise invalid("top_logprobs requires logprobs to be set to true")
    if request.logprobs and request.n_probs is None:
        request.n_probs = 20 if request.top_logprobs is None else max(1, request.top_logprobs)
    asked = await server.aside(_asked, server, request)
    if asked.names and request.stream and request.logprobs:
        raise invalid("logprobs is not supported with tools + stream")
    abouts = server.abouts(request, [asked.what])
    readers = [_message_stream(server, request, asked) for _ in abouts]
    if request.stream:
        return await event_stream(http, _all_chunks(server, request, asked, abouts, readers), done=True)
    work = (server.finish(about.what, request.id_slot) for about in abouts)
    ends = await while_connected(http, together(work, len(server.engine.slots)))

    def answer() -> JSONResponse:
        placed = [(replace(about, id_slot=slot), end) for about, (slot, end) in zip(abouts, ends, strict=True)]
        bodies = [
            openai.chat_completion(about, end, reader.whole(asked.begun + end.text))
            for (about, end), reader in zip(placed, readers, strict=True)
        ]
        choices = [choice for body in bodies for choice in body["choices"]]
        return JSONResponse({**bodies[0], "choices": choices, "usage": usage(*placed)})

    return await server.aside(answer)  # many probabilities take long to format


def _chat_grammar(request: ChatRequest) -> str | None:
    """Returns GBNF for the response format. None: use the request's own grammar."""
    kind = (request.response_format or {}).get("type", "text")
    schema = request.json_schema
    if kind == "json_object":
        schema = (request.response_format or {}).get("schema", {} if schema is None else schema)
    elif kind == "json_schema":
        wrapped = (request.response_format or {}).get("json_schema")
        if not isinstance(wrapped, dict):
            raise invalid("response_format.json_schema is needed, an object with a schema")
        schema = wrapped.get("schema", {})
    elif kind not in ("text", "", None):
        raise invalid(f'response_format type must be one of "text" or "json_object", but got: {kind}')
    if schema is not None and request.grammar:
        raise invalid("Cannot use both json_schema and grammar")
    return None if schema is None else grammar_of(schema)


async def _all_chunks(
    server: Server, request: ChatRequest, asked: _Asked, abouts: Sequence[About], readers: Sequence[MessageStream]
) -> AsyncGenerator[dict[str, Any], None]:
    """Yields the chunks of all answers as they come; the last one has the usage of all, if the request wants it."""
    ended: list[tuple[About, End]] = []
    pairs = zip(abouts, readers, strict=True)
    streams = [_chat_chunks(server, request, asked, about, reader, ended) for about, reader in pairs]
    async with aclosing(merged(streams, len(server.engine.slots))) as chunks:
        async for chunk in chunks:
            yield chunk
    if _wants_usage(request):
        yield openai.chat_usage(*ended)


async def _chat_chunks(
    server: Server,
    request: ChatRequest,
    asked: _Asked,
    about: About,
    reader: MessageStream,
    ended: list[tuple[About, End]],
) -> AsyncGenerator[dict[str, Any], None]:
    has_role, n_sent = False, 0
    held = reader.add(asked.begun)
    if not asked.echoes:
        held = []
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
            deltas = held + (reader.add(step.text) if isinstance(step, Token) else reader.end())
            held = []
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
