#!/usr/bin/env python3
"""Runs a server's script and records the bodies that it sends, so that the answers of two checkouts can be compared.

    KVC_RECORD_SCRIPT=scripts/llama_server_shim.py KVC_RECORD_FOLDER=bodies scripts/record_bodies.py [ARGUMENTS]

Each answer is one line of JSON: request, status, content type and body. Values that change from run to run, such as
times and random ids, are masked. The file is named after the test that started the server, or ``server``. The script
gets the words of KVC_RECORD_ARGUMENTS as further arguments.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

Message = dict[str, Any]
App = Callable[[Any, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]]

#: fields with a time, a date or an address; ``*_ms`` and ``*_seconds`` are masked by the ends of their names
VOLATILE = {
    "created",
    "created_at",
    "date",
    "model_path",
    "port",
    "pid",
    "uptime",
    "url",
    "model_file",
    "Process-Start-Time-Unix",
}
VOLATILE_END = re.compile(r"(_ms|_seconds|_per_second|_at|_us)$")

#: parts of texts, and what stands for them: random ids, llama.cpp's random marker, ports, temporary folders, metrics
TEXTS = [
    (re.compile(r"\b(chatcmpl|cmpl|call|resp|msg|rs|fc)[-_][A-Za-z0-9]{8,}\b"), r"\1-*"),
    (re.compile(r"<__media_\w+__>"), "<__media_*__>"),
    (re.compile(r"(127\.0\.0\.1|localhost):\d+"), r"\1:*"),
    (re.compile(r"/tmp/[^\s\"',]+"), "/tmp/*"),
    (re.compile(r"^([\w:]*(?:second|time|created)[\w:]*(?:\{[^}]*\})?) [-+.\deE]+$", re.M), r"\1 *"),
]


def mask(value: Any, name: str = "") -> Any:
    """Returns a JSON value with ``*`` in place of everything that changes from run to run."""
    if isinstance(value, dict):
        return {key: mask(item, key) for key, item in value.items()}
    if isinstance(value, list):
        return [mask(item) for item in value]
    if name in VOLATILE or VOLATILE_END.search(name):
        return "*"
    return mask_text(value) if isinstance(value, str) else value


def mask_text(text: str) -> str:
    """Returns a text with ``*`` in place of random ids, ports, temporary folders and the metrics' times."""
    for pattern, instead in TEXTS:
        text = pattern.sub(instead, text)
    return text


def mask_body(body: bytes) -> Any:
    """Returns a body as a masked value: JSON, a list of server-sent events, or lines of text."""
    text = body.decode("utf-8", "backslashreplace")
    try:
        return mask(json.loads(text))
    except ValueError:
        lines = [line for line in text.splitlines() if line]
    return [mask_event(line) for line in lines]


def mask_event(line: str) -> Any:
    field, colon, data = line.partition(": ")
    if colon and field in ("data", "error"):
        try:
            return {field: mask(json.loads(data))}
        except ValueError:
            pass
    return mask_text(line)


class Recorder:
    """An ASGI application that passes everything to ``app``, and appends each answer to ``file``."""

    def __init__(self, app: App, file: Path) -> None:
        self.app, self.file = app, file

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        asked, told, start, ended = bytearray(), bytearray(), {}, False

        async def hear() -> Message:
            message: Message = await receive()
            asked.extend(message.get("body", b""))
            return message

        async def tell(message: Message) -> None:
            nonlocal ended
            await send(message)
            if message["type"] == "http.response.start":
                start.update(message)
            else:
                told.extend(message.get("body", b""))
                ended = not message.get("more_body", False)

        try:
            await self.app(scope, hear, tell)
        finally:
            self._write(scope, bytes(asked), start, bytes(told) if ended else None)

    def _write(self, scope: Any, asked: bytes, start: Message, told: bytes | None) -> None:
        """Appends one line; ``told`` is None if the client left, at a moment that differs from run to run."""
        status = start.get("status")
        if scope["path"].endswith("/health") and status == 503:
            return  # how often a client asks until the model is loaded depends on the machine
        kinds = [value.decode("latin-1") for name, value in start.get("headers", []) if name.lower() == b"content-type"]
        line = {
            "asked": f"{scope['method']} {scope['path']}",
            "body": mask_body(asked),
            "status": status,
            "type": kinds,
            "answer": "left" if told is None else mask_body(told),
        }
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def main() -> None:
    import uvicorn

    folder = Path(os.environ["KVC_RECORD_FOLDER"])
    folder.mkdir(parents=True, exist_ok=True)
    test = os.environ.get("PYTEST_CURRENT_TEST", "server").rpartition(" (")[0] or "server"
    file = folder / f"{re.sub(r'[^A-Za-z0-9.]+', '-', test.removeprefix('unit/'))[:150].strip('-')}.jsonl"
    make = uvicorn.Config.__init__

    def with_recorder(self: uvicorn.Config, app: Any, *args: Any, **kwargs: Any) -> None:
        make(self, Recorder(app, file), *args, **kwargs)

    uvicorn.Config.__init__ = with_recorder  # type: ignore[method-assign]
    sys.argv[0] = os.environ["KVC_RECORD_SCRIPT"]
    sys.argv += os.environ.get("KVC_RECORD_ARGUMENTS", "").split()
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
