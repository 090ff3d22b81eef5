"""What the documents of requests say, and their place before the first question of a chat."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from typing import Any

from ...errors import ConfigError
from ...plan import seam
from ...support.documents import document_of
from ..api.errors import ApiError, invalid
from ..api.schemas import DocumentFile, DocumentRequest
from ..server import Server
from ..slots.documents import Document

#: characters of a text that name it if it has no title
N_TITLE = 60


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


def text_and_title(request: DocumentRequest) -> tuple[str, str]:
    """Returns what a document says, and its name; raises ApiError if it says nothing, or its file cannot be read."""
    if bool(request.text) == (request.file is not None):
        raise invalid("text and file: give one of them")
    if request.file is None:
        return request.text, request.title or " ".join(request.text.split())[:N_TITLE]
    try:
        text = document_of(request.file.filename, _bytes_of(request.file)).text
    except ConfigError as error:
        raise invalid(str(error)) from error
    return text, request.title or request.file.filename


def _bytes_of(file: DocumentFile) -> bytes:
    data = file.file_data
    if data.startswith("data:"):  # a data URL: data:application/pdf;base64,...
        kind, _, data = data.partition(",")
        if not kind.endswith(";base64"):
            raise invalid("file_data is a data URL without base64: encode the file in Base64")
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:  # a ValueError: letters beyond ASCII
        raise invalid(f"file_data is not Base64: {error}") from error


def found_document(server: Server, name: str) -> Document:
    """Returns the document with an id; raises ApiError if there is none."""
    document = server.engine.stores.documents.get(name)
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
