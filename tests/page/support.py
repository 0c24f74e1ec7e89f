"""Opening, painting, waiting and downloading in the page, for its tests."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lgnet_fast.samples import sample_paths

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

# Strokes are collected until Enter.
COLLECTS = """try { localStorage.setItem("lgnet-settings", '{"auto": false}'); } catch { /* no page yet */ }"""


def open_sample(page: Any, name: str = "chelsea") -> None:
    page.click(f"[aria-label='Open the sample {name}']")
    opened(page)


def opened(page: Any) -> None:
    page.wait_for_selector("body.editing")
    page.wait_for_selector("#status:not([data-kind=busy])")


def named(*files: tuple[str, bytes]) -> list[dict[str, Any]]:
    """PNG files for `set_input_files`."""
    return [{"name": name, "mimeType": "image/png", "buffer": data} for name, data in files]


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
    deadline = time.monotonic() + 120
    while page.evaluate("() => performance.getEntriesByName('lgnet-fill').length") < count:
        assert time.monotonic() < deadline, page.text_content("#status")
        page.wait_for_timeout(30)


def hold(page: Any, pattern: str) -> list[Any]:
    """The requests of an address, which wait until the test answers them."""
    held: list[Any] = []
    page.route(pattern, lambda route: held.append(route))
    return held


def arrived(page: Any, held: list[Any], count: int = 1) -> None:
    """Waits for so many of them: the page shows that it is busy before a request comes."""
    for _ in range(6000):
        if len(held) >= count:
            return
        page.wait_for_timeout(20)
    raise AssertionError(f"{len(held)} requests came, not {count}")


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


def failed(page: Any) -> str:
    """The text of an error, when it is shown."""
    page.wait_for_selector("#status[data-kind=error]")
    return page.text_content("#status")


STROKE = [(150, 100), (170, 110), (200, 110)]
REACH = 60  # pixels from the stroke that may change: half the brush, dilate, feather


def assert_only_near_the_stroke(result: np.ndarray, original: np.ndarray) -> None:
    assert result.shape == original.shape
    left, top, right, bottom = changed(result, original)
    assert 150 - REACH < left < 150 < 200 < right < 200 + REACH
    assert 100 - REACH < top < 100 < 110 < bottom < 110 + REACH
