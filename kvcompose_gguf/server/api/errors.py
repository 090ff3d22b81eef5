"""Errors in llama-server's form: ``{"error": {"code", "message", "type"}}``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import ConfigError, ContextLengthError, KVComposeError
from ..slots.job import Busy, TimedOut

#: value of ``Retry-After``, seconds, when the queue is full
RETRY_AFTER = 1

TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    413: "invalid_request_error", 500: "server_error", 501: "not_supported_error", 503: "unavailable_error",
    408: "invalid_request_error", 504: "timeout_error",
}  # fmt: skip


#: HTTP status and error type of our exceptions: the first class that fits counts. None: the usual type of the status
STATUSES: tuple[tuple[type[KVComposeError], int, str | None], ...] = (
    (ContextLengthError, 400, "exceed_context_size_error"), (ConfigError, 400, None), (Busy, 503, None),
    (TimedOut, 504, None), (KVComposeError, 500, None),
)  # fmt: skip


class ApiError(Exception):
    """An error for the client.

    Args:
        code: HTTP status.
        message: one sentence for humans.
        kind: llama-server's error type. None: the usual type of the status.
        **details: additional fields of the error object.
    """

    def __init__(self, code: int, message: str, kind: str | None = None, **details: Any) -> None:
        super().__init__(message)
        self.code, self.message, self.details = code, message, details
        self.kind = kind or TYPES.get(code, "server_error")

    def body(self) -> dict[str, Any]:
        """Returns llama-server's error object (format_error_response in server-common.cpp)."""
        return {"error": {"code": self.code, "message": self.message, "type": self.kind, **self.details}}


def invalid(message: str) -> ApiError:
    """Returns an error 400: the request is invalid."""
    return ApiError(400, message)


def invalid_fields(errors: Sequence[Mapping[str, Any]], n_skip: int = 0) -> ApiError:
    """Returns an error 400 that names the fields of a body that pydantic refuses.

    Args:
        n_skip: number of parts before the field in every place.
    """
    places = [".".join(map(str, error["loc"][n_skip:])) for error in errors[:3]]
    told = [
        f"Field '{place}': {error['msg']}" if place else error["msg"]
        for place, error in zip(places, errors[:3], strict=True)
    ]
    return invalid("; ".join(told))


def not_supported(message: str) -> ApiError:
    """Returns an error 501: this server does not have a route or feature, or was started without it."""
    return ApiError(501, message)


def api_error(error: BaseException) -> ApiError:
    """Returns the error for a client that an exception stands for."""
    if isinstance(error, ApiError):
        return error
    for kind, code, name in STATUSES:
        if isinstance(error, kind):
            return ApiError(code, str(error), name)
    return ApiError(500, f"{type(error).__name__}: {error}")
