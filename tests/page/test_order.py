"""Events in another order than usual: what is asked for one picture never reaches another one, and is not lost."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from ..serve_support import file_of, hole, photo, pixels_of
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
    named,
    open_sample,
    opened,
    parts_shown,
    place,
)

pytestmark = pytest.mark.page

A, B = named(("a.png", file_of(photo(90, 120))), ("b.png", file_of(photo(80, 110))))


def open_two(page: Any) -> None:
    page.set_input_files("#file", [A, B])
    opened(page)


def show(page: Any, key: str, about: str) -> None:
    page.keyboard.press(key)
    page.wait_for_selector(f"#about:text('{about}')")
    opened(page)


@pytest.mark.parametrize("tool", ["d", "e", "r", "l"])
def test_a_stroke_ends_with_its_picture(new_page, tool):
    page = new_page(init=COLLECTS)
    open_two(page)
    drag(page, [(50, 50)])
    page.keyboard.press(tool)
    drag(page, [(20, 20), (50, 50)], release=False)
    page.keyboard.press("PageDown")  # the second picture is opened while the pointer moves
    page.mouse.move(640, 420, steps=5)
    page.wait_for_selector("#about:text('110 × 80')")
    opened(page)
    page.mouse.move(600, 400, steps=5)
    page.mouse.up()
    assert page.is_disabled("#fill")
    assert page.is_disabled("#undo")
    show(page, "PageUp", "120 × 90")
    assert page.is_enabled("#fill")
    assert page.text_content("#count") == ""


def test_a_mask_goes_to_the_picture_that_it_was_imported_for(new_page):
    page = new_page(init=COLLECTS)
    page.expected_errors.append("400")
    open_two(page)
    held = hold(page, "**/mask?*")
    page.set_input_files("#mask-file", named(("mask.png", file_of(hole(90, 120)))))
    arrived(page, held)
    show(page, "PageDown", "110 × 80")
    held[0].fallback()
    page.wait_for_selector("#status:text('Mask read')")
    assert page.is_disabled("#fill")
    show(page, "PageUp", "120 × 90")
    assert page.is_enabled("#fill")
    page.keyboard.press("Control+z")
    # The question for its channels, too.
    rubbed = np.dstack([photo(90, 120), np.where(hole(90, 120), np.uint8(0), np.uint8(255))])
    page.set_input_files("#mask-file", named(("mask.png", file_of(rubbed))))
    arrived(page, held, 2)
    show(page, "PageDown", "110 × 80")
    held[1].fallback()
    page.click("#channels [value=inverse_alpha]")
    arrived(page, held, 3)
    held[2].fallback()
    page.wait_for_selector("#status:text('Mask read')")
    assert page.is_disabled("#fill")
    show(page, "PageUp", "120 × 90")
    assert page.is_enabled("#fill")


def test_two_masks_are_asked_about_one_after_the_other(new_page):
    page = new_page(init=COLLECTS)
    page.expected_errors.append("400")
    open_two(page)
    rubbed = np.dstack([photo(90, 120), np.where(hole(90, 120), np.uint8(0), np.uint8(255))])
    for _ in range(2):
        page.set_input_files("#mask-file", named(("mask.png", file_of(rubbed))))
    page.click("#channels [value=inverse_alpha]")
    page.wait_for_selector("#channels", state="visible")
    page.keyboard.press("Escape")
    page.wait_for_selector("#channels", state="hidden")
    page.wait_for_selector("#fill:enabled")
    page.keyboard.press("Control+z")
    assert page.is_disabled("#fill")


def test_save_pressed_twice_saves_once(new_page):
    page = new_page(init=COLLECTS)
    open_sample(page)
    held = hold(page, "**/result?*")
    downloads: list[Any] = []
    page.on("download", lambda one: downloads.append(one))
    page.keyboard.press("Control+s")
    page.keyboard.press("Control+s")
    arrived(page, held)
    # What is shown has changed: this is another file.
    drag(page, STROKE)
    page.keyboard.press("Enter")
    filled(page)
    page.keyboard.press("Control+s")
    arrived(page, held, 2)
    for route in held:
        with page.expect_download():
            route.fallback()
    page.wait_for_selector("#status:text('Saved as')")
    assert len(held) == len(downloads) == 2


@pytest.mark.parametrize(
    ("key", "pattern", "dialog"), [("v", "**/view?*", "#slider"), ("t", "**/stages?*", "#stage-dialog")]
)
def test_what_comes_too_late_is_not_shown(new_page, key, pattern, dialog):
    page = new_page()
    open_two(page)
    drag(page, [(50, 50), (60, 50)])
    filled(page)
    show(page, "PageDown", "110 × 80")
    show(page, "PageUp", "120 × 90")
    held = hold(page, pattern)
    count = 2 if key == "v" else 1

    def answer() -> None:
        arrived(page, held, count)
        for route in held:
            with page.expect_response(route.request.url):
                route.fallback()
        held.clear()
        page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")

    page.keyboard.press(key)
    show(page, "PageDown", "110 × 80")
    answer()
    assert page.is_hidden(dialog)
    show(page, "PageUp", "120 × 90")
    page.keyboard.press(key)
    arrived(page, held, count)
    page.click("#home")
    page.wait_for_selector("#discard[open]")
    answer()
    assert page.is_hidden(dialog)
    page.click("#discard [value=keep]")
    page.keyboard.press(key)
    answer()
    page.wait_for_selector(dialog, state="visible")


def test_undo_during_a_fill_takes_the_last_stroke_that_waits(new_page):
    page = new_page()
    page.expected_errors.append("ERR_")
    open_sample(page)
    held = hold(page, "**/fill?*")
    drag(page, STROKE)
    arrived(page, held)
    drag(page, [(300, 200), (330, 200)])
    page.wait_for_selector("#fill:enabled")
    page.keyboard.press("Control+z")
    assert page.is_disabled("#fill")
    assert page.evaluate("() => document.body.classList.contains('filling')")
    held[0].fallback()
    filled(page)
    assert changed(pixels_of(download(page)[1]), SAMPLE)[2:] < (300, 200)
    assert len(held) == 1
    page.keyboard.press("Control+z")
    assert parts_shown(page) == 0
    # Without one, it is the fill.
    drag(page, STROKE)
    arrived(page, held, 2)
    page.keyboard.press("Control+z")
    page.wait_for_selector("body:not(.filling)")
    assert page.text_content("#status") == "Cancelled."
    assert page.is_disabled("#fill")


FRAMES = """
window.frames = true;
const ask = window.requestAnimationFrame;
window.requestAnimationFrame = (call) => (window.frames ? ask(call) : 0);
"""


def test_a_fill_can_be_undone_before_it_is_drawn(new_page):
    page = new_page(init=FRAMES)
    open_sample(page)
    held = hold(page, "**/fill?*")
    drag(page, STROKE)
    arrived(page, held)
    page.evaluate("() => (window.frames = false)")  # as in a tab in the background
    held[0].fallback()
    page.wait_for_selector("#compare:enabled")
    page.keyboard.press("Control+z")
    assert page.text_content("#status") == "Undone."
    assert page.is_enabled("#redo")
    assert parts_shown(page) == 0


def test_a_stroke_is_shown_while_a_fill_ends(new_page):
    page = new_page()
    open_sample(page)
    held = hold(page, "**/fill?*")
    drag(page, STROKE)
    arrived(page, held)
    shown = "(number) => Konva.stages[0].getLayers()[number].visible()"
    drag(page, [(300, 200), (330, 200)], release=False)
    assert page.evaluate(shown, 3)
    held[0].fallback()
    filled(page)
    assert page.evaluate(shown, 3)
    assert not page.evaluate(shown, 1)
    page.mouse.up()
    arrived(page, held, 2)
    held[1].fallback()
    filled(page, 2)
    assert not page.evaluate(shown, 3)


def test_a_fill_that_fails_behind_another_picture_names_its_own(new_page):
    page = new_page()
    page.expected_errors.append("500")
    open_two(page)
    held = hold(page, "**/fill?*")
    drag(page, [(50, 50), (60, 50)])
    arrived(page, held)
    show(page, "PageDown", "110 × 80")
    held[0].fulfill(status=500, body=json.dumps({"detail": "it broke"}))
    assert failed(page) == "a.png: it broke"
    assert page.is_disabled("#fill")
    show(page, "PageUp", "120 × 90")
    assert page.is_enabled("#fill")


def test_a_picture_that_is_opened_slowly(new_page):
    page = new_page(init=COLLECTS)
    page.expected_errors.append("ERR_")
    open_two(page)
    drag(page, [(50, 50)])
    held = hold(page, "**/api/v1/pictures")
    page.keyboard.press("PageDown")
    arrived(page, held)
    # The bars stay, the picture before does not, and nothing can be done.
    assert page.text_content("#number") == "2 of 2"
    assert page.text_content("#name") == "b.png"
    assert page.evaluate("() => Konva.stages[0].getLayers()[0].getChildren().length") == 0
    for name in ("#fill", "#undo", "#save", "#compare"):
        assert page.is_disabled(name)
    for key in ("Control+s", "Control+c", "Enter", "i", "v", "t", "0", "1", "+", "Delete"):
        page.keyboard.press(key)
    drag(page, [(50, 50), (60, 50)])
    page.click("#previous")
    page.wait_for_selector("#about:text('120 × 90')")
    assert page.is_enabled("#fill")
    held[0].fallback()
    show(page, "PageDown", "110 × 80")
    # Closing a picture ends its upload.
    page.set_input_files("#file", [A])
    page.click("#discard [value=discard]")
    arrived(page, held, 2)
    with page.expect_event("requestfailed", lambda request: request.url.endswith("/api/v1/pictures")):
        page.click("#home")
    page.wait_for_selector("#start", state="visible")
    assert page.get_attribute("#status", "data-kind") != "error"


def test_previews_of_many_pictures_are_let_go(new_page):
    page = new_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url) if request.url.endswith("/view") else None)
    page.set_input_files("#file", named(*((f"{n}.png", file_of(photo(60 + n, 80))) for n in range(10))))
    opened(page)
    drag(page, [(40, 30), (50, 30)])
    filled(page)
    for number in range(1, 10):
        show(page, "PageDown", f"80 × {60 + number}")
    for number in range(8, 1, -1):
        show(page, "PageUp", f"80 × {60 + number}")
    assert len(asked) == 10  # those are kept
    show(page, "PageUp", "80 × 61")
    held = hold(page, "**/view")
    page.keyboard.press("PageUp")
    arrived(page, held)
    assert page.is_disabled("#save")  # it is not the picture that is shown
    held[0].fallback()
    page.wait_for_selector("#about:text('80 × 60')")
    opened(page)
    assert len(asked) == 12
    assert parts_shown(page) == 1


def test_the_end_of_a_drag_beside_a_dialog_does_not_close_it(new_page):
    page = new_page()
    open_sample(page)
    drag(page, STROKE)
    filled(page)
    page.keyboard.press("v")
    page.wait_for_selector("#slider[open] img-comparison-slider.rendered")
    box = page.locator("img-comparison-slider").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(4, 400, steps=4)
    page.mouse.up()
    assert page.is_visible("#slider")
    page.mouse.click(4, 400)
    page.wait_for_selector("#slider", state="hidden")


def test_space_pans_after_a_click_on_a_button(new_page):
    page = new_page()
    open_sample(page)
    for button in ("button[data-tool=rectangle]", "#size"):
        page.click(button)
        x, y, _ = place(page)
        page.mouse.move(600, 400)
        page.keyboard.down(" ")
        page.mouse.down()
        page.mouse.move(630, 420)
        page.mouse.up()
        page.keyboard.up(" ")
        assert place(page)[:2] == pytest.approx((x + 30, y + 20), abs=1)
    page.focus("#settings")
    page.keyboard.press(" ")  # by the keyboard it is the button's
    assert page.is_visible("#panel")
