"""Measures the bundled model for docs/evaluation.md: rewrites its tables, the contact sheet beside it, and the
README's picture.

python -m bench.evaluation_page --kodak DIR --lpips FILE       # or: make evaluation KODAK=DIR LPIPS=FILE
"""

from __future__ import annotations

import argparse
import hashlib
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from bench.timing import ROOT
from lgnet_fast import weights
from lgnet_fast.errors import LGNetError
from lgnet_fast.evaluation import Evaluation, EvaluationOptions, evaluate
from lgnet_fast.pipeline import Inpainter
from lgnet_fast.pipeline.formats import EXTENSIONS
from lgnet_fast.samples import sample_paths

SAMPLES = {
    "astronaut.png": "NASA, public domain",
    "brick.png": "CC0 Textures, CC0 1.0",
    "camera.png": "Lav Varshney, CC0 1.0",
    "chelsea.png": "Stéfan van der Walt, CC0 1.0",
    "clock_motion.png": "Stéfan van der Walt, public domain",
    "coffee.png": "Rachel Michetti, courtesy of Pikolo Espresso Bar, CC0 1.0",
    "grass.png": "linolafett, CC0 1.0",
    "gravel.png": "CC0 Textures, CC0 1.0",
    "hubble_deep_field.jpg": "NASA, public domain",
    "retina.jpg": "Mikael Häggström, CC0 1.0",
    "rocket.jpg": "SpaceX, public domain",
}
"""The photographs in scikit-image's package that it declares as CC0 or public domain: authors, and names."""


def kodak(source: Path, folder: Path) -> None:
    """Copy the Kodak set to `folder` in the order of its numbers, because drawn masks depend on the order of files.

    Raises LGNetError: not 24 pictures numbered from 1 to 24.
    """
    numbered = []
    for file in sorted(source.glob("*")):
        digits = re.search(r"(\d+)$", file.stem)
        if digits and file.suffix.lower() in EXTENSIONS:
            numbered.append((int(digits[1]), file))
    if sorted(number for number, _ in numbered) != list(range(1, 25)):
        raise LGNetError(
            f"--kodak: expected 24 pictures numbered from 1 to 24 in {str(source)!r}, got {len(numbered)}"
        )
    for number, file in numbered:
        shutil.copy(file, folder / f"kodim{number:02d}{file.suffix}")


def samples(folder: Path) -> None:
    """Copies :data:`SAMPLES` to `folder`. Raises LGNetError: the installed scikit-image lacks one."""
    import skimage.data

    assert skimage.data.__file__ is not None
    for name in SAMPLES:
        file = Path(skimage.data.__file__).with_name(name)
        if not file.is_file():
            raise LGNetError(f"scikit-image: expected {name} among its data, got {str(file.parent)!r} without it")
        shutil.copy(file, folder / name)


def before_and_after(pipe: Inpainter, file: Path) -> None:
    """Write the demo's pictures, their holes in white, and below each its fill, all scaled to one height."""
    height, gap = 230, 6  # pixels
    columns = []
    for picture_path, mask_path in sample_paths().values():
        fill = pipe(picture_path, mask_path)
        holes = Image.open(picture_path).convert("RGB")
        holes.paste("white", mask=Image.open(mask_path).convert("L"))
        size = round(height * fill.width / fill.height), height
        columns.append([picture.resize(size, Image.Resampling.LANCZOS) for picture in (holes, fill)])
    width = sum(above.width + gap for above, _ in columns) - gap
    drawn, x = Image.new("RGB", (width, 2 * height + gap), "white"), 0
    for above, below in columns:
        drawn.paste(above, (x, 0))
        drawn.paste(below, (x, height + gap))
        x += above.width + gap
    drawn.save(file, quality=88, optimize=True)


def filled_in(page: str, name: str, text: str) -> str:
    """`page` with `text` between ``<!-- name -->`` and ``<!-- end -->``. Raises LGNetError: no such place."""
    place = re.compile(rf"(?<=<!-- {name} -->\n).*?(?=<!-- end -->)", re.DOTALL)
    if not place.search(page):
        raise LGNetError(f"page: expected a line <!-- {name} --> and after it <!-- end -->")
    return place.sub(lambda _: text, page, count=1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Rewrites the page; without ``--kodak`` only the part of scikit-image's samples."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kodak", type=Path, metavar="DIR", help="the 24 pictures of the Kodak set")
    parser.add_argument(
        "--lpips", type=Path, metavar="FILE", required=True, help="AlexNet's weights with the heads of LPIPS"
    )
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "evaluation.md")
    options = parser.parse_args(arguments)
    page = options.page.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as temporary:
        sets = {"samples": samples}
        if options.kodak is not None:
            sets["kodak"] = lambda folder: kodak(options.kodak, folder)
        for name, fetch in sets.items():
            folder, out = Path(temporary, name), Path(temporary, f"{name} out")
            folder.mkdir()
            fetch(folder)
            result = evaluate(
                EvaluationOptions(folder, suite=True, models={"LGNet": None}, out=out, lpips=options.lpips)
            )
            assert isinstance(result, Evaluation)
            page = filled_in(page, name, result.markdown())
            if name == "samples":
                sheet = options.page.with_name("evaluation_samples.jpg")
                Image.open(out / "evaluation.png").save(sheet, quality=80, optimize=True)
    licences = "".join(f"| `{name}` | {licence} |\n" for name, licence in SAMPLES.items())
    page = filled_in(page, "licences", "| file | by, licence |\n|---|---|\n" + licences)
    file = weights.bundled_path() / "model.safetensors"
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    page = filled_in(page, "weights", f"Weights measured: `{weights.BUNDLED}`, SHA-256 `{digest[:16]}…`.\n")
    options.page.write_text(page, encoding="utf-8")
    before_and_after(Inpainter.from_pretrained(None, device="cpu"), options.page.with_name("demo.jpg"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
