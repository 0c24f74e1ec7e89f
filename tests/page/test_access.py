"""The page without a mouse, on small windows, and what axe says of it."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from ..serve_support import file_of, photo, pixels_of
from .support import (
    COLLECTS,
    PHONE,
    SAMPLE,
    STROKE,
    changed,
    drag,
    filled,
    hold,
    named,
    open_sample,
    opened,
    place,
)

pytestmark = pytest.mark.page

FILE = file_of(photo(90, 120))


def test_the_keyboard_alone(new_page):
    page = new_page()
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate("() => document.activeElement.getAttribute('aria-label')") == "Open the sample chelsea":
            break
    page.keyboard.press("Enter")
    opened(page)
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("() => document.activeElement.id") == "stage":
            break
    assert page.evaluate("() => document.activeElement.id") == "stage"
    for _ in range(3):
        page.keyboard.press("ArrowUp")
    assert page.is_visible("#cursor")
    assert page.text_content("#spoken").startswith("Brush at ")
    page.keyboard.down(" ")
    for _ in range(6):
        page.keyboard.press("ArrowRight")
    page.keyboard.up(" ")
    filled(page)
    with page.expect_download() as caught:
        page.keyboard.press("Control+s")
    result = pixels_of(Path(caught.value.path()).read_bytes())
    left, top, right, bottom = changed(result, SAMPLE)
    assert right - left > 1.3 * (bottom - top)
    page.keyboard.press("Control+z")
    page.click("#settings")
    for name, value in {"x": 20, "y": 30, "width": 40, "height": 25}.items():
        page.fill(f"#rectangle-{name}", str(value))
    page.keyboard.press("Enter")
    filled(page, 2)
    with page.expect_download() as caught:
        page.keyboard.press("Control+s")
    left, top, right, bottom = changed(pixels_of(Path(caught.value.path()).read_bytes()), SAMPLE)
    assert (left, top) >= (20 - 7, 30 - 7)
    assert (right, bottom) <= (60 + 7, 55 + 7)
    page.keyboard.press("?")
    assert page.is_hidden("#help-dialog")  # a field has the focus
    page.click("#panel-close")
    page.keyboard.press("?")
    assert page.is_visible("#help-dialog")


FRAME = "() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"
AXE = (Path(__file__).parent / "axe.min.js").read_text()


def problems(page: Any) -> list[str]:
    page.evaluate(FRAME)  # these tests have no transitions, so all has its colours
    page.evaluate(f"() => {{ {AXE} }}")
    found = page.evaluate("async () => (await axe.run()).violations")
    return [f"{one['id']}: {node['html'][:140]} {node['failureSummary']}" for one in found for node in one["nodes"]]


@pytest.mark.parametrize("scheme", ["dark", "light"])
@pytest.mark.parametrize("device", ["desktop", "phone"])
def test_axe_finds_nothing(new_page, scheme, device, shots):
    page = new_page(color_scheme=scheme, reduced_motion="reduce", **(PHONE if device == "phone" else {}))
    assert problems(page) == []
    page.screenshot(path=shots / f"{device}_{scheme}_start.png")
    open_sample(page)
    assert problems(page) == []
    drag(page, STROKE)
    filled(page)
    page.click("#settings")
    page.wait_for_selector("#panel", state="visible")
    assert problems(page) == []
    page.screenshot(path=shots / f"{device}_{scheme}.png")
    page.click("#panel-close")
    page.click("#compare")
    page.wait_for_selector("#slider[open] img-comparison-slider.rendered")
    assert problems(page) == []
    page.keyboard.press("Escape")
    page.wait_for_selector("#slider", state="hidden")
    if device == "desktop":
        page.click("#help")
        assert problems(page) == []
        page.keyboard.press("Escape")
        page.wait_for_selector("#help-dialog", state="hidden")
        page.goto(page.url + "docs")
        page.wait_for_selector(".docs details")
        page.evaluate("() => document.querySelectorAll('details').forEach((one) => (one.open = true))")
        assert problems(page) == []


def test_nothing_is_wider_than_a_phone(new_page):
    page = new_page(**PHONE)
    for step in ("start", "editing", "settings"):
        if step == "editing":
            open_sample(page)
        elif step == "settings":
            page.click("#settings")
        wide = page.evaluate(
            "() => [...document.querySelectorAll('body *')].filter((e) => e.getBoundingClientRect().right > "
            "innerWidth + 1 && getComputedStyle(e).display !== 'none').map((e) => e.id || e.className || e.tagName)"
        )
        assert wide == []


def test_the_number_of_strokes_is_in_the_name_of_fill(new_page):
    page = new_page(init=COLLECTS, reduced_motion="reduce")
    open_sample(page)
    drag(page, STROKE)
    assert page.get_attribute("#fill", "aria-label") == "Fill what is painted (Enter)"
    drag(page, [(300, 200)])
    assert page.get_attribute("#fill", "aria-label") == "Fill 2 strokes (Enter)"
    assert problems(page) == []
    page.click("#home")
    page.wait_for_selector("#discard[open]")
    assert problems(page) == []


def focused(page: Any) -> str:
    return page.evaluate("() => document.activeElement.getAttribute('aria-label') || document.activeElement.tagName")


def test_the_menu_of_the_mask_by_keys(new_page):
    page = new_page(init=COLLECTS)
    open_sample(page)
    page.focus("#mask-menu summary")
    page.keyboard.press("Enter")
    page.wait_for_selector(".menu", state="visible")
    page.keyboard.press("Tab")
    page.keyboard.press("Escape")
    assert page.is_hidden(".menu")
    assert focused(page) == "Mask"
    page.keyboard.press("Enter")
    page.focus("[data-do=invert]")
    page.keyboard.press("Enter")
    assert page.is_hidden(".menu")
    assert focused(page) == "Mask"
    assert page.is_enabled("#fill")
    assert page.get_attribute("#mask-menu summary", "role") is None  # a button would not say whether it is open


def test_keys_that_are_not_the_pages(new_page):
    page = new_page()
    page.set_input_files("#file", [{"name": f"{n}.png", "mimeType": "image/png", "buffer": FILE} for n in range(2)])
    opened(page)
    page.evaluate("() => addEventListener('keydown', (event) => (window.taken = event.defaultPrevented))")
    page.keyboard.press("e")
    assert page.evaluate("() => window.taken")
    for key in ("Alt+d", "Alt+ArrowLeft", "Control+Shift+c", "Control+Shift+s"):
        page.focus("#stage")
        page.keyboard.press(key)
        assert not page.evaluate("() => window.taken"), key
    assert page.get_attribute("button[data-tool=eraser]", "aria-checked") == "true"
    page.focus("#size")
    size = int(page.input_value("#size"))
    page.keyboard.press("PageDown")
    assert int(page.input_value("#size")) < size
    assert page.text_content("#number") == "1 of 2"


def test_letters_of_other_alphabets_are_read_by_their_place(new_page):
    page = new_page(init=COLLECTS)
    open_sample(page)
    drag(page, STROKE)

    def press(key: str, code: str, **more: bool) -> None:
        page.evaluate(
            "(how) => document.querySelector('#stage').dispatchEvent(new KeyboardEvent('keydown', how))",
            {"key": key, "code": code, "bubbles": True, **more},
        )

    press("у", "KeyE")
    assert page.get_attribute("button[data-tool=eraser]", "aria-checked") == "true"
    size = int(page.input_value("#size"))
    press("ъ", "BracketRight")
    assert int(page.input_value("#size")) > size
    press("я", "KeyZ", ctrlKey=True)
    assert page.is_disabled("#undo")
    press("€", "KeyD")
    press("w", "KeyD")  # a Latin letter is what it says
    assert page.get_attribute("button[data-tool=eraser]", "aria-checked") == "true"


def test_the_name_can_be_read_above_any_picture(new_page):
    page = new_page()
    open_sample(page)
    background = page.evaluate("() => getComputedStyle(document.querySelector('.title')).backgroundColor")
    assert background.startswith("rgb")
    assert not background.endswith(", 0)")


def test_the_brush_of_the_keyboard_takes_the_window_with_it(new_page):
    page = new_page()
    open_sample(page)
    page.focus("#stage")
    fitted = place(page)
    for _ in range(3):
        page.keyboard.press("+")
    page.keyboard.press("1")
    for _ in range(6):
        page.keyboard.press("+")
    x, _, scale = place(page)
    assert x < 0
    assert scale > fitted[2]
    for _ in range(400):
        page.keyboard.press("ArrowLeft")
        if page.text_content("#spoken").startswith("Brush at 0,"):
            break
    assert page.text_content("#spoken").startswith("Brush at 0,")
    assert place(page)[0] == pytest.approx(0, abs=1)
    page.keyboard.press("ArrowLeft")
    assert place(page)[0] == pytest.approx(0, abs=1)


@pytest.mark.parametrize("width", [320, 400, 721, 740, 800, 900, 901, 1024])
def test_the_buttons_above_the_picture_fit(new_page, width):
    page = new_page(viewport={"width": width, "height": 600})
    page.set_input_files(
        "#file", [{"name": f"a rather long name {n}.png", "mimeType": "image/png", "buffer": FILE} for n in range(3)]
    )
    opened(page)
    boxes = [one.bounding_box() for one in page.locator("header button:visible").all()]
    assert len(boxes) >= 9
    for box in boxes:
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width
    for one, other in itertools.combinations(boxes, 2):
        beside = one["x"] + one["width"] <= other["x"] + 0.5 or other["x"] + other["width"] <= one["x"] + 0.5
        assert beside or one["y"] + one["height"] <= other["y"] or other["y"] + other["height"] <= one["y"]


LONG = "a_name_without_any_space_" * 8 + ".png"


@pytest.mark.parametrize("device", ["desktop", "phone"])
def test_names_of_files_fit_and_turn_nothing_around(new_page, device):
    page = new_page(init=COLLECTS, **(PHONE if device == "phone" else {}))
    page.expected_errors.append("400")
    inside = """() => {
      const status = document.querySelector("#status");
      return status.scrollWidth <= status.clientWidth && status.getBoundingClientRect().right <= innerWidth;
    }"""
    for name in (LONG, "many words " * 20 + ".png"):
        page.set_input_files("#file", [{"name": name, "mimeType": "image/png", "buffer": FILE}])
        page.wait_for_function("(name) => document.querySelector('#name').textContent === name", arg=name)
        opened(page)
        assert page.evaluate(inside)
        assert page.get_attribute("#name", "title") == name
    page.set_input_files("#file", [{"name": LONG, "mimeType": "image/png", "buffer": b"broken"}])
    page.wait_for_selector("#status[data-kind=error]")
    assert page.evaluate(inside)
    # A right-to-left name, and one with a character that turns the text after it around, stay among themselves.
    for name in ("\u05e6\u05d9\u05dc\u05d5\u05dd.png", "a\u202egnp.exe.png"):
        page.set_input_files("#file", [{"name": name, "mimeType": "image/png", "buffer": FILE}])
        page.wait_for_function("(name) => document.querySelector('#name').textContent === name", arg=name)
        opened(page)
        assert page.text_content("#status").startswith(f"\u2068{name}\u2069, 120 × 90. ")
    drag(page, [(50, 50)])
    page.click("#home")
    page.wait_for_selector("#discard[open]")
    box = page.locator("#discard").bounding_box()
    assert box["x"] >= 0
    assert box["y"] >= 0


def covered(page: Any, selector: str) -> bool:
    """Whether something else is where the middle of an element is."""
    return page.evaluate(
        """(selector) => {
          const element = document.querySelector(selector);
          const { x, y, width, height } = element.getBoundingClientRect();
          return !element.contains(document.elementFromPoint(x + width / 2, y + height / 2));
        }""",
        selector,
    )


SMALL = {
    "phone": (390, 844),
    "narrow": (320, 568),
    "lying": (844, 390),
    "low": (667, 375),
    "doubled": (720, 450),
    "zoomed": (360, 225),
    "zoomed square": (320, 256),
    "zoomed wide": (480, 270),
}


@pytest.mark.parametrize("name", SMALL)
def test_nothing_is_covered_in_small_windows(new_page, name):
    width, height = SMALL[name]
    page = new_page(**PHONE | {"viewport": {"width": width, "height": height}})
    page.set_input_files("#file", [{"name": f"{n}.png", "mimeType": "image/png", "buffer": FILE} for n in range(2)])
    opened(page)
    x, y, scale = place(page)
    drag(page, [(60, 45), (70, 45)])
    filled(page)
    page.click("#mask-menu summary")
    assert [one for one in ("#mask-import", "#mask-export", "#invert", "#mask-clear") if covered(page, one)] == []
    page.keyboard.press("Escape")
    bars = ["#undo", "#next", "#save", "#fill", "#size", "button[data-tool=lasso]", "#mask-menu summary"]
    assert [one for one in bars if covered(page, one)] == []
    # The bars leave the picture free.
    for bar in ("header .pill:visible", "#tools", "#dock"):
        for box in [one.bounding_box() for one in page.locator(bar).all()]:
            beside = box["x"] >= x + 120 * scale or box["x"] + box["width"] <= x
            assert beside or box["y"] >= y + 90 * scale - 1 or box["y"] + box["height"] <= y + 1, bar
    page.click("#compare")
    page.wait_for_selector("#slider[open] img-comparison-slider.rendered")
    dialog, slider = page.locator("#slider").bounding_box(), page.locator("img-comparison-slider").bounding_box()
    assert dialog["x"] < slider["x"]
    assert slider["x"] + slider["width"] < dialog["x"] + dialog["width"]
    assert slider["y"] + slider["height"] < dialog["y"] + dialog["height"] <= height


@pytest.mark.parametrize("name", [name for name in SMALL if name.startswith("zoomed")])
@pytest.mark.parametrize("count", [1, 2])
def test_half_of_the_height_is_the_pictures_at_400_percent(new_page, name, count):
    """Screens of 1440x900, 1280x1024 and 1920x1080 at 400 % (WCAG 2.2, criterion 1.4.10)."""
    width, height = SMALL[name]
    page = new_page(viewport={"width": width, "height": height}, device_scale_factor=4)
    data = file_of(photo(400, 400))
    page.set_input_files("#file", named(*((f"{n}.png", data) for n in range(count))))
    opened(page)
    x, y, scale = place(page)
    assert 400 * scale >= height / 2
    assert x >= 0
    assert y >= 0
    assert x + 400 * scale <= width
    assert y + 400 * scale <= height
    for one in page.locator("button:visible, summary:visible").all():  # criterion 2.5.8: at least 24x24
        box = one.bounding_box()
        assert min(box["width"], box["height"]) >= 24
        assert 0 <= box["x"] <= box["x"] + box["width"] <= width
        assert 0 <= box["y"] <= box["y"] + box["height"] <= height


def test_nothing_moves_where_less_motion_is_asked_for(new_page):
    page = new_page(init=COLLECTS, reduced_motion="reduce")
    open_sample(page)
    hold(page, "**/fill?*")
    drag(page, STROKE)
    moving = "() => document.getAnimations().map((one) => one.animationName || one.transitionProperty)"
    assert page.evaluate(moving) == []
    page.keyboard.press("Enter")
    page.wait_for_selector("body.filling")
    assert page.evaluate(moving) == []
    drag(page, [(300, 200)])
    assert page.evaluate(moving) == []


def test_what_a_background_tells_is_told_in_forced_colours(new_page):
    page = new_page(forced_colors="active")
    open_sample(page)
    style = "([selector, name]) => getComputedStyle(document.querySelector(selector))[name]"
    assert page.evaluate(style, ["[role=radio][aria-checked=true]", "outlineStyle"]) == "solid"
    assert page.evaluate(style, ["#save", "borderStyle"]) == "solid"
    page.click("#settings")
    on = page.evaluate(style, ["#auto", "backgroundColor"])
    page.uncheck("#auto")
    page.wait_for_function(f"() => getComputedStyle(document.querySelector('#auto')).backgroundColor !== '{on}'")


def test_the_focus_goes_to_the_picture_that_was_opened(new_page):
    page = new_page()
    page.focus("[aria-label='Open the sample chelsea']")
    page.keyboard.press("Enter")
    opened(page)
    assert page.evaluate("() => document.activeElement.id") == "stage"
    page.keyboard.press("ArrowUp")
    page.wait_for_selector("#spoken:text('Brush at')", state="attached")
    outline = "() => getComputedStyle(document.querySelector('#stage')).outlineStyle"
    assert page.evaluate(outline) != "none"
    drag(page, STROKE)
    assert page.evaluate(outline) == "none"  # the pointer needs none
    filled(page)


def test_the_picture_is_beside_the_settings_as_long_as_there_is_room(new_page):
    page = new_page()
    open_sample(page)

    def middle() -> float:
        x, _, scale = place(page)
        return x + 451 * scale / 2

    assert middle() == pytest.approx(640, abs=1)
    page.click("#settings")
    assert middle() < 600
    page.set_viewport_size({"width": 900, "height": 700})
    page.wait_for_function("() => Konva.stages[0].width() === 900")
    page.evaluate(FRAME)
    assert middle() == pytest.approx(450, abs=1)
