"""The web page at /."""

from __future__ import annotations

import mimetypes
from collections.abc import Callable
from importlib.resources import files
from typing import Any

from fastapi import APIRouter, Response
from markdown_it import MarkdownIt

from ..api.errors import ApiError
from ..api.schemas import MarkdownRequest
from ..gate import FILES

#: HTML in a text stays text, and an image would be loaded from elsewhere
MARKDOWN = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"]).disable("image")


def page(is_there: bool) -> APIRouter:
    """Returns a router for the files of the page, which answers 404 if ``is_there`` is False."""
    router = APIRouter()

    def route_of(name: str) -> Callable[[], Any]:
        async def route() -> Response:
            if not is_there:
                raise ApiError(404, "File Not Found")
            kind = mimetypes.guess_type(name)[0]
            # the browser loads nothing from other hosts, and no inline scripts
            policy = {"Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'"}
            raw = files("kvcompose_gguf.server").joinpath("page", name).read_bytes()
            return Response(raw, media_type=kind, headers=policy)

        return route

    for path, name in (("/", FILES[0]), *((f"/{name}", name) for name in FILES)):
        router.add_api_route(path, route_of(name), include_in_schema=False)

    @router.post("/kv/markdown", include_in_schema=False)
    def markdown(request: MarkdownRequest) -> dict[str, str]:
        """Returns a text that is Markdown as HTML for the page, without HTML of its own."""
        if not is_there:
            raise ApiError(404, "File Not Found")
        return {"html": MARKDOWN.render(request.text)}

    return router
