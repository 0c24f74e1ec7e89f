"""`lgnet-fast demo`: the bundled model fills the bundled pictures, with one contact sheet per picture."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from .pipeline import Inpainter
from .pipeline.encoding import save_picture
from .samples import sample_paths

_MARGIN, _CAPTION, _WIDTH = 8, 26, 320


class DemoResult(NamedTuple):
    """Files of one sample, its picture's size (width, height), and the seconds one call took."""

    name: str
    size: tuple[int, int]
    result: Path
    sheet: Path
    seconds: float


def contact_sheet(panels: dict[str, Image.Image]) -> Image.Image:
    """Captioned pictures of one size side by side, each scaled to 320 pixels in width."""
    first = next(iter(panels.values()))
    height = round(first.height * _WIDTH / first.width)
    sheet = Image.new("RGB", ((_WIDTH + _MARGIN) * len(panels) + _MARGIN, height + _CAPTION + _MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (caption, picture) in enumerate(panels.items()):
        x = _MARGIN + i * (_WIDTH + _MARGIN)
        draw.text((x, 5), caption, fill="black", font=ImageFont.load_default(15))
        sheet.paste(picture.convert("RGB").resize((_WIDTH, height), Image.Resampling.LANCZOS), (x, _CAPTION))
    return sheet


def run_demo(out: Path, pipe: Inpainter) -> Iterator[DemoResult]:
    """Fill every sample with `pipe`; write ``<name>.png`` and ``<name>_sheet.png`` to `out`, a folder, atomically."""
    for name, (picture_path, mask_path) in sample_paths().items():
        start = time.perf_counter()
        result = pipe(picture_path, mask_path)
        seconds = time.perf_counter() - start
        save_picture(result, out / f"{name}.png")
        stages = pipe.stages(picture_path, mask_path)
        merged = zip(("coarse", "local", "result"), stages.merged, strict=True)
        sheet = contact_sheet({"input": Image.open(picture_path), "hole": stages.masked, **dict(merged)})
        save_picture(sheet, out / f"{name}_sheet.png")
        yield DemoResult(name, result.size, out / f"{name}.png", out / f"{name}_sheet.png", seconds)
