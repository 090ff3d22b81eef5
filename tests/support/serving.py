"""Servers for the tests: behind a client in this process, or on a socket in a thread."""

from __future__ import annotations

import contextlib
import json
import math
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi.testclient import TestClient

from kvcompose_gguf import KVCompose
from kvcompose_gguf.server.app import create_app
from kvcompose_gguf.server.command import make_engine
from kvcompose_gguf.server.options import ServeOptions
from kvcompose_gguf.server.slots.job import Job
from kvcompose_gguf.server.slots.sampling import Sampler, Sampling
from kvcompose_gguf.server.slots.turns import Turns
from support import tiny

CONFIG = tiny.GQA
#: seconds after which something hangs; nothing takes nearly as long on a machine that has other work
TIMEOUT = 120
METHOD = KVCompose(compression_ratio=0.5, scoring="repeat", min_tokens=100, keep_last=8)


def tiny_options(model_path: Path, **options: Any) -> ServeOptions:
    """Of a server on a tiny model: two slots of 1,024 tokens. The same request always has the same answer."""
    defaults: dict[str, Any] = {
        "model_path": model_path, "n_ctx": 2048, "n_parallel": 2, "threads": 1, "n_batch": 64, "type_k": 0,
        "type_v": 0, "flash_attn": False, "alias": "tiny", "sampling": Sampling(seed=1),
    }  # fmt: skip
    return ServeOptions(**(defaults | options))


def in_process(options: ServeOptions) -> TestClient:
    """A client of a server in this process, which runs inside of its ``with``."""
    return TestClient(create_app(options, lambda: make_engine(options)), raise_server_exceptions=False)


def post(client: TestClient, path: str, status: int = 200, /, **body: Any) -> Any:
    """The answer's JSON."""
    answer = client.post(path, json=body)
    assert answer.status_code == status, answer.text
    return answer.json()


def events(client: TestClient, path: str, **body: Any) -> tuple[list[Any], bool]:
    """The chunks of a streamed answer, and whether it ended with [DONE]."""
    with client.stream("POST", path, json=body | {"stream": True}) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line and line != ":"]
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
        try:
            until(lambda: server.started)
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(TIMEOUT)
        assert not thread.is_alive()


def until(true: Callable[[], Any], seconds: float = TIMEOUT) -> None:
    """Wait for something to be true."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


class Gate:
    """Holds the threads that come to it, until the test lets them pass; open at first."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._left = math.inf
        self.n_held = self.n_passed = 0

    def let(self, n: float) -> None:
        """Let ``n`` more pass, and hold those that come after them."""
        with self._changed:
            self._left = n
            self._changed.notify_all()

    def open(self) -> None:
        """Let all pass."""
        self.let(math.inf)

    def arrive(self) -> None:
        """Called by the threads: returns when this one may pass."""
        with self._changed:
            self.n_held += 1
            self._changed.notify_all()
            may_pass = self._changed.wait_for(lambda: self._left > 0, 2 * TIMEOUT)
            self.n_held -= 1
            assert may_pass, "the test has not opened the gate"
            self._left -= 1
            self.n_passed += 1

    def wait_held(self, n: int = 1) -> None:
        """Return when ``n`` threads are held."""
        with self._changed:
            assert self._changed.wait_for(lambda: self.n_held >= n and self._left <= 0, TIMEOUT)


@contextlib.contextmanager
def gate_before(owner: type, name: str, thread: str = "") -> Iterator[Gate]:
    """A gate before every call of ``owner``'s method, of threads with this in their names; it is open at the end."""
    gate, original = Gate(), getattr(owner, name)

    def method(*args: Any, **kwargs: Any) -> Any:
        if thread in threading.current_thread().name:
            gate.arrive()
        return original(*args, **kwargs)

    setattr(owner, name, method)
    try:
        yield gate
    finally:
        gate.open()
        setattr(owner, name, original)


def decodes(thread: str = "slot-") -> contextlib.AbstractContextManager[Gate]:
    """A gate before every decode, in the thread that wants it: a slot that is held does not hold the others."""
    return gate_before(Turns, "run", thread)


@contextlib.contextmanager
def cancelling() -> Iterator[threading.Event]:
    """An event that is set when the server cancels a request: its client has gone, or it has been answered."""
    cancelled, cancel = threading.Event(), Job.cancel

    def told(self: Job) -> None:
        cancel(self)
        cancelled.set()

    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(Job, "cancel", told)
        yield cancelled


class Asking:
    """A request in a thread of its own.

    Attributes:
        lines: of the answer so far.
        busy_at_end: slots at work when its last line had come, as /slots and /metrics say it.
    """

    def __init__(self, client: TestClient, path: str, **body: Any) -> None:
        self.lines: list[str] = []
        self.status = -1
        self.busy_at_end: tuple[float, float] = (-1, -1)
        self._client, self._path, self._body = client, path, body
        self._thread = threading.Thread(target=self._ask)
        self._thread.start()

    def _ask(self) -> None:
        with self._client.stream("POST", self._path, json=self._body) as answer:
            self.status = answer.status_code
            for line in answer.iter_lines():
                if line and line != ":":
                    self.lines.append(line.removeprefix("data: "))
        self.busy_at_end = n_busy(self._client), n_processing(self._client)

    def n_ends(self) -> int:
        """Parts so far that end a generation or the answer."""
        ends = ('"stop": true', '"finish_reason": "', "[DONE]", '"error"', '"id_slot": ')
        return sum(any(end in line for end in ends) and '"stop": false' not in line for line in list(self.lines))

    def wait(self) -> list[str]:
        """Its lines, when it has been answered."""
        self._thread.join(TIMEOUT)
        assert not self._thread.is_alive()
        return self.lines


def n_busy(client: TestClient) -> int:
    """Slots at work, as /slots says it."""
    return sum(slot["is_processing"] for slot in client.get("/slots").json())


def n_processing(client: TestClient) -> float:
    """Slots at work, as /metrics says it."""
    (line,) = [
        line for line in client.get("/metrics").text.splitlines() if line.startswith("llamacpp:requests_processing ")
    ]
    return float(line.split()[1])


@contextlib.contextmanager
def saying(text: str) -> Iterator[None]:
    """Lets the tiny model say a text, one character a token, and then end, whatever its samplers would choose."""
    choose = Sampler._choose

    def said(self: Any, logits: Any) -> int:
        n_said = self.n_said = getattr(self, "n_said", 0) + 1
        tokens = tiny.of_bytes(text)
        return tokens[n_said - 1] if n_said <= len(tokens) else int(self._llama.token_eos())

    Sampler._choose = said  # type: ignore[method-assign]
    try:
        yield
    finally:
        Sampler._choose = choose  # type: ignore[method-assign]
