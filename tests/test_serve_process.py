"""`lgnet-fast serve` as a process: many clients at once, and its end by SIGTERM."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator

import httpx
import numpy as np
import psutil
import pytest

from lgnet_fast import Inpainter

from .serve_support import Server, base64_of, file_of, hole, photo, pixels_of

pytestmark = pytest.mark.once

SIZES = [(96, 120), (200, 180), (256, 256), (300, 420)]
BOXES = [(30, 50, 40, 70), (60, 90, 20, 60), (10, 40, 80, 110)]


@pytest.fixture
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    one = Server(*getattr(request, "param", ()))
    yield one
    if one.process.poll() is None:
        one.process.kill()
        one.process.wait()


def _requests() -> list[tuple[dict[str, str], np.ndarray, np.ndarray]]:
    """Bodies of mixed sizes, with their pictures and masks."""
    cases = []
    for number, (height, width) in enumerate(SIZES):
        for box in BOXES:
            picture, mask = photo(height, width, number), hole(height, width, box)
            cases.append(({"image": base64_of(file_of(picture)), "mask": base64_of(file_of(mask))}, picture, mask))
    return cases


def _same(filled: np.ndarray, alone: np.ndarray) -> bool:
    """Equal but for a level in few values: sums of a batch are in another order, which may move one over an edge."""
    apart = np.abs(filled.astype(int) - alone)
    return bool(apart.max() <= 1 and apart.mean() <= 1e-4)


def test_eight_clients_get_what_each_would_get_alone(server):
    cases = _requests()
    pipe = Inpainter.from_pretrained(None)
    alone = [np.asarray(pipe(picture, mask)) for _, picture, mask in cases]
    wrong: list[str] = []
    done = Counter()

    def client(number: int) -> None:
        with httpx.Client(base_url=server.address, timeout=300) as calls:
            for turn in range(4):
                which = (number * 5 + turn * 7) % len(cases)
                answer = calls.post("/api/v1/inpaint", json=cases[which][0])
                done[answer.status_code] += 1
                if answer.status_code != 200 or not _same(pixels_of(answer.content), alone[which]):
                    wrong.append(f"client {number}, turn {turn}: {answer.status_code}")

    threads = [threading.Thread(target=client, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert done == {200: 32}
    text = server.get("/metrics").text
    runs = float(re.search(r"lgnet_batch_windows_count (\S+)", text)[1])
    windows = float(re.search(r"lgnet_batch_windows_sum (\S+)", text)[1])
    assert windows >= 32
    assert runs < windows, "no two windows ran together"
    assert server.end() == 0


@pytest.mark.parametrize("server", [("--grace", "600")], indirect=True)  # also on a slow machine
def test_sigterm_answers_or_refuses_every_request(server):
    body, picture, mask = _requests()[0]
    expected = np.asarray(Inpainter.from_pretrained(None)(picture, mask))
    statuses: Counter[object] = Counter()
    wrong: list[object] = []
    ending, ended = threading.Event(), threading.Event()

    def client() -> None:
        with httpx.Client(base_url=server.address, timeout=300) as calls:
            while not ended.is_set():
                try:
                    answer = calls.post("/api/v1/inpaint", json=body)
                except httpx.ConnectError:
                    statuses["closed"] += 1
                    return
                except httpx.RemoteProtocolError as error:
                    # A kept connection may be closed between two requests; none is lost within one.
                    statuses["lost" if "without sending" not in str(error) else "closed"] += 1
                    return
                except (httpx.ReadError, httpx.WriteError):  # it was closed while the next request was being sent
                    statuses["closed" if ending.is_set() else "lost"] += 1
                    return
                statuses[answer.status_code] += 1
                if answer.status_code == 200:
                    if not _same(pixels_of(answer.content), expected):
                        wrong.append("pixels")
                elif answer.status_code == 503:
                    if "retry-after" not in answer.headers:
                        wrong.append(answer.headers)
                    time.sleep(0.05)

    threads = [threading.Thread(target=client) for _ in range(6)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 300
    while statuses[200] < 3:
        assert time.monotonic() < deadline, statuses
        time.sleep(0.02)
    server.ask_to_end()
    ending.set()
    assert server.get("/v2/health/live").status_code == 200
    assert server.get("/v2/health/ready").status_code == 503
    while statuses[503] < 6:
        assert time.monotonic() < deadline, statuses
        time.sleep(0.02)
    server.ask_to_end()  # a second signal ends the grace period
    assert server.process.wait(60) == 0
    ended.set()
    for thread in threads:
        thread.join(60)
    assert set(statuses) <= {200, 503, "closed"}, statuses
    assert wrong == []
    assert "lgnet-fast has ended" in "".join(server.lines)


def _cpu_seconds(server: Server) -> float:
    """What the process has used, and its children: in a virtual environment on Windows the server is one."""
    started = psutil.Process(server.process.pid)
    return sum(sum(one.cpu_times()[:2]) for one in (started, *started.children(recursive=True)))


@pytest.mark.parametrize("server", [("--shutdown", "0.3", "--grace", "0.1", "--device", "cpu")], indirect=True)
def test_work_over_the_limit_of_the_shutdown_is_answered_and_the_process_ends(server):
    size = 1536  # half a minute of work on two cores
    body = {
        "image": base64_of(file_of(photo(size, size))),
        "mask": base64_of(file_of(hole(size, size, (60, 1476, 60, 1476)))),
        "strategy": "full",
    }
    answers: list[httpx.Response] = []

    def ask() -> None:
        answers.append(httpx.post(f"{server.address}/api/v1/inpaint", json=body, timeout=300))

    asking = threading.Thread(target=ask)
    asking.start()
    deadline = time.monotonic() + 300
    while "lgnet_queue_depth 1.0" not in server.get("/metrics").text:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    begun = _cpu_seconds(server) + 3  # the picture is read in less; the network takes a minute of a core
    while _cpu_seconds(server) < begun:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    start = time.monotonic()
    assert server.end() == 0
    spent = time.monotonic() - start
    asking.join(60)
    (answer,) = answers
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "5"
    assert answer.json()["detail"] == "the server is shutting down"
    assert spent < 30
    server.reader.join(60)
    text = "".join(server.lines)
    assert "work of more than 0.3 s (--shutdown) was given up" in text
    assert "Traceback" not in text


def test_a_public_address_gets_a_token_and_a_taken_one_an_error():
    server = Server("--host", "0.0.0.0")
    try:
        text = "".join(server.lines)
        token = re.search(r"\?token=(\S+)", text)[1]
        assert len(token) >= 32
        port = re.search(r":(\d+)/", text)[1]
        assert server.address == f"http://127.0.0.1:{port}"
        assert server.get("/api/v1/page").status_code == 401
        assert server.get("/api/v1/page", headers={"Authorization": f"Bearer {token}"}).status_code == 200
        command = [sys.executable, "-m", "lgnet_fast", "serve", "--host", "0.0.0.0", "--port", port]
        second = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        assert second.returncode == 2
        assert f"cannot listen on 0.0.0.0:{port}" in second.stderr
        assert server.end() == 0
    finally:
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait()
