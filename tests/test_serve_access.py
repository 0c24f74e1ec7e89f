"""Who may ask a server: origins, hosts, whole addresses, tokens."""

from __future__ import annotations

import socket
from urllib.parse import urlsplit

import httpx
import pytest

from lgnet_fast.serve.options import ServeOptions

from .serve_support import PICTURE, file_of, live_server

pytestmark = pytest.mark.once  # what runs the network is tested elsewhere


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://[::1"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Sec-Fetch-Site": "same-origin"}, 201),
        ({"Origin": "https://ok.example", "Sec-Fetch-Site": "cross-site"}, 201),
        ({"Host": "evil.example"}, 421),
        ({"Host": "127.0.0.1.evil.example:80"}, 421),
        ({"Host": "[::1]:9"}, 201),
        ({"Host": "localhost"}, 201),
    ],
    ids=str,
)
def test_origins_and_hosts(client, headers, status):
    answer = client.post("/api/v1/pictures", content=file_of(PICTURE), headers=headers)
    assert answer.status_code == status
    allowed = answer.headers.get("access-control-allow-origin")
    assert allowed == ("https://ok.example" if headers.get("Origin") == "https://ok.example" else None)


def test_another_name_of_the_server_is_told_as_the_option_takes_it(client):
    answer = client.get("/v2/health/live", headers={"Host": "Example.org:8443"})
    assert answer.status_code == 421
    assert answer.json()["detail"] == "host: 'example.org' is not this server's name; --allowed-host NAME adds one"


@pytest.mark.parametrize(("host", "status"), [(b"", 200), (b"Host: evil.example\r\n", 421), (b"Host: \r\n", 421)])
def test_http_1_0_needs_no_host(server, host, status):
    """Such clients may send none; where there is one, it is checked."""
    answer = answer_of(server, b"GET /v2/health/ready HTTP/1.0\r\n" + host + b"\r\n")
    assert answer.startswith(b"HTTP/1.1 %d " % status)


def answer_of(server: str, request: bytes) -> bytes:
    """The answer to the bytes of a request, after which the server closes the connection."""
    address = urlsplit(server)
    with socket.create_connection((address.hostname, address.port), timeout=60) as connection:
        connection.sendall(request)
        return b"".join(iter(lambda: connection.recv(4096), b""))


@pytest.mark.parametrize(
    ("target", "host", "status"),
    [
        ("http://127.0.0.1/v2/health/ready", "127.0.0.1", 200),
        ("HTTPS://LOCALHOST:80/v2/health/ready?x=1", "localhost", 200),
        ("http://127.0.0.1/v2/health/re%61dy", "127.0.0.1", 200),
        ("http://127.0.0.1", "127.0.0.1", 200),
        ("http://127.0.0.1?x=1", "127.0.0.1", 200),
        ("http://127.0.0.1/nothing", "127.0.0.1", 404),
        ("http://127.0.0.1/v2/health/ready", "evil.example", 200),
        ("http://evil.example/v2/health/ready", "127.0.0.1", 421),
        ("http:///v2/health/ready", "127.0.0.1", 421),
    ],
)
def test_targets_may_be_whole_addresses(server, target, host, status):
    """RFC 9112, section 3.2.2: the host of the address counts, the header is ignored."""
    request = f"GET {target} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
    answer = answer_of(server, request.encode())
    assert answer.startswith(b"HTTP/1.1 %d " % status)
    assert (b"<!doctype html>" in answer) == (status == 200 and "health" not in target)


def test_own_origin_and_preflight(client, server):
    own = client.post("/api/v1/pictures", content=file_of(PICTURE), headers={"Origin": server})
    assert own.status_code == 201
    ask = {"Access-Control-Request-Method": "POST"}
    assert client.options("/inpaint", headers={"Origin": "https://ok.example", **ask}).status_code == 204
    told = client.get("/api/v1/page", headers={"Origin": "https://ok.example"})
    exposed = told.headers["access-control-expose-headers"].split(", ")
    assert {"X-Boxes", "X-Position", "X-Strategy", "X-Seed", "Retry-After", "Server-Timing"} <= set(exposed)
    assert "access-control-expose-headers" not in own.headers
    assert client.options("/inpaint", headers={"Origin": "https://evil.example", **ask}).status_code == 405


def test_tokens():
    with live_server(ServeOptions(token="s3cret")) as address, httpx.Client(base_url=address, timeout=60) as client:
        open_paths = (
            "/",
            "/static/main.js",
            "/docs",
            "/v2/health/live",
            "/v2/models/lgnet",
            "/v2/models/lgnet/ready",
        )
        for path in open_paths:
            assert client.get(path).status_code == 200
        for headers in (
            {},
            {"Authorization": "Bearer no"},
            {"Authorization": "Basic ***"},
            {"Authorization": "s3cret"},
        ):
            for path in ("/api/v1/page", "/metrics", "/api/v1/server-config"):
                assert client.get(path, headers=headers).status_code == 401
        assert client.get("/api/v1/page", headers={"Authorization": "Bearer s3cret"}).status_code == 200
        assert client.get("/api/v1/page", auth=("any", "s3cret")).status_code == 200
        refused = client.post("/v1/images/edits")
        assert refused.status_code == 401
        assert refused.json()["error"] == {
            "message": "token: expected the header Authorization: Bearer TOKEN",
            "type": "invalid_request_error",
            "param": "token",
            "code": "RequestError",
        }
