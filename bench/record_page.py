"""The pictures of the page in docs/: serve.webp, a short recording, and serve.jpg, one view.

python -m bench.record_page docs

A date stamp and two scratches are drawn on a sample photo, then painted over on the page. Chromium and Playwright as
`make test-page` installs them.
"""

from __future__ import annotations

import io
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from lgnet_fast.samples import sample_paths
from tests.page.conftest import BROWSERS, FLAGS
from tests.serve_support import Server

WINDOW, SHOWN = (1100, 720), (825, 540)
STROKES = [
    [(314, 268), (350, 270), (390, 268), (440, 270)],
    [(58, 36), (90, 60), (130, 80), (172, 114)],
    [(300, 14), (309, 60), (318, 92), (332, 136)],
]
PLACE = "() => { const l = Konva.stages[0].getLayers()[0]; return [l.x(), l.y(), l.scaleX()]; }"
FILLS = "() => performance.getEntriesByName('lgnet-fill').length"


def damaged_photo() -> Image.Image:
    """The sample with a date stamp and two scratches."""
    photo = Image.open(sample_paths()["chelsea"][0]).convert("RGB")
    draw = ImageDraw.Draw(photo)
    draw.text((316, 258), "26 11 '26  14:07", fill=(255, 140, 40), font=ImageFont.load_default(16))
    draw.line([(60, 38), (90, 60), (130, 80), (170, 112)], fill=(245, 245, 240), width=2)
    draw.line([(300, 16), (309, 60), (318, 92), (331, 134)], fill=(240, 240, 238), width=2)
    return photo


def record(page: Any, frames: list[tuple[Image.Image, int]]) -> None:
    """Paints every stroke; a frame is a view and the milliseconds that it is shown."""

    def keep(milliseconds: int) -> None:
        frames.append((Image.open(io.BytesIO(page.screenshot())).convert("RGB"), milliseconds))

    x, y, scale = page.evaluate(PLACE)
    page.keyboard.press("[")
    for number, points in enumerate(STROKES):
        if number == 1:  # a scratch takes a thin brush
            for _ in range(5):
                page.keyboard.press("[")
        for position, (across, down) in enumerate(points):
            page.mouse.move(x + across * scale, y + down * scale, steps=6)
            if position == 0:
                page.mouse.down()
            keep(500 if position == 0 else 90)
        page.mouse.up()
        while page.evaluate(FILLS) <= number:
            page.wait_for_timeout(20)
        page.wait_for_timeout(250)
        keep(1000)
    page.keyboard.down("b")
    page.wait_for_timeout(150)
    keep(1000)
    page.keyboard.up("b")
    page.wait_for_timeout(150)
    keep(1400)


def main() -> None:
    """Writes both files to the folder of the first argument."""
    from playwright.sync_api import sync_playwright

    folder = Path(sys.argv[1])
    browser_path = next(filter(None, map(shutil.which, BROWSERS)))
    server = Server()
    frames: list[tuple[Image.Image, int]] = []
    with sync_playwright() as driver, tempfile.TemporaryDirectory() as temporary:
        browser = driver.chromium.launch(executable_path=browser_path, args=FLAGS)
        size: Any = {"width": WINDOW[0], "height": WINDOW[1]}
        page = browser.new_context(viewport=size, color_scheme="dark").new_page()
        page.goto(server.address)
        page.wait_for_selector("html.ready", state="attached")
        damaged_photo().save(Path(temporary) / "photo.png")
        page.set_input_files("#file", Path(temporary) / "photo.png")
        page.wait_for_selector("body.editing")
        page.wait_for_selector("#status:not([data-kind=busy])")
        page.wait_for_timeout(600)
        record(page, frames)
        page.mouse.move(720, 640)
        page.click("#settings")
        page.wait_for_timeout(600)
        view = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
        browser.close()
    server.end()
    view.save(folder / "serve.jpg", quality=84)
    small = [frame.resize(SHOWN, Image.Resampling.LANCZOS) for frame, _ in frames]
    durations = [milliseconds for _, milliseconds in frames]
    small[0].save(
        folder / "serve.webp", save_all=True, append_images=small[1:], duration=durations, loop=0, quality=60
    )


if __name__ == "__main__":
    main()
