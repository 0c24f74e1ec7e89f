"""`lgnet_fast.evaluation`: baselines, masks and their classes, scores, processes, resumption, bad pictures."""

from __future__ import annotations

import io
import json
import os
import re
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from lgnet_fast.data import metrics as metrics_module
from lgnet_fast.data.masks import HOLE_CLASSES, MaskFolder, generate_mask, hole_ratio
from lgnet_fast.errors import UsageError
from lgnet_fast.evaluation import EvaluationOptions, biharmonic, navier_stokes, parse_classes, scoring, telea
from lgnet_fast.evaluation.frechet import frechet_distance
from lgnet_fast.evaluation.protocol import FolderMasks, fit_mask, fit_picture
from lgnet_fast.jobs.world import World
from lgnet_fast.pipeline import Inpainter

from .evaluation_support import invoke_eval, write_waves
from .pipeline_support import ConstantFill, box_mask, evaluate, noise


@pytest.fixture
def pictures(tmp_path) -> Path:
    return write_waves(tmp_path / "pictures")


# -- baselines, pictures and masks ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [telea, navier_stokes, biharmonic])
def test_baselines_keep_known_pixels_and_never_look_under_the_hole(method):
    hole = box_mask(40, 50, (10, 15, 25, 40))
    flat = np.full((40, 50, 3), (10, 200, 90), np.uint8)
    spoilt = np.where(hole[..., None], noise(40, 50), flat).astype(np.uint8)
    np.testing.assert_allclose(method(spoilt, hole).astype(int), flat, atol=3)  # OpenCV 5 rounds Telea's gradients
    np.testing.assert_array_equal(method(spoilt, hole), method(flat, hole))
    picture = noise(40, 50)
    filled = method(picture, hole)
    np.testing.assert_array_equal(filled[~hole], picture[~hole])
    assert (filled[hole] != picture[hole]).mean() > 0.9


@pytest.mark.parametrize("method", [telea, navier_stokes, biharmonic])
def test_baselines_refuse_what_is_no_8_bit_colour_picture_with_its_hole(method):
    hole = box_mask(40, 40, (10, 15, 25, 40))
    for wrong, got in (noise(40, 40) / 255, "float64 [40, 40, 3]"), (noise(40, 40)[..., 0], "uint8 [40, 40]"):
        with pytest.raises(ValueError, match=re.escape(f"picture: expected uint8 [H, W, 3], got {got}")):
            method(wrong, hole)
    with pytest.raises(ValueError, match=re.escape("hole: expected [40, 50] to fit the picture, got [40, 40]")):
        method(noise(40, 50), hole)


@pytest.mark.parametrize(("height", "width"), [(60, 90), (90, 60), (32, 32), (20, 31)])
def test_a_picture_and_its_mask_are_scaled_and_cropped_alike(tmp_path, height, width):
    square = box_mask(height, width, (height // 4, width // 4, 3 * height // 4, 3 * width // 4))
    Image.fromarray(square.astype(np.uint8) * 255).save(tmp_path / "grey.png")
    picture = fit_picture(tmp_path / "grey.png", 32)
    assert picture.shape == (32, 32, 3)
    mask = fit_mask(square, 32)
    assert mask.shape == (32, 32)
    np.testing.assert_array_equal(picture[..., 0] > 127, mask)
    assert fit_picture(tmp_path / "grey.png", 0).shape == (height, width, 3)


@pytest.mark.parametrize("size", [(40_000, 3), (3, 40_000)])
def test_a_narrow_picture_costs_what_is_evaluated(tmp_path, size, monkeypatch):
    """Only the part that stays is scaled: the whole would be 3.4 million pixels long."""
    made = []
    resize = Image.Image.resize
    monkeypatch.setattr(
        Image.Image, "resize", lambda self, *given, **named: made.append(given[0]) or resize(self, *given, **named)
    )
    ramp = np.linspace(0, 255, max(size)).astype(np.uint8)
    levels = np.broadcast_to(ramp if size[0] > size[1] else ramp[:, None], size[::-1])
    Image.fromarray(np.ascontiguousarray(levels)).save(tmp_path / "strip.png")
    picture = fit_picture(tmp_path / "strip.png", 256)
    assert made == [(256, 256)]
    assert picture.shape == (256, 256, 3)
    assert np.abs(picture.astype(int) - 127).max() <= 1  # the middle three pixels
    second_half = np.arange(max(size)) >= max(size) // 2
    mask = fit_mask(np.broadcast_to(second_half if size[0] > size[1] else second_half[:, None], size[::-1]), 256)
    assert mask.shape == (256, 256)
    assert 0.3 < mask.mean() < 0.7


def test_masks_of_a_folder_are_dealt_by_their_measured_class(tmp_path):
    for index in range(12):
        mask = generate_mask(40, 40, hole_class=1 + index % 2, kind="boxes", seed=index)
        Image.fromarray(mask.astype(np.uint8) * 255).save(tmp_path / f"{index}.png")
    source = FolderMasks(MaskFolder(tmp_path), None, seed=5)
    assert source.classes == (1, 2)
    for one in source.classes:
        dealt = [source.identity(index, one)[0] for index in range(6)]
        assert len(set(dealt)) == 6
        assert [source.identity(index, one)[0] for index in range(6, 12)] == dealt
        assert dealt == [FolderMasks(MaskFolder(tmp_path), (1, 2), 5).identity(index, one)[0] for index in range(6)]
        assert dealt != [FolderMasks(MaskFolder(tmp_path), (1, 2), 6).identity(index, one)[0] for index in range(6)]
        low, high = HOLE_CLASSES[one]
        assert all(low < hole_ratio(source.mask(index, one, 40, 40)) <= high for index in range(6))
        assert source.mask(0, one, 64, 80).shape == (64, 80)
    with pytest.raises(UsageError, match="50-60%, got none"):
        FolderMasks(MaskFolder(tmp_path), (5,), 0)


def test_a_mask_that_scaling_empties_is_told(tmp_path, pictures):
    """Its score would be that of a perfect fill: l1 0, and an infinite PSNR of the whole class."""
    folder = tmp_path / "masks"
    folder.mkdir()
    rows = np.zeros((128, 128), bool)
    rows[::4] = True  # a quarter of the picture; at half the size only odd rows are sampled
    Image.fromarray(rows).save(folder / "lines.png")
    result = evaluate(pictures, masks=folder, size=64, models=[], baselines=["ns"], metrics=["l1", "psnr"])
    assert result.scores == []
    expected = f"mask {str(folder / 'lines.png')!r}: no hole pixel at 64x64"
    assert [one["error"] for one in result.failures] == [expected] * 5


@pytest.mark.parametrize("options", [{}, {"pair_by_name": True}])
def test_pictures_are_no_masks(pictures, tmp_path, options):
    """Their bright parts would be the holes."""
    expected = f"^masks: expected masks, got {str(pictures / '0.png')!r}, which is one of the pictures$"
    with pytest.raises(UsageError, match=expected):
        evaluate(pictures, masks=pictures, **options)
    with pytest.raises(UsageError, match=expected):  # the folder of pictures lies in that of the masks
        evaluate(pictures, masks=tmp_path, **options)


def test_the_sheet_of_an_earlier_evaluation_is_no_mask(pictures, tmp_path):
    masks = tmp_path / "masks"
    masks.mkdir()
    for index, path in enumerate(sorted(pictures.iterdir())):
        height, width = Image.open(path).size[::-1]
        Image.fromarray(box_mask(height, width, (0, 0, height // 4, width))).save(masks / f"{index}.png")
    options = {"masks": masks, "size": 0, "models": [], "baselines": ["ns"], "metrics": ["l1"]}
    with pytest.raises(UsageError, match=r"^out: expected another folder .* evaluation.png, got '.*out'"):
        evaluate(pictures, out=masks / "results" / "out", **options)
    for _ in range(2):  # by name no other file is a mask
        result = evaluate(pictures, out=masks / "results", pair_by_name=True, **options)
        assert [(score.hole_class, score.pictures) for score in result.scores] == [("20-30%", 5)]


def test_class_names():
    assert parse_classes(None) is None
    assert parse_classes("1, 2") == parse_classes("10-20,20-30%") == parse_classes([1, "20-30"]) == (1, 2)
    assert parse_classes("0,1-10") == (0,)
    for bad in ("6", "-1", "10-30", "", "two", []):
        with pytest.raises(UsageError, match="^classes"):
            parse_classes(bad)


# -- evaluate ------------------------------------------------------------------------------------------------------


def test_scores_of_a_network_with_a_known_answer(pictures):
    """A network that paints the hole in one colour: every mean follows from the pictures and masks alone."""
    pipe = Inpainter(ConstantFill(0.0, 0.5, -1.0))
    result = evaluate(
        pictures, models={"flat": pipe}, classes=(1, 3), size=64, seed=7, baselines=(), metrics=("l1", "psnr")
    )
    colour = np.rint((np.array([0.0, 0.5, -1.0]) + 1) * 127.5).astype(np.uint8)
    everything = []
    for one, label in ((1, "10-20%"), (3, "30-40%")):
        l1, psnr = [], []
        for index, path in enumerate(sorted(pictures.iterdir())):
            truth = fit_picture(path, 64)
            hole = generate_mask(64, 64, hole_class=one, kind="strokes", seed=(7, index, one))
            filled = np.where(hole[..., None], colour, truth).astype(np.float64)
            l1.append(100 * np.abs(filled - truth).mean() / 255)
            psnr.append(10 * np.log10(255**2 / ((filled - truth) ** 2).mean()))
        everything += l1
        score = result.score("flat", label)
        assert score.pictures == 5
        assert score.l1 == pytest.approx(np.mean(l1), rel=1e-9)
        assert score.psnr == pytest.approx(np.mean(psnr), rel=1e-6)
    assert result.score("flat").l1 == pytest.approx(np.mean(everything), rel=1e-9)
    assert [score.hole_class for score in result.scores] == ["10-20%", "30-40%", "all"]


def test_paper_compat_truncates_known_and_filled_pixels(tmp_path):
    """63 of 256 levels come back one lower, as in the released test script (docs/model.md)."""
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(np.stack([levels] * 3, axis=2)).save(tmp_path / "levels.png")
    pipe = Inpainter(ConstantFill(0.5, 0.5, 0.5))
    common = {"models": {"m": pipe}, "classes": (1,), "size": 16, "baselines": ["telea"], "metrics": ["l1"]}
    exact, paper = (evaluate(tmp_path, paper_compat=compat, **common) for compat in (False, True))
    hole = generate_mask(16, 16, hole_class=1, kind="strokes", seed=(0, 0, 1))
    known = levels[~hole].astype(np.float32)
    lowered = (((known / 255 - 0.5) / 0.5 + 1) / 2 * 255).astype(np.uint8) != levels[~hole]
    assert 0 < lowered.sum() <= 63
    inside = np.abs(levels[hole].astype(float) - 191).sum()  # 0.75 * 255 = 191.25: 191 either way
    assert exact.score("m", "10-20%").l1 == pytest.approx(100 * inside / 255 / 256, rel=1e-9)
    assert paper.score("m", "10-20%").l1 == pytest.approx(100 * (inside + lowered.sum()) / 255 / 256, rel=1e-9)
    assert paper.score("Telea", "10-20%") == exact.score("Telea", "10-20%")


def test_the_truncating_conversion_lowers_63_levels():
    from lgnet_fast.evaluation.scoring import _TRUNCATED

    assert (np.arange(256) - _TRUNCATED).sum() == 63
    assert set(np.arange(256) - _TRUNCATED) == {0, 1}


def test_masks_paired_by_name_are_grouped_by_their_class(pictures, tmp_path):
    masks = tmp_path / "masks"
    masks.mkdir()
    for index, path in enumerate(sorted(pictures.iterdir())):
        width, height = Image.open(path).size
        rows = height * (2 * index + 1) // 10  # ratios of 10, 30, 50, 70 and 90 %
        mask = box_mask(height, width, (0, 0, rows, width))
        Image.fromarray(mask.astype(np.uint8) * 255).save(masks / path.name)
    result = evaluate(pictures, masks=masks, pair_by_name=True, size=0, models=[], baselines=["ns"], metrics=["l1"])
    counts = {score.hole_class: score.pictures for score in result.scores}
    assert counts == {"1-10%": 1, "20-30%": 1, "40-50%": 1, "other": 2, "all": 5}
    Image.new("L", (128, 96), 255).save(masks / "4.png")  # a picture of which nothing is known
    (failure,) = evaluate(
        pictures, masks=masks, pair_by_name=True, size=0, models=[], baselines=["ns"], metrics=["l1"]
    ).failures
    assert failure["picture"] == str(pictures / "4.png")
    assert failure["error"] == f"mask {str(masks / '4.png')!r}: no known pixel in the part that is evaluated"
    (masks / "3.png").unlink()
    with pytest.raises(UsageError, match=r"no file named '3'.*3.png"):
        evaluate(pictures, masks=masks, pair_by_name=True)
    with pytest.raises(UsageError, match="^pair_by_name"):
        evaluate(pictures, pair_by_name=True)
    for folder in (pictures, masks):
        with pytest.raises(UsageError, match=r"^out: expected another folder .* evaluation.png, got '.*'"):
            evaluate(pictures, masks=masks, out=folder)
        assert not list(folder.glob("evaluation*"))


def test_one_process_and_three_give_the_same_numbers(fake, pictures, tmp_path, monkeypatch):
    class Moments(nn.Module):
        def forward(self, picture):
            return picture.float().std(dim=(2, 3))

    monkeypatch.setattr(metrics_module, "_inception", lambda source: Moments())
    options = {"classes": "1,2", "size": 64, "seed": 1, "metrics": ("l1", "psnr", "fid"), "sheet_rows": 3}
    alone = evaluate(pictures, out=tmp_path / "one", **options)
    worlds = [World(rank, 3, launch="same") for rank in range(3)]
    for world in worlds[1:]:
        assert evaluate(pictures, out=tmp_path / "three", world=world, **options) is None
    merged = evaluate(pictures, out=tmp_path / "three", world=worlds[0], **options)
    assert merged.scores == alone.scores
    assert merged.died == []
    assert merged.missing == {}
    for name in ("evaluation.json", "evaluation.md", "evaluation.png"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "three" / name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "three").iterdir()) == [
        "evaluation.json", "evaluation.md", "evaluation.png"
    ]  # fmt: skip

    pairs = [
        (fit_picture(path, 64), generate_mask(64, 64, hole_class=2, kind="strokes", seed=(1, index, 2)))
        for index, path in enumerate(sorted(pictures.iterdir()))
    ]
    real = np.stack([truth.std(axis=(0, 1), ddof=1) for truth, _ in pairs])
    filled = np.stack([telea(truth, hole).std(axis=(0, 1), ddof=1) for truth, hole in pairs])
    expected = frechet_distance(torch.from_numpy(real), torch.from_numpy(filled))
    assert alone.score("Telea", "20-30%").fid == pytest.approx(expected, rel=1e-3)
    with pytest.raises(UsageError, match="fid: expected a path"):
        evaluate(pictures, out=tmp_path / "four", fid=Moments(), **options)
    with pytest.raises(UsageError, match="^out: several processes"):
        evaluate(pictures, world=worlds[0], **options)


def test_a_process_that_dies_is_named_and_a_later_launch_does_the_rest(fake, pictures, tmp_path):
    options = {"classes": "1,2", "size": 64, "metrics": ["l1", "psnr"], "sheet_rows": 0, "baselines": ["ns"]}
    alone = evaluate(pictures, out=tmp_path / "one", **options)

    def killed(done: int, total: int, error: str | None) -> None:
        if done == 2:
            raise KeyboardInterrupt

    out = tmp_path / "two"
    first, second = (World(rank, 2, launch="a") for rank in range(2))
    with pytest.raises(KeyboardInterrupt):
        scoring.evaluate(EvaluationOptions(pictures, out=out, **options), second, killed)
    merged = evaluate(pictures, out=out, world=first, **options)
    counted = merged.score("bundled").pictures
    assert (merged.died, counted) == ([1], 6 + 2)  # six of three pictures, two of the process that died
    assert "incomplete: processes 1 ended before their part" in (out / "evaluation.md").read_text()
    before = len(fake.seen)
    again = [World(rank, 2, launch="b") for rank in range(2)]
    assert evaluate(pictures, out=out, world=again[1], **options) is None
    whole = evaluate(pictures, out=out, world=again[0], **options)
    assert (whole.died, whole.scores) == ([], alone.scores)
    assert len(fake.seen) - before == 10 - counted
    assert sorted(path.name for path in out.iterdir()) == ["evaluation.json", "evaluation.md"]


def _shard(path: Path, files: dict[str, bytes]) -> None:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_tar_shards_give_the_numbers_of_their_pictures(fake, pictures, tmp_path):
    files = {path.name: path.read_bytes() for path in sorted(pictures.iterdir())}
    _shard(tmp_path / "shards" / "a.tar", {name: files[name] for name in ("0.png", "1.png", "2.png")})
    _shard(tmp_path / "shards" / "b.tar", {"3.png": files["3.png"], "3.txt": b"a caption", "4.png": files["4.png"]})
    (tmp_path / "shards" / "torn.tar").write_bytes(b"torn")
    options = {"classes": "1,2", "size": 64, "metrics": ["l1", "psnr"], "sheet_rows": 2}
    expected = evaluate(pictures, out=tmp_path / "one", **options)
    worlds = [World(rank, 2, launch="same") for rank in range(2)]
    assert evaluate(tmp_path / "shards", out=tmp_path / "two", world=worlds[1], **options) is None
    found = evaluate(tmp_path / "shards", out=tmp_path / "two", world=worlds[0], **options)
    assert found.scores == expected.scores
    assert found.score("Telea", "20-30%").pictures == 5
    assert [failure["picture"] for failure in found.failures] == [str(tmp_path / "shards" / "torn.tar")]
    assert len(fake.seen) == 2 * 10

    alone = evaluate(tmp_path / "shards" / "b.tar", **options)
    assert (alone.failures, alone.score("Telea", "20-30%").pictures) == ([], 2)
    (tmp_path / "masks").mkdir()
    for index in (3, 4):
        with Image.open(pictures / f"{index}.png") as picture:
            width, height = picture.size
        Image.fromarray(box_mask(height, width, (20, 20, 44, 44))).save(tmp_path / "masks" / f"{index}.png")
    named = evaluate(
        tmp_path / "shards" / "b.tar", masks=tmp_path / "masks", pair_by_name=True, **{**options, "classes": None}
    )
    assert (named.failures, [one.pictures for one in named.scores if one.method == "Telea"]) == ([], [1, 1, 2])
    _shard(pictures / "beside.tar", {"5.png": files["4.png"]})
    beside = evaluate(pictures, **options)
    assert beside.scores == expected.scores
    assert "a tar shard beside pictures" in beside.failures[0]["error"]
    with pytest.raises(
        UsageError, match=r"^pictures: no pictures in '.*torn.tar' \(.*expected an uncompressed tar file"
    ):
        evaluate(tmp_path / "shards" / "torn.tar", **options)


def test_an_interrupted_evaluation_goes_on_where_it_was(fake, pictures, tmp_path):
    class Interrupted(Exception):
        pass

    def stop(done, total, error):
        assert total == 10
        if done == 4:
            raise Interrupted

    options = {"classes": "1,2", "size": 64, "metrics": ["l1"], "out": tmp_path / "out", "baselines": ["ns"]}
    with pytest.raises(Interrupted):
        evaluate(pictures, tell=stop, **options)
    assert not (tmp_path / "out" / "evaluation.json").exists()
    before = len(fake.seen)
    assert before == 4
    (part,) = (tmp_path / "out").rglob("*.jsonl")
    records = part.read_bytes()
    assert records.count(b'"measured": ["l1"]') == 4
    records = records.replace(b'"measured": ["l1"]', b'"measured": []', 1)  # as where a metric was not available
    part.write_bytes(records + b'{"key": "torn')
    os.utime(pictures / "1.png", (1, 1))  # another picture: both of its records are
    result = evaluate(pictures, **options)
    assert len(fake.seen) - before == 9
    assert result.scores == evaluate(pictures, **{**options, "out": None}).scores
    fake.seen.clear()
    evaluate(pictures, **{**options, "seed": 1})
    assert len(fake.seen) == 10  # another seed is another evaluation


def test_fid_of_perfect_fills_is_zero(fake, tmp_path, monkeypatch):
    """With fewer pictures than dimensions; the eigenvalues of the product of covariances gave a negative distance."""

    class Places(nn.Module):
        def forward(self, picture):
            return torch.arange(1.0, 513.0).sin() * picture.float().mean()

    (tmp_path / "flat").mkdir()
    for level in (40, 90, 200):
        Image.new("RGB", (64, 64), (level,) * 3).save(tmp_path / "flat" / f"{level}.png")
    monkeypatch.setattr(metrics_module, "_inception", lambda source: Places())
    result = evaluate(tmp_path / "flat", classes="1", size=64, metrics=["fid"], baselines=["ns"])
    assert result.score("Navier-Stokes", "10-20%").fid == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("damage", [lambda file: file.unlink(), lambda file: file.write_bytes(b"torn")])
def test_features_that_are_gone_are_measured_again(fake, pictures, tmp_path, monkeypatch, damage):
    class Moments(nn.Module):
        def forward(self, picture):
            return picture.float().std(dim=(2, 3))

    class Interrupted(Exception):
        pass

    def stop(done, total, error):
        if done == 3:
            raise Interrupted

    monkeypatch.setattr(metrics_module, "_inception", lambda source: Moments())
    options = {"classes": "1", "size": 64, "metrics": ["fid"], "out": tmp_path / "out", "baselines": ["ns"]}
    with pytest.raises(Interrupted):
        evaluate(pictures, tell=stop, **options)
    damage(next((tmp_path / "out").rglob("*.npy")))
    before = len(fake.seen)
    result = evaluate(pictures, **options)
    assert len(fake.seen) - before == 3  # two that were not done, and the one without features
    assert result.scores == evaluate(pictures, **{**options, "out": None}).scores
    assert result.score("Navier-Stokes", "10-20%").fid > 0


def test_broken_pictures_are_told_once_and_left_out(fake, pictures, tmp_path):
    (pictures / "2.png").write_bytes(b"not a picture")
    Image.fromarray(noise(8, 8)).save(pictures / "small.png")
    result = invoke_eval(
        "-i",
        pictures,
        "-o",
        tmp_path / "out",
        "--classes",
        "1,2",
        "--size",
        0,
        "--metrics",
        "l1",
        "--baselines",
        "ns",
    )
    assert result.exit_code == 1, result.output
    assert result.stderr.count("failed: ") == 2
    assert "2 pictures could not be evaluated" in result.stderr
    written = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert {Path(one["picture"]).name for one in written["failures"]} == {"2.png", "small.png"}
    assert {score["pictures"] for score in written["scores"]} == {4, 8}


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are bytes on Linux alone")
def test_names_that_are_not_utf8_and_formats_that_are_not_read(fake, pictures, tmp_path):
    """The report has the name of a failed picture, the contact sheet's caption that of a good one."""
    good = (pictures / "0.png").read_bytes()
    for name, data in ((b"caf\xe9.png", b"x"), (b"\xe9t\xe9.png", good)):
        with open(os.fsencode(pictures) + b"/" + name, "wb") as file:
            file.write(data)
    (pictures / "art.psd").write_bytes(b"x")
    arguments = ["--classes", "1", "--size", 0, "--metrics", "l1", "--baselines", "none", "--sheet-rows", 20]
    result = invoke_eval("-i", pictures, "-o", tmp_path / "out", *arguments)
    assert result.exit_code == 1, result.output
    assert "2 pictures could not be evaluated" in result.stderr
    assert f"failed: {pictures / 'art.psd'}: pictures of the format .psd are not read here" in result.stderr
    assert {path.name for path in (tmp_path / "out").glob("evaluation.*")} == {
        "evaluation.json", "evaluation.md", "evaluation.png",
    }  # fmt: skip
    failures = json.loads((tmp_path / "out" / "evaluation.json").read_bytes().decode())["failures"]
    assert {os.fsencode(one["picture"]).rpartition(b"/")[2] for one in failures} == {b"caf\xe9.png", b"art.psd"}
