"""Puts documents before the first question of a chat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...errors import ConfigError
from ...plan import seam
from ..api.errors import ApiError, invalid
from ..server import Server
from ..slots.documents import Document


def with_documents(server: Server, messages: list[dict[str, Any]], names: Sequence[str]) -> list[dict[str, Any]]:
    """Returns messages with the texts of documents before the first question, as ``document_prompt`` has them.

    Raises:
        ApiError: a document is unknown, or there is no question.
    """
    if not names:
        return messages
    texts = [found_document(server, name).text for name in names]
    first = next((n for n, message in enumerate(messages) if message["role"] == "user"), None)
    if first is None:
        raise invalid("kv_documents needs a message of the user")
    content = messages[first]["content"]
    before = "".join(f"{text}\n\n" for text in texts)
    if isinstance(content, str):
        content = before + content
    else:
        first_part, *more = content or [{"type": "text", "text": ""}]
        content = [{**first_part, "text": before + first_part["text"]}, *more]
    return [*messages[:first], {**messages[first], "content": content}, *messages[first + 1 :]]


def found_document(server: Server, name: str) -> Document:
    """Returns the document with an id; raises ApiError if there is none."""
    document = None if server.engine.documents is None else server.engine.documents.get(name)
    if document is None:
        raise ApiError(404, f"document {name[:64]!r} is unknown: see GET /kv/documents")
    return document


def document_prompt(server: Server, text: str, system: str) -> str:
    """Returns what every conversation about a document begins with, whatever its question is; raises ApiError."""
    said = [{"role": "system", "content": system}] if system else []
    variables = {"enable_thinking": server.options.reasoning, "reasoning_format": server.options.reasoning_format}
    asked = ([*said, {"role": "user", "content": f"{text}\n\n{letter}"}] for letter in ("A", "Z"))
    try:
        one, other = (server.template.render(each, tool_choice="none", **variables).prompt for each in asked)
    except ConfigError as error:
        raise invalid(str(error)) from error
    return one[: seam.common_prefix(one, other)]
