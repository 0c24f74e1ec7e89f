"""docs/evaluation.md is rewritten in its marked places, from the pictures that its text names."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bench import evaluation_page, write_tables
from lgnet_fast.errors import LGNetError

from .test_features import weights

PAGE = Path(__file__).resolve().parents[1] / "docs" / "evaluation.md"


def test_the_page_is_rewritten_in_its_places_only(fake, tmp_path, monkeypatch):
    np.savez(tmp_path / "lpips.npz", **weights("alexnet"))
    monkeypatch.setattr(evaluation_page, "SAMPLES", {"a.png": "somebody, CC0"})
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    monkeypatch.setattr(evaluation_page, "samples", lambda folder: Image.fromarray(picture).save(folder / "a.png"))
    before = PAGE.read_text(encoding="utf-8")
    (tmp_path / "evaluation.md").write_text(before, encoding="utf-8")
    arguments = ["--page", str(tmp_path / "evaluation.md"), "--lpips", str(tmp_path / "lpips.npz")]
    assert evaluation_page.main(arguments) == 0
    after = (tmp_path / "evaluation.md").read_text(encoding="utf-8")
    places = re.compile(r"<!-- (samples|kodak|licences|weights) -->\n(.*?)<!-- end -->", re.DOTALL)
    assert places.sub("", after) == places.sub("", before)
    old, new = (dict(places.findall(text)) for text in (before, after))
    assert new["kodak"] == old["kodak"]  # no --kodak given
    assert [line.split("|")[2].strip() for line in new["samples"].splitlines()[2:6]] == [
        "LGNet", "Telea", "Navier-Stokes", "biharmonic"
    ]  # fmt: skip
    assert "n/a" not in new["samples"]
    assert "| `a.png` | somebody, CC0 |" in new["licences"]
    assert re.search(r"SHA-256 `[0-9a-f]{16}…`", new["weights"])
    with Image.open(tmp_path / "evaluation_samples.jpg") as sheet:
        assert sheet.size == (6 * 198 + 6, 22 + 4 * 214 + 6)  # a single picture is best and worst of each kind
    # Three samples of 512x512, 451x300 and 600x400: a row with white holes, and their fills.
    with Image.open(tmp_path / "demo.jpg") as drawn:
        assert drawn.size == (230 + 346 + 345 + 12, 2 * 230 + 6)
        white = np.asarray(drawn).min(axis=2) > 250
    assert white[:230, 588:].mean() > 0.02  # the spoon of the third one
    assert white[236:, 588:].mean() < 0.001


def test_kodak_is_taken_in_the_order_of_its_numbers(tmp_path):
    source, folder = tmp_path / "kodak", tmp_path / "copy"
    source.mkdir()
    folder.mkdir()
    for number in range(1, 25):
        (source / f"{number}.png").write_bytes(bytes([number]))
    evaluation_page.kodak(source, folder)
    assert [file.read_bytes()[0] for file in sorted(folder.iterdir())] == list(range(1, 25))
    (source / "07.jpg").write_bytes(b"")  # which of the two is of the set is not known
    with pytest.raises(LGNetError, match="24 pictures numbered from 1 to 24.*got 25"):
        evaluation_page.kodak(source, folder)
    (source / "07.jpg").unlink()
    (source / "7.png").unlink()
    with pytest.raises(LGNetError, match="24 pictures numbered from 1 to 24.*got 23"):
        evaluation_page.kodak(source, folder)


def test_scikit_image_has_the_samples(tmp_path):
    pytest.importorskip("skimage")
    evaluation_page.samples(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == set(evaluation_page.SAMPLES)


@pytest.mark.parametrize("script", [evaluation_page, write_tables])
def test_help_is_the_whole_text(script, capsys):
    with pytest.raises(SystemExit) as ended:
        script.main(["--help"])
    assert ended.value.code == 0
    assert script.__doc__.strip() in capsys.readouterr().out
