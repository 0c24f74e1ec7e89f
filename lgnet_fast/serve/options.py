"""The options of `lgnet-fast serve`."""

from __future__ import annotations

import ipaddress
import math
import re
from dataclasses import dataclass, field
from typing import Any

_MIB = 2**20
_ORIGIN = re.compile(r"https?://(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:[0-9]{1,5})?")
_NAME = re.compile(r"[A-Za-z0-9._-]+")


@dataclass(frozen=True)
class ServeOptions:
    """Address, access and limits of the server. Numbers and seconds must be above 0, except the port.

    `host`, `port`: address to listen on; port 0 to 65535, 0: any free one. `token`: secret that clients must send, of
    ASCII letters, digits and the characters ``._~-``, None: none; on an address other than loopback
    :func:`lgnet_fast.serve.command.run` generates one. `cors`: origins of other pages that may call the API,
    "https://host[:port]" or "http://host[:port]" each, without a path or a wildcard; a host beyond ASCII as browsers
    send it ("xn--..."). `allowed_hosts`: names of the server, besides its address, without scheme and port.
    `max_bytes`: of a request's body. `max_pixels`: of a picture, read from its header before it is decoded.
    `max_sessions`, `session_bytes`, `session_idle`: number of open pictures of the page, bytes of memory for all of
    them (at most half of what the machine or the container has left when the server starts), and seconds after which
    an unused one is closed. `queue`: requests that may wait or run; more are answered
    429. `threads`: requests that are prepared at the same time. `batch`: network passes of one size that may run
    together. `timeout`: seconds for one request, from the last byte of its body to the answer. `body_timeout`:
    seconds between two parts of a body. `grace`: seconds after the signal to end during which new requests are still
    answered (503, also /v2/health/ready); at least the interval of a load balancer's checks. `shutdown`: seconds
    after the same signal in which running work must end; what has not ended by then is answered 503.

    Raises ValueError: a value that a field does not take; the text begins with the name of the field.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    token: str | None = field(default=None, repr=False)
    cors: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    max_bytes: int = 64 * _MIB
    max_pixels: int = 100_000_000
    max_sessions: int = 50
    session_bytes: int = 4096 * _MIB
    session_idle: float = 3600.0
    queue: int = 32
    threads: int = 4
    batch: int = 4
    timeout: float = 120.0
    body_timeout: float = 30.0
    grace: float = 0.5
    shutdown: float = 30.0

    def __post_init__(self) -> None:
        if not isinstance(self.host, str) or not self.host.strip():
            raise ValueError(f"host: expected an address or a name, got {self.host!r}")
        _whole("port", self.port, 0, 65535)
        for name in ("max_bytes", "max_pixels", "max_sessions", "session_bytes", "queue", "threads", "batch"):
            _whole(name, getattr(self, name), 1, None)
        for name in ("session_idle", "timeout", "body_timeout", "grace", "shutdown"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise ValueError(f"{name}: expected seconds > 0, got {value!r}")
        valid = isinstance(self.token, str) and re.fullmatch(r"[A-Za-z0-9._~-]+", self.token)
        if self.token is not None and not valid:
            raise ValueError("token: expected letters, digits and . _ ~ -, got something else")
        for name in ("cors", "allowed_hosts"):
            values = getattr(self, name)
            if not isinstance(values, (tuple, list)) or not all(isinstance(value, str) for value in values):
                raise ValueError(f"{name}: expected a tuple of texts, got {values!r}")
            object.__setattr__(self, name, tuple(value.lower() for value in values))
        for origin in self.cors:
            if not _ORIGIN.fullmatch(origin):
                raise ValueError(f"cors: expected an origin such as https://example.org:8443, got {origin!r}")
        object.__setattr__(self, "cors", tuple(map(_as_sent, self.cors)))
        for name in self.allowed_hosts:
            if not _NAME.fullmatch(name):
                raise ValueError(f"allowed_hosts: expected a name such as example.org, without a port, got {name!r}")

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        if self.host.lower() == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def _as_sent(origin: str) -> str:
    """An origin as browsers send it: without the port that its scheme has anyway."""
    scheme = origin.partition(":")[0]
    return origin.removesuffix({"http": ":80", "https": ":443"}[scheme])


def _whole(name: str, value: Any, low: int, high: int | None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        span = f">= {low}" if high is None else f"in {low}..{high}"
        raise ValueError(f"{name}: expected a whole number {span}, got {value!r}")
