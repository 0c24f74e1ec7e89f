"""Fills in the page that fail, and what is shown while and after they are made."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from ..serve_support import file_of, photo, pixels_of
from .support import (
    COLLECTS,
    SAMPLE,
    STROKE,
    arrived,
    changed,
    download,
    drag,
    failed,
    filled,
    hold,
    open_file,
    open_sample,
    parts_shown,
    waiting,
)

pytestmark = pytest.mark.page

NO_TEXT = "Object.defineProperty(Response.prototype, 'statusText', { value: '' });"
LEFT, RIGHT = [(60, 60), (90, 60)], [(300, 200), (330, 200)]


def refuse(page: Any, status: int, detail: str) -> list[str]:
    """Answers every fill with an error; the addresses that were asked."""
    sent: list[str] = []

    def answer(route: Any) -> None:
        sent.append(route.request.url)
        route.fulfill(status=status, body=json.dumps({"detail": detail}))

    page.route("**/fill?*", answer)
    page.expected_errors.append(str(status))
    return sent


def mask_shown(page: Any) -> bool:
    return page.evaluate("() => Konva.stages[0].getLayers()[2].visible()")


def test_a_fill_that_fails_keeps_its_mask(new_page):
    page = new_page(init=COLLECTS)
    open_sample(page)
    drag(page, LEFT)
    drag(page, RIGHT)
    refuse(page, 500, "it broke")
    page.keyboard.press("Enter")
    assert failed(page) == "it broke"
    page.wait_for_selector("body:not(.filling)")
    assert mask_shown(page)
    assert page.text_content("#count") == "2"
    page.keyboard.press("Control+z")
    assert page.text_content("#count") == ""
    assert page.is_enabled("#fill")
    page.keyboard.press("Control+Shift+z")
    assert page.text_content("#count") == "2"

    page.unroute("**/fill?*")
    page.expected_errors.append("400")
    page.keyboard.press("i")  # all but the two strokes
    page.keyboard.press("Enter")
    page.wait_for_selector("#status:text('More than 95 % is painted')")
    page.wait_for_selector("body:not(.filling)")
    assert page.text_content("#count") == "3"
    page.keyboard.press("Control+z")
    page.keyboard.press("Enter")
    filled(page)
    assert not mask_shown(page)
    left, top, right, bottom = changed(pixels_of(download(page)[1]), SAMPLE)
    assert (left, top) < (60, 60) < (330, 200) < (right, bottom)


def test_strokes_that_waited_for_a_fill_that_failed_are_kept(new_page):
    page = new_page()
    page.expected_errors.append("500")
    open_sample(page)
    held = hold(page, "**/fill?*")
    drag(page, LEFT)
    arrived(page, held)
    page.wait_for_selector("body.filling")
    drag(page, RIGHT)
    held[0].fulfill(status=500, body=json.dumps({"detail": "it broke"}))
    assert failed(page) == "it broke"
    page.wait_for_selector("#count:text('2')")
    page.keyboard.press("Control+z")
    page.keyboard.press("Control+z")
    assert page.is_disabled("#undo")
    assert not mask_shown(page)
    assert len(held) == 1


@pytest.mark.parametrize(("init", "told"), [("", "502 Bad Gateway"), (NO_TEXT, "502")], ids=["HTTP/1.1", "HTTP/2"])
def test_an_answer_that_is_not_the_servers_is_told(new_page, init, told):
    """Of a proxy, with a page as its body."""
    page = new_page(init=COLLECTS + init)
    open_sample(page)
    drag(page, LEFT)
    page.route("**/fill?*", lambda route: route.fulfill(status=502, content_type="text/html", body="<h1>No</h1>"))
    page.expected_errors.append("502")
    page.keyboard.press("Enter")
    assert failed(page) == f"The server, or one between it and this page, answers {told}."
    assert waiting(page) == 1


def test_an_answer_without_a_time_is_not_asked_for_again(new_page):
    page = new_page()
    open_sample(page)
    sent = refuse(page, 503, "timeout: the request took more than 2 seconds")
    drag(page, STROKE)
    assert failed(page) == "timeout: the request took more than 2 seconds"
    page.wait_for_timeout(1500)
    assert len(sent) == 1
    assert page.is_enabled("#fill")


def test_the_original_is_shown_as_long_as_b_is_held(new_page):
    page = new_page()
    open_sample(page)
    drag(page, STROKE)
    filled(page)
    page.keyboard.down("b")
    assert page.is_visible("#badge")
    page.keyboard.press("Control+z")
    assert page.is_hidden("#badge")
    page.keyboard.up("b")
    page.keyboard.press("Control+Shift+z")
    assert page.is_hidden("#badge")
    assert page.evaluate("() => Konva.stages[0].getLayers()[0].find('Group')[0].visible()")
    assert parts_shown(page) == 1


DECODED = """
window.decoded = 0;
const make = window.createImageBitmap;
window.createImageBitmap = (what, ...box) => { window.decoded += what instanceof Blob; return make(what, ...box); };
"""


def test_the_answer_of_a_fill_is_decoded_once(new_page):
    page = new_page(init=COLLECTS + DECODED)
    open_file(page, file_of(photo(700, 1000)))
    before = page.evaluate("() => window.decoded")
    for corner in ((60, 60), (940, 60), (60, 640), (940, 640)):
        drag(page, [corner])
    page.keyboard.press("Enter")
    filled(page)
    assert parts_shown(page) > 1
    assert page.evaluate("() => window.decoded") - before == 1


def test_erasing_where_nothing_is_painted_does_nothing(new_page):
    page = new_page(init=COLLECTS)
    open_sample(page)
    drag(page, STROKE, button="right")
    assert page.is_disabled("#fill")
    assert page.is_disabled("#undo")
    # Where all that was painted is erased, Fill says so, and the strokes can be undone.
    drag(page, [(100, 100)])
    drag(page, [(90, 100), (110, 100)], button="right")
    page.keyboard.press("Enter")
    page.wait_for_selector("#status:text('Paint something first.')")
    page.keyboard.press("Control+z")
    page.keyboard.press("Enter")
    filled(page)
    assert re.fullmatch(r"Filled in \d+ ms", page.text_content("#status"))


def test_strokes_beside_the_picture_are_none(new_page):
    page = new_page()
    open_sample(page)
    drag(page, [(-40, 100), (-30, 120)])
    assert page.text_content("#status") == "That is beside the picture."
    page.click("#settings")
    page.fill("#rectangle-x", "451")
    page.click("#numbers button")
    page.wait_for_timeout(100)
    assert page.text_content("#status") == "That is beside the picture."
    assert waiting(page) == 0
    assert page.is_disabled("#undo")
    page.fill("#rectangle-x", "450")  # a column of the picture
    page.click("#numbers button")
    filled(page)
    assert page.is_enabled("#undo")
