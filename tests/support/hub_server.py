"""A small server that speaks the routes of the Hugging Face hub which its client uses to find and load files."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Repo:
    """Files by path; ``token`` is needed for them if it is not empty, ``status`` is answered instead if it is not 0."""

    files: dict[str, bytes]
    token: str = ""
    status: int = 0
    commit: str = "1" * 40


@dataclass
class Hub:
    """A running server: its repositories, and the requests that it has seen as (method, path, Range header)."""

    url: str
    repos: dict[str, Repo]
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    cut_after: int | None = None  # bytes of the next download, then the connection ends

    def downloads(self) -> list[str]:
        """The files that were asked for with GET, in order."""
        return [
            path.rsplit("/", 1)[-1] for method, path, _ in self.requests if method == "GET" and path.startswith("/cdn/")
        ]


@contextlib.contextmanager
def running(repos: dict[str, Repo]) -> Iterator[Hub]:
    """Serve ``repos`` on loopback."""
    server = _Server(repos)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(ThreadingHTTPServer):
    def __init__(self, repos: dict[str, Repo]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub = Hub(f"http://127.0.0.1:{self.server_address[1]}", repos)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    @property
    def hub(self) -> Hub:
        assert isinstance(self.server, _Server)
        return self.server.hub

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = self.path.split("?")[0]
        self.hub.requests.append((self.command, path, self.headers.get("Range")))
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+?)(?:/revision/[^/]+)?", path):
            self._info(match[1])
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._resolve(match[1], match[3])
        elif match := re.fullmatch(r"/cdn/([^/]+/[^/]+)/(.+)", path):
            self._content(self.hub.repos[match[1]].files[match[2]])
        else:
            self._send(404, {"X-Error-Code": "EntryNotFound"})

    def _info(self, name: str) -> None:
        repo = self.hub.repos.get(name)
        if repo is None:  # as the hub answers clients that are not logged in
            self._send(401, {"X-Error-Code": "RepoNotFound"}, b'{"error":"Repository not found"}')
        elif repo.status:
            self._send(repo.status, {}, b'{"error":"something"}')
        else:
            info = {"id": name, "sha": repo.commit, "siblings": [{"rfilename": file} for file in repo.files]}
            self._send(200, {"Content-Type": "application/json"}, json.dumps(info).encode())

    def _resolve(self, name: str, file: str) -> None:
        repo = self.hub.repos[name]
        if repo.token and self.headers.get("Authorization") != f"Bearer {repo.token}":
            self._send(403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
            return
        content = repo.files[file]
        headers = {
            "X-Repo-Commit": repo.commit, "X-Linked-Size": str(len(content)), "ETag": '"of the redirect"',
            "X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"', "Location": f"{self.hub.url}/cdn/{name}/{file}",
        }  # fmt: skip
        self._send(302, headers)

    def _content(self, content: bytes) -> None:
        cut, self.hub.cut_after = self.hub.cut_after, None
        start = 0
        if match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            start = int(match[1])
        body = content[start:]
        headers = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if start else {}
        self._send(206 if start else 200, headers, body, cut)

    def _send(self, status: int, headers: dict[str, str], body: bytes = b"", cut: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:cut])
            self.close_connection = cut is not None
