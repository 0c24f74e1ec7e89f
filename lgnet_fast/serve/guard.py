"""Checks of every request before its route: host, origin, token, and size of the body."""

from __future__ import annotations

import asyncio
import base64
import hmac
import ipaddress
import json
import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import unquote, urlsplit

from .errors import BusyError, RequestError, TooLargeError, error_body
from .metrics import Metrics
from .options import ServeOptions

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

# img-comparison-slider uses a constructed style sheet, Konva sets its styles by script.
_POLICY = (
    "default-src 'self'; img-src 'self' blob: data:; style-src 'self'; script-src 'self'; connect-src 'self'; "
    "object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = [
    (b"content-security-policy", _POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
]
_OPEN_PATHS = {"/", "/docs", "/openapi.json", "/favicon.ico", "/v2/models/lgnet", "/v2/models/lgnet/ready"}
# Headers of answers that scripts of other origins may read.
_EXPOSED = (
    b"Content-Disposition, Retry-After, Server-Timing, X-Backend, X-Boxes, X-Ignored, X-Passes, X-Position, X-Seed, "
    b"X-Strategy"
)
_ABSOLUTE = re.compile(rb"https?://([^/]*)(.*)", re.IGNORECASE | re.DOTALL)
_BODIES = 8  # most bodies of the largest size that are held at the same time


class Guard:
    """ASGI middleware. Rejects foreign hosts, foreign origins and wrong tokens; limits the size of bodies while they
    arrive; adds headers that keep other pages out."""

    def __init__(self, app: Any, options: ServeOptions, metrics: Metrics) -> None:
        self._app, self._options, self._metrics = app, options, metrics
        self._hosts = {"localhost", options.host.lower(), *options.allowed_hosts}
        self._held = 0

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope = _in_origin_form(scope)
        if scope["method"] == "HEAD":  # as GET; the server sends no body
            scope = {**scope, "method": "GET"}
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        origin = headers.get("origin", "").lower()
        extra = _HEADERS + (_shared_with(origin) if origin in self._options.cors else [])
        status = 500

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), *extra]
            await send(message)

        held, complete = 0, False

        async def counted() -> Message:
            nonlocal held, complete
            # After a complete body, the next message is the disconnect of the client.
            limit = None if complete else self._options.body_timeout
            try:
                message = await asyncio.wait_for(receive(), limit)
            except asyncio.TimeoutError:
                raise RequestError(f"body: no data for {self._options.body_timeout:g} seconds", status=408) from None
            if message["type"] == "http.request":
                size = len(message.get("body", b""))
                held += size
                self._held += size
                if held > self._options.max_bytes:
                    raise TooLargeError(self._too_many())
                if self._held > _BODIES * self._options.max_bytes:
                    raise BusyError("body: the server holds too many bodies now", status=503, retry_after=2)
                complete = not message.get("more_body", False)
            return message

        try:
            refused = self._refusal(scope, headers, origin)
            if refused is not None:
                await _refuse(scope["path"], refused, answer)
            elif scope["method"] == "OPTIONS" and origin in self._options.cors:
                allowed = [
                    (b"access-control-allow-methods", b"GET, POST, DELETE"),
                    (b"access-control-allow-headers", b"Authorization, Content-Type"),
                ]
                await answer({"type": "http.response.start", "status": 204, "headers": allowed})
                await answer({"type": "http.response.body"})
            else:
                await self._app(scope, counted, answer)
        finally:
            self._held -= held
            route = scope.get("route")
            self._metrics.requests.labels(getattr(route, "path", "other"), str(status)).inc()

    def _refusal(self, scope: Message, headers: dict[str, str], origin: str) -> RequestError | None:
        host = headers.get("host", "")
        # Clients of HTTP/1.0 may send none, browsers always do.
        if "host" in headers and not self._known(name := _name_of(host)):
            return RequestError(
                f"host: {_short(name)} is not this server's name; --allowed-host NAME adds one", status=421
            )
        changes = scope["method"] not in ("GET", "HEAD", "OPTIONS")
        if changes and origin and origin not in self._options.cors and not _is_of(origin, host):
            return RequestError(f"origin: pages of {_short(origin)} may not call this server (--cors)", status=403)
        site = headers.get("sec-fetch-site", "none")
        if changes and not origin and site not in ("none", "same-origin"):
            return RequestError("origin: pages of other sites may not call this server (--cors)", status=403)
        path = scope["path"]
        is_open = path in _OPEN_PATHS or path.startswith(("/static/", "/v2/health/"))
        preflight = scope["method"] == "OPTIONS" and origin in self._options.cors
        locked = self._options.token is not None and not is_open and not preflight
        if locked and not self._has_token(headers.get("authorization", "")):
            return RequestError("token: expected the header Authorization: Bearer TOKEN", status=401)
        coding = headers.get("content-encoding", "identity").strip().lower()
        if coding not in ("", "identity"):
            return RequestError(f"body: expected no Content-Encoding, got {_short(coding)}", status=415)
        length = headers.get("content-length", "")
        if length.isdigit() and int(length[:20]) > self._options.max_bytes:
            return TooLargeError(self._too_many())
        return None

    def _known(self, name: str) -> bool:
        """Whether a name is this server's. IP addresses always pass: DNS rebinding needs a name."""
        if name in self._hosts:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    def _has_token(self, authorization: str) -> bool:
        assert self._options.token is not None
        kind, _, given = authorization.partition(" ")
        if kind.lower() == "basic":  # form of A1111's clients: any user, the token as password
            try:
                given = base64.b64decode(given, validate=True).decode().partition(":")[2]
            except ValueError:
                return False
        elif kind.lower() != "bearer":
            return False
        return hmac.compare_digest(given.strip().encode(), self._options.token.encode())

    def _too_many(self) -> str:
        return f"body: expected at most {self._options.max_bytes} bytes (--max-bytes)"


def _in_origin_form(scope: Message) -> Message:
    """A request to a whole address (RFC 9112, section 3.2.2) as one to its path; its host replaces the header's."""
    absolute = _ABSOLUTE.fullmatch(scope.get("raw_path") or b"")
    if absolute is None:
        return scope
    host, path = absolute[1], absolute[2] or b"/"
    headers = [(b"host", host), *((name, value) for name, value in scope["headers"] if name != b"host")]
    return {**scope, "raw_path": path, "path": unquote(path.decode("ascii")), "headers": headers}


def _name_of(host: str) -> str:
    """The name in a Host header, in lower case and without the port; of what is no address, all of it."""
    try:
        return urlsplit(f"//{host}").hostname or host
    except ValueError:  # such as brackets without an IPv6 address
        return host


def _is_of(origin: str, host: str) -> bool:
    """Whether an origin is that of a page of `host`; what is no address is not."""
    try:
        return urlsplit(origin).netloc == host.lower()
    except ValueError:  # such as brackets without an IPv6 address
        return False


def _shared_with(origin: str) -> list[tuple[bytes, bytes]]:
    return [
        (b"access-control-allow-origin", origin.encode()),
        (b"access-control-expose-headers", _EXPOSED),
        (b"vary", b"Origin"),
    ]


async def _refuse(path: str, error: RequestError, send: Send) -> None:
    body = json.dumps(error_body(path, error, error.status, str(error))).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if error.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _short(text: str) -> str:
    return repr(text[:80])
