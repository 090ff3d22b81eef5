"""A server on a socket, in a thread of the tests."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn

from kvcompose_gguf.server.app import create_app
from kvcompose_gguf.server.command import make_engine
from kvcompose_gguf.server.options import ServeOptions


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
