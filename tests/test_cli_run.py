"""`lgnet-fast run`: one picture, folders, pairs, resume, reports, exit codes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from lgnet_fast import cli
from lgnet_fast.errors import OutOfMemoryError, UsageError, WeightsError
from lgnet_fast.jobs import entries
from lgnet_fast.jobs.entries import run_items
from lgnet_fast.jobs.journal import Journal
from lgnet_fast.pipeline import Inpainter

from .pipeline_support import BlurFill, box_mask, noise, plan_items, write_picture

HOLE = box_mask(40, 60, (10, 15, 30, 45))


def _mask(path: Path, hole: np.ndarray = HOLE) -> Path:
    return write_picture(path, hole.astype(np.uint8) * 255)


def _run(*arguments):
    return CliRunner().invoke(cli.app, ["run", *map(str, arguments)])


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_one_picture_to_a_file(fake, tmp_path):
    picture, mask = write_picture(tmp_path / "a.png", noise(40, 60)), _mask(tmp_path / "m.png")
    result = _run("-i", picture, "-m", mask, "-o", tmp_path / "new" / "out.png")
    assert result.exit_code == 0, result.output
    assert "1 filled, 0 skipped, 0 failed of 1" in result.stderr
    assert result.stdout == ""
    filled = np.asarray(Image.open(tmp_path / "new" / "out.png"))
    np.testing.assert_array_equal(filled, Inpainter(BlurFill())(noise(40, 60), HOLE))


def test_options_reach_the_pipeline(fake, tmp_path):
    picture, mask = write_picture(tmp_path / "a.png", noise(40, 60)), _mask(tmp_path / "m.png", ~HOLE)
    report = tmp_path / "report.json"
    result = _run(
        "-i", picture, "-m", mask, "-o", tmp_path / "o.png", "--strategy", "tile", "--invert-mask", "--dilate", 2,
        "--feather", 3, "--mask-threshold", 0.3, "--report", report, "--dtype", "bfloat16", "--device", "cpu",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    expected = Inpainter(BlurFill(), dtype="bfloat16")(noise(40, 60), HOLE, strategy="tile", dilate=2, feather=3)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "o.png")), expected)
    settings = json.loads(report.read_text())["settings"]
    assert settings["dtype"] == "bfloat16"
    assert (settings["strategy"], settings["dilate"], settings["feather"]) == ("tile", 2, 3)


def test_a_folder_with_one_mask_keeps_names_formats_and_subfolders(fake, tmp_path):
    write_picture(tmp_path / "in" / "a.png", noise(40, 60))
    write_picture(tmp_path / "in" / "b.JPG", noise(40, 60))
    write_picture(tmp_path / "in" / "deep" / "er" / "c.webp", noise(40, 60))
    (tmp_path / "in" / "notes.txt").write_text("not a picture")
    (tmp_path / "in" / ".hidden.png").write_bytes(b"")
    result = _run("-i", tmp_path / "in", "-m", _mask(tmp_path / "m.png"), "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert _files(tmp_path / "out") == ["a.png", "b.JPG", "deep/er/c.webp"]
    assert Image.open(tmp_path / "out" / "b.JPG").format == "JPEG"
    assert Image.open(tmp_path / "out" / "deep" / "er" / "c.webp").format == "WEBP"


def test_format_and_quality(fake, tmp_path):
    picture, mask = write_picture(tmp_path / "a.png", noise(40, 60)), _mask(tmp_path / "m.png")
    sizes = []
    for quality in (20, 95):
        out = tmp_path / str(quality)
        assert (
            _run("-i", picture, "-m", mask, "-o", f"{out}/", "--format", "jpeg", "--quality", quality).exit_code == 0
        )
        assert _files(out) == ["a.jpg"]
        assert Image.open(out / "a.jpg").format == "JPEG"
        sizes.append((out / "a.jpg").stat().st_size)
    assert sizes[0] < sizes[1] / 2


def test_a_file_named_wrongly_keeps_the_format_of_its_contents(fake, tmp_path):
    picture = tmp_path / "in" / "really_a_png.jpg"
    write_picture(picture, noise(40, 60), format="PNG")
    assert _run("-i", picture, "-m", _mask(tmp_path / "m.png"), "-o", tmp_path / "out/").exit_code == 0
    assert _files(tmp_path / "out") == ["really_a_png.png"]


def test_masks_are_paired_by_stem_and_one_that_is_missing_fails_alone(fake, tmp_path):
    for name in ("a.png", "b.png", "sub/a.png", "sub/d.png"):
        write_picture(tmp_path / "in" / name, noise(40, 60))
    small = box_mask(40, 60, (0, 0, 5, 5))
    _mask(tmp_path / "masks" / "a.png")
    _mask(tmp_path / "masks" / "sub" / "a.bmp", small)
    _mask(tmp_path / "masks" / "elsewhere" / "d.png", small)
    report = tmp_path / "report.json"
    result = _run("-i", tmp_path / "in", "-m", tmp_path / "masks", "-o", tmp_path / "out", "--report", report)
    assert result.exit_code == 1
    assert "3 filled, 0 skipped, 1 failed of 4" in result.stderr
    assert "no file named 'b'" in result.stderr
    assert _files(tmp_path / "out") == ["a.png", "sub/a.png", "sub/d.png"]
    for name, hole in (("a.png", HOLE), ("sub/a.png", small), ("sub/d.png", small)):
        changed = (np.asarray(Image.open(tmp_path / "out" / name)) != noise(40, 60)).any(axis=2)
        assert changed[hole].mean() > 0.9
        assert not changed[~hole].any()
    items = {Path(item["input"]).name: item for item in json.loads(report.read_text())["items"]}
    assert items["b.png"]["status"] == "failed"
    assert items["b.png"]["mask"] is None
    assert items["d.png"]["hole_ratio"] == pytest.approx(25 / 2400, abs=1e-6)


def test_the_mask_of_another_picture_is_not_taken(fake, tmp_path):
    for name in ("a.png", "sub/a.png"):
        write_picture(tmp_path / "in" / name, noise(40, 60))
    _mask(tmp_path / "masks" / "sub" / "a.png")
    result = _run("-i", tmp_path / "in", "-m", tmp_path / "masks", "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert "1 filled, 0 skipped, 1 failed of 2" in result.stderr
    other = Path("sub") / "a.png"
    assert f"no file named 'a' in {str(tmp_path / 'masks')!r} but {other}, another picture's" in result.stderr
    assert _files(tmp_path / "out") == ["sub/a.png"]


def test_a_picture_that_is_moved_while_the_network_runs_is_written(fake, tmp_path, monkeypatch):
    source = write_picture(tmp_path / "a.jpg", noise(40, 60), quality=30)
    with Image.open(source) as opened:
        tables = opened.quantization
    forward = BlurFill.forward

    def move_and_fill(*arguments):
        source.rename(tmp_path / "moved.jpg")
        return forward(*arguments)

    monkeypatch.setattr(BlurFill, "forward", move_and_fill)
    result = _run("-i", source, "-m", _mask(tmp_path / "m.png"), "-o", tmp_path / "out.jpg")
    assert result.exit_code == 0, result.output
    assert not source.exists()
    with Image.open(tmp_path / "out.jpg") as written:
        assert written.quantization == tables


def test_duplicate_stems(fake, tmp_path):
    for name in ("a.png", "a.bmp", "b.png"):
        write_picture(tmp_path / "in" / name, noise(40, 60))
    for name in ("a.png", "a.bmp", "b.bmp", "b.tiff"):
        _mask(tmp_path / "masks" / name)
    items = {
        item.picture.name: item for item in plan_items(tmp_path / "in", tmp_path / "masks", tmp_path / "out", "png")
    }
    assert items["a.png"].mask == tmp_path / "masks" / "a.png"  # the exact name decides
    assert items["a.bmp"].mask == tmp_path / "masks" / "a.bmp"
    assert items["b.png"].mask is None
    assert "b.bmp, b.tiff" in items["b.png"].problem
    names = sorted(item.output.name for item in items.values())
    assert names == ["a.bmp.png", "a.png.png", "b.png"]


def test_bad_files_do_not_stop_the_others(fake, tmp_path):
    write_picture(tmp_path / "in" / "a.png", noise(40, 60))
    (tmp_path / "in" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    cut = write_picture(tmp_path / "in" / "cut.jpg", noise(40, 60))
    cut.write_bytes(cut.read_bytes()[:900])
    write_picture(tmp_path / "in" / "larger.png", noise(80, 60))
    write_picture(tmp_path / "in" / "z.png", noise(40, 60))
    result = _run("-i", tmp_path / "in", "-m", _mask(tmp_path / "m.png"), "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert "2 filled, 0 skipped, 3 failed of 5" in result.stderr
    assert "60x80 (width x height), got 60x40" in result.stderr
    assert _files(tmp_path / "out") == ["a.png", "z.png"]
    assert "Traceback" not in result.output


def test_skip_existing_resumes(fake, tmp_path):
    for name in ("a.png", "b.png"):
        write_picture(tmp_path / "in" / name, noise(40, 60))
    mask, out = _mask(tmp_path / "m.png"), tmp_path / "out"
    out.mkdir()
    (out / "a.png").write_bytes(b"kept as it is")
    result = _run("-i", tmp_path / "in", "-m", mask, "-o", out, "--skip-existing")
    assert result.exit_code == 0
    assert "1 filled, 1 skipped, 0 failed of 2" in result.stderr
    assert (out / "a.png").read_bytes() == b"kept as it is"
    assert len(fake.seen) == 1
    assert _run("-i", tmp_path / "in", "-m", mask, "-o", out).exit_code == 0
    assert (out / "a.png").read_bytes() == (out / "b.png").read_bytes()


def test_resume_says_that_a_run_without_it_kept_no_journal(fake, tmp_path):
    for name in ("a.png", "b.png"):
        write_picture(tmp_path / "in" / name, noise(40, 60))
    run = ("-i", tmp_path / "in", "-m", _mask(tmp_path / "m.png"), "-o", tmp_path / "out")
    assert "warning" not in _run(*run).stderr
    told = _run(*run, "--resume").stderr
    assert "warning: --resume: no run with --resume and these settings was here before" in told
    assert "2 filled, 0 skipped" in told
    again = _run(*run, "--resume").stderr
    assert "warning" not in again
    assert "2 filled (2 by an earlier run)" in again
    assert len(fake.seen) == 4
    left = _run(*run, "--resume", "--skip-existing", "--dilate", "1").stderr
    assert "warning" not in left
    assert "0 filled, 2 skipped" in left
    other = ("-i", tmp_path / "in", "-m", tmp_path / "m.png", "-o", tmp_path / "other")
    assert "warning" not in _run(*other, "--resume").stderr


@pytest.mark.skipif(sys.platform == "win32", reason="a folder with open files cannot be removed there")
def test_a_folder_of_results_that_is_removed_during_a_run_with_a_journal(fake, tmp_path, monkeypatch):
    """The journal, which was in it, is not waited for."""
    for name in ("a.png", "b.png"):
        write_picture(tmp_path / "in" / name, noise(40, 60))
    out, save = tmp_path / "out", entries.save_picture

    def remove_first(picture, path, **options):
        if path.name == "b.png":
            shutil.rmtree(out)
        save(picture, path, **options)

    monkeypatch.setattr(entries, "save_picture", remove_first)
    monkeypatch.setattr(Journal, "collect", lambda self: pytest.fail("it would wait for five minutes"))
    result = _run("-i", tmp_path / "in", "-m", _mask(tmp_path / "m.png"), "-o", out, "--resume")
    assert result.exit_code == 0, result.output
    assert "2 filled, 0 skipped" in result.stderr
    assert [file.name for file in out.iterdir()] == ["b.png"]


def test_report(fake, tmp_path):
    picture, mask = write_picture(tmp_path / "a.png", noise(40, 60)), _mask(tmp_path / "m.png")
    empty = _mask(tmp_path / "empty.png", HOLE & False)
    report = tmp_path / "reports" / "r.json"
    assert _run("-i", picture, "-m", mask, "-o", tmp_path / "o.png", "--report", report).exit_code == 0
    data = json.loads(report.read_text())
    (item,) = data["items"]
    assert item.pop("seconds") > 0
    assert item == {
        "input": str(picture), "mask": str(mask), "output": str(tmp_path / "o.png"), "status": "ok", "size": [40, 60],
        "strategy": "full", "passes": 1, "hole_ratio": 0.25, "warnings": [], "error": None,
    }  # fmt: skip
    assert data["totals"].pop("seconds") > 0
    assert data["totals"] == {"items": 1, "ok": 1, "failed": 0, "skipped": 0, "left_out": 0}
    assert set(data["versions"]) == {"lgnet_fast", "torch", "numpy", "pillow", "python"}

    result = _run("-i", picture, "-m", empty, "-o", tmp_path / "o.png", "--report", report, "--allow-any-mask")
    assert result.exit_code == 0
    assert "no hole pixel" in result.stderr
    (item,) = json.loads(report.read_text())["items"]
    assert (item["status"], item["strategy"], item["passes"], len(item["warnings"])) == ("ok", None, 0, 1)
    assert _files(tmp_path / "reports") == ["r.json"]


def test_turned_photo_comes_out_upright_with_its_metadata(fake, tmp_path):
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "Camera"
    picture = write_picture(
        tmp_path / "in" / "photo.jpg", noise(60, 40), exif=exif, icc_profile=b"profile", dpi=(72, 72)
    )
    sideways = _mask(tmp_path / "sideways.png", HOLE.T)
    result = _run("-i", picture, "-m", sideways, "-o", tmp_path / "out/")
    assert result.exit_code == 1
    assert "orientation 6" in result.stderr
    assert _run("-i", picture, "-m", _mask(tmp_path / "m.png"), "-o", tmp_path / "out/").exit_code == 0
    saved = Image.open(tmp_path / "out" / "photo.jpg")
    assert saved.size == (60, 40)
    assert saved.getexif().get(0x0112, 1) == 1
    assert saved.getexif()[0x010F] == "Camera"
    assert saved.info["icc_profile"] == b"profile"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-i", "none.png", "-m", "m.png", "-o", "o.png"], "--input: 'none.png' does not exist"),
        (["-i", "a.png", "-m", "none.png", "-o", "o.png"], "--mask: 'none.png' does not exist"),
        (["-i", "a.png", "-m", "m.png", "-o", "a.png"], "would replace an input"),
        (["-i", "a.png", "-m", "m.png", "-o", "."], "would replace an input"),
        (["-i", "a.png", "-m", "m.png", "-o", "m.png"], "would replace an input"),
        (["-i", "a.png", "-m", "m.png", "-o", "o.png", "--format", "jpeg"], "does not go with --format jpeg"),
        (["-i", "a.png", "-m", "m.png", "-o", "text.txt"], "got the file 'text.txt'"),
        (["-i", "empty", "-m", "m.png", "-o", "out"], "no pictures in 'empty'"),
        (["-i", "a.png", "-m", "empty", "-o", "out/"], "no pictures in 'empty'"),
        (["-i", "a.png", "-m", "m.png", "-o", "o.png", "--report", "a.png"], "--report"),
        (["-i", "a.png", "-m", "m.png", "-o", "o.png", "--report", "empty"], "got the folder"),
        (["-i", "a.png", "-m", "m.png", "-o", "o.png", "--device", "cuda:99"], "error: --device: cuda:99"),
        (["-i", "a.png", "-m", "m.png", "-o", "o.png", "--strategy", "huge"], "huge"),
        (["-i", "a.png", "-m", "m.png", "-o", "o.png", "--dilate", "-1"], "--dilate"),
        (["-i", "a.png", "-m", "m.png", "-o", "o.png", "--quality", "0"], "--quality"),
        (["-i", "a.png", "-m", "m.png", "-o", "o.tif", "--quality", "50"], "--quality: expected results in JPEG"),
        (["-i", "a.png", "-m", "m.png", "-o", "o/", "--quality", "50", "--format", "png"], "HEIC, got PNG"),
        (["-i", "a.png", "-m", "m.png", "-o", "o.png", "--mask-threshold", "1"], "--mask-threshold"),
        (["-i", "a.png", "-o", "o.png"], "--mask"),
    ],
)
def test_usage_errors_exit_with_2_and_write_nothing(fake, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    write_picture(tmp_path / "a.png", noise(40, 60))
    _mask(tmp_path / "m.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("text")
    before = {name: (tmp_path / name).read_bytes() for name in _files(tmp_path)}
    result = _run(*arguments)
    assert result.exit_code == 2, result.output
    assert words in result.stderr
    assert "Traceback" not in result.output
    assert {name: (tmp_path / name).read_bytes() for name in _files(tmp_path)} == before


def test_weights_that_are_not_there_are_one_line(tmp_path):
    picture, mask = write_picture(tmp_path / "a.png", noise(40, 60)), _mask(tmp_path / "m.png")
    result = _run("-i", picture, "-m", mask, "-o", tmp_path / "o.png", "--model", tmp_path / "no_model")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["models/typo", "./typo", "../typo"])
def test_a_model_folder_that_is_not_there_is_said_at_once(tmp_path, monkeypatch, name):
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WeightsError, match=f"expected a model directory or a hub id, got '{name}', which does not"):
        Inpainter.from_pretrained(name, device="cpu")


def test_errors_that_concern_every_item_stop_the_run_and_others_do_not(tmp_path):
    picture, mask = write_picture(tmp_path / "a.png", noise(40, 60)), _mask(tmp_path / "m.png")
    items = plan_items(picture, mask, tmp_path / "o.png")

    class Fails(BlurFill):
        error: Exception

        def forward(self, image, mask, return_stages=False):
            raise self.error

    model = Fails()
    for error in (OutOfMemoryError("full"), ZeroDivisionError("oops")):
        model.error = error
        (entry,) = run_items(items, Inpainter(model))
        assert entry.status == "failed"
        assert str(error) in entry.error
    model.error = WeightsError("torn")
    with pytest.raises(WeightsError):
        run_items(items, Inpainter(model))
    assert not (tmp_path / "o.png").exists()


@pytest.mark.parametrize(("share", "words"), [(0, "no hole pixel"), (0.96, "96.0% of the picture is hole")])
def test_a_mask_that_selects_nothing_or_nearly_all_fails_before_the_network(fake, tmp_path, share, words):
    hole = np.zeros((50, 60), bool)
    hole.reshape(-1)[: round(share * 3000)] = True
    picture, out = write_picture(tmp_path / "a.png", noise(50, 60)), tmp_path / "o.png"
    arguments = ("-i", picture, "-m", _mask(tmp_path / "m.png", hole), "-o", out)
    result = _run(*arguments)
    assert result.exit_code == 1
    assert f"failed: {picture}: mask: {words}" in result.stderr
    assert "--allow-any-mask" in result.stderr
    assert "returned unchanged" not in result.stderr
    assert not out.exists()
    assert fake.seen == []
    result = _run(*arguments, "--allow-any-mask")
    assert result.exit_code == 0
    assert f"warning: {picture}: mask: {words}" in result.stderr
    assert out.exists()


def test_mask_channel(fake, tmp_path):
    picture = write_picture(tmp_path / "a.png", noise(40, 60))
    rubbed_out = write_picture(
        tmp_path / "m.png", np.dstack([noise(40, 60), np.where(HOLE, 0, 255).astype(np.uint8)])
    )
    result = _run("-i", picture, "-m", rubbed_out, "-o", tmp_path / "o.png")
    assert result.exit_code == 1
    assert "--mask-channel" in result.stderr
    result = _run("-i", picture, "-m", rubbed_out, "-o", tmp_path / "o.png", "--mask-channel", "inverse_alpha")
    assert result.exit_code == 0
    filled = np.asarray(Image.open(tmp_path / "o.png"))
    np.testing.assert_array_equal(filled, Inpainter(BlurFill())(noise(40, 60), HOLE))


def test_masks_and_results_inside_the_picture_folder_are_not_pictures(tmp_path):
    for name in ("a.png", "out/a.png", "masks/a.png"):
        _mask(tmp_path / name)
    (item,) = plan_items(tmp_path, tmp_path / "masks", tmp_path / "out")
    assert item.picture == tmp_path / "a.png"
    with pytest.raises(UsageError, match="would replace an input"):
        plan_items(tmp_path, tmp_path / "masks", tmp_path / "masks")


def test_the_command_itself_with_the_bundled_model(tmp_path):
    """The console script's entry, in a process of its own: no progress bar and no markup outside a terminal."""
    from lgnet_fast import samples

    picture, mask = samples.sample_paths()["coffee"]
    shutil.copy(picture, tmp_path / "[bold]coffee.png")
    command = [sys.executable, "-c", "from lgnet_fast.cli import main; main()", "run", "-i", "[bold]coffee.png"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    done = subprocess.run(
        [*command, "-m", str(mask), "-o", "out/", "--backend", "eager"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1].startswith("1 filled")
    assert "\x1b" not in done.stderr
    filled = np.asarray(Image.open(tmp_path / "out" / "[bold]coffee.png"))
    hole, original = np.asarray(Image.open(mask).convert("L")) > 127, np.asarray(Image.open(picture))
    np.testing.assert_array_equal(filled[~hole], original[~hole])
    assert (filled[hole] != original[hole]).mean() > 0.5
