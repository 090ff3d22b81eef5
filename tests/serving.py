"""Servers for the tests: behind a client in this process, or on a socket in a thread."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tiny
import uvicorn
from fastapi.testclient import TestClient

from kvcompose_gguf import KVCompose
from kvcompose_gguf.server.app import create_app
from kvcompose_gguf.server.command import make_engine
from kvcompose_gguf.server.options import ServeOptions

CONFIG = tiny.GQA
METHOD = KVCompose(compression_ratio=0.5, scoring="repeat", min_tokens=100, keep_last=8)


def tiny_options(model_path: Path, **options: Any) -> ServeOptions:
    """Of a server on a tiny model: two slots of 1,024 tokens."""
    defaults: dict[str, Any] = {
        "model_path": model_path, "n_ctx": 2048, "n_parallel": 2, "threads": 1, "n_batch": 64, "type_k": 0,
        "type_v": 0, "flash_attn": False, "alias": "tiny",
    }  # fmt: skip
    return ServeOptions(**(defaults | options))


def in_process(options: ServeOptions) -> TestClient:
    """A client of a server in this process, which runs inside of its ``with``."""
    return TestClient(create_app(options, lambda: make_engine(options)), raise_server_exceptions=False)


def post(client: TestClient, path: str, status: int = 200, **body: Any) -> Any:
    """The answer's JSON."""
    answer = client.post(path, json=body)
    assert answer.status_code == status, answer.text
    return answer.json()


def events(client: TestClient, path: str, **body: Any) -> tuple[list[Any], bool]:
    """The chunks of a streamed answer, and whether it ended with [DONE]."""
    with client.stream("POST", path, json=body | {"stream": True}) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    done = lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[: len(lines) - done]], done


@contextlib.contextmanager
def running(options: ServeOptions) -> Iterator[str]:
    """The address of a server, until the end of the ``with``."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(create_app(options, lambda: make_engine(options)), log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        until(lambda: server.started)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def until(true: Callable[[], Any], seconds: float = 30) -> None:
    """Wait for something to be true."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)
