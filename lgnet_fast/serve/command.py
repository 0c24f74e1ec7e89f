"""`lgnet-fast serve`: the server as a process, from the first address printed to the last answer."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import secrets
import socket
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from ..errors import LGNetError
from .options import ServeOptions


def run(
    options: ServeOptions,
    models: Mapping[str, str | None],
    say: Callable[[str], Any] = print,
    open_page: bool = False,
    **inpainter: Any,
) -> None:
    """Serve until SIGINT or SIGTERM; then answer 503 on /v2/health/ready, finish running work, and return.

    Where a run of the network takes longer than `options.shutdown`, the process ends (exit code 0), because such a
    run cannot be stopped.

    `models`: see `State`; `inpainter`: device, dtype, backend. Raises LGNetError: the extra is missing, the address
    is in use, or a model cannot be loaded.
    """
    try:
        from .process import Server
        from .state import State
    except ImportError as cause:
        raise LGNetError(f"serve: {cause.name} is missing: pip install 'lgnet-fast[serve]'") from cause

    start = time.perf_counter()
    logging.captureWarnings(True)
    made_up = options.token is None and not options.loopback
    if made_up:
        options = replace(options, token=secrets.token_urlsafe(24))
    listening = _socket(options)
    address = _address(options, listening.getsockname()[1])
    state = State(options, models, **inpainter)

    async def announce() -> None:
        if made_up:
            say(f"{options.host} is reached from other machines: a token was made up (--token sets one)")
        names, seconds = ", ".join(state.models), time.perf_counter() - start
        say(f"lgnet-fast serves {names} after {seconds:.1f} s: {address}")
        if open_page:
            import webbrowser

            await asyncio.to_thread(webbrowser.open, address)

    Server(state, announce).run(sockets=[listening])
    if not state.closed:
        say(f"lgnet-fast has ended, work of more than {options.shutdown:g} s (--shutdown) was given up")
        logging.shutdown()
        sys.stdout.flush()
        os._exit(0)
    say("lgnet-fast has ended")


def _address(options: ServeOptions, port: int) -> str:
    """The URL of the page on this machine, with the token."""
    host = options.host
    with suppress(ValueError):  # a name
        if (own := ipaddress.ip_address(host)).is_unspecified:  # all addresses of this machine
            host = "127.0.0.1" if own.version == 4 else "::1"
    key = f"?token={options.token}" if options.token else ""
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/{key}"


def _socket(options: ServeOptions) -> socket.socket:
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        # On Windows SO_REUSEADDR lets programs share a port that is in use; the other option keeps them from it.
        option = getattr(socket, "SO_EXCLUSIVEADDRUSE", socket.SO_REUSEADDR)
        listening.setsockopt(socket.SOL_SOCKET, option, 1)
        listening.bind((options.host, options.port))
        listening.listen(1024)
    except OSError as cause:
        listening.close()
        raise LGNetError(f"serve: cannot listen on {options.host}:{options.port} ({cause.strerror})") from cause
    return listening
