"""The page in a browser: painting by mouse, touch and keyboard; what is downloaded; what travels."""

from __future__ import annotations

import io
import re
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from ..serve_support import file_of, photo, pixels_of
from .support import (
    CANVASES,
    COLLECTS,
    NOISE,
    PHONE,
    REACH,
    SAMPLE,
    STROKE,
    arrived,
    assert_only_near_the_stroke,
    changed,
    download,
    drag,
    filled,
    hold,
    open_file,
    open_sample,
    opened,
    parts_shown,
    place,
    waiting,
)

pytestmark = pytest.mark.page


def test_paint_fill_undo_redo_compare_download(new_page):
    page = new_page()
    open_sample(page)
    assert page.text_content("#about") == "451 × 300 · PNG"
    drag(page, STROKE)
    filled(page)
    assert re.fullmatch(r"Filled in \d+ ms", page.text_content("#status"))
    assert parts_shown(page) == 1
    name, data = download(page)
    assert name == "chelsea_filled.png"
    result = pixels_of(data)
    assert_only_near_the_stroke(result, SAMPLE)

    page.keyboard.press("Control+z")
    assert parts_shown(page) == 0
    np.testing.assert_array_equal(pixels_of(download(page)[1]), SAMPLE)
    page.keyboard.press("Control+Shift+z")
    assert parts_shown(page) == 1
    np.testing.assert_array_equal(pixels_of(download(page)[1]), result)
    page.click("#undo")
    assert page.is_disabled("#undo")
    page.keyboard.press("Control+y")

    page.keyboard.down("b")
    assert page.is_visible("#badge")
    assert not page.evaluate("() => Konva.stages[0].getLayers()[0].find('Group')[0].visible()")
    page.keyboard.up("b")
    assert page.is_hidden("#badge")
    page.click("#compare")
    page.wait_for_selector("#slider[open] img-comparison-slider.rendered")
    page.keyboard.down("ArrowRight")
    page.wait_for_selector("img-comparison-slider:not([aria-valuenow='50'])")
    page.keyboard.up("ArrowRight")
    assert page.evaluate("() => document.querySelector('img-comparison-slider').value") > 50
    page.keyboard.press("Escape")
    page.wait_for_selector("#slider", state="hidden")

    page.click("#stages")
    page.wait_for_selector("#stage-dialog[open]")
    assert page.locator("#stage-figures img").count() == 4
    page.keyboard.press("Escape")
    page.wait_for_selector("#stage-dialog", state="hidden")
    page.click("#settings")
    assert page.locator("#phases div").count() == 4
    assert "engine on cpu" in page.text_content("#ran")


def test_only_the_masks_box_travels_and_no_pixel_of_the_picture_is_read(new_page):
    results = []
    for init in ("", NOISE):
        page = new_page(init=init)
        open_sample(page)
        sent = []
        page.on("request", lambda request, sent=sent: sent.append(request) if "/fill" in request.url else None)
        drag(page, STROKE)
        filled(page)
        mask = Image.open(io.BytesIO(sent[0].post_data_buffer))
        assert mask.mode == "1"
        assert mask.width < 50 + REACH
        assert mask.height < 10 + REACH
        assert len(sent[0].post_data_buffer) < 1500
        results.append(pixels_of(download(page)[1]))
    np.testing.assert_array_equal(results[0], results[1])
    assert_only_near_the_stroke(results[0], SAMPLE)


@pytest.mark.parametrize(("format", "kind"), [("WEBP", "image/webp"), ("JPEG", "image/jpeg")])
def test_turned_files_are_painted_on_as_they_are_seen(new_page, format, kind):
    exif = Image.Exif()
    exif[274] = 6
    exif[271] = "maker"
    options = {"lossless": True} if format == "WEBP" else {"quality": 92}
    data = file_of(photo(300, 451), format, exif=exif, **options)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    page = new_page()
    open_file(page, data, f"photo.{format.lower()}", kind)
    assert page.text_content("#about") == f"300 × 451 · {format}"
    drag(page, STROKE)
    filled(page)
    name, own = download(page)
    assert name == f"photo_filled.{format.lower()}"
    with Image.open(io.BytesIO(own)) as again:
        assert (again.format, again.size) == (format, (300, 451))
        assert again.getexif().get(274, 1) == 1
        assert again.getexif()[271] == "maker"
    page.click("#settings")
    page.select_option("#format", "png")
    name, png = download(page)
    assert name == "photo_filled.png"
    assert_only_near_the_stroke(pixels_of(png), upright)


def session_of(page: Any) -> Any:
    """The connection to the browser by which a page gets events of fingers and pens."""
    page.own_session = getattr(page, "own_session", None) or page.context.new_cdp_session(page)
    return page.own_session


def touch(page: Any, kind: str, *points: tuple[float, float]) -> None:
    fingers = [{"x": x, "y": y, "id": number} for number, (x, y) in enumerate(points)]
    session_of(page).send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": fingers})


def test_a_finger_paints_and_two_zoom(new_page, shots):
    page = new_page(init=CANVASES, **PHONE)
    page.screenshot(path=shots / "phone_start.png")
    open_sample(page)
    x, y, scale = place(page)
    points = [(x + a * scale, y + b * scale) for a, b in [(120, 100), (140, 104), (180, 108), (220, 110)]]
    touch(page, "touchStart", points[0])
    for point in points[1:]:
        touch(page, "touchMove", point)
    touch(page, "touchEnd")
    filled(page)
    page.screenshot(path=shots / "phone.png")
    left, _, right, _ = changed(pixels_of(download(page)[1]), SAMPLE)
    assert right - left > 100  # a line, not a tap
    assert left < 120 < 220 < right

    middle = (195.0, 420.0)
    touch(page, "touchStart", (middle[0] - 20, middle[1]))
    touch(page, "touchStart", (middle[0] - 20, middle[1]), (middle[0] + 20, middle[1]))
    for apart in (30, 50, 80):
        touch(page, "touchMove", (middle[0] - apart, middle[1]), (middle[0] + apart, middle[1]))
    touch(page, "touchEnd")
    assert place(page)[2] > 2 * scale
    page.wait_for_timeout(100)
    assert page.evaluate("() => performance.getEntriesByName('lgnet-fill').length") == 1
    assert waiting(page) == 0
    page.click("#settings")
    page.wait_for_selector("#panel", state="visible")
    page.screenshot(path=shots / "phone_settings.png")
    assert page.evaluate("() => window.noteAll()") <= 390 * 844 * 2 * 2


@pytest.mark.parametrize("first", ["pen", "palm"])
def test_the_palm_of_the_hand_that_holds_the_pen_does_nothing(new_page, first):
    page = new_page(init=COLLECTS, has_touch=True)
    open_sample(page)
    before = place(page)
    x, y, scale = before
    points = [(x + across * scale, y + down * scale) for across, down in STROKE]

    def pen(kind: str, at: tuple[float, float]) -> None:
        how = {"x": at[0], "y": at[1], "button": "left", "buttons": 1, "pointerType": "pen"}
        session_of(page).send("Input.dispatchMouseEvent", {"type": kind, **how})

    palm = [(points[0][0] + 60, points[0][1] + 200), (points[0][0] + 110, points[0][1] + 230)]
    down = [lambda: pen("mousePressed", points[0]), lambda: touch(page, "touchStart", palm[0])]
    for step in down if first == "pen" else down[::-1]:
        step()
    touch(page, "touchMove", (palm[0][0] - 30, palm[0][1] - 40))
    pen("mouseMoved", points[1])
    touch(page, "touchStart", (palm[0][0] - 30, palm[0][1] - 40), palm[1])
    touch(page, "touchMove", (palm[0][0] - 60, palm[0][1] - 40), (palm[1][0] + 30, palm[1][1]))
    pen("mouseMoved", points[2])
    pen("mouseReleased", points[2])
    touch(page, "touchEnd")
    assert waiting(page) == 1
    assert place(page) == before
    page.keyboard.press("Enter")
    filled(page)
    left, _, right, bottom = changed(pixels_of(download(page)[1]), SAMPLE)
    assert left < 150 < 200 < right  # the whole stroke, and not one of the palm
    assert bottom < 110 + REACH

    touch(page, "touchStart", palm[0])  # without the pen, a finger pans
    touch(page, "touchMove", (palm[0][0] - 30, palm[0][1] - 40))
    touch(page, "touchEnd")
    assert place(page) == pytest.approx((x - 30, y - 40, scale))


def test_strokes_during_a_fill_wait_and_go_together(new_page):
    page = new_page()
    open_sample(page)
    sent, release = [], []

    def hold(route: Any) -> None:
        sent.append(route.request.url)
        if len(sent) == 1:
            release.append(route)
        else:
            route.fallback()

    page.route("**/fill?*", hold)
    drag(page, [(60, 60), (90, 60)])
    arrived(page, release)
    page.wait_for_selector("body.filling")
    drag(page, [(60, 200), (90, 200)])
    drag(page, [(300, 200), (330, 200)])
    assert len(sent) == 1
    assert "2 more strokes wait" in page.text_content("#status")
    release[0].fallback()
    filled(page, 2)
    assert len(sent) == 2
    assert "position=0" in sent[0]
    assert "position=1" in sent[1]
    assert parts_shown(page) >= 2
    page.click("#undo")
    assert parts_shown(page) == 1
    page.click("#undo")
    assert parts_shown(page) == 0
    page.click("#redo")
    assert parts_shown(page) == 1


def test_escape_cancels_a_fill(new_page):
    page = new_page()
    page.expected_errors.append("ERR_")
    open_sample(page)
    held = hold(page, "**/fill?*")
    drag(page, STROKE)
    arrived(page, held)
    page.wait_for_selector("body.filling")
    page.keyboard.press("Escape")
    page.wait_for_selector("body:not(.filling)")
    assert page.text_content("#status") == "Cancelled."
    assert page.is_disabled("#undo")
    page.unroute("**/fill?*")
    drag(page, STROKE)
    filled(page)
    assert_only_near_the_stroke(pixels_of(download(page)[1]), SAMPLE)


def test_ctrl_collects_and_enter_fills(new_page):
    page = new_page()
    open_sample(page)
    page.keyboard.down("Control")
    drag(page, [(60, 60), (90, 60)])
    drag(page, [(60, 200), (90, 200)])
    assert page.text_content("#count") == "2"
    page.keyboard.up("Control")
    filled(page)
    left, top, right, bottom = changed(pixels_of(download(page)[1]), SAMPLE)
    assert (left, top) < (60, 60) < (90, 200) < (right, bottom)
    page.click("#settings")
    page.uncheck("#auto")
    page.click("#panel-close")
    drag(page, [(300, 60), (330, 60)])
    page.wait_for_timeout(200)
    assert page.evaluate("() => performance.getEntriesByName('lgnet-fill').length") == 1
    page.keyboard.press("Enter")
    filled(page, 2)


def test_tools_masks_and_their_history(new_page):
    page = new_page()
    open_sample(page)
    page.click("#settings")
    page.uncheck("#auto")
    page.click("#panel-close")

    def mask() -> np.ndarray:
        page.click("#mask-menu summary")
        name, data = download(page, "#mask-export")
        assert name == "chelsea_mask.png"
        return pixels_of(data)

    page.keyboard.press("r")
    drag(page, [(100, 50), (200, 150)])
    rectangle = mask()
    assert rectangle.shape == (300, 451)
    assert rectangle[51:149, 101:199].all()
    assert abs(int(rectangle.sum()) - 100 * 100) < 300
    page.keyboard.press("d")
    drag(page, [(150, 100), (160, 100)], button="right")
    erased = mask()
    assert not erased[100, 150:160].any()
    assert rectangle.sum() - erased.sum() > 300
    page.keyboard.press("e")
    assert page.get_attribute("button[data-tool=eraser]", "aria-checked") == "true"
    page.keyboard.press("x")
    assert page.get_attribute("button[data-tool=brush]", "aria-checked") == "true"
    page.keyboard.press("Control+z")
    np.testing.assert_array_equal(mask(), rectangle)
    page.keyboard.press("i")
    np.testing.assert_array_equal(mask(), ~rectangle)
    page.keyboard.press("Control+z")
    page.keyboard.press("l")
    drag(page, [(300, 50), (400, 50), (400, 150), (300, 50)])
    lasso = mask() & ~rectangle
    assert abs(int(lasso.sum()) - 5000) < 300
    page.keyboard.press("Delete")
    assert page.is_disabled("#fill")
    page.keyboard.press("Control+z")
    assert page.is_enabled("#fill")
    page.keyboard.press("Delete")
    page.set_input_files("#mask-file", {"name": "m.png", "mimeType": "image/png", "buffer": file_of(rectangle)})
    page.wait_for_selector("#fill:enabled")
    np.testing.assert_array_equal(mask(), rectangle)
    page.click("#fill")
    filled(page)
    left, _, _, bottom = changed(pixels_of(download(page)[1]), SAMPLE)
    assert abs(left - 100) < 9
    assert abs(bottom - 150) < 9
    # Shift and a click: a line from the last point.
    page.keyboard.press("d")
    drag(page, [(50, 250)])
    page.keyboard.down("Shift")
    drag(page, [(400, 250)])
    page.keyboard.up("Shift")
    assert mask()[250, 50:400].all()
    # For an ambiguous mask the page offers the channels.
    rubbed = np.dstack([SAMPLE, np.where(rectangle, np.uint8(0), np.uint8(255))])
    page.keyboard.press("Delete")
    page.expected_errors.append("400")
    page.set_input_files("#mask-file", {"name": "m.png", "mimeType": "image/png", "buffer": file_of(rubbed)})
    page.click("#channels [value=inverse_alpha]")
    page.wait_for_selector("#fill:enabled")
    np.testing.assert_array_equal(mask(), rectangle)


def test_sizes_zoom_and_pan(new_page):
    page = new_page()
    open_sample(page)

    def size() -> float:
        return page.evaluate("() => parseFloat(document.querySelector('#cursor').style.width)")

    page.mouse.move(600, 400)
    start = size()
    page.keyboard.press("]")
    assert start < size() < 1.2 * start
    page.keyboard.press("[")
    page.keyboard.press("Shift+[")
    assert size() < 0.75 * start
    page.keyboard.down("Alt")
    page.mouse.wheel(0, -300)
    page.wait_for_function(
        "(size) => parseFloat(document.querySelector('#cursor').style.width) > size", arg=0.9 * start
    )
    page.keyboard.up("Alt")
    x, y, scale = place(page)
    page.mouse.wheel(0, -200)
    page.wait_for_function("(scale) => Konva.stages[0].getLayers()[0].scaleX() > scale", arg=1.3 * scale)
    nx, ny, zoomed = place(page)
    assert (600 - nx) / zoomed == pytest.approx((600 - x) / scale, abs=0.5)  # what is under the cursor stays
    page.keyboard.down(" ")
    page.mouse.down()
    page.mouse.move(650, 430)
    page.mouse.up()
    page.keyboard.up(" ")
    assert place(page)[:2] == pytest.approx((nx + 50, ny + 30), abs=1)
    page.mouse.down(button="middle")
    page.mouse.move(640, 400)
    page.mouse.up(button="middle")
    assert place(page)[:2] == pytest.approx((nx + 40, ny), abs=1)
    page.mouse.move(600, 400)
    assert page.is_visible("#cursor")
    assert page.evaluate("() => performance.getEntriesByName('lgnet-fill').length") == 0
    page.keyboard.press("1")
    assert place(page)[2] == pytest.approx(1)
    page.keyboard.press("0")
    assert place(page) == pytest.approx((x, y, scale))


# The browser's tools for developers change the density of the screen without the event that tells it.
QUERIES = """
const ask = window.matchMedia;
const queries = [];
window.matchMedia = (query) => (queries.push(ask.call(window, query)), queries.at(-1));
window.tell = (name) => queries.findLast(({ media }) => media.includes(name)).dispatchEvent(new Event("change"));
"""


@pytest.mark.parametrize("width", [1280, 960], ids=["another screen", "zoom of the browser"])
def test_the_picture_is_drawn_in_the_pixels_of_the_screen(new_page, width):
    page = new_page(init=QUERIES)
    open_sample(page)
    size = "() => { const { width, height } = document.querySelector('#stage canvas'); return [width, height]; }"
    assert page.evaluate(size) == [1280, 800]
    metrics = {"width": width, "height": width * 5 // 8, "deviceScaleFactor": 2, "mobile": False}
    session_of(page).send("Emulation.setDeviceMetricsOverride", metrics)
    if width == 1280:
        page.evaluate("() => window.tell('resolution')")
    drawn = f"() => document.querySelector('#stage canvas').width === {2 * width}"
    page.wait_for_function(drawn, timeout=20_000)
    assert page.evaluate(size) == [2 * width, 2 * width * 5 // 8]
    x, y, scale = place(page)
    levels = """async ([x, y]) => {
      for (let frame = 0; frame < 2; frame++) await new Promise(requestAnimationFrame);
      return [...document.querySelector("#stage canvas").getContext("2d").getImageData(x, y, 1, 1).data];
    }"""
    row, column = 60, 420  # near a corner, where the picture is smooth
    seen = page.evaluate(levels, [round(2 * (x + (column + 0.5) * scale)), round(2 * (y + (row + 0.5) * scale))])
    assert np.abs(np.array(seen[:3]) - SAMPLE[row, column]).max() <= 16
    assert seen[3] == 255


def test_a_large_picture_is_previewed_cropped_and_filled_at_full_size(new_page, tmp_path):
    picture = photo(2400, 3200)
    page = new_page(init=CANVASES)
    (tmp_path / "photo.png").write_bytes(file_of(picture, compress_level=1))
    page.set_input_files("#file", tmp_path / "photo.png")
    opened(page)
    assert page.text_content("#about") == "3200 × 2400 · PNG"
    images = "() => Konva.stages[0].getLayers()[0].find('Image').map((i) => [i.image().width, i.width()])"
    assert page.evaluate(images) == [[2048, 3200]]
    page.mouse.move(600, 400)
    for _ in range(12):
        page.mouse.wheel(0, -120)
    # A crop at full resolution.
    page.wait_for_function(
        "() => { const crop = Konva.stages[0].getLayers()[0].find('Image')[1]; "
        "return crop && Math.abs(crop.image().width - crop.width()) <= 1; }"
    )
    x, y, scale = place(page)
    at = ((600 - x) / scale, (400 - y) / scale)
    drag(page, [at, (at[0] + 10, at[1])])
    filled(page)
    result = pixels_of(download(page)[1])
    left, top, right, bottom = changed(result, picture)
    assert left < at[0] < right
    assert top < at[1] < bottom
    assert right - left < 60
    page.keyboard.press("i")  # a mask of the whole picture is written in tiles
    page.click("#mask-menu summary")
    assert pixels_of(download(page, "#mask-export")[1]).all()
    assert page.evaluate("() => window.noteAll()") <= 1280 * 800


def test_settings_are_kept(new_page):
    page = new_page()
    page.click("#settings")
    page.select_option("#strategy", "crop")
    page.fill("#colour", "#00ff88")
    page.locator("#dilate").fill("9")
    page.uncheck("#auto")
    page.click("#theme")
    page.reload()
    page.wait_for_selector("html.ready", state="attached")
    assert page.is_visible("#panel")
    assert page.input_value("#strategy") == "crop"
    assert page.input_value("#colour") == "#00ff88"
    assert page.text_content("#dilate-value") == "9 px"
    assert not page.is_checked("#auto")
    assert page.get_attribute("html", "data-theme") == "light"
    page.check("#auto")
    with page.expect_request("**/fill?*") as caught:
        open_sample(page)
        drag(page, STROKE)
    assert "strategy=crop&dilate=9" in caught.value.url
    filled(page)
