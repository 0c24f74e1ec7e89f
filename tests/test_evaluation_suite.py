"""`lgnet-fast eval --suite`: its measures by their formulas, masks, table, JSON, Markdown, contact sheet, errors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from lgnet_fast import cli
from lgnet_fast.data.masks import SUITE_KINDS, suite_mask
from lgnet_fast.data.metrics import LPIPS_VARIABLE
from lgnet_fast.errors import UsageError
from lgnet_fast.evaluation import telea
from lgnet_fast.evaluation.protocol import fit_picture
from lgnet_fast.evaluation.report import Evaluation, Score
from lgnet_fast.evaluation.scoring import _best_to_worst
from lgnet_fast.evaluation.suite import SuiteMetrics, gradient_energy
from lgnet_fast.pipeline import Inpainter
from lgnet_fast.reference.features import LPIPS
from lgnet_fast.training import validation

from .pipeline_support import ConstantFill, box_mask, evaluate, smooth_noise

PLAIN = ("l1", "psnr", "ssim", "sharp")


@pytest.fixture(autouse=True)
def _no_weights_of_the_user(monkeypatch):
    monkeypatch.delenv(LPIPS_VARIABLE, raising=False)


@pytest.fixture
def pictures(tmp_path) -> Path:
    """Three pictures, 64x64 after scaling."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index, (height, width) in enumerate([(64, 64), (64, 96), (128, 128)]):
        Image.fromarray(smooth_noise(height, width, index)).save(folder / f"{index}.png")
    return folder


def _suite(*arguments):
    return CliRunner().invoke(cli.app, ["eval", "--suite", "--size", "64", *map(str, arguments)])


# -- measures ------------------------------------------------------------------------------------------------------


def plain_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Wang et al. 2004, eq. 13, over uniform windows 7x7 inside the picture, sample covariances; mean of RGB."""
    values = []
    for top in range(a.shape[0] - 6):
        for left in range(a.shape[1] - 6):
            for channel in range(3):
                x, y = (p[top : top + 7, left : left + 7, channel].astype(float).ravel() for p in (a, b))
                (vx, vxy), (_, vy) = np.cov(x, y)
                c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
                mx, my = x.mean(), y.mean()
                values.append((2 * mx * my + c1) * (2 * vxy + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    return float(np.mean(values))


def plain_energy(picture: np.ndarray, hole: np.ndarray) -> float:
    total = 0.0
    for y, x in np.argwhere(hole):
        for other in ((y + 1, x), (y, x + 1)):
            if other[0] < hole.shape[0] and other[1] < hole.shape[1] and hole[other]:
                step = picture[other].astype(float) - picture[y, x]
                total += (0.299 * step[0] + 0.587 * step[1] + 0.114 * step[2]) ** 2
    return total


def test_measures_are_those_of_their_formulas():
    truth = smooth_noise(24, 32, 0)
    hole = suite_mask(24, 32, kind="blob", seed=1)
    filled = np.where(hole[..., None], smooth_noise(24, 32, 1), truth)
    values = SuiteMetrics(PLAIN).scores({"a": filled, "same": truth}, truth, hole)
    difference = filled.astype(float) - truth
    inside = np.array([difference[y, x] for y, x in np.argwhere(hole)])
    assert values["a"] == pytest.approx(
        {
            "l1": np.abs(difference).sum() / difference.size / 2.55,
            "psnr": 10 * np.log10(65025 / (difference**2).mean()),
            "ssim": plain_ssim(filled, truth),
            "hole_l1": np.abs(inside).mean() / 2.55,
            "hole_psnr": 10 * np.log10(65025 / (inside**2).mean()),
            "energy": plain_energy(filled, hole),
            "true_energy": plain_energy(truth, hole),
            "sharp": plain_energy(filled, hole) / plain_energy(truth, hole),
        },
        rel=1e-9,
    )
    assert (values["same"]["sharp"], values["same"]["l1"]) == (1, 0)
    assert values["same"]["psnr"] == pytest.approx(10 * np.log10(65025 / 1e-3))  # finite, so that means exist
    assert values["same"]["ssim"] == pytest.approx(1)


def test_energy_counts_only_steps_within_the_hole():
    picture = np.zeros((4, 4, 3), np.uint8)
    picture[1, 1] = 10
    assert gradient_energy(picture, box_mask(4, 4, (1, 1, 2, 2))) == 0
    assert gradient_energy(picture, box_mask(4, 4, (1, 1, 3, 3))) == pytest.approx(200)
    assert gradient_energy(picture, box_mask(4, 4, (0, 0, 4, 4))) == pytest.approx(400)


def test_the_trainer_validates_by_the_same_energy():
    picture, hole = smooth_noise(24, 32, 3), suite_mask(24, 32, kind="thick", seed=2)
    batch = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].double()
    mask = torch.from_numpy(hole)[None, None].double()
    assert float(validation.gradient_energy(batch, mask)) == pytest.approx(gradient_energy(picture, hole), rel=1e-6)


def test_lpips_takes_the_pictures_in_the_range_of_the_network():
    torch.manual_seed(0)
    network = LPIPS("alexnet")
    truth, filled = smooth_noise(64, 64, 0), [smooth_noise(64, 64, 1), smooth_noise(64, 64, 2)]
    hole = box_mask(64, 64, (10, 10, 30, 30))
    values = SuiteMetrics(("lpips",), lpips=network).scores(dict(enumerate(filled)), truth, hole)
    a, *others = (torch.from_numpy(p.copy()).permute(2, 0, 1)[None].float() * (2 / 255) - 1 for p in (truth, *filled))
    with torch.inference_mode():
        expected = [float(network(other, a)) for other in others]
    assert [values[i]["lpips"] for i in range(2)] == pytest.approx(expected, rel=1e-4)
    assert expected[0] != pytest.approx(expected[1], rel=1e-2)
    other = SuiteMetrics(("lpips",), lpips=lambda a, b: network(a, b)).scores(dict(enumerate(filled)), truth, hole)
    assert [other[i]["lpips"] for i in range(2)] == pytest.approx(expected, rel=1e-4)


def test_lpips_weights_come_from_the_option_or_the_variable(tmp_path, monkeypatch):
    network = LPIPS("alexnet")
    tensors = {f"lin{i}": getattr(network, f"head{i}") for i in range(5)}
    for i, layer in enumerate(network.features.convolutions):
        tensors |= {f"w{i}": layer.weight, f"b{i}": layer.bias}
    np.savez(tmp_path / "alexnet.npz", **{name: value.numpy() for name, value in tensors.items()})
    without = SuiteMetrics()
    assert without.available == PLAIN
    assert without.missing == {"lpips": "no weights; give their file as lpips (--lpips) or by LGNET_FAST_LPIPS"}
    assert "lpips" in SuiteMetrics(lpips=tmp_path / "alexnet.npz").available
    monkeypatch.setenv(LPIPS_VARIABLE, str(tmp_path / "alexnet.npz"))
    assert "lpips" in SuiteMetrics().available
    assert SuiteMetrics().legend.endswith("LPIPS: AlexNet.")
    (reason,) = SuiteMetrics(lpips=tmp_path / "none.npz").missing.values()
    assert "none.npz" in reason
    assert "\n" not in reason


# -- evaluate ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [False, True])
def test_means_and_medians_over_drawn_and_given_masks(pictures, tmp_path, given):
    """A network that paints the hole in one colour, and Telea: every figure follows from pictures and masks."""
    truths = [fit_picture(path, 64) for path in sorted(pictures.iterdir())]
    folder = None
    if given:
        folder = tmp_path / "masks"
        folder.mkdir()
    masks = {}
    for index, path in enumerate(sorted(pictures.iterdir())):
        for one, kind in enumerate(SUITE_KINDS):
            masks[index, kind] = suite_mask(64, 64, kind=kind, seed=(9 if given else 5, index, one))
            if folder is not None:
                # Of the picture's own size; scaled to 64, and cropped to the middle 64 columns, it is the one above.
                own = np.kron(masks[index, kind], np.ones((2, 2), bool)) if index == 2 else masks[index, kind]
                own = np.pad(own, ((0, 0), (16, 16))) if index == 1 else own
                Image.fromarray(own).save(folder / f"{path.stem}_{kind}.png")
    pipe = Inpainter(ConstantFill(0.0, 0.5, -1.0))
    result = evaluate(
        pictures, suite=True, masks=folder, models={"flat": pipe}, size=64, seed=5, baselines=["telea"], metrics=PLAIN
    )
    colour = np.rint((np.array([0.0, 0.5, -1.0]) + 1) * 127.5).astype(np.uint8)
    assert [score.hole_class for score in result.scores[::2]] == [*SUITE_KINDS, "all"]
    measure = SuiteMetrics(PLAIN)
    for kind in SUITE_KINDS:
        rows = []
        for index, truth in enumerate(truths):
            hole = masks[index, kind]
            filled = {"flat": np.where(hole[..., None], colour, truth), "Telea": telea(truth, hole)}
            rows.append(measure.scores(filled, truth, hole))
        for title in ("flat", "Telea"):
            score = result.score(title, kind)
            own = [row[title] for row in rows]
            assert score.pictures == 3
            for name in ("l1", "psnr", "ssim", "hole_l1", "hole_psnr"):
                assert getattr(score, name) == pytest.approx(np.mean([one[name] for one in own]), rel=1e-9)
            assert score.sharp == pytest.approx(sorted(one["sharp"] for one in own)[1], rel=1e-9)
            ratio = sum(one["energy"] for one in own) / sum(one["true_energy"] for one in own)
            assert score.sharp_all == pytest.approx(ratio, rel=1e-9)
        assert result.score("flat", kind).sharp == pytest.approx(0, abs=1e-9)
    assert result.score("Telea").pictures == 12


def test_kinds_can_be_chosen_and_the_seed_counts(pictures):
    options = {"suite": True, "models": [], "baselines": ["ns"], "metrics": ["l1"], "size": 64, "classes": "box,thin"}
    first, again, other = (evaluate(pictures, seed=seed, **options) for seed in (0, 0, 1))
    assert [score.hole_class for score in first.scores] == ["thin", "box", "all"]
    assert first.scores == again.scores
    assert first.scores != other.scores
    assert first.legend == "Holes at 256x256: thin, strokes of 3 to 9 pixels over 10-20 %; box, 64x64."
    with pytest.raises(
        UsageError, match="^classes: with `suite` expected names of thin, thick, box, blob, got none$"
    ):
        evaluate(pictures, **{**options, "classes": []})


def test_the_command_writes_table_json_markdown_and_sheet(fake, pictures, tmp_path):
    result = _suite("-i", pictures, "-o", tmp_path / "out", "--model", "new=bundled", "--model", "old=bundled")
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert written["settings"]["suite"]
    assert written["missing"].keys() == {"lpips"}
    titles = ["new", "old", "Telea", "Navier-Stokes", "biharmonic"]
    assert [(s["hole_class"], s["method"]) for s in written["scores"]] == [
        (kind, title) for kind in (*SUITE_KINDS, "all") for title in titles
    ]
    markdown = (tmp_path / "out" / "evaluation.md").read_text()
    for score in written["scores"]:
        (line,) = [
            line
            for line in markdown.splitlines()
            if line.startswith(f"| {score['hole_class']} | {score['method']} |")
        ]
        cells = [cell.strip(" *") for cell in line.split("|")[4:9]]
        assert cells == [
            f"{score['l1']:.2f}", f"{score['psnr']:.2f}", f"{score['ssim']:.4f}", "n/a", f"{score['sharp']:.3f}"
        ]  # fmt: skip
        assert f"{score['sharp']:.3f}" in result.stdout
    assert markdown.count("LPIPS: n/a (no weights; give their file as lpips (--lpips)") == 1
    assert "box, 64x64; blob, one shape of 15 %. Sharpness: gradient energy" in markdown
    with Image.open(tmp_path / "out" / "evaluation.png") as sheet:
        assert sheet.size == (7 * 198 + 6, 22 + 12 * 214 + 6)  # original, masked, five methods; three rows a kind

    result = _suite(
        "-i", pictures, "-o", tmp_path / "quick", "--baselines", "none", "--sheet-rows", 0, "--classes", "box"
    )
    assert result.exit_code == 0, result.output
    assert sorted(p.name for p in (tmp_path / "quick").iterdir()) == ["evaluation.json", "evaluation.md"]
    assert "evaluation.png" not in result.stderr


def test_the_sheet_shows_the_best_and_the_worst():
    def record(index, one, **values):
        return {"index": index, "class": one, "scores": {"a": {"l1": 0.0, **values}}}

    boxes = [record(i, 2, ssim=s, lpips=p) for i, (s, p) in enumerate([(0.9, 0.1), (0.8, 0.3), (0.7, 0.2)])]
    chosen = _best_to_worst(boxes, "a", (0, 2), 4)
    assert [r["index"] for _, r in chosen] == [0, 1]
    assert chosen[1][0] == "box, number 3 of 3 for a: LPIPS 0.3000"
    assert [r["index"] for _, r in _best_to_worst(boxes, "a", (2,), 3)] == [0, 2, 1]
    assert [r["index"] for _, r in _best_to_worst(boxes, "a", (2,), 1)] == [2]
    every = [record(i, one, ssim=0.1 * i) for one in range(4) for i in range(5)]
    rows = {asked: len(_best_to_worst(every, "a", range(4), asked)) for asked in (1, 7, 8, 13, 20)}
    assert rows == {1: 4, 7: 4, 8: 8, 13: 12, 20: 20}  # as many of each kind, at least one
    by_ssim = [record(i, 1, ssim=s) for i, s in enumerate([0.7, 0.9])]
    assert [r["index"] for _, r in _best_to_worst(by_ssim, "a", (1,), 9)] == [1, 0]
    assert [r["index"] for _, r in _best_to_worst([record(0, 3)], "a", (3,), 9)] == [0]


def test_the_sharpness_nearest_to_the_truth_is_best():
    scores = [Score("a", "thin", 3, sharp=0.2), Score("b", "thin", 3, sharp=1.1), Score("c", "thin", 3, sharp=1.4)]
    lines = Evaluation(scores, metrics=("sharp",)).markdown().splitlines()
    assert lines[0] == "| holes | method | pictures | sharpness → 1 |"
    assert [line.split("|")[4].strip() for line in lines[2:5]] == ["0.200", "**1.100**", "1.400"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--classes", "10-20"], "--classes: with --suite expected names of thin, thick, box, blob, got '10-20'"),
        (["--metrics", "l1,fid"], "--metrics: expected names of l1, psnr, ssim, lpips, sharp, got fid"),
        (["-m", "masks", "--pair-by-name"], "--suite: expected no --pair-by-name"),
        (["--mask-kind", "boxes"], "--mask-kind: expected none with --suite, got 'boxes'"),
        (["-m", "empty"], "--masks: no pictures in 'empty'"),
        (["-m", "masks"], "--masks: mask: no file named '0_thick'"),
    ],
)
def test_errors_are_one_line_with_exit_code_2(pictures, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "masks"):
        (tmp_path / name).mkdir()
    Image.fromarray(box_mask(64, 64, (10, 10, 20, 20))).save(tmp_path / "masks" / "0_thin.png")
    result = _suite("-i", pictures, "-o", "out", *arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.lstrip().startswith("error: ")  # rich before 14.3 begins with an empty line
    assert words in result.stderr
    assert result.stderr.strip().count("\n") == 0


def test_masks_of_another_size_or_without_known_pixels_are_told(pictures, tmp_path):
    folder = tmp_path / "masks"
    folder.mkdir()
    for name, shape in (("0", (64, 64)), ("1", (64, 64)), ("2", (128, 128))):
        Image.fromarray(np.full(shape, name == "0")).save(folder / f"{name}_box.png")
    options = {"suite": True, "models": [], "baselines": ["ns"], "metrics": ["l1"], "size": 64, "classes": ["box"]}
    result = evaluate(pictures, masks=folder, **options)
    errors = {Path(one["picture"]).name: one["error"] for one in result.failures}
    assert "no known pixel" in errors["0.png"]
    assert "expected the picture's size 96x64 (width x height), got 64x64" in errors["1.png"]
    assert "no hole pixel" in errors["2.png"]
    (folder / "1_box.png").rename(folder / "1_blob.png")
    with pytest.raises(UsageError, match="no file named '1_box'"):
        evaluate(pictures, masks=folder, **options)
