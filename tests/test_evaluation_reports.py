"""`lgnet-fast eval`: tables, reports, the sheet of pictures, errors, interruptions."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from lgnet_fast.cli.commands.eval import models_of
from lgnet_fast.data.metrics import METRICS
from lgnet_fast.errors import UsageError
from lgnet_fast.evaluation import EvaluationOptions
from lgnet_fast.evaluation.protocol import fit_picture
from lgnet_fast.evaluation.report import Evaluation, Score, strip
from lgnet_fast.evaluation.scoring import _identity, _plan, _settings
from lgnet_fast.evaluation.suite import SUITE_METRICS
from lgnet_fast.pipeline import Inpainter

from .evaluation_support import invoke_eval, write_waves
from .pipeline_support import BlurFill, ConstantFill, evaluate, noise
from .test_features import weights


@pytest.fixture
def pictures(tmp_path) -> Path:
    return write_waves(tmp_path / "pictures")


def test_the_command_writes_a_table_json_markdown_and_a_sheet(fake, pictures, tmp_path):
    out = tmp_path / "out"
    result = invoke_eval(
        "-i", pictures, "-o", out, "--classes", "10-20", "--size", 64, "--metrics", "l1,psnr,ssim", "--sheet-rows", 2,
        "--device", "cpu",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    written = json.loads((out / "evaluation.json").read_text())
    scores = {score["method"]: score for score in written["scores"]}
    assert list(scores) == ["bundled", "Telea", "Navier-Stokes"]
    assert written["settings"]["classes"] == ["10-20%"]
    # Those in which the network was computed, not the option "auto".
    assert (written["settings"]["device"], written["settings"]["dtype"]) == ("cpu", "float32")
    for title, score in scores.items():
        row = f"| {title} | 5 |"
        (line,) = [line for line in (out / "evaluation.md").read_text().splitlines() if row in line]
        cells = [cell.strip(" *") for cell in line.split("|")[4:7]]
        assert cells == [f"{score['l1']:.2f}", f"{score['psnr']:.2f}", f"{score['ssim']:.4f}"]
        assert all(cell in result.stdout for cell in cells)
    with Image.open(out / "evaluation.png") as sheet:
        # 5 columns of 192 with margins of 6; 2 rows of 192 under captions of 22, and the head.
        assert sheet.size == (5 * 198 + 6, 22 + 2 * 214 + 6)
        originals = [np.asarray(sheet.crop((6, top, 198, top + 192))) for top in (44, 258)]
    for number, original in enumerate(originals):
        picture = Image.fromarray(fit_picture(pictures / f"{number}.png", 64))
        np.testing.assert_array_equal(original, np.asarray(picture.resize((192, 192), Image.Resampling.LANCZOS)))


@pytest.mark.parametrize(("network", "name"), [("alexnet", "AlexNet"), ("vgg16", "VGG-16")])
def test_the_network_of_lpips_is_named(pictures, tmp_path, network, name):
    """Its distances by the two differ by more than those of two models."""
    np.savez(tmp_path / "weights.npz", **weights(network))
    options = {"metrics": ["lpips"], "lpips": tmp_path / "weights.npz", "classes": "10-20", "size": 32}
    result = evaluate(pictures, models={"grey": Inpainter(ConstantFill(0.0, 0.0, 0.0))}, baselines=[], **options)
    assert result.missing == {}
    assert result.legend == f"LPIPS: {name}."
    assert f"\n- LPIPS: {name}.\n" in result.markdown()


def test_a_strip_keeps_the_proportions_of_its_pictures():
    strips = [strip([np.zeros((*size, 3), np.uint8)] * 2) for size in ((40, 80), (80, 40))]
    for encoded, height, width in zip(strips, (96, 192), (192, 96), strict=True):
        with Image.open(io.BytesIO(encoded)) as sheet:
            assert sheet.size == (2 * 192 + 6, 192)
            dark = np.asarray(sheet.crop((0, 0, 192, 192)))[..., 0] < 128
        assert (dark.any(axis=1).sum(), dark.any(axis=0).sum()) == (height, width)


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
        (["-i", "pictures", "--metrics", ""], "--metrics: expected names of l1, psnr, ssim, lpips, fid, got none"),
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
    result = invoke_eval("-o", "out", *arguments)
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


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"size": 64.5}, "size: expected a whole number, got 64.5"),
        ({"seed": "1"}, "seed: expected a whole number, got '1'"),
        ({"sheet_rows": True}, "sheet_rows: expected a whole number, got True"),
        ({"sheet_rows": -1}, "sheet_rows: expected 0 or more, got -1"),
        ({"mask_kind": "stars"}, "mask_kind: expected one of strokes, boxes, mixed, got 'stars'"),
        ({"invert_mask": "no"}, "invert_mask: expected True or False, got 'no'"),
        ({"dtype": 16}, "dtype: expected a text, got 16"),
    ],
)
def test_options_out_of_range_are_refused_at_once(pictures, option, words):
    with pytest.raises(UsageError, match=f"^{words}$"):
        EvaluationOptions(pictures, **option)


def test_titles_of_models(pictures):
    assert models_of([]) == [None]
    assert models_of(["runs/1", "runs/2"]) == ["runs/1", "runs/2"]
    assert models_of(["old=bundled", "new=runs/2=b"]) == {"old": None, "new": "runs/2=b"}
    assert models_of(["bundled", "runs/1"]) == [None, "runs/1"]
    for wrong in (["a=runs/1", "runs/2"], ["a=runs/1", "a=runs/2"]):
        with pytest.raises(UsageError, match=r"as TITLE=DIR, or for none, got a=runs/1, .*runs/2"):
            models_of(wrong)
    pipe = Inpainter(ConstantFill(0, 0, 0))
    with pytest.raises(UsageError, match="titles of their own"):
        evaluate(pictures, models={"Telea": pipe})


def test_every_metric_has_a_column_and_a_field():
    metrics = tuple(dict.fromkeys((*METRICS, *SUITE_METRICS)))
    scores = [
        Score("a", "thin", 1, **dict.fromkeys(metrics, 0.25)),
        Score("b", "thin", 1, **dict.fromkeys(metrics, 2)),
    ]
    head, _, first, second = Evaluation(scores, metrics).markdown().splitlines()
    assert [cell.split()[-1] for cell in head.split(" | ")[3:-1]] == ["↓", "↑", "↑", "↓", "↓"]
    assert [line.count("**") // 2 for line in (first, second)] == [4, 2]


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
    lines = (tmp_path / "out" / "evaluation.md").read_text(encoding="utf-8").splitlines()
    shown = {line.split("|")[2].strip(): line.split("|")[5].strip() for line in lines if line.startswith("| all")}
    assert shown == {"exact": "**∞**", "dark": f"{by_title['dark']['psnr']:.2f}"}
    missing = Evaluation([Score("a", "all", 1, l1=0.0)], metrics=("l1", "psnr"), missing={"psnr": "no time"})
    assert missing.markdown().splitlines()[2] == "| all | a | 1 | 0.00 | n/a |"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_score_that_json_cannot_hold_is_refused(tmp_path, value):
    """Rather than written as NaN, which few readers of JSON take; a file that is there stays as it is."""
    (tmp_path / "evaluation.json").write_text("{}")
    with pytest.raises(ValueError, match="JSON"):
        Evaluation([Score("a", "all", 1, l1=value)], metrics=("l1",)).write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["evaluation.json"]
    assert (tmp_path / "evaluation.json").read_text() == "{}"


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
        result = invoke_eval("-i", tmp_path / "evaluation.png", "-o", tmp_path, "--sheet-rows", rows)
        assert result.exit_code == 2
        assert result.stderr.startswith("error: --output: expected another folder than that of the picture")
    assert (tmp_path / "evaluation.png").read_bytes() == before


def test_titles_are_cells_of_the_markdown_table():
    (line,) = Evaluation([Score("a|b\nc", "all", 3, l1=1.0)], metrics=("l1",)).markdown().splitlines()[2:3]
    assert line == r"| all | a\|b c | 3 | 1.00 |"


def test_a_sheet_of_an_earlier_evaluation_never_stays(fake, pictures, tmp_path):
    arguments = ["-i", pictures, "-o", tmp_path / "out", "--classes", "1", "--size", 64, "--metrics", "l1"]
    first = invoke_eval(*arguments, "--baselines", "none")
    assert "evaluation.md, evaluation.png" in first.stderr
    assert (tmp_path / "out" / "evaluation.png").is_file()
    again = invoke_eval(*arguments, "--baselines", " ns , telea", "--sheet-rows", 0)
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
    model = tmp_path / "model" / "model.safetensors"
    model.parent.mkdir()
    own, identities = replace(options, models=[str(model.parent)]), set()
    for content in (b"x", b"other"):
        model.write_bytes(content)
        identities.add(_identity(own, _settings(own, _plan(own).holes)))
    assert len(identities) == 2
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
        stopped = invoke_eval(*arguments)
    assert (stopped.exit_code, stopped.stdout) == (130, "")
    assert stopped.stderr.strip() == "interrupted: the same command goes on from here"
    assert not list((tmp_path / "out").glob("evaluation.*"))
    assert invoke_eval(*arguments).exit_code == 0
    assert len(fake.seen) == 5


def test_a_table_in_a_file_has_room_for_its_columns(fake, pictures, tmp_path, monkeypatch):
    arguments = ["--suite", "--size", 64, "--classes", "box", "--sheet-rows", 0]
    widest = {}
    for columns in (None, "50"):
        monkeypatch.delenv("COLUMNS", raising=False)
        if columns is not None:
            monkeypatch.setenv("COLUMNS", columns)
        result = invoke_eval("-i", pictures, "-o", tmp_path / "out", *arguments)
        widest[columns] = max(map(len, result.stdout.splitlines()))
    assert 80 < widest[None] <= 120
    assert widest["50"] <= 50
