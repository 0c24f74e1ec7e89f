"""The page and its server: tokens, calls that are made again, a server that ends and returns."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from lgnet_fast.serve.options import ServeOptions

from ..serve_support import live_server, pixels_of
from .support import STROKE, download, drag, failed, filled, open_sample

pytestmark = pytest.mark.page


def test_what_the_server_forgot_is_sent_again(new_page, server):
    page = new_page()
    page.expected_errors.append("404")
    with page.expect_response(lambda response: response.url.endswith("/pictures?sample=chelsea")) as caught:
        open_sample(page)
    identity = caught.value.json()["id"]
    drag(page, [(60, 60), (90, 60)])
    filled(page)
    first = pixels_of(download(page)[1])
    assert page.request.delete(f"{server}/api/v1/pictures/{identity}").status == 204
    np.testing.assert_array_equal(pixels_of(download(page)[1]), first)
    drag(page, [(300, 200), (330, 200)])
    filled(page, 2)
    both = pixels_of(download(page)[1])
    np.testing.assert_array_equal(both[:120], first[:120])


def test_a_busy_server_is_asked_again(new_page):
    page = new_page()
    page.expected_errors.append("429")
    open_sample(page)
    turned_away = []

    def busy(route: Any) -> None:
        if turned_away:
            route.fallback()
        else:
            turned_away.append(1)
            body = json.dumps({"detail": "queue: all 32 places are taken"})
            route.fulfill(status=429, headers={"Retry-After": "1"}, body=body)

    page.route("**/fill?*", busy)
    page.evaluate("""() => {
      window.said = [];
      const status = document.querySelector("#status");
      new MutationObserver(() => window.said.push(status.textContent)).observe(status, { childList: true });
    }""")
    drag(page, STROKE)
    filled(page)
    assert "The server is busy, trying again in 1 s …" in page.evaluate("() => window.said")


def test_tokens_come_by_the_address_and_leave_it(new_page):
    with live_server(ServeOptions(token="abc.123")) as address:
        page = new_page("/?token=abc.123", address=address)
        assert page.url == f"{address}/"
        open_sample(page)
        drag(page, STROKE)
        filled(page)
        page.reload()
        page.wait_for_selector("html.ready", state="attached")


def test_a_wrong_token_is_told_for_as_long_as_the_page_is_open(new_page):
    with live_server(ServeOptions(token="abc.123")) as address:
        page = new_page("/?token=abc.123", address=address)
        page.expected_errors += ["401", "token: expected"]
        page.clock.install()
        page.goto(f"{address}/?token=wrong")
        assert failed(page).startswith("This server needs its token.")
        page.clock.fast_forward(60_000)
        assert page.get_attribute("#status", "class") == "shown"
        assert page.locator("button:enabled").count() == 0


def test_a_forgotten_picture_is_sent_once(new_page, server):
    page = new_page()
    page.expected_errors.append("404")
    with page.expect_response(lambda response: response.url.endswith("/pictures?sample=chelsea")) as caught:
        open_sample(page)
    drag(page, STROKE)
    filled(page)
    assert page.request.delete(f"{server}/api/v1/pictures/{caught.value.json()['id']}").status == 204
    sent = []
    page.on("request", lambda request: sent.append(request.url) if request.method == "POST" else None)
    page.keyboard.press("v")  # asks for two views at the same time
    page.wait_for_selector("#slider[open] img-comparison-slider.rendered")
    assert [url.rpartition("/")[2].partition("?")[0] for url in sent] == ["pictures", "fill"]


def test_a_picture_that_could_not_be_sent_again_as_a_whole_is_sent_once_more(new_page, server):
    page = new_page()
    page.expected_errors += ["404", "net::ERR_FAILED"]
    with page.expect_response(lambda response: response.url.endswith("/pictures?sample=chelsea")) as caught:
        open_sample(page)
    drag(page, STROKE)
    filled(page)
    drag(page, [(300, 200), (330, 200)])
    filled(page, 2)
    before = pixels_of(download(page)[1])
    assert page.request.delete(f"{server}/api/v1/pictures/{caught.value.json()['id']}").status == 204
    page.route("**/fill?*&position=1", lambda route: route.abort())  # the second fill that is sent again
    with page.expect_request(lambda request: request.method == "DELETE"):
        page.keyboard.press("Control+s")
    assert "does not answer" in failed(page)
    page.unroute("**/fill?*&position=1")
    np.testing.assert_array_equal(pixels_of(download(page)[1]), before)


def test_the_page_below_another_path(new_page):
    with live_server(prefix="/tools/lgnet") as address:
        page = new_page("/tools/lgnet/", address=address)
        open_sample(page)
        drag(page, STROKE)
        filled(page)
        assert download(page)[0] == "chelsea_filled.png"
        page.goto(f"{address}/tools/lgnet/docs")
        page.wait_for_selector(".docs details")


def test_leaving_the_page_closes_its_pictures(new_page):
    with live_server() as address:
        page = new_page(address=address)

        def pictures() -> str:
            text = page.request.get(f"{address}/metrics").text()
            return next(line for line in text.splitlines() if line.startswith("lgnet_pictures "))

        open_sample(page)
        assert pictures() == "lgnet_pictures 1.0"
        page.goto("about:blank")
        for _ in range(3000):
            if pictures() == "lgnet_pictures 0.0":
                break
            page.wait_for_timeout(20)
        assert pictures() == "lgnet_pictures 0.0"


def test_the_server_ends_and_returns(new_page):
    """What was painted is kept while nobody answers, and the picture is sent to the next server."""
    page = new_page()
    page.expected_errors += ["ERR_", "404"]
    open_sample(page)
    drag(page, STROKE)
    filled(page)
    before = pixels_of(download(page)[1])
    page.route("**/api/v1/**", lambda route: route.abort("connectionrefused"))
    drag(page, [(300, 200), (330, 200)])
    assert failed(page) == "The server does not answer. Is lgnet-fast serve still running?"
    page.wait_for_selector("#fill:enabled")
    page.keyboard.press("Control+s")
    page.wait_for_selector("#status[data-kind=error]")
    page.unroute("**/api/v1/**")
    known: list[str] = []

    def other(route: Any) -> None:  # the next server knows no pictures but those that it is sent
        identity = route.request.url.split("/pictures/")[1].split("/")[0]
        if identity in known:
            route.fallback()
        else:
            route.fulfill(status=404, body=json.dumps({"detail": "picture: the server does not have it"}))

    def opens(route: Any) -> None:
        answer = route.fetch()
        known.append(answer.json()["id"])
        route.fulfill(response=answer)

    page.route("**/api/v1/pictures/**", other)
    page.route("**/api/v1/pictures?sample=*", opens)
    page.keyboard.press("Enter")
    filled(page, 2)
    assert len(known) == 1
    after = pixels_of(download(page)[1])
    np.testing.assert_array_equal(after[:120], before[:120])
    assert (after[150:] != before[150:]).any()
