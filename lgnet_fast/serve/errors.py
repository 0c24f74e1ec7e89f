"""Errors of requests, with their HTTP status."""

from __future__ import annotations

from typing import Any

from ..errors import LGNetError, OutOfMemoryError


class OptionError(LGNetError, ValueError):
    """An option that a session does not accept; the text names it."""


class RequestError(LGNetError):
    """A rejected request: `status`, and the seconds after which the client may retry."""

    status = 400

    def __init__(self, text: str, status: int | None = None, retry_after: int | None = None) -> None:
        super().__init__(text)
        self.status = type(self).status if status is None else status
        self.retry_after = retry_after


class TooLargeError(RequestError):
    """More bytes or pixels than the server accepts."""

    status = 413


class UnknownPictureError(RequestError):
    """A picture that the server does not have, or no longer."""

    status = 404


class BusyError(RequestError):
    """The queue is full."""

    status = 429


class DrainingError(RequestError):
    """The server is shutting down."""

    status = 503


class TimeLimitError(RequestError):
    """The request took longer than the time limit. Not 503: the same request would take as long again."""

    status = 504


class CancelledError(RequestError):
    """The client has left; the status is the one that nginx logs."""

    status = 499


def status_of(error: Exception) -> int | None:
    """The HTTP status of an error of the client; None for a fault of the server."""
    if isinstance(error, RequestError):
        return error.status
    if isinstance(error, OutOfMemoryError):
        return 413
    return 400 if isinstance(error, LGNetError) and isinstance(error, ValueError) else None


def error_body(path: str, error: Exception, status: int, text: str) -> dict[str, Any]:
    """The JSON of an error in the form that clients of the path expect: OpenAI's under /v1, else IOPaint's."""
    name = type(error).__name__
    if path.startswith("/v1/"):
        kind = "server_error" if status >= 500 else "invalid_request_error"
        field = text.partition(":")[0] if ":" in text else None
        return {"error": {"message": text, "type": kind, "param": field, "code": name}}
    return {"error": name, "detail": text, "body": "", "errors": ""}
