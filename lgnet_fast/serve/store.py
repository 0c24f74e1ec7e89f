"""The open pictures of the page: limited in number, bytes and idle time."""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, field

from .display import Display
from .errors import UnknownPictureError
from .session import Session


@dataclass
class Open:
    """One open picture. `turn`: lock of a request that changes it or takes long; others wait without a thread."""

    id: str
    session: Session
    display: Display
    format: str
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    used: float = field(default_factory=time.monotonic)
    encoded: dict[tuple[object, ...], tuple[bytes, str]] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it keeps, approximately."""
        kept = sum(len(data) for data, _ in list(self.encoded.values()))
        return self.session.nbytes + self.display.nbytes + kept


class Store:
    """Open pictures by id. The least recently used is closed when a limit is reached. Thread-safe."""

    def __init__(self, count: int, nbytes: int, idle: float) -> None:
        self._count, self._nbytes, self._idle = count, nbytes, idle
        self._open: OrderedDict[str, Open] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, session: Session, display: Display, format: str) -> Open:
        """Add a picture under a new, unguessable id."""
        own = Open(secrets.token_urlsafe(18), session, display, format)
        with self._lock:
            self._open[own.id] = own
            self._make_room(own)
        return own

    def get(self, id: str) -> Open:
        """The picture of an id. Raises UnknownPictureError: never opened, closed, or dropped at a limit."""
        with self._lock:
            self._make_room(None)
            if id not in self._open:
                raise UnknownPictureError("picture: the server does not have it, or no longer; send it again")
            own = self._open[id]
            own.used = time.monotonic()
            self._open.move_to_end(id)
            return own

    def close(self, id: str) -> bool:
        """Close a picture; False where it was not open."""
        with self._lock:
            return self._open.pop(id, None) is not None

    def close_idle(self) -> None:
        """Close the pictures that were idle for too long."""
        with self._lock:
            self._make_room(None)

    def usage(self) -> tuple[int, int]:
        """Number of open pictures, and their bytes."""
        with self._lock:
            return len(self._open), sum(own.nbytes for own in self._open.values())

    def _make_room(self, latest: Open | None) -> None:
        """Close pictures that were idle for too long, then the least recently used ones, but never the latest."""
        oldest = time.monotonic() - self._idle
        for own in [own for own in self._open.values() if own.used < oldest]:
            del self._open[own.id]
        while len(self._open) > 1 and (
            len(self._open) > self._count or sum(own.nbytes for own in self._open.values()) > self._nbytes
        ):
            first = next(iter(self._open))
            if latest is not None and first == latest.id:
                break
            del self._open[first]
