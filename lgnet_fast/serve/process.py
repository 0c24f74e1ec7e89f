"""uvicorn's server with an end in two steps: new requests are answered 503, then the socket is closed. Connections
without a request are closed."""

from __future__ import annotations

import asyncio
import functools
import math
import socket
import sys
import time
from collections.abc import Awaitable, Callable
from types import FrameType

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from .app import create_app
from .state import State

# On Windows asyncio closes a listening socket where a client has gone before it was accepted (python/cpython#93821).
_LOSES_SOCKETS = sys.platform == "win32"


class Connection(H11Protocol):
    """Closes itself where the head of a request has not arrived `timeout_keep_alive` seconds after it was opened,
    after the last answer, or after the last part of a body that was answered before its end. uvicorn waits without
    limit for the first request and for the rest of a head: silent clients could take all of `limit_concurrency`."""

    _silent: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._limit_silence()

    def handle_events(self) -> None:
        super().handle_events()
        if self.cycle is not None and not self.cycle.response_complete:
            self._end_limit()
        elif self.conn.their_state is h11.SEND_BODY:
            # The rest of a body that was refused: many clients read the answer only when they have sent all of it.
            self._limit_silence()

    def on_response_complete(self) -> None:
        self._limit_silence()  # before a request that has arrived already
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_limit()
        super().connection_lost(exc)

    def _limit_silence(self) -> None:
        self._end_limit()
        self._silent = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def _end_limit(self) -> None:
        if self._silent is not None:
            self._silent.cancel()
            self._silent = None


class Server(uvicorn.Server):
    """Answers 503 and lets running work end before uvicorn closes its socket. Work over the limit is answered 503.

    `listening`: awaited once the server answers requests.
    """

    def __init__(self, state: State, listening: Callable[[], Awaitable[None]]) -> None:
        options = state.options
        config = uvicorn.Config(
            create_app(state),
            http=Connection,
            log_level="warning",
            access_log=False,
            timeout_keep_alive=10,
            h11_max_incomplete_event_size=64 * 1024,
            limit_concurrency=max(1000, 4 * options.queue),
            server_header=False,
        )
        super().__init__(config)
        self._state = state
        self._listening = listening
        self._ending: float | None = None
        self._grace = options.grace
        self._sockets: list[socket.socket] = []
        self._spares: list[socket.socket] = []

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if _LOSES_SOCKETS:
            self._sockets = list(sockets or [])
            self._spares = [one.dup() for one in self._sockets]
        await self._listening()

    async def _listen_again(self) -> None:
        """Take the spare of each listening socket that was closed."""
        for number, spare in enumerate(self._spares):
            if self._sockets[number].fileno() == -1:
                self._sockets[number] = spare.dup()
                protocol = functools.partial(
                    Connection, config=self.config, server_state=self.server_state, app_state=self.lifespan.state
                )
                loop = asyncio.get_running_loop()
                self.servers[number] = await loop.create_server(protocol, sock=self._sockets[number])

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for spare in self._spares:
            spare.close()
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            super().handle_exit(sig, frame)
        elif self._ending is None:
            self._ending = time.monotonic()
            self._state.drain()
        elif self._grace:  # a second signal ends the grace period
            self._grace = 0.0
        else:  # a third one ends the wait for running work
            self._state.give_up()

    async def on_tick(self, counter: int) -> bool:
        if self._ending is None:
            await self._listen_again()
        else:
            over = self._state.remaining == 0
            if over:
                self._state.give_up()
            if time.monotonic() - self._ending > self._grace and (over or self._state.queue.depth == 0):
                # Answers, and bodies that still arrive, have the rest of the time.
                self.config.timeout_graceful_shutdown = max(1, math.ceil(self._state.remaining))
                self.should_exit = True
        return await super().on_tick(counter)
