"""Turns a chat into a prompt, and into what its answer has to be (oaicompat_chat_params_parse)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...errors import ConfigError
from ...native.chat_library import Rendered, Trigger
from ...plan import seam
from ..api.errors import invalid
from ..api.grammars import bounded_schema, json_safe
from ..api.reader import Reader
from ..api.schemas import ChatRequest, KVCompress
from ..options import REASONING_FORMATS
from ..server import Server
from ..slots.constraint import Constraint, Thinking
from ..slots.steps import Generation
from .documents import found_document, with_documents
from .messages import check_messages
from .tools import check_tools

#: characters that have a meaning in regular expressions (regex_escape in common/common.cpp)
SPECIAL = str.maketrans({character: "\\" + character for character in ".^$|()*+?[]{}\\"})


@dataclass(frozen=True, kw_only=True)
class ChatPrompt:
    """The prompt of a chat.

    Attributes:
        rendered: the prompt, and what its answer has to be.
        opening: what the prompt begins with whatever the user says: system messages and tools; empty: there are none.
        is_continued: whether the answer goes on with the last message.
        calls: whether the model may call tools.
        is_constrained: whether the grammar comes from a schema or from tools, and describes the whole message.
    """

    rendered: Rendered
    opening: str
    is_continued: bool
    calls: bool
    is_constrained: bool


def chat_prompt(server: Server, request: ChatRequest) -> ChatPrompt:
    """Returns the prompt of a chat.

    Raises:
        ApiError: messages or tools are invalid, or the template refuses them.
    """
    messages = with_documents(server, check_messages(request.messages), request.kv_documents)
    tools, choice = check_tools(request.tools, request.tool_choice, server.template)
    if tools and choice != "none" and request.grammar:
        raise invalid("Cannot use custom grammar constraints with tools.")
    options: dict[str, Any] = {
        **_continuation(request, messages), **_variables(server, request), "tool_choice": choice,
        "grammar": request.grammar or "", "reasoning_format": reasoning_format(server, request),
    }  # fmt: skip
    if tools:
        options["tools"] = tools
    if request.parallel_tool_calls is not None:
        options["parallel_tool_calls"] = request.parallel_tool_calls
    schema = _schema(request)
    if schema is not None:
        options["json_schema"] = bounded_schema(schema) or {"type": "object"}
    try:
        rendered = server.template.render(messages, **options)
    except ConfigError as error:
        raise invalid(str(error)) from error
    if tools or schema is not None:
        rendered = replace(rendered, grammar=json_safe(rendered.grammar, is_chat=True))
    return ChatPrompt(
        rendered=rendered, opening=_opening(server, messages, options),
        is_continued=bool(options["continue_final_message"]), calls=bool(tools) and choice != "none",
        is_constrained=bool(rendered.grammar) and not request.grammar,
    )  # fmt: skip


def chat_generation(server: Server, request: ChatRequest, prompt: ChatPrompt) -> Generation:
    """Returns the generation of a chat's answer.

    Raises:
        ApiError: an option is invalid, or the prompt is too long.
    """
    rendered, reader = prompt.rendered, server.reader
    if request.kv_documents and request.kv_compress is None:
        how = found_document(server, request.kv_documents[0]).kv_compress
        request = request.model_copy(update={"kv_compress": None if how is None else KVCompress(**how)})
    constraint = _constraint(reader, rendered) if prompt.is_constrained else None
    thinking = _thinking(reader, rendered, request) if rendered.thinking else None
    what = server.generation(request, reader.tokens(rendered.prompt), constraint, thinking)
    preserved = (_token(reader, text) for text in rendered.preserved)
    what = replace(
        what, stops=(*what.stops, *rendered.stops), preserved=frozenset(each for each in preserved if each is not None)
    )
    if what.method is not None and prompt.opening:
        n_first = seam.common_prefix(reader.tokens(prompt.opening), what.tokens)
        what = replace(what, method=replace(what.method, protect_first=max(n_first, what.method.protect_first)))
    return what


def reasoning_format(server: Server, request: ChatRequest) -> str:
    """Returns how thoughts are told: one of ``REASONING_FORMATS``; raises ApiError."""
    form = request.reasoning_format or server.options.reasoning_format
    if form not in REASONING_FORMATS:
        raise invalid(f"Unknown reasoning format: {form}")
    return form


def _continuation(request: ChatRequest, messages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    is_continued = messages[-1]["role"] == "assistant"
    if is_continued and len(messages) > 1 and messages[-2]["role"] == "assistant":
        raise invalid("Cannot have 2 or more assistant messages at the end of the list.")
    if request.continue_final_message and request.add_generation_prompt:
        raise invalid("Cannot set both add_generation_prompt and continue_final_message to true.")
    if is_continued and messages[-1].get("tool_calls"):
        raise invalid("Cannot continue an assistant message that contains tool calls.")
    if is_continued:
        return {"continue_final_message": request.continue_final_message or True, "add_generation_prompt": False}
    return {"continue_final_message": False, "add_generation_prompt": request.add_generation_prompt}


def _variables(server: Server, request: ChatRequest) -> dict[str, Any]:
    variables = dict(request.chat_template_kwargs or {})
    thinks = variables.get("enable_thinking", server.options.reasoning)
    if isinstance(thinks, str):
        raise invalid('invalid type for "enable_thinking" (expected boolean, got string)')
    if request.reasoning_effort == "none":
        thinks = False
    elif request.reasoning_effort:
        variables["reasoning_effort"] = request.reasoning_effort
    return {"enable_thinking": bool(thinks), "chat_template_kwargs": variables}


def _schema(request: ChatRequest) -> Any:
    """Returns the JSON schema of the answer; None: there is none."""
    form = request.response_format or {}
    kind, schema = form.get("type", "text"), request.json_schema
    if kind == "json_object":
        schema = form.get("schema", {} if schema is None else schema)
    elif kind == "json_schema":
        if not isinstance(form.get("json_schema"), dict):
            raise invalid("response_format.json_schema is needed, an object with a schema")
        schema = form["json_schema"].get("schema", {})
    elif kind not in ("text", "", None):
        raise invalid(f'response_format type must be one of "text" or "json_object", but got: {kind}')
    if schema is not None and request.grammar:
        raise invalid("Cannot use both json_schema and grammar")
    return schema


def _opening(server: Server, messages: Sequence[dict[str, Any]], options: Mapping[str, Any]) -> str:
    """Returns what a chat begins with whatever the user says."""
    is_other = (each["role"] not in ("system", "developer") for each in messages)
    n_system = next((n for n, other in enumerate(is_other) if other), len(messages))
    if not n_system and "tools" not in options:
        return ""
    options = {**options, "add_generation_prompt": False, "continue_final_message": False}
    said = ([*messages[:n_system], {"role": "user", "content": text}] for text in ("A", "Z"))
    try:
        one, other = (server.template.render(each, **options).prompt for each in said)
    except ConfigError:  # it allows no such chat
        return ""
    return one[: seam.common_prefix(one, other)]


def _constraint(reader: Reader, rendered: Rendered) -> Constraint:
    patterns, tokens = [], []
    for trigger in rendered.triggers:
        token = _token(reader, trigger.value) if trigger.kind == Trigger.WORD else None
        if trigger.kind == Trigger.TOKEN or token is not None:
            tokens.append(trigger.token if token is None else token)
        else:
            patterns.append(_pattern(trigger))
    return Constraint(
        grammar=rendered.grammar, begin=_begin(reader, rendered.begin), patterns=tuple(patterns), tokens=tuple(tokens)
    )  # fmt: skip


def _thinking(reader: Reader, rendered: Rendered, request: ChatRequest) -> Thinking:
    mark, *ends = (reader.tokens(text, begin=False) for text in rendered.thinking)
    budget = request.reasoning_budget_tokens
    message = reader.tokens(request.reasoning_budget_message, begin=False) if request.reasoning_budget_message else ()
    return Thinking(
        mark=mark, ends=tuple(ends), begin=_begin(reader, rendered.begin),
        n_most=None if budget is None or budget < 0 else budget, closing=(*message, *ends[0]),
    )  # fmt: skip


def _pattern(trigger: Trigger) -> str:
    if trigger.kind == Trigger.WORD:
        return trigger.value.translate(SPECIAL)
    if trigger.kind == Trigger.PATTERN or not trigger.value:
        return trigger.value or "^$"
    return "^" + trigger.value.removeprefix("^").removesuffix("$") + "$"


def _begin(reader: Reader, text: str) -> tuple[int, ...]:
    tokens = reader.tokens(text, begin=False) if text else ()
    if tokens and not text[0].isspace() and reader.text(tokens[0])[:1].isspace():
        return tokens[1:]  # some tokenizers add a space before the first control token
    return tokens


def _token(reader: Reader, text: str) -> int | None:
    """Returns the one token of a text; None: it has several."""
    tokens = reader.tokens(text, begin=False)
    return tokens[0] if len(tokens) == 1 else None
