"""Files in the page: opened, refused, saved, and not lost."""

from __future__ import annotations

import io
import json
import zipfile
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lgnet_fast.pipeline.formats import EXTENSIONS
from lgnet_fast.serve.options import ServeOptions

from ..serve_support import file_of, hole, live_server, photo, pixels_of
from .support import (
    COLLECTS,
    STROKE,
    arrived,
    changed,
    download,
    drag,
    failed,
    filled,
    hold,
    named,
    open_file,
    open_sample,
    opened,
    parts_shown,
    place,
)

pytestmark = pytest.mark.page


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
    page.click("#discard [value=discard]")
    assert "expected a readable picture" in failed(page)
    assert page.is_visible("#start")


def test_files_that_are_gone_or_too_large_are_told_without_a_call(new_page, tmp_path):
    with live_server(ServeOptions(max_bytes=2**20)) as address:
        page = new_page(address=address)
        files = [tmp_path / f"{name}.png" for name in "abc"]
        for file in files:
            file.write_bytes(file_of(photo(90, 120)))
        files[1].write_bytes(bytes(2**20 + 2**19))
        page.set_input_files("#file", files)
        opened(page)
        calls = []
        page.on("request", lambda request: calls.append(request.url) if request.method == "POST" else None)
        page.keyboard.press("PageDown")
        assert failed(page) == "b.png: The file has 1.5 MiB. This server takes at most 1.0 MiB (--max-bytes)."
        assert page.text_content("#number") == "2 of 2"  # c.png took its place
        opened(page)
        page.keyboard.press("PageUp")
        page.wait_for_selector("#name:text('a.png')")
        assert len(calls) == 1

        page.set_input_files("#file", files[::2])
        opened(page)
        files[2].unlink()
        page.keyboard.press("PageDown")
        page.wait_for_selector("#status:text('c.png: The file cannot be read any more.')")
        assert page.text_content("#number") == "1 of 2"
        assert len(calls) == 2


@pytest.mark.parametrize("gone", ["before the fill", "after the fill"])
def test_fills_outlive_the_file_and_the_servers_picture(new_page, server, tmp_path, gone):
    """The page keeps a copy of a file with fills, or says that it cannot."""
    page, file = new_page(), tmp_path / "photo.png"
    page.expected_errors.append("404")
    file.write_bytes(file_of(photo(200, 300)))
    with page.expect_response(lambda response: response.url.endswith("/pictures")) as caught:
        page.set_input_files("#file", file)
    opened(page)
    identity = caught.value.json()["id"]
    if gone == "before the fill":
        file.unlink()
    drag(page, [(150, 100), (180, 100)])
    filled(page)
    if gone == "before the fill":
        assert failed(page) == (
            "The file of photo.png cannot be read any more. Save the picture: if the server closes it, its fills are "
            "lost."
        )
        assert pixels_of(download(page)[1]).shape == (200, 300, 3)
        return
    page.wait_for_selector("#status[data-kind=done]")
    page.wait_for_timeout(300)  # the file is copied
    first = pixels_of(download(page)[1])
    file.unlink()
    assert page.request.delete(f"{server}/api/v1/pictures/{identity}").status == 204
    drag(page, [(40, 40), (60, 40)])
    filled(page, 2)
    both = pixels_of(download(page)[1])
    np.testing.assert_array_equal(both[95:], first[95:])
    assert (both[:60] != first[:60]).any()


def test_all_pictures_with_fills_are_saved_as_a_zip_file(new_page):
    """Under names of their own; a picture without a fill is left out."""
    page = new_page()
    originals = [photo(96, 120, seed=seed) for seed in range(3)]
    names = ("a.png", "A.png", "b.png")
    page.set_input_files("#file", named(*((n, file_of(one)) for n, one in zip(names, originals, strict=True))))
    opened(page)
    page.click("#save-all")
    page.wait_for_selector("#status:text('No picture has a fill yet.')")
    singles = []
    for count in (1, 2):
        drag(page, [(50, 50), (60, 50)])
        filled(page, count)
        singles.append(download(page)[1])
        page.keyboard.press("PageDown")
        page.wait_for_selector(f"#name:text-is('{names[count]}')")
        opened(page)
    name, data = download(page, "#save-all")
    assert name == "filled.zip"
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == ["a_filled.png", "A_filled-2.png"]
        files = [archive.read(one) for one in archive.namelist()]
    assert files == singles
    for file, original in zip(files, originals, strict=False):
        assert (pixels_of(file) != original).any()
    assert page.text_content("#status") == "Saved as filled.zip, pictures: 2"
    open_file(page, file_of(originals[0]), "other.png")  # nothing unsaved is asked about
    assert page.text_content("#name") == "other.png"
    assert page.is_hidden("#save-all")


def test_each_picture_is_shown_where_it_was_left(new_page):
    page = new_page(init=COLLECTS)
    page.set_input_files("#file", named(("a.png", file_of(photo(200, 300))), ("b.png", file_of(photo(150, 100)))))
    opened(page)
    fitted = place(page)
    page.keyboard.press("+")
    page.keyboard.press("+")
    left = place(page)
    assert left[2] == pytest.approx(1.69 * fitted[2])
    page.keyboard.press("PageDown")
    page.wait_for_selector("#name:text('b.png')")
    opened(page)
    other = place(page)
    assert other[2] != pytest.approx(left[2])
    page.keyboard.press("PageUp")
    page.wait_for_selector("#name:text('a.png')")
    opened(page)
    assert place(page) == pytest.approx(left)
    page.keyboard.press("0")
    page.set_viewport_size({"width": 900, "height": 700})
    page.keyboard.press("PageDown")
    page.wait_for_selector("#name:text('b.png')")
    opened(page)
    assert place(page)[2] < other[2]  # it was fitted to the window, and is


def test_transparent_parts_are_shown_on_a_checkerboard(new_page):
    page = new_page()
    clear = np.dstack([photo(100, 160), np.where(hole(100, 160, (0, 100, 0, 80)), np.uint8(0), np.uint8(255))])
    open_file(page, file_of(clear))
    x, y, scale = place(page)
    box = {"x": x + 20 * scale, "y": y + 20 * scale, "width": 32, "height": 32}
    shown = pixels_of(page.screenshot(clip=box))[..., 0]
    assert np.isin(shown, (0x66, 0x9A)).mean() > 0.7  # the rest is between two squares
    assert 0.3 < (shown < 0x80).mean() < 0.7


@pytest.mark.filterwarnings("ignore:.*frames is used")
def test_frames_that_are_not_opened_are_told(new_page):
    frames = [Image.fromarray(photo(seed=seed)).quantize(64) for seed in range(3)]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    page = new_page()
    open_file(page, file.getvalue(), "moves.gif", "image/gif")
    assert page.text_content("#status") == (
        "moves.gif, 120 × 96. Only the first of its 3 frames is opened, and will be saved."
    )
    assert page.text_content("#about") == "120 × 96 · GIF · frame 1 of 3"
    open_file(page, file_of(photo()))
    assert page.text_content("#about") == "120 × 96 · PNG"


def test_a_file_that_is_no_picture_is_passed_over(new_page):
    page = new_page(init=COLLECTS)
    page.expected_errors.append("400")
    good = file_of(photo(90, 120))
    page.set_input_files("#file", named(("a.png", b"broken"), ("b.png", b"broken"), ("c.png", good)))
    assert "expected a readable picture" in failed(page)
    page.wait_for_selector("#status:text('a.png: ')")
    assert page.is_visible("#dock")
    assert page.text_content("#name") == "c.png"
    assert page.text_content("#about") == "120 × 90 · PNG"
    assert page.is_hidden("#strip")

    page.set_input_files("#file", named(("a.png", good), ("b.png", b"broken")))
    page.wait_for_selector("#name:text('a.png')")
    opened(page)
    drag(page, [(50, 50), (60, 50)])
    page.keyboard.press("PageDown")
    assert failed(page).startswith("b.png: ")
    assert page.text_content("#name") == "a.png"
    assert page.evaluate("() => Konva.stages[0].getLayers()[2].visible()")
    assert page.is_enabled("#fill")


def test_a_picture_that_comes_at_a_bad_time_stays_in_the_list(new_page):
    page = new_page()
    page.expected_errors.append("500")
    good = file_of(photo(90, 120))
    page.set_input_files("#file", named(("a.png", good), ("b.png", good)))
    opened(page)
    page.route("**/api/v1/pictures", lambda route: route.fulfill(status=500, body=json.dumps({"detail": "broke"})))
    page.keyboard.press("PageDown")
    assert failed(page) == "b.png: broke"
    assert page.text_content("#number") == "1 of 2"
    page.unroute("**/api/v1/pictures")
    page.keyboard.press("PageDown")
    page.wait_for_selector("#about:text('120 × 90')")
    page.wait_for_selector("#number:text('2 of 2')")
    opened(page)


def asks_before_leaving(page: Any) -> bool:
    return page.evaluate("() => !dispatchEvent(new Event('beforeunload', { cancelable: true }))")


def test_unsaved_work_is_not_dropped_without_a_question(new_page):
    page = new_page(init=COLLECTS)
    open_sample(page)
    page.click("#home")  # nothing was done
    page.wait_for_selector("#start", state="visible")
    open_sample(page)
    drag(page, STROKE)
    page.click("#home")
    page.wait_for_selector("#discard[open]")
    assert page.text_content("#discard-text") == "Fills and strokes would be lost: chelsea.png"
    assert page.evaluate("() => document.activeElement.value") == "keep"
    page.keyboard.press("Escape")
    page.wait_for_selector("#discard", state="hidden")
    page.click("#fill")
    filled(page)
    other = named(("other.png", file_of(photo(90, 120))))
    page.set_input_files("#file", other)
    page.click("#discard [value=keep]")
    assert page.text_content("#name") == "chelsea.png"
    assert parts_shown(page) == 1
    page.set_input_files("#file", other)
    page.click("#discard [value=discard]")
    page.wait_for_selector("#name:text('other.png')")


def test_a_file_that_comes_before_the_close_event_of_the_question(new_page):
    page = new_page(init=COLLECTS)
    open_sample(page)
    drag(page, STROKE)
    # The answer and the next file in one task: the event of the answer comes after both.
    page.evaluate(
        """async (bytes) => {
          const give = (name) => {
            const files = new DataTransfer();
            files.items.add(new File([new Uint8Array(bytes)], name, { type: "image/png" }));
            const input = document.querySelector("#file");
            input.files = files.files;
            input.dispatchEvent(new Event("change"));
          };
          const frame = () => new Promise(requestAnimationFrame);
          const dialog = document.querySelector("#discard");
          give("first.png");
          while (!dialog.open) await frame();
          dialog.querySelector("[value=keep]").click();
          give("second.png");
        }""",
        list(file_of(photo(90, 120))),
    )
    page.click("#discard [value=discard]")
    page.wait_for_selector("#name:text('second.png')")


def test_leaving_asks_while_a_file_lacks_what_is_shown(new_page):
    page = new_page(init=COLLECTS)
    open_sample(page)
    assert not asks_before_leaving(page)
    drag(page, STROKE)
    assert asks_before_leaving(page)
    page.keyboard.press("Enter")
    filled(page)
    download(page)
    page.wait_for_selector("#status:text('Saved as')")
    assert not asks_before_leaving(page)
    # Another fill in the place of the saved one.
    page.keyboard.press("Control+z")
    drag(page, STROKE)
    page.keyboard.press("Enter")
    filled(page, 2)
    assert asks_before_leaving(page)
    # A fill that ends while the file is made is not in it.
    held = hold(page, "**/result?*")
    page.keyboard.press("Control+s")
    arrived(page, held)
    drag(page, [(300, 200), (330, 200)])
    page.keyboard.press("Enter")
    filled(page, 3)
    with page.expect_download():
        held[0].fallback()
    page.wait_for_selector("#status:text('Saved as')")
    assert asks_before_leaving(page)


def test_a_fill_goes_on_while_another_picture_is_shown(new_page):
    page = new_page()
    page.set_input_files("#file", named(("a.png", file_of(photo(90, 120))), ("b.png", file_of(photo(80, 110)))))
    opened(page)
    held = hold(page, "**/fill?*")
    drag(page, [(50, 50), (60, 50)])
    arrived(page, held)
    page.wait_for_selector("body.filling")
    page.keyboard.press("PageDown")
    page.wait_for_selector("#about:text('110 × 80')")
    opened(page)
    assert page.is_disabled("#undo")
    held[0].fallback()
    filled(page)
    assert parts_shown(page) == 0
    page.keyboard.press("PageUp")
    page.wait_for_selector("#about:text('120 × 90')")
    assert parts_shown(page) == 1
    assert page.is_enabled("#undo")


def test_all_that_the_server_reads_is_opened_and_the_rest_is_named(new_page):
    page = new_page()
    assert page.get_attribute("#file", "accept") == ",".join(["image/*", *EXTENSIONS])
    unknown = "application/octet-stream"
    others = [{"name": f"{n}.pdf", "mimeType": "application/pdf", "buffer": b"%PDF"} for n in range(5)]
    page.set_input_files("#file", others)
    assert failed(page) == "Skipped, no pictures: 0.pdf, 1.pdf, 2.pdf and 2 more"
    assert page.is_visible("#start")
    data = file_of(photo(90, 120), "JPEG2000", no_jp2=True)
    page.set_input_files("#file", [{"name": "photo.J2K", "mimeType": unknown, "buffer": data}, others[0]])
    page.wait_for_selector("#status:text('Skipped, no pictures: 0.pdf')")
    assert page.text_content("#name") == "photo.J2K"
    assert page.text_content("#about").startswith("120 × 90")


@pytest.mark.parametrize(
    ("name", "format", "saved"),
    [
        ("photo.JPEG", "JPEG", "photo_filled.JPEG"),
        ("photo.jpg", "WEBP", "photo_filled.webp"),  # as many web sites name it
        ("photo.jpg", "PNG", "photo_filled.png"),
        ("my.photo.tiff", "TIFF", "my.photo_filled.tiff"),
        ("grey.pgm", "PPM", "grey_filled.pgm"),
        ("photo", "PNG", "photo_filled.png"),
    ],
)
def test_the_saved_name_has_an_extension_of_its_format(new_page, name, format, saved):
    page = new_page()
    open_file(page, file_of(photo()[..., 0] if format == "PPM" else photo(), format), name)
    found, data = download(page)
    assert found == saved
    assert Image.open(io.BytesIO(data)).format == format


def test_copying_says_where_it_is_allowed(new_page):
    page = new_page(init="Object.defineProperty(navigator, 'clipboard', { value: undefined });")
    open_sample(page)
    page.keyboard.press("Control+c")
    assert failed(page) == "Browsers copy on https or localhost only. Save the picture instead."


def test_stored_settings_that_are_unknown_are_not_used(new_page):
    stored = {"strategy": "old", "tool": "wand", "format": "pcx", "size": 9000, "colour": "red", "feather": 7}
    page = new_page(init=f"try {{ localStorage.setItem('lgnet-settings', '{json.dumps(stored)}'); }} catch {{}}")
    open_sample(page)
    assert page.get_attribute("button[data-tool=brush]", "aria-checked") == "true"
    assert page.input_value("#colour") == "#ff5c7a"
    assert page.input_value("#format") == ""
    with page.expect_request("**/fill?*") as caught:
        drag(page, STROKE)
    assert "strategy=auto&dilate=4&feather=7" in caught.value.url
    filled(page)


def test_a_browser_that_stores_nothing(new_page):
    blocked = """
      for (const name of ["localStorage", "sessionStorage"]) {
        Object.defineProperty(window, name, { get() { throw Error(name); } });
      }
    """
    with live_server(ServeOptions(token="abc.123")) as address:
        page = new_page("/?token=abc.123", init=blocked, address=address)
        open_sample(page)
        drag(page, STROKE)
        filled(page)


def test_the_thinnest_brush_paints(new_page):
    page = new_page()
    page.set_input_files("#file", named(("tiny.png", file_of(photo(16, 16)))))
    opened(page)
    drag(page, [(8, 8)])  # where four pixels meet
    filled(page)
    left, top, right, bottom = changed(pixels_of(download(page)[1]), photo(16, 16))
    assert left < 8 < right
    assert top < 8 < bottom


GIVE = """([kind, names, bytes]) => {
  const data = new DataTransfer();
  for (const name of names) {
    data.items.add(new File([new Uint8Array(bytes)], name, { type: name.endsWith(".png") ? "image/png" : "" }));
  }
  const options = { bubbles: true, cancelable: true };
  document.querySelector("#stage").dispatchEvent(
    kind === "paste"
      ? new ClipboardEvent("paste", { clipboardData: data, ...options })
      : new DragEvent(kind, { dataTransfer: data, ...options }),
  );
}"""


def test_pictures_and_masks_are_pasted_and_dropped(new_page):
    page = new_page(init=COLLECTS)
    data = list(file_of(photo(90, 120)))
    page.evaluate(GIVE, ["paste", ["image.png"], data])
    page.wait_for_selector("#name:text('image.png')")
    opened(page)
    page.evaluate(GIVE, ["dragenter", ["a.png"], data])
    page.wait_for_selector("#drop", state="visible")
    page.evaluate(GIVE, ["dragleave", ["a.png"], data])
    page.wait_for_selector("#drop", state="hidden")
    page.evaluate(GIVE, ["drop", ["b.png", "a.png", "notes.txt", ".hidden"], data])
    page.wait_for_selector("#status:text('Skipped, no pictures: notes.txt')")
    assert page.text_content("#name") == "b.png"
    assert page.text_content("#number") == "1 of 2"
    page.evaluate(GIVE, ["drop", [], data])
    assert failed(page).startswith("No file was dropped.")
    page.evaluate(GIVE, ["drop", ["my_mask.png"], list(file_of(hole(90, 120)))])
    page.wait_for_selector("#fill:enabled")
    assert page.text_content("#name") == "b.png"
    page.focus("#settings")
    page.keyboard.press("Enter")
    page.focus("#rectangle-x")
    page.evaluate(GIVE.replace("#stage", "#rectangle-x"), ["paste", ["c.png"], data])
    assert page.text_content("#name") == "b.png"  # a field takes what is pasted into it
    page.focus("#dilate")
    page.evaluate(GIVE.replace("#stage", "#dilate"), ["paste", ["c.png"], data])
    page.click("#discard [value=discard]")
    page.wait_for_selector("#name:text('c.png')")  # a slider does not


def test_a_folder_is_dropped(new_page, tmp_path):
    """With the folders in it, in the order of the names."""
    (tmp_path / "photos" / "inner").mkdir(parents=True)
    for name in ("10.png", "9.png", ".hidden", "inner/1.png"):
        (tmp_path / "photos" / name).write_bytes(file_of(photo(90, 120)))
    page = new_page()
    session = page.context.new_cdp_session(page)
    dragged = {"items": [], "files": [str(tmp_path / "photos")], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
        session.send("Input.dispatchDragEvent", {"type": kind, "x": 600, "y": 400, "data": dragged})
    page.wait_for_selector("#number:text('1 of 3')")
    opened(page)
    names = [page.text_content("#name")]
    for _ in range(2):
        page.keyboard.press("PageDown")
        opened(page)
        names.append(page.text_content("#name"))
    assert names == ["1.png", "9.png", "10.png"]
