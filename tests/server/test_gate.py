"""Origins, keys and sizes, before any route."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from kvcompose_gguf.server.api.errors import ApiError
from kvcompose_gguf.server.gate import Gate


def ask(gate: Gate, path: str = "/slots", method: str = "GET", body: list[bytes] = [b""], **headers: str) -> Any:  # noqa: B006
    """Status, headers and what the application read, or the error it got."""
    sent: list[Any] = []
    chunks = iter(body)

    async def receive() -> Any:
        return {"type": "http.request", "body": next(chunks, b""), "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    pairs = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    asyncio.run(gate({"type": "http", "method": method, "path": path, "headers": pairs}, receive, send))  # type: ignore[arg-type]
    headers = {name.lower(): value for name, value in sent[0]["headers"]}
    return sent[0]["status"], headers, sent[1].get("body")


async def reads_twice(scope: Any, receive: Any, send: Any) -> None:
    """An application that tells the content type, after it has read two pieces of the body."""
    try:
        await receive()
        await receive()
        status = 200
    except ApiError as error:
        status = error.code
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": dict(scope["headers"]).get(b"content-type", b"")})


def make(keys: tuple[str, ...] = (), size: int = 100, **options: Any) -> Gate:
    return Gate(reads_twice, keys, size, **options)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401), ({"authorization": "Bearer one"}, 200), ({"authorization": "two"}, 200), ({"x_api_key": "two"}, 200),
        ({"authorization": "Bearer on"}, 401), ({"authorization": "Bearer one "}, 401), ({"x_api_key": ""}, 401),
        ({"authorization": "Bearer é"}, 401), ({"authorization": "Basic one"}, 401),
    ],
)  # fmt: skip
def test_one_of_the_keys_is_needed(headers, status):
    assert ask(make(("one", "two")), **headers)[0] == status


@pytest.mark.parametrize("path", ["/health", "/v1/health", "/"])
def test_public_paths_need_no_key_and_others_do(path):
    assert ask(make(("one",)), path)[0] == 200
    assert ask(make(("one",)), path + "x")[0] == 401
    assert ask(make(()), path + "x")[0] == 200


def test_options_are_answered_without_a_key_and_with_the_origin():
    status, headers, body = ask(make(("one",)), method="OPTIONS", origin="web.mydomain.fr")
    assert (status, body) == (200, b"")
    assert headers[b"access-control-allow-origin"] == b"web.mydomain.fr"
    assert headers[b"access-control-allow-credentials"] == b"true"
    assert headers[b"access-control-allow-methods"] == b"GET, POST, DELETE, OPTIONS"
    assert headers[b"access-control-allow-headers"] == b"*"


@pytest.mark.parametrize(
    ("origin", "is_allowed"),
    [
        ("http://localhost:8080", True), ("http://127.0.0.1", True), ("http://[::1]:3000", True), ("http://evil.com", False),
        ("http://notlocalhost", False), ("http://localhost.evil.com", False), ("null", False),
    ],
)  # fmt: skip
def test_only_pages_of_this_machine_may_ask_if_so_wanted(origin, is_allowed):
    assert (b"access-control-allow-origin" in ask(make(origins="localhost"), origin=origin)[1]) == is_allowed
    assert ask(make(), origin=origin)[1][b"access-control-allow-origin"] == origin.encode()


def test_long_bodies_are_refused_by_their_length_or_when_it_is_reached():
    assert ask(make(size=100), content_length="100")[0] == 200
    assert ask(make(size=100), content_length="101")[0] == 413
    assert ask(make(size=100), content_length="many")[0] == 413
    assert ask(make(size=100), body=[b"x" * 60, b"x" * 40])[0] == 200
    assert ask(make(size=100), body=[b"x" * 60, b"x" * 41])[0] == 413


def test_a_body_is_json_whatever_its_sender_calls_it():
    assert ask(make(), content_type="application/x-www-form-urlencoded")[2] == b"application/json"
    assert ask(make())[2] == b"application/json"


def test_a_body_has_to_come_in_time():
    async def slow() -> Any:
        gate, never = make(timeout=0.05), asyncio.Event()
        wait: Any = never.wait
        sent: list[Any] = []
        await gate({"type": "http", "method": "POST", "path": "/x", "headers": []}, wait, lambda m: _append(sent, m))
        return sent[0]["status"]

    async def _append(sent: list[Any], message: Any) -> None:
        sent.append(message)

    assert asyncio.run(slow()) == 408


@pytest.mark.parametrize(("path", "status"), [("/", 200), ("/health", 503), ("/slots", 503)])
def test_only_the_page_comes_before_the_model(path, status):
    assert ask(make(is_ready=lambda: False), path)[0] == status


@pytest.mark.parametrize(
    ("origin", "method", "status"),
    [
        ("http://evil.com", "POST", 403), ("http://evil.com", "DELETE", 403), ("http://evil.com", "GET", 200), ("null", "POST", 403),
        ("http://localhost:3000", "POST", 200), ("http://192.168.0.9:8080", "POST", 200), ("http://192.168.0.9:81", "POST", 403),
    ],
)  # fmt: skip
def test_what_another_hosts_page_asks_is_not_done(origin, method, status):
    headers = {"origin": origin, "host": "192.168.0.9:8080"}
    assert ask(make(origins="localhost"), "/completion", method, [b"{}"], **headers)[0] == status
    assert ask(make(origins="*"), "/completion", method, [b"{}"], **headers)[0] == 200


@pytest.mark.parametrize(
    ("host", "status"), [("localhost:8080", 200), ("127.0.0.1", 200), ("[::1]:80", 200), ("rebound.example:8080", 403)]
)
def test_a_server_of_this_machine_is_called_by_its_names(host, status):
    found, _, body = ask(make(origins="localhost", local_only=True), host=host)
    assert found == status
    assert found == 200 or b"--api-key, --cors-origins or another --host" in body
    assert ask(make(origins="localhost"), host=host)[0] == 200


def test_one_origin_may_be_named():
    headers = ask(make(origins="https://a.example"), origin="https://b.example")[1]
    assert headers[b"access-control-allow-origin"] == b"https://a.example"
