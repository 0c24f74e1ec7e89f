"""Pictures, masks and a live server for the tests of `lgnet_fast.serve`."""

from __future__ import annotations

import base64
import io
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import numpy as np
import uvicorn
from PIL import Image

from lgnet_fast import Inpainter
from lgnet_fast.serve.app import create_app
from lgnet_fast.serve.options import ServeOptions
from lgnet_fast.serve.process import Connection
from lgnet_fast.serve.state import State


def photo(height: int = 96, width: int = 120, seed: int = 0) -> np.ndarray:
    """uint8 [H, W, 3]: smooth colours with noise, so that pixels of a row are not equal by chance."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(30, 226, (max(2, height // 16), max(2, width // 16), 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return np.clip(smooth + rng.integers(-6, 7, smooth.shape), 0, 255).astype(np.uint8)


def hole(height: int = 96, width: int = 120, box: tuple[int, int, int, int] = (30, 50, 40, 70)) -> np.ndarray:
    """bool [H, W]: rows box[0] to box[1], columns box[2] to box[3]."""
    mask = np.zeros((height, width), dtype=bool)
    mask[box[0] : box[1], box[2] : box[3]] = True
    return mask


def file_of(pixels: np.ndarray, format: str = "PNG", **options: Any) -> bytes:
    """A picture file of an array; bool is a mask, white = True."""
    data = np.where(pixels, np.uint8(255), np.uint8(0)) if pixels.dtype == bool else pixels
    file = io.BytesIO()
    Image.fromarray(data).save(file, format, **options)
    return file.getvalue()


def pixels_of(data: bytes) -> np.ndarray:
    """The samples of a picture file."""
    with Image.open(io.BytesIO(data)) as opened:
        return np.asarray(opened)


def base64_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


def data_url(data: bytes, media_type: str = "image/png") -> str:
    return f"data:{media_type};base64,{base64_of(data)}"


PICTURE, HOLE = photo(), hole()
GOOD, MASK = file_of(PICTURE), file_of(HOLE)

LIMITS = ServeOptions(max_bytes=4 * 2**20, max_pixels=4_000_000, cors=("https://ok.example",))
"""Small ones, so that tests exceed them quickly."""


def result_of_the_pipeline() -> np.ndarray:
    """What the bundled model makes of PICTURE and HOLE without a server."""
    return np.asarray(Inpainter.from_pretrained(None)(PICTURE, HOLE))


def inpaint(**changes: object) -> dict:
    """A request to fill HOLE in PICTURE, as arguments of a client's `post`."""
    return {"url": "/api/v1/inpaint", "json": {"image": base64_of(GOOD), "mask": base64_of(MASK), **changes}}


def rubbed_out() -> bytes:
    """PICTURE, transparent in HOLE."""
    return file_of(np.dstack([PICTURE, np.where(HOLE, np.uint8(0), np.uint8(255))]))


def open_picture(client: httpx.Client, data: bytes) -> dict:
    """Open a picture as the page does; returns what it is told."""
    answer = client.post("/api/v1/pictures", content=data)
    assert answer.status_code == 201, answer.text
    return answer.json()


@contextmanager
def live_server(
    options: ServeOptions | None = None,
    models: dict[str, str | None] | None = None,
    prefix: str = "",
    silence: int = 10,
) -> Iterator[str]:
    """The address of a server that listens on a free port of this machine, ready to fill. `prefix`: of all paths, as
    a proxy adds it. `silence`: seconds after which a connection without a request is closed."""
    state = State(options or ServeOptions(), models or {"bundled": None})
    app = create_app(state)

    async def proxied(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            known = scope["path"].startswith(f"{prefix}/")
            scope = {**scope, "path": scope["path"][len(prefix) :] if known else "/unknown"}
        await app(scope, receive, send)

    config = uvicorn.Config(
        proxied, port=0, http=Connection, timeout_keep_alive=silence, log_level="warning", access_log=False
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 600
    while not (server.started and state.ready):
        assert thread.is_alive()
        assert time.monotonic() < deadline, "the server did not get ready"
        time.sleep(0.02)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(60)


class Server:
    """`lgnet-fast serve` as a process on a free port; `seconds`: from its start until it was ready to fill."""

    def __init__(self, *options: str) -> None:
        start = time.monotonic()
        command = [sys.executable, "-m", "lgnet_fast", "serve", "--port", "0", *options]
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),  # which gets the signal of `ask_to_end`
        )
        self.lines: list[str] = []
        self.address = ""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if found := re.search(r"http://[^\s?]+", line):
                self.address = found[0].rstrip("/")
                break
        assert self.address, self.lines
        self.reader = threading.Thread(target=self._drain, daemon=True)
        self.reader.start()
        deadline = time.monotonic() + 600
        while self.get("/v2/health/ready").status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        self.seconds = time.monotonic() - start

    def get(self, path: str, **options: Any) -> httpx.Response:
        """The answer to a GET request. httpx alone would wait 5 seconds, less than a busy machine may take."""
        return httpx.get(f"{self.address}{path}", timeout=60, **options)

    def _drain(self) -> None:
        self.lines.extend(self.process.stdout or ())

    def ask_to_end(self) -> None:
        """Send SIGTERM; Ctrl-Break on Windows, where SIGTERM kills."""
        self.process.send_signal(getattr(signal, "CTRL_BREAK_EVENT", signal.SIGTERM))

    def end(self) -> int:
        self.ask_to_end()
        return self.process.wait(60)
