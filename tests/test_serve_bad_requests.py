"""Bad requests to a live server, and its limits on bodies, places and time."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest

from lgnet_fast.serve import process
from lgnet_fast.serve.options import ServeOptions
from lgnet_fast.serve.state import State

from .serve_support import (
    GOOD,
    HOLE,
    MASK,
    PICTURE,
    base64_of,
    file_of,
    hole,
    inpaint,
    live_server,
    photo,
    pixels_of,
    result_of_the_pipeline,
    rubbed_out,
)

pytestmark = pytest.mark.once  # what runs the network is tested elsewhere


@pytest.fixture(scope="module")
def expected() -> np.ndarray:
    return result_of_the_pipeline()


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header promises far more than it holds."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = zlib.compress(b"\0" * 100_000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


LONG = np.dstack([photo(8, 16384), np.where(hole(8, 16384, (2, 5, 40, 70)), np.uint8(0), np.uint8(255))])
TRUNCATED = GOOD[: len(GOOD) // 2]


def form(url: str = "/inpaint", fields: dict | None = None, **files: bytes) -> dict:
    return {"url": url, "files": {name: (name, data) for name, data in files.items()}, "data": fields or {}}


BAD = {
    "no body": ({"url": "/api/v1/inpaint", "content": b""}, 422, "body: expected JSON"),
    "not JSON": ({"url": "/api/v1/inpaint", "content": b"{'image'"}, 422, "body: expected JSON"),
    "a list": ({"url": "/api/v1/inpaint", "json": []}, 422, "body"),
    "nested JSON": ({"url": "/api/v1/inpaint", "content": b"[" * 100_000}, 422, "body"),
    "no mask": ({"url": "/api/v1/inpaint", "json": {"image": base64_of(GOOD)}}, 422, "mask: Field required"),
    "a number": (inpaint(image=5), 422, "image: "),
    "null": (inpaint(mask=None), 422, "mask: "),
    "not base64": (inpaint(image="&&&"), 400, "image: expected base64"),
    "an empty text": (inpaint(image=""), 400, "image: expected a picture file"),
    "an address": (inpaint(image="http://127.0.0.1/a.png"), 400, "image: addresses are not fetched"),
    "a file's address": (inpaint(mask="file:///etc/passwd"), 400, "mask: addresses are not fetched"),
    "not a picture": (inpaint(image=base64_of(b"hello")), 400, "image: expected a readable picture"),
    "a torn picture": (inpaint(image=base64_of(TRUNCATED)), 400, "image"),
    "a torn mask": (inpaint(mask=base64_of(MASK[: len(MASK) // 2])), 400, "mask"),
    "a text as mask": (inpaint(mask=base64_of(b"<svg></svg>")), 400, "mask: expected a readable picture"),
    "another size": (inpaint(mask=base64_of(file_of(hole(97, 120)))), 400, "expected the picture's size 120x96"),
    "an empty mask": (inpaint(mask=base64_of(file_of(HOLE & False))), 400, "no hole pixel"),
    "a full mask": (inpaint(mask=base64_of(file_of(HOLE | True))), 400, "100.0% of the picture is hole"),
    "a bomb": (inpaint(image=base64_of(bomb(20_000, 20_000))), 413, "image: expected at most 4000000 pixels (--max-"),
    "a bomb to open": (
        {"url": "/api/v1/pictures", "content": bomb(20_000, 20_000)}, 413, "picture: expected at most 4000000"),
    "a large picture": (inpaint(image=base64_of(bomb(2001, 2000))), 413, "image: expected at most 4000000 pixels"),
    "a large mask": (inpaint(mask=base64_of(bomb(2001, 2000))), 413, "mask: expected at most 4000000 pixels"),
    "a promise not kept": (inpaint(image=base64_of(bomb(1900, 1900))), 400, "image"),
    "a wrong strategy": (inpaint(strategy="best"), 400, "strategy: expected one of"),
    "a wrong HD strategy": (inpaint(hd_strategy="Best"), 400, "hd_strategy: expected Original, Crop or Resize"),
    "a negative dilate": (inpaint(dilate=-1), 422, "dilate: "),
    "a huge dilate": (inpaint(dilate=10**9), 422, "dilate: "),
    "a text as feather": (inpaint(feather="wide"), 422, "feather: "),
    "a threshold": (inpaint(mask_threshold=1.0), 422, "mask_threshold: "),
    "a channel": (inpaint(mask_channel="red"), 400, "mask_channel: expected one of"),
    "a channel that is not there": (inpaint(mask_channel="alpha"), 400, "needs a mask with transparency"),
    "a format": (inpaint(format="exe"), 400, "format: expected one of"),
    "a quality": (inpaint(quality=0), 422, "quality: "),
    "a format that holds no alpha": (
        {"url": "/api/v1/inpaint", "json": {"image": base64_of(file_of(np.dstack([PICTURE, PICTURE[..., 0]]))),
         "mask": base64_of(MASK), "format": "jpeg"}}, 400, "format: JPEG holds"),
    "a format of shorter sides": (
        inpaint(image=base64_of(file_of(LONG[..., :3])), mask=base64_of(file_of(LONG[..., 3] == 0)), format="webp"),
        400, "format: WEBP holds at most 16383 pixels a side, got 16384"),
    "too many bytes": (
        {"url": "/api/v1/pictures", "content": b"\0" * (4 * 2**20 + 1)}, 413, "body: expected at most"),
    "bytes that were not announced": (
        {"url": "/api/v1/pictures", "content": (b"\0" * 2**20 for _ in range(6))}, 413, "body: expected at most"),
    "a compressed body": (
        {"url": "/api/v1/pictures", "content": zlib.compress(GOOD), "headers": {"content-encoding": "deflate"}}, 415,
        "body: expected no Content-Encoding, got 'deflate'"),
    "no form": ({"url": "/inpaint", "json": {}}, 415, "multipart/form-data"),
    "a form without a mask": (form(image=GOOD), 422, "mask: expected a picture file"),
    "a form of texts": ({"url": "/inpaint", "data": {"image": "x"}, "files": {"mask": MASK}}, 422, "image: "),
    "a broken form": (
        {"url": "/inpaint", "content": b"--x\r\n", "headers": {"content-type": "multipart/form-data"}}, 400, ""),
    "many fields": (form(fields={f"f{n}": "1" for n in range(100)}, image=GOOD, mask=MASK), 400, "Too many fields"),
    "many files": (form(image=GOOD, mask=MASK, a=b"1", b=b"2", c=b"3"), 400, "Too many files"),
    "a seed": (form(fields={"sdSeed": "x"}, image=GOOD, mask=MASK), 422, "sd_seed: "),
    "a wrong operation": (
        {"url": "/api/v1/adjust_mask", "json": {"mask": base64_of(MASK), "operate": "twist"}}, 400, "operate: "),
    "an edit without an image": (form("/v1/images/edits", mask=rubbed_out()), 400, "image: expected one"),
    "an edit of two": (
        {"url": "/v1/images/edits", "files": [("image[]", GOOD), ("image[]", GOOD)]}, 400, "expected one file"),
    "an edit as URL": (
        form("/v1/images/edits", {"response_format": "url"}, image=rubbed_out()), 400, "response_format: "),
    "an edit with a wrong compression": (
        form("/v1/images/edits", {"output_format": "webp", "output_compression": "101"}, image=rubbed_out()), 422,
        "output_compression: expected a whole number from 0 to 100, got '101'"),
    "an edit of too long a side": (
        form("/v1/images/edits", {"output_format": "webp"}, image=file_of(LONG)), 400,
        "output_format: WEBP holds at most"),
    "an edit whose alpha the format does not hold": (
        form("/v1/images/edits", {"output_format": "jpeg"},
             image=file_of(np.dstack([PICTURE, PICTURE[..., 0] | 1])), mask=rubbed_out()),
        400, "output_format: JPEG holds"),
    "an edit as a stream": (
        form("/v1/images/edits", {"stream": "true"}, image=rubbed_out()), 400, "stream: expected false"),
    "an edit by a torn mask": (form("/v1/images/edits", image=GOOD, mask=rubbed_out()[:-900]), 400, "mask"),
    "no initial image": (
        {"url": "/sdapi/v1/img2img", "json": {"init_images": [], "mask": base64_of(MASK)}}, 422, "init_images: "),
    "a torn initial image": (
        {"url": "/sdapi/v1/img2img", "json": {"init_images": [base64_of(b"hello")], "mask": base64_of(MASK)}}, 400,
        "init_images: expected a readable picture"),
    "a large initial image": (
        {"url": "/sdapi/v1/img2img", "json": {"init_images": [base64_of(bomb(2001, 2000))], "mask": base64_of(MASK)}},
        413, "init_images: expected at most 4000000 pixels"),
    "an unknown picture": ({"url": "/api/v1/pictures/no/fill?x=0&y=0", "content": MASK}, 404, "send it again"),
    "no place": ({"url": "/api/v1/pictures/no/fill", "content": MASK}, 422, "x: Field required"),
    "a picture of a sample that is none": ({"url": "/api/v1/pictures?sample=../x"}, 404, "no such sample"),
    "an empty picture": ({"url": "/api/v1/pictures", "content": b""}, 400, "picture: expected a picture file"),
    "an unknown path": ({"url": "/api/v1/nothing"}, 404, "Not Found"),
    "a wrong method": ({"url": "/metrics"}, 405, "Method Not Allowed"),
    "another origin": ({"url": "/inpaint", "headers": {"origin": "http://evil"}}, 403, "origin: "),
    "a long header": ({"url": "/inpaint", "headers": {"x-long": "x" * 200_000}}, 400, ""),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_requests_are_told_what_is_wrong(server, name):
    request, status, text = BAD[name]
    with httpx.Client(base_url=server, timeout=60) as client:
        try:
            answer = client.post(**request)
        except (httpx.WriteError, httpx.ReadError, httpx.RemoteProtocolError):
            assert status in (400, 413)  # answered while it was still being sent
        else:
            assert answer.status_code == status, answer.text
            if text:
                told = answer.json()
                told = told["error"]["message"] if request["url"].startswith("/v1/") else told["detail"]
                assert text in told
                if request["url"].startswith("/v1/") and ":" in text:
                    assert answer.json()["error"]["param"] == text.partition(":")[0]
        assert client.get("/v2/health/ready").status_code == 200


@pytest.mark.parametrize(
    "name", ["a format that holds no alpha", "a format of shorter sides", "an edit of too long a side"]
)
def test_a_format_that_cannot_hold_the_picture_is_refused_before_the_network_runs(client, name):
    def runs() -> list[str]:
        lines = client.get("/metrics").text.splitlines()
        return [line for line in lines if line.startswith("lgnet_batch_windows_count")]

    before = runs()
    assert client.post(**BAD[name][0]).status_code == 400
    assert runs() == before
    assert len(before) == 1


@pytest.mark.parametrize("piece", [1, 7, 2**20])
@pytest.mark.parametrize(
    ("preamble", "epilogue"),
    [
        (b"", b""),
        (b"\r\n", b"\r\n"),
        (b"This is a message of several parts.\r\n", b"\r\nThe end.\r\n"),
        (b"--y\r\n\r\n--not this one\r\n", b"\r\n--x\r\nno part\r\n"),
    ],
)
def test_text_around_the_parts_of_a_form_is_ignored(client, preamble, epilogue, piece):
    """RFC 2046, section 5.1.1."""
    parts = b"".join(
        b"--x\r\nContent-Disposition: form-data; name=%s; filename=a\r\n\r\n%s\r\n" % (name, data)
        for name, data in ((b"image", GOOD[:40]), (b"mask", MASK))
    )
    body = preamble + parts + b"--x--" + epilogue
    answer = client.post(
        "/inpaint",
        content=(body[at : at + piece] for at in range(0, len(body), piece)),
        headers={"content-type": "multipart/form-data; boundary=x"},
    )
    assert answer.status_code == 400
    assert answer.json()["detail"].startswith("image: expected a readable picture")  # it was found, and is torn


def test_after_all_that_a_good_request_works(client, expected):
    assert len(BAD) >= 40
    answer = client.post(**inpaint())
    np.testing.assert_array_equal(pixels_of(answer.content), expected)
    assert 'code="500"' not in client.get("/metrics").text


def test_a_body_that_stops_is_given_up():
    with live_server(ServeOptions(body_timeout=0.5)) as address:
        connection = http.client.HTTPConnection("127.0.0.1", urlsplit(address).port, timeout=60)
        connection.putrequest("POST", "/api/v1/pictures")
        connection.putheader("Content-Length", "1000")
        connection.endheaders(b"\x89PNG")
        answer = connection.getresponse()
        assert answer.status == 408
        assert "no data for 0.5 seconds" in json.loads(answer.read())["detail"]
        connection.close()


@pytest.mark.parametrize("answered", [False, True])
@pytest.mark.parametrize("head", [b"", b"GET /v2/health/live HTTP/1.1\r\nHost: loc"])
def test_a_connection_without_a_whole_request_is_closed(head, answered):
    """uvicorn has no limit for the first byte of a connection and for the rest of a head."""
    request = b"GET /v2/health/live HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with (
        live_server(silence=1) as address,
        socket.create_connection(("127.0.0.1", urlsplit(address).port), timeout=60) as connection,
    ):
        if answered:
            connection.sendall(request)
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        for byte in head:
            connection.sendall(bytes([byte]))
        connection.settimeout(20)
        assert connection.recv(65536) == b""


def test_a_slow_client_whose_body_is_refused_can_read_why():
    with live_server(ServeOptions(max_bytes=1000), silence=1) as address:
        connection = http.client.HTTPConnection("127.0.0.1", urlsplit(address).port, timeout=60)
        connection.putrequest("POST", "/api/v1/pictures")
        connection.putheader("Content-Length", "1500000")
        connection.endheaders()
        for _ in range(15):  # 3 seconds, and more than a socket's buffers hold
            connection.send(bytes(100_000))
            time.sleep(0.2)
        answer = connection.getresponse()
        assert answer.status == 413
        assert json.loads(answer.read())["detail"] == "body: expected at most 1000 bytes (--max-bytes)"
        connection.request("GET", "/v2/health/live")
        assert connection.getresponse().status == 200
        connection.close()


def test_the_command_runs_that_limit():
    async def listening() -> None: ...

    assert process.Server(State(ServeOptions(), {"bundled": None}), listening).config.http is process.Connection


def test_a_listening_socket_that_is_closed_is_opened_again(monkeypatch):
    monkeypatch.setattr(process, "_LOSES_SOCKETS", True)  # as asyncio does on Windows

    async def answers(port: int) -> int:
        async with httpx.AsyncClient(trust_env=False) as client:
            return (await client.get(f"http://127.0.0.1:{port}/v2/health/live", timeout=30)).status_code

    async def serve() -> list[int]:
        state = State(ServeOptions(), {"bundled": None})
        listening = socket.create_server(("127.0.0.1", 0))
        port = listening.getsockname()[1]
        started = asyncio.Event()

        async def announce() -> None:
            started.set()

        server = process.Server(state, announce)
        running = asyncio.create_task(server.serve(sockets=[listening]))
        await asyncio.wait_for(started.wait(), 60)
        found = [await answers(port)]
        for one in (listening, *server._sockets):
            if one.fileno() != -1:
                asyncio.get_running_loop().remove_reader(one)
                one.close()
        await asyncio.sleep(0.5)  # several ticks
        found.append(await answers(port))
        server.should_exit = True
        await asyncio.wait_for(running, 60)
        with pytest.raises(httpx.ConnectError):
            await answers(port)
        return found

    assert asyncio.run(serve()) == [200, 200]


def test_work_that_takes_longer_than_the_silence_is_answered(expected):
    started = threading.Event()

    def parts() -> Iterator[bytes]:
        body = json.dumps(inpaint()["json"]).encode()
        yield body[:100]
        started.wait(2.5)
        yield body[100:]

    with live_server(silence=1) as address:
        answer = httpx.post(
            f"{address}/api/v1/inpaint",
            content=parts(),
            headers={"content-type": "application/json"},
            timeout=60,
        )
    np.testing.assert_array_equal(pixels_of(answer.content), expected)


def test_a_full_queue_is_told_as_429():
    with (
        live_server(ServeOptions(queue=1, threads=1)) as address,
        httpx.Client(base_url=address, timeout=60) as client,
    ):
        large = file_of(photo(700, 900))
        mask = file_of(np.ones((700, 900), bool) & (np.indices((700, 900)).sum(axis=0) % 300 < 20))
        body = {"image": base64_of(large), "mask": base64_of(mask)}
        slow = threading.Thread(
            target=httpx.post, args=(f"{address}/api/v1/inpaint",), kwargs={"json": body, "timeout": 300}
        )
        slow.start()
        deadline = time.monotonic() + 60
        while "lgnet_queue_depth 1.0" not in client.get("/metrics").text:
            assert time.monotonic() < deadline
        statuses = set()
        while slow.is_alive() and 429 not in statuses:
            answer = client.post(**inpaint())
            statuses.add(answer.status_code)
        slow.join()
        assert 429 in statuses
        assert int(answer.headers["retry-after"]) >= 1
        assert "queue: all 1 places are taken" in answer.json()["detail"]


def test_over_the_time_limit_is_504_without_a_time_to_come_again_and_idle_pictures_are_closed():
    options = ServeOptions(timeout=0.1, session_idle=0.4)
    with live_server(options) as address, httpx.Client(base_url=address, timeout=60) as client:
        large, mask = file_of(photo(700, 900)), file_of(hole(700, 900, (100, 600, 100, 800)))
        body = {"image": base64_of(large), "mask": base64_of(mask), "strategy": "full"}
        answer = client.post("/api/v1/inpaint", json=body)
        assert answer.status_code == 504
        assert "retry-after" not in answer.headers
        assert answer.json()["detail"] == "timeout: the request took more than 0.1 seconds (--timeout)"

        deadline = time.monotonic() + 60
        while client.post("/api/v1/pictures", content=GOOD).status_code != 201:  # the large one still runs
            assert time.monotonic() < deadline
        while "lgnet_pictures 0.0" not in client.get("/metrics").text:
            assert time.monotonic() < deadline
            time.sleep(0.05)
