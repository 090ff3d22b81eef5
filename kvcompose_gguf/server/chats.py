"""/v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from . import chat, formats, tools
from .errors import invalid
from .formats import About
from .generation import End, Generation, Progress, Token
from .grammars import grammar_of
from .schemas import ChatRequest
from .server import Server
from .streams import event_stream, merged, together, while_connected


def chat_prompt(server: Server, request: ChatRequest) -> tuple[str, list[dict[str, Any]], str]:
    """The prompt of a chat, the tools that the model may call, and whether it may or has to."""
    messages = chat.check_messages(request.messages)
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
        "enable_thinking": True, "datetime": time.strftime("%b %d %Y", now),
        "date_string": time.strftime("%d %b %Y", now),
        **(request.chat_template_kwargs or {}),
    }  # fmt: skip
    if isinstance(variables["enable_thinking"], str):
        raise invalid('invalid type for "enable_thinking" (expected boolean, got string)')
    if offered:
        variables["tools"] = offered
    for name in ("messages", "add_generation_prompt", "bos_token", "eos_token"):
        variables.pop(name, None)
    if not is_continued:
        return server.template.render(messages, request.add_generation_prompt, **variables), offered, choice
    prompt = server.template.render(messages[:-1], True, **variables)
    return prompt + messages[-1]["content"], offered, choice


async def answer_chat(server: Server, http: Request, request: ChatRequest) -> Response:
    """Answer a chat, whole or in pieces."""
    if request.top_logprobs and not request.logprobs:
        raise invalid("top_logprobs requires logprobs to be set to true")
    if request.logprobs and request.n_probs is None:
        request.n_probs = 20 if request.top_logprobs is None else max(1, request.top_logprobs)
    what, offered, choice = await server.aside(_asked, server, request)
    abouts = server.abouts(request, [what])
    reads_calls = bool(offered) and choice != "none"
    begun = chat.CALL_BEGIN if choice == "required" else ""
    if request.stream:
        chunks = merged([_chat_chunks(server, request, about, reads_calls, begun) for about in abouts])
        return await event_stream(http, chunks, done=True)
    work = (server.finish(about.what, request.id_slot) for about in abouts)
    ends = await while_connected(http, together(work, len(server.engine.slots)))
    bodies = []
    for about, (slot, end) in zip(abouts, ends, strict=True):
        message = tools.parse_calls(begun + end.text) if reads_calls else tools.Message(end.text)
        bodies.append(formats.chat_completion(replace(about, id_slot=slot), end, message.content, message.tool_calls))
    return JSONResponse({**bodies[0], "choices": [choice for body in bodies for choice in body["choices"]]})


def _asked(server: Server, request: ChatRequest) -> tuple[Generation, list[dict[str, Any]], str]:
    """What is to be generated, the tools that may be called, and whether they may or have to be."""
    prompt, offered, choice = chat_prompt(server, request)
    grammar = _chat_grammar(request, offered if choice == "required" else [])
    if choice == "required":
        prompt += chat.CALL_BEGIN + "\n"
    return server.generation(request, server.reader.tokens(prompt), grammar), offered, choice


def _chat_grammar(request: ChatRequest, forced: list[dict[str, Any]]) -> str | None:
    """GBNF of a response format, or of a call of one of the ``forced`` tools; None: the request's own."""
    if forced:
        return grammar_of(tools.call_schema(forced))
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


async def _chat_chunks(
    server: Server, request: ChatRequest, about: About, reads_calls: bool, begun: str
) -> AsyncIterator[dict[str, Any]]:
    has_role = False
    calls = tools.CallStream(begun)
    async for _, step in server.events(about.what, request.id_slot):
        if isinstance(step, Progress):
            if request.return_progress:
                has_role = True
                more = formats.extras(step, request.timings_per_token)
                yield formats.chat_part(about, {"role": "assistant", "content": None}, **more)
            continue
        if not has_role:
            has_role = True
            yield formats.chat_part(about, {"role": "assistant", "content": None})
        text = step.text if isinstance(step, Token) else step.rest
        deltas: list[dict[str, Any]] = [{"content": text}] if text else []
        if reads_calls:
            deltas = calls.add(text) + (calls.end() if isinstance(step, End) else [])
        for delta in deltas:
            chunk = formats.chat_part(about, delta)
            if isinstance(step, Token) and delta is deltas[-1]:  # they go with the last
                chunk |= formats.extras(step, request.timings_per_token)
                if about.logprobs:
                    chunk["choices"][0]["logprobs"] = formats.chat_logprobs(about, step)
            yield chunk
        if isinstance(step, Token):
            continue
        timings = {"timings": formats.timings(step.timings, step.report)}
        wants_usage = request.stream_options is not None and request.stream_options.include_usage
        last = formats.chat_part(about, {}, formats.chat_finish(step, calls.n_calls > 0))
        yield last if wants_usage else last | timings
        if wants_usage:
            yield formats.chat_usage(about, step) | timings
