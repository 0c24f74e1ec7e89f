"""Errors of requests, with their HTTP status."""

from __future__ import annotations

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
    """The request took longer than the time limit."""

    status = 503


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
