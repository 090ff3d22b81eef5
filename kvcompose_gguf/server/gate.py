"""Checks every request before its route: origin, API key, size of the body."""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from .api.errors import ApiError

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Asgi = Callable[[Scope, Receive, Send], Awaitable[None]]

#: files of the web page
FILES = ("index.html", "page.css", "page.js", "cache.js", "chat.js", "documents.js", "shared.js")
#: paths that work before the model is loaded
PAGE = frozenset({"/", "/favicon.ico", *(f"/{name}" for name in FILES)})
#: paths that need no API key
PUBLIC = PAGE | {"/health", "/v1/health"}

CORS = {
    b"access-control-allow-credentials": b"true",
    b"access-control-allow-methods": b"GET, POST, DELETE, OPTIONS",
    b"access-control-allow-headers": b"*",
}


WRONG_HOST = (
    "Host is not a name of this machine: use localhost, 127.0.0.1 or [::1], or start the server with --api-key, "
    "--cors-origins or another --host"
)

JSON = b"application/json; charset=utf-8"


class _Refused(BaseException):
    """A body is too long or too slow. A BaseException, so that the framework does not turn it into an answer itself."""

    def __init__(self, error: ApiError) -> None:
        self.error = error


class Gate:
    """ASGI middleware for CORS as in llama-server, API keys and a limit on bodies.

    Args:
        app: the application.
        api_keys: a request needs one of them. Empty: no key is needed.
        max_body_bytes: maximum bytes of a request's body.
        origins: allowed CORS origins: ``"*"``, ``"localhost"`` (this machine and the server itself), or one origin.
        timeout: maximum seconds between two pieces of a body. None: no limit.
        is_ready: returns whether the model is loaded. Until then only the web page is served.
        local_only: refuse requests whose ``Host`` is another name than this machine's. A web page of another host could
            otherwise reach the server by DNS rebinding.
    """

    def __init__(
        self,
        app: Asgi,
        api_keys: Sequence[str],
        max_body_bytes: int,
        origins: str = "*",
        timeout: float | None = None,
        is_ready: Callable[[], bool] = lambda: True,
        local_only: bool = False,
    ) -> None:
        self._app = app
        self._keys = [key.encode() for key in api_keys]
        self._max_body_bytes = max_body_bytes
        self._origins, self._timeout, self._is_ready, self._local_only = origins, timeout, is_ready, local_only

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        more = [(b"server", b"kvcompose"), *self._origin(headers)]

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                # some clients look for header names with the case that llama-server uses
                message["headers"] = [(name.title(), value) for name, value in (*message.get("headers", ()), *more)]
            await send(message)

        if scope["method"] == "OPTIONS":
            more += CORS.items()
            await _answer(send_with_headers, 200, b"", b"text/html; charset=utf-8")
            return
        error = self._refusal(scope["method"], scope["path"], headers)
        if error is not None:
            body = json.dumps(error.body()).encode()
            await _answer(send_with_headers, error.code, body, JSON)
            return
        # llama-server reads JSON whatever content type the client sends
        named = [(name, value) for name, value in scope["headers"] if name != b"content-type"]
        scope = {**scope, "headers": [*named, (b"content-type", b"application/json")]}
        answer: Send = send_with_headers
        if scope["method"] == "HEAD":  # the answer to a GET, without its body
            scope, answer = {**scope, "method": "GET"}, _without_body(send_with_headers)
        try:
            await self._app(scope, self._bounded(receive), answer)
        except _Refused as refused:
            await _answer(send_with_headers, refused.error.code, json.dumps(refused.error.body()).encode(), JSON)

    def _origin(self, headers: dict[bytes, bytes]) -> list[tuple[bytes, bytes]]:
        origin = headers.get(b"origin")
        if self._origins not in ("*", "localhost"):
            return [(b"access-control-allow-origin", self._origins.encode())]
        if origin is None or not self._may_ask(origin, headers):
            return [(b"vary", b"Origin")]
        return [(b"access-control-allow-origin", origin), (b"vary", b"Origin")]

    def _may_ask(self, origin: bytes, headers: dict[bytes, bytes]) -> bool:
        if self._origins == "*":
            return True
        if self._origins == "localhost":
            return _is_local(origin) or origin.partition(b"://")[2] == headers.get(b"host")
        return origin == self._origins.encode()

    def _refusal(self, method: str, path: str, headers: dict[bytes, bytes]) -> ApiError | None:
        origin = headers.get(b"origin")
        if origin is not None and method not in ("GET", "HEAD") and not self._may_ask(origin, headers):
            # a browser hides the answer from the page, but the server would have done the work
            return ApiError(403, "this origin is not allowed: start the server with --cors-origins")
        if self._local_only and not _is_local(b"://" + headers.get(b"host", b"localhost")):
            return ApiError(403, WRONG_HOST)
        if not self._is_ready() and path not in PAGE:
            return ApiError(503, "Loading model")
        if self._keys and path not in PUBLIC:
            given = headers.get(b"authorization") or headers.get(b"x-api-key", b"")
            given = given.removeprefix(b"Bearer ")
            # compare with all keys, so that the time does not depend on which one fits
            if not any([hmac.compare_digest(given, key) for key in self._keys]):
                return ApiError(401, "Invalid API Key")
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self._max_body_bytes:
            return self._too_long()
        return None

    def _too_long(self) -> ApiError:
        return ApiError(413, f"the request is longer than {self._max_body_bytes} bytes: raise --max-body")

    def _bounded(self, receive: Receive) -> Receive:
        """Returns ``receive`` with a limit on the bytes and on the wait for the next ones."""
        n_bytes, is_whole = 0, False

        async def receive_bounded() -> Message:
            nonlocal n_bytes, is_whole
            try:  # after the body, the next message is the disconnect: no limit for that
                message = await asyncio.wait_for(receive(), None if is_whole else self._timeout)
            except asyncio.TimeoutError:
                late = ApiError(408, f"the body of the request did not come within {self._timeout:g} seconds")
                raise _Refused(late) from None
            is_whole = not message.get("more_body", False)
            n_bytes += len(message.get("body", b""))
            if n_bytes > self._max_body_bytes:
                raise _Refused(self._too_long())
            return message

        return receive_bounded


def _without_body(send: Send) -> Send:
    async def send_head(message: Message) -> None:
        await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

    return send_head


async def _answer(send: Send, code: int, body: bytes, kind: bytes) -> None:
    headers = [(b"content-type", kind), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": code, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _is_local(origin: bytes) -> bool:
    host = origin.partition(b"://")[2]
    name = host[: host.find(b"]") + 1] if host.startswith(b"[") else host.partition(b":")[0]
    return name in (b"localhost", b"127.0.0.1", b"[::1]")
