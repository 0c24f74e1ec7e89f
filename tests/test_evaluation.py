"""`lgnet-fast eval` and `lgnet_fast.evaluation`: metrics, masks, baselines, tables, errors, resumption."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import nn
from typer.testing import CliRunner

from lgnet_fast import cli
from lgnet_fast.cli.commands.eval import models_of
from lgnet_fast.data import metrics as metrics_module
from lgnet_fast.data.masks import HOLE_CLASSES, MaskFolder, generate_mask, hole_ratio
from lgnet_fast.data.metrics import Metrics, fid_score
from lgnet_fast.errors import MissingExtraError, UsageError, WeightsError
from lgnet_fast.evaluation import EvaluationOptions, biharmonic, navier_stokes, parse_classes, telea
from lgnet_fast.evaluation.frechet import frechet_distance
from lgnet_fast.evaluation.protocol import FolderMasks, fit_mask, fit_picture
from lgnet_fast.evaluation.report import Evaluation, Score
from lgnet_fast.evaluation.scoring import _identity, _plan, _settings
from lgnet_fast.jobs.journal import World
from lgnet_fast.pipeline import Inpainter

from .pipeline_support import BlurFill, ConstantFill, box_mask, evaluate, noise, smooth_noise

PLAIN = ("l1", "psnr", "ssim")


@pytest.fixture
def pictures(tmp_path) -> Path:
    """Five smooth pictures of several sizes, in a folder."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index, (height, width) in enumerate([(64, 64), (80, 64), (64, 100), (70, 70), (96, 128)]):
        rows, columns = np.mgrid[0:height, 0:width] / 20
        waves = [np.sin(rows + index), np.cos(columns * (index + 1) / 2), np.sin(rows + columns)]
        Image.fromarray((127 + 100 * np.stack(waves, axis=2)).astype(np.uint8)).save(folder / f"{index}.png")
    return folder


def _evaluate(*arguments):
    return CliRunner().invoke(cli.app, ["eval", *map(str, arguments)])


# -- metrics -------------------------------------------------------------------------------------------------------


def _ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Wang et al. 2004, eq. 13, where the 11x11 Gaussian window (sigma 1.5) lies inside the picture; mean of RGB."""
    offsets = np.arange(11) - 5
    line = np.exp(-(offsets**2) / (2 * 1.5**2))
    window = np.outer(line, line) / line.sum() ** 2

    def mean(values: np.ndarray) -> np.ndarray:
        windows = np.lib.stride_tricks.sliding_window_view(values, (11, 11), axis=(0, 1))
        return np.einsum("hwcij,ij->hwc", windows, window)

    a, b = a.astype(np.float64), b.astype(np.float64)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    ma, mb = mean(a), mean(b)
    va, vb, vab = mean(a * a) - ma**2, mean(b * b) - mb**2, mean(a * b) - ma * mb
    return float((((2 * ma * mb + c1) * (2 * vab + c2)) / ((ma**2 + mb**2 + c1) * (va + vb + c2))).mean())


def test_l1_psnr_and_ssim_are_those_of_their_definitions():
    truth = smooth_noise(48, 40, 0)
    filled = truth.copy()
    filled[10:30, 5:25] = noise(20, 20, 1)
    scores = Metrics(PLAIN).scores(filled, truth)
    difference = filled.astype(np.float64) - truth
    assert scores["l1"] == pytest.approx(100 * np.abs(difference).mean() / 255, rel=1e-12)
    assert scores["psnr"] == pytest.approx(10 * np.log10(255**2 / (difference**2).mean()), rel=1e-6)
    assert scores["ssim"] == pytest.approx(_ssim(filled, truth), abs=5e-6)
    assert Metrics(PLAIN).scores(truth, truth) == {
        "l1": 0.0,
        "psnr": float("inf"),
        "ssim": pytest.approx(1, abs=1e-6),
    }


def test_fid_of_known_gaussians():
    rng = np.random.default_rng(0)
    real = rng.normal(size=(40, 3)).astype(np.float32)
    assert fid_score(real, real) == pytest.approx(0, abs=1e-6)
    assert fid_score(real, real + np.float32([1, 0, 2])) == pytest.approx(5, abs=1e-4)  # equal covariances: |shift|^2
    line = real[:, :1]
    spread = float(line.std(ddof=1))
    assert fid_score(line, 3 * line) == pytest.approx(
        (2 * line.mean()) ** 2 + (2 * spread) ** 2, rel=1e-5
    )  # one dimension: (m1 - m2)^2 + (s1 - s2)^2


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_frechet_distance_of_broken_features_is_not_a_number(bad):
    rows = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    broken = rows.clone()
    broken[3, 1] = bad
    assert np.isnan(frechet_distance(rows, broken))
    assert np.isnan(frechet_distance(broken, rows))
    assert frechet_distance(rows, rows) == pytest.approx(0, abs=1e-6)


def test_lpips_and_fid_networks_may_be_given():
    seen = []

    def distance(a, b):
        seen.append((a.shape, a.dtype, float(a.min()), float(a.max())))
        return (a - b).abs().mean()

    class Mean(nn.Module):
        def forward(self, picture):
            assert picture.dtype == torch.uint8
            return picture.float().mean(dim=(2, 3))

    white, black = np.full((16, 20, 3), 255, np.uint8), np.zeros((16, 20, 3), np.uint8)
    measure = Metrics(("lpips", "fid"), lpips=distance, fid=Mean())
    assert measure.available == ("lpips", "fid")
    assert measure.scores(white, black) == {"lpips": 2.0}
    assert seen == [((1, 3, 16, 20), torch.float32, 1.0, 1.0)]
    np.testing.assert_array_equal(measure.features(white), [255, 255, 255])


def test_missing_backbones_are_one_line_each_and_the_other_metrics_stay(tmp_path, pictures):
    for name in ("a.pth", "b.pth"):
        (tmp_path / name).write_bytes(b"torn")
    result = evaluate(
        pictures, classes="1", size=64, baselines=["telea"], models=[], seed=3, lpips=tmp_path / "a.pth",
        fid=tmp_path / "b.pth",
    )  # fmt: skip
    assert set(result.missing) == {"lpips", "fid"}
    assert all(reason and "\n" not in reason for reason in result.missing.values())
    assert "b.pth" in result.missing["fid"]
    score = result.score("Telea", "10-20%")
    assert (score.lpips, score.fid) == (None, None)
    assert score.psnr > 15
    assert "LPIPS: n/a (" in result.markdown()
    assert result.markdown().count("n/a |") == 2


def _alexnet_features() -> nn.Sequential:
    """torchvision's ``alexnet().features``, random."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(True), nn.MaxPool2d(3, 2)]
    layers += [nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(True), nn.MaxPool2d(3, 2)]
    for inputs, outputs in ((192, 384), (384, 256), (256, 256)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(True)]
    return nn.Sequential(*layers, nn.MaxPool2d(3, 2))


def test_lpips_with_a_local_backbone_is_that_of_its_definition(tmp_path):
    """Zhang et al. 2018, eq. (1): squared differences of unit features, weighted by v0.1's linear layers."""
    backbone = _alexnet_features()
    state = {f"features.{name}": value for name, value in backbone.state_dict().items()}
    torch.save({**state, "classifier.1.weight": torch.zeros(2, 2)}, tmp_path / "alexnet.pth")
    lpips_module = pytest.importorskip("torchmetrics.functional.image.lpips")
    measure = Metrics(("lpips",), lpips=tmp_path / "alexnet.pth")
    assert measure.missing == {}
    truth, filled = smooth_noise(64, 64, 0), smooth_noise(64, 64, 1)

    linear = torch.load(
        Path(lpips_module.__file__).parent / "lpips_models" / "alex.pth", map_location="cpu", weights_only=True
    )
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    expected, taps = 0.0, (1, 4, 7, 9, 11)
    with torch.inference_mode():
        maps = []
        for picture in (filled, truth):
            x = ((torch.from_numpy(picture.copy()) / 127.5 - 1 - shift) / scale).permute(2, 0, 1)[None]
            maps.append([])
            for index, layer in enumerate(backbone):
                x = layer(x)
                if index in taps:
                    maps[-1].append(x / x.norm(dim=1, keepdim=True))
        for level, (a, b) in enumerate(zip(*maps)):
            expected += float((linear[f"lin{level}.model.1.weight"] * (a - b) ** 2).sum(1).mean())
    assert measure.scores(filled, truth)["lpips"] == pytest.approx(expected, rel=1e-4)

    torch.save({**state, "features.0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "other.pth")
    other = Metrics(("lpips",), lpips=tmp_path / "other.pth")
    assert "names and shapes do not fit. wrong shape (7)" in other.missing["lpips"]
    assert len(other.missing["lpips"]) <= 240
    assert "does not exist" in Metrics(("lpips",), lpips=tmp_path / "none.pth").missing["lpips"]


def test_a_backbone_that_cannot_be_downloaded_names_its_file_and_address(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    torch.hub.set_dir(str(tmp_path / "hub"))

    def refuse(url, file, **options):
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    with pytest.raises(WeightsError, match=r"alexnet-owt-7be5be79.pth.*no network.*`lpips`.*https://"):
        metrics_module._alexnet_file()
    (tmp_path / "hub" / "checkpoints" / "alexnet-owt-7be5be79.pth").write_bytes(b"")
    assert metrics_module._alexnet_file() == tmp_path / "hub" / "checkpoints" / "alexnet-owt-7be5be79.pth"


@pytest.fixture(autouse=True)
def _hub_directory():
    yield
    torch.hub._hub_dir = None


def test_extras_that_are_not_installed_are_named(monkeypatch, pictures):
    hole = box_mask(20, 20, (5, 5, 10, 10))
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(MissingExtraError, match=r"lgnet_fast\[eval\]"):
        telea(noise(20, 20), hole)
    monkeypatch.setitem(sys.modules, "skimage.restoration", None)
    with pytest.raises(MissingExtraError, match=r"scikit-image.*lgnet_fast\[eval\]"):
        biharmonic(noise(20, 20), hole)
    result = _evaluate("-i", pictures, "-o", pictures.parent / "out", "--metrics", "l1", "--size", 64)
    assert result.exit_code == 2
    assert result.stderr.strip().count("\n") == 0
    monkeypatch.setitem(sys.modules, "torchmetrics.functional.image", None)
    with pytest.raises(MissingExtraError, match=r"torchmetrics.*lgnet_fast\[eval\]"):
        Metrics()


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


def test_class_names():
    assert parse_classes(None) is None
    assert parse_classes("1, 2") == parse_classes("10-20,20-30%") == parse_classes([1, "20-30"]) == (1, 2)
    assert parse_classes("0,1-10") == (0,)
    for bad in ("6", "-1", "10-30", "", "two"):
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
    assert alone.score("Telea", "20-30%").fid == pytest.approx(fid_score(real, filled), rel=1e-3)
    with pytest.raises(UsageError, match="fid: expected a path"):
        evaluate(pictures, out=tmp_path / "four", fid=Moments(), **options)
    with pytest.raises(UsageError, match="^out: several processes"):
        evaluate(pictures, world=worlds[0], **options)


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
    part.write_bytes(part.read_bytes() + b'{"key": "torn')
    result = evaluate(pictures, **options)
    assert len(fake.seen) - before == 6
    assert result.scores == evaluate(pictures, **{**options, "out": None}).scores
    fake.seen.clear()
    evaluate(pictures, **{**options, "seed": 1})
    assert len(fake.seen) == 10  # another seed is another evaluation


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
    result = _evaluate(
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


def test_names_that_are_not_utf8_and_formats_that_are_not_read(fake, pictures, tmp_path):
    """The report has the name of a failed picture, the contact sheet's caption that of a good one."""
    good = (pictures / "0.png").read_bytes()
    for name, data in ((b"caf\xe9.png", b"x"), (b"\xe9t\xe9.png", good)):
        with open(os.fsencode(pictures) + b"/" + name, "wb") as file:
            file.write(data)
    (pictures / "art.psd").write_bytes(b"x")
    arguments = ["--classes", "1", "--size", 0, "--metrics", "l1", "--baselines", "none", "--sheet-rows", 20]
    result = _evaluate("-i", pictures, "-o", tmp_path / "out", *arguments)
    assert result.exit_code == 1, result.output
    assert "2 pictures could not be evaluated" in result.stderr
    assert {path.name for path in (tmp_path / "out").glob("evaluation.*")} == {
        "evaluation.json", "evaluation.md", "evaluation.png",
    }  # fmt: skip
    failures = json.loads((tmp_path / "out" / "evaluation.json").read_bytes().decode())["failures"]
    assert {os.fsencode(one["picture"]).rpartition(b"/")[2] for one in failures} == {b"caf\xe9.png", b"art.psd"}


# -- the command and its reports -----------------------------------------------------------------------------------


def test_the_command_writes_a_table_json_markdown_and_a_sheet(fake, pictures, tmp_path):
    out = tmp_path / "out"
    result = _evaluate(
        "-i", pictures, "-o", out, "--classes", "10-20", "--size", 64, "--metrics", "l1,psnr,ssim", "--sheet-rows", 2,
        "--device", "cpu",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    written = json.loads((out / "evaluation.json").read_text())
    scores = {score["method"]: score for score in written["scores"]}
    assert list(scores) == ["bundled", "Telea", "Navier-Stokes"]
    assert written["settings"]["classes"] == ["10-20%"]
    for title, score in scores.items():
        row = f"| {title} | 5 |"
        (line,) = [line for line in (out / "evaluation.md").read_text().splitlines() if row in line]
        cells = [cell.strip(" *") for cell in line.split("|")[4:7]]
        assert cells == [f"{score['l1']:.2f}", f"{score['psnr']:.2f}", f"{score['ssim']:.4f}"]
        assert all(cell in result.stdout for cell in cells)
    with Image.open(out / "evaluation.png") as sheet:
        # 5 columns of 192 with margins of 6; 2 rows of 192 under captions of 22, and the head.
        assert sheet.size == (5 * 198 + 6, 22 + 2 * 214 + 6)
        original = np.asarray(sheet.crop((6, 44, 198, 236)), dtype=int)
    shown = Image.fromarray(fit_picture(pictures / "0.png", 64)).resize((192, 192), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(original, np.asarray(shown))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-i", "none"], "--input: 'none' does not exist"),
        (["-i", "empty"], "no pictures in 'empty'"),
        (["-i", "pictures", "-m", "empty"], "--masks"),
        (["-i", "pictures", "-m", "nowhere"], "--masks"),
        (["-i", "pictures", "-m", "pictures", "--pair-by-name", "--classes", "1"], "--pair-by-name"),
        (["-i", "pictures", "-m", "one", "--pair-by-name"], "no file named '1'"),
        (["-i", "pictures", "-m", "one"], "hole ratios of 1-60%, got none"),
        (["-i", "pictures", "--classes", "10-30"], "--classes: expected names of 1-10%, 10-20%"),
        (["-i", "pictures", "--baselines", "patchmatch"], "--baselines: expected names of telea, ns"),
        (["-i", "pictures", "--baselines", "ns,telea,ns"], "--baselines: expected each name once, got ns, telea, ns"),
        (["-i", "pictures", "--metrics", "l1,mse"], "--metrics"),
        (["-i", "pictures", "--metrics", "l1, psnr,l1"], "--metrics: expected each name once, got l1, psnr, l1"),
        (["-i", "pictures", "--metrics", "l1", "--fid", "a.pth"], "--fid: expected fid among the --metrics, got l1"),
        (["-i", "pictures", "--suite", "--fid", "a.pth"], "--fid: expected fid among the --metrics, got l1, psnr, "),
        (["-i", "pictures", "--model", "bundled", "--model", "bundled"], "--model: expected each method once, or"),
        (["-i", "pictures", "--model", "a/x", "--model", "a/x"], "titles of their own, got a/x, a/x, Telea, Navier"),
        (["-i", "pictures", "--lpips", "nowhere.pth"], "--lpips: expected a file of weights, got 'nowhere.pth'"),
        (["-i", "pictures", "--fid", "empty"], "--fid: expected a file of weights, got 'empty'"),
        (["-i", "pictures", "--invert-mask"], "--invert-mask: expected --masks"),
        (
            ["-i", "pictures", "-m", "one", "--mask-kind", "boxes"],
            "--mask-kind: expected none with --masks, got 'boxes'",
        ),
        (["-i", "pictures", "--size", "8"], "--size"),
        (["-i", "pictures", "--model", "empty"], "empty"),
        (["-i", "pictures", "--model", "torn"], "torn"),
        (["-i", "pictures", "--model", "a=empty", "--model", "torn"], "TITLE=DIR"),
        (["-i", "pictures", "--device", "cuda:99"], "cuda:99"),
        (["-i", "pictures", "-o", "pictures/0.png"], "--output"),
    ],
)
def test_errors_are_one_line_with_exit_code_2(pictures, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "torn", "one"):
        (tmp_path / name).mkdir()
    (tmp_path / "torn" / "config.json").write_text("{")
    (tmp_path / "torn" / "model.safetensors").write_bytes(b"\0" * 20)
    Image.fromarray(np.full((64, 64), 255, np.uint8)).save(tmp_path / "one" / "0.png")
    (tmp_path / "a.pth").write_bytes(b"torn")
    result = _evaluate("-o", "out", *arguments)
    assert result.exit_code == 2, result.output
    assert words in result.stderr
    assert "Traceback" not in result.output
    assert result.stderr.lstrip().startswith("error: ")  # rich before 14.3 begins with an empty line
    assert result.stderr.strip().count("\n") == 0
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["models", "baselines", "metrics"])
def test_a_text_in_place_of_a_list(pictures, name):
    with pytest.raises(UsageError, match=f"^{name}: expected a list, got the single 'l1'"):
        evaluate(pictures, **{name: "l1"})


def test_titles_of_models(pictures):
    assert models_of([]) == [None]
    assert models_of(["runs/1", "runs/2"]) == ["runs/1", "runs/2"]
    assert models_of(["old=bundled", "new=runs/2=b"]) == {"old": None, "new": "runs/2=b"}
    assert models_of(["bundled", "runs/1"]) == [None, "runs/1"]
    for wrong in (["a=runs/1", "runs/2"], ["a=runs/1", "a=runs/2"]):
        with pytest.raises(UsageError, match=r"a title of its own for each, as TITLE=DIR, got a=runs/1, .*runs/2"):
            models_of(wrong)
    pipe = Inpainter(ConstantFill(0, 0, 0))
    with pytest.raises(UsageError, match="titles of their own"):
        evaluate(pictures, models={"Telea": pipe})


def test_the_best_of_each_class_is_bold_and_missing_values_are_not_compared():
    scores = [
        Score("a", "10-20%", 3, l1=1.0, psnr=30.0, ssim=0.9, fid=None),
        Score("b", "10-20%", 3, l1=2.0, psnr=31.0, ssim=0.9, fid=5.0),
    ]
    lines = Evaluation(scores, metrics=("l1", "psnr", "ssim", "fid")).markdown().splitlines()
    assert lines[2] == "| 10-20% | a | 3 | **1.00** | 30.00 | **0.9000** | n/a |"
    assert lines[3] == "| 10-20% | b | 3 | 2.00 | **31.00** | **0.9000** | **5.00** |"


def test_pictures_without_any_difference_are_the_best_and_valid_json(tmp_path):
    """A flat picture that is filled exactly: its PSNR is infinite, which JSON cannot hold."""
    Image.new("RGB", (64, 64), (191, 191, 191)).save(tmp_path / "flat.png")  # (0.5 + 1) * 127.5
    pipes = {"exact": Inpainter(ConstantFill(0.5, 0.5, 0.5)), "dark": Inpainter(ConstantFill(0, 0, 0))}
    options = {"models": pipes, "size": 64, "classes": "1,2", "baselines": []}
    result = evaluate(tmp_path, metrics=("l1", "psnr", "ssim"), **options)
    (tmp_path / "out").mkdir()
    result.write(tmp_path / "out")

    def refuse(text):
        raise AssertionError(text)

    written = json.loads((tmp_path / "out" / "evaluation.json").read_text(), parse_constant=refuse)
    by_title = {score["method"]: score for score in written["scores"] if score["hole_class"] == "all"}
    assert (by_title["exact"]["l1"], by_title["exact"]["psnr"]) == (0, None)
    assert 10 < by_title["dark"]["psnr"] < 30
    lines = (tmp_path / "out" / "evaluation.md").read_text().splitlines()
    shown = {line.split("|")[2].strip(): line.split("|")[5].strip() for line in lines if line.startswith("| all")}
    assert shown == {"exact": "**∞**", "dark": f"{by_title['dark']['psnr']:.2f}"}
    missing = Evaluation([Score("a", "all", 1, l1=0.0)], metrics=("l1", "psnr"), missing={"psnr": "no time"})
    assert missing.markdown().splitlines()[2] == "| all | a | 1 | 0.00 | n/a |"


def test_figures_stay_whole_in_a_narrow_terminal():
    table = Evaluation([Score("a method", "10-20%", 1234, l1=12.25, psnr=29.75)], metrics=("l1", "psnr")).table()
    console = Console(width=34)
    with console.capture() as captured:
        console.print(table)
    rows = [line.split("│") for line in captured.get().splitlines() if line.startswith("│")]
    columns = ["".join(cells).replace(" ", "") for cells in list(zip(*rows))[3:6]]
    assert columns == ["1234", "12.25", "29.75"]


def test_a_picture_with_the_name_of_the_sheet_is_not_replaced(fake, tmp_path):
    Image.fromarray(noise(64, 64)).save(tmp_path / "evaluation.png")
    before = (tmp_path / "evaluation.png").read_bytes()
    for rows in (0, 2):
        result = _evaluate("-i", tmp_path / "evaluation.png", "-o", tmp_path, "--sheet-rows", rows)
        assert result.exit_code == 2
        assert result.stderr.startswith("error: --output: expected another folder than that of the picture")
    assert (tmp_path / "evaluation.png").read_bytes() == before


def test_titles_are_cells_of_the_markdown_table():
    (line,) = Evaluation([Score("a|b\nc", "all", 3, l1=1.0)], metrics=("l1",)).markdown().splitlines()[2:3]
    assert line == r"| all | a\|b c | 3 | 1.00 |"


def test_a_sheet_of_an_earlier_evaluation_never_stays(fake, pictures, tmp_path):
    arguments = ["-i", pictures, "-o", tmp_path / "out", "--classes", "1", "--size", 64, "--metrics", "l1"]
    first = _evaluate(*arguments, "--baselines", "none")
    assert "evaluation.md, evaluation.png" in first.stderr
    assert (tmp_path / "out" / "evaluation.png").is_file()
    again = _evaluate(*arguments, "--baselines", " ns , telea", "--sheet-rows", 0)
    assert again.exit_code == 0, again.output
    assert "evaluation.png" not in again.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["evaluation.json", "evaluation.md"]


def test_another_device_or_network_is_another_evaluation(fake, pictures, tmp_path, monkeypatch):
    """What an interrupted one has measured is not mixed with results of another dtype, or of another LPIPS."""
    options = EvaluationOptions(pictures, out=tmp_path / "out")
    one = _identity(options, _settings(options, _plan(options).holes))
    for changed in ({"device": "cuda"}, {"dtype": "float64"}, {"backend": "eager"}, {"seed": 1}, {"sheet_rows": 1}):
        other = replace(options, **changed)
        assert _identity(other, _settings(other, _plan(other).holes)) != one, changed
    (tmp_path / "vgg.npz").write_bytes(b"x")
    monkeypatch.setenv("LGNET_FAST_LPIPS", str(tmp_path / "vgg.npz"))
    assert _identity(options, _settings(options, _plan(options).holes)) != one


def test_ctrl_c_says_that_the_same_command_goes_on(fake, pictures, tmp_path, monkeypatch):
    forward = BlurFill.forward

    def pressed(self, *arguments, **options):
        if len(self.seen) == 2:
            raise KeyboardInterrupt
        return forward(self, *arguments, **options)

    arguments = ["-i", pictures, "-o", tmp_path / "out", "--classes", "1", "--size", 64, "--metrics", "l1"]
    with monkeypatch.context() as patch:
        patch.setattr(BlurFill, "forward", pressed)
        stopped = _evaluate(*arguments)
    assert (stopped.exit_code, stopped.stdout) == (130, "")
    assert stopped.stderr.strip() == "interrupted: the same command goes on from here"
    assert not list((tmp_path / "out").glob("evaluation.*"))
    assert _evaluate(*arguments).exit_code == 0
    assert len(fake.seen) == 5


def test_a_table_in_a_file_has_room_for_its_columns(fake, pictures, tmp_path, monkeypatch):
    arguments = ["--suite", "--size", 64, "--classes", "box", "--sheet-rows", 0]
    widest = {}
    for columns in (None, "50"):
        monkeypatch.delenv("COLUMNS", raising=False)
        if columns is not None:
            monkeypatch.setenv("COLUMNS", columns)
        result = _evaluate("-i", pictures, "-o", tmp_path / "out", *arguments)
        widest[columns] = max(map(len, result.stdout.splitlines()))
    assert 80 < widest[None] <= 120
    assert widest["50"] <= 50
