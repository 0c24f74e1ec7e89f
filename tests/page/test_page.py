"""The page in a browser: painting by mouse, touch and keyboard; what is downloaded; what travels."""

from __future__ import annotations

import io
import json
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from lgnet_fast.samples import sample_paths
from lgnet_fast.serve.options import ServeOptions

from ..serve_support import file_of, live_server, photo, pixels_of

pytestmark = pytest.mark.page

PHONE = {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2, "has_touch": True, "is_mobile": True}
SAMPLE = np.asarray(Image.open(sample_paths()["chelsea"][0]))

# What private browsers do to pixels that are read back from a canvas.
NOISE = """
for (const kind of [CanvasRenderingContext2D, OffscreenCanvasRenderingContext2D]) {
  const read = kind.prototype.getImageData;
  kind.prototype.getImageData = function (...box) {
    const image = read.apply(this, box);
    for (let i = 0; i < image.data.length; i++) image.data[i] ^= (i * 7919) % 3 ? 1 : 0;
    return image;
  };
}
const refuse = () => { throw Error("picture read"); };
for (const name of ["toBlob", "toDataURL"]) HTMLCanvasElement.prototype[name] = refuse;
OffscreenCanvas.prototype.convertToBlob = refuse;
"""

# The largest canvas that was ever there, in pixels.
CANVASES = """
window.largest = 0;
const note = (canvas) => (window.largest = Math.max(window.largest, canvas.width * canvas.height));
for (const kind of [HTMLCanvasElement, OffscreenCanvas]) {
  const get = kind.prototype.getContext;
  kind.prototype.getContext = function (...how) { note(this); return get.apply(this, how); };
}
window.noteAll = () => { document.querySelectorAll("canvas").forEach(note); return window.largest; };
"""


def open_sample(page: Any, name: str = "chelsea") -> None:
    page.click(f"[aria-label='Open the sample {name}']")
    opened(page)


def opened(page: Any) -> None:
    page.wait_for_selector("body.editing")
    page.wait_for_selector("#status:not([data-kind=busy])")


def open_file(page: Any, data: bytes, name: str = "photo.png", kind: str = "image/png") -> None:
    page.set_input_files("#file", {"name": name, "mimeType": kind, "buffer": data})
    opened(page)


def place(page: Any) -> tuple[float, float, float]:
    """(x, y, scale) of the picture in the window, as the first layer of the stage has them."""
    return tuple(
        page.evaluate("() => { const l = Konva.stages[0].getLayers()[0]; return [l.x(), l.y(), l.scaleX()]; }")
    )


def drag(page: Any, points: list[tuple[float, float]], button: str = "left", release: bool = True) -> None:
    """A stroke through points of the picture."""
    x, y, scale = place(page)
    for number, (across, down) in enumerate(points):
        page.mouse.move(x + across * scale, y + down * scale, steps=1 if number == 0 else 4)
        if number == 0:
            page.mouse.down(button=button)
    if release:
        page.mouse.up(button=button)


def filled(page: Any, count: int = 1) -> None:
    """Waits for so many fills that have been drawn."""
    deadline = time.monotonic() + 60
    while page.evaluate("() => performance.getEntriesByName('lgnet-fill').length") < count:
        assert time.monotonic() < deadline, page.text_content("#status")
        page.wait_for_timeout(30)


def parts_shown(page: Any) -> int:
    return page.evaluate("() => Konva.stages[0].getLayers()[0].find('Group')[0].getChildren().length")


def waiting(page: Any) -> int:
    """Operations of the mask that are shown as painted."""
    return page.evaluate("() => document.querySelector('#fill').disabled ? 0 : 1")


def download(page: Any, how: str = "#save") -> tuple[str, bytes]:
    with page.expect_download() as caught:
        page.click(how)
    return caught.value.suggested_filename, Path(caught.value.path()).read_bytes()


def changed(result: np.ndarray, original: np.ndarray) -> tuple[int, int, int, int]:
    """The box (left, top, right, bottom) of the pixels that differ."""
    differs = (result != original).reshape(*result.shape[:2], -1).any(axis=2)
    rows, columns = np.flatnonzero(differs.any(axis=1)), np.flatnonzero(differs.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


STROKE = [(150, 100), (170, 110), (200, 110)]
REACH = 60  # pixels from the stroke that may change: half the brush, dilate, feather


def assert_only_near_the_stroke(result: np.ndarray, original: np.ndarray) -> None:
    assert result.shape == original.shape
    left, top, right, bottom = changed(result, original)
    assert 150 - REACH < left < 150 < 200 < right < 200 + REACH
    assert 100 - REACH < top < 100 < 110 < bottom < 110 + REACH


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
    assert page.is_hidden("#slider")

    page.click("#stages")
    page.wait_for_selector("#stage-dialog[open]")
    assert page.locator("#stage-figures img").count() == 4
    page.keyboard.press("Escape")
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


def touch(page: Any, kind: str, *points: tuple[float, float]) -> None:
    session = page.touch_session = getattr(page, "touch_session", None) or page.context.new_cdp_session(page)
    fingers = [{"x": x, "y": y, "id": number} for number, (x, y) in enumerate(points)]
    session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": fingers})


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
    held = []
    page.route("**/fill?*", lambda route: held.append(route))
    drag(page, STROKE)
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
    page.keyboard.up("Alt")
    assert size() > 0.9 * start
    x, y, scale = place(page)
    page.mouse.wheel(0, -200)
    page.wait_for_timeout(50)
    nx, ny, zoomed = place(page)
    assert zoomed > 1.3 * scale
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
    deadline = time.monotonic() + 30
    while len(page.evaluate(images)) < 2:
        assert time.monotonic() < deadline
        page.wait_for_timeout(50)
    inner, width = page.evaluate(images)[1]
    assert inner == pytest.approx(width)  # a crop at full resolution
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


def test_several_pictures(new_page):
    page = new_page()
    files = [{"name": f"{n}.png", "mimeType": "image/png", "buffer": file_of(photo(90 + n, 120))} for n in range(3)]
    page.set_input_files("#file", files)
    opened(page)
    assert page.text_content("#number") == "1 of 3"
    page.keyboard.press("PageDown")
    page.wait_for_selector("#name:text('1.png')")
    opened(page)
    assert page.text_content("#about") == "120 × 91 · PNG"
    drag(page, [(50, 50), (60, 50)])
    filled(page)
    page.click("#next")
    page.wait_for_selector("#name:text('2.png')")
    assert page.is_disabled("#next")
    opened(page)
    assert parts_shown(page) == 0
    page.keyboard.press("PageUp")
    page.wait_for_selector("#name:text('1.png')")
    assert parts_shown(page) == 1
    page.expected_errors.append("400")
    page.set_input_files("#file", [{"name": "bad.png", "mimeType": "image/png", "buffer": b"no picture"}])
    page.wait_for_selector("#status[data-kind=error]")
    assert "expected a readable picture" in page.text_content("#status")
    assert page.is_visible("#start")


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
    drag(page, STROKE)
    page.wait_for_selector("#status:text('The server is busy')")
    filled(page)


def test_tokens_come_by_the_address_and_leave_it(new_page):
    with live_server(ServeOptions(token="abc.123")) as address:
        page = new_page("/?token=abc.123", address=address)
        assert page.url == f"{address}/"
        open_sample(page)
        drag(page, STROKE)
        filled(page)
        page.reload()
        page.wait_for_selector("html.ready", state="attached")


AXE = (Path(__file__).parent / "axe.min.js").read_text()


def problems(page: Any) -> list[str]:
    page.wait_for_timeout(350)  # what fades in has its colours
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
    if device == "desktop":
        page.click("#help")
        assert problems(page) == []
        page.keyboard.press("Escape")
        page.goto(page.url + "docs")
        page.wait_for_selector(".docs details")
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
