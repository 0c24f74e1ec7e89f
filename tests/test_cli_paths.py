"""`lgnet-fast run`: unusual outputs, masks and arguments; everything left out is reported."""

from __future__ import annotations

import io
import json
import os
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from lgnet_fast import cli
from lgnet_fast.data import folders
from lgnet_fast.errors import UsageError
from lgnet_fast.jobs import options, outputs

from .cli_support import FILLED
from .cli_support import names as _names
from .cli_support import run as _run
from .pipeline_support import HOLE, box_mask, noise, plan_items, png_bytes, write_picture


def test_results_of_equal_names_are_numbered_from_two():
    # The third picture's longer name is what the first one has already.
    names = [Path(name) for name in ("a.png", "A.png", "a.png", "b.png")]
    longer = [Path(name) for name in ("a.jpg.png", "A.bmp.png", "a.jpg.png", "b.bmp.png")]
    assert [str(name) for name in outputs.distinct(names, longer)] == [
        "a.jpg.png", "A.bmp.png", "a.jpg-2.png", "b.png",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"quality": 500}, "quality: expected a whole number from 1 to 100, got 500"),
        ({"quality": True}, "quality: expected a whole number from 1 to 100, got True"),
        ({"quality": "90"}, "quality: expected a whole number from 1 to 100, got '90'"),
        ({"dilate": -1}, "dilate: expected a whole number of pixels >= 0, got -1"),
        ({"feather": 1.5}, "feather: expected a whole number of pixels >= 0, got 1.5"),
        ({"mask_threshold": "half"}, "mask_threshold: expected 0 <= value < 1, got 'half'"),
        ({"mask_threshold": float("nan")}, "mask_threshold: expected 0 <= value < 1, got nan"),
        ({"mask_channel": "red"}, "mask_channel: expected one of auto, .*, got 'red'"),
        ({"invert_mask": "no"}, "invert_mask: expected True or False, got 'no'"),
        ({"strategy": "huge"}, "strategy: expected one of auto, .*, got 'huge'"),
        ({"allow_any_mask": 1}, "allow_any_mask: expected bool, got 1"),
        ({"skip_existing": "no"}, "skip_existing: expected bool, got 'no'"),
        ({"source": "a.png"}, "source: expected Path, got 'a.png'"),
        ({"mask": "m.png"}, "mask: expected Path or None, got 'm.png'"),
        ({"out": None}, "out: expected Path or str, got None"),
        ({"report": "r.json"}, "report: expected Path or None, got 'r.json'"),
        ({"format": ["png"]}, r"format: expected str or None, got \['png'\]"),
        ({"mask_suffix": 3}, "mask_suffix: expected str or None, got 3"),
        ({"model": Path("m")}, r"model: expected str or None, got .*Path\('m'\)"),
        ({"dtype": 16}, "dtype: expected str, got 16"),
    ],
)
def test_fields_out_of_range_are_refused_at_once(option, words):
    """Not when the first result is written."""
    fields = {"source": Path("a.png"), "mask": Path("m.png"), "out": "o.jpg", **option}
    with pytest.raises(UsageError, match=f"^{words}$"):
        options.FillOptions(**fields)


# -- outputs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("result.pgn", "got 'result.pgn'; end it with a slash"),
        ("result.v2", "end it with a slash"),
        ("result.psd", "result.psd"),
        ("http://example.org/a.png", "got the address"),
        ("s3://bucket/a.png", "got the address"),
        ("", "got an empty text"),
        ("m.png/a.png", "m.png' is no folder"),
        ("x" * 300 + ".png", "xxx" if os.name == "nt" else "File name too long"),
    ],
)
def test_outputs_that_cannot_be_meant_are_refused_before_work(case, fake, out, words):
    before = _names(case)
    result = _run("-i", "a.png", "-m", "m.png", "-o", out)
    assert result.exit_code == 2, result.output
    assert words in " ".join(result.stderr.replace("│", " ").split())
    assert _names(case) == before
    assert fake.seen == []


def test_a_slash_makes_a_folder_of_any_name(case):
    assert _run("-i", "a.png", "-m", "m.png", "-o", "result.v2/").exit_code == 0
    assert _run("-i", "in", "-m", "m.png", "-o", "other.v3").exit_code == 0
    assert _names(case / "result.v2") == ["a.png"]
    assert _names(case / "other.v3") == ["a.png", "b.jpg"]
    result = _run("-i", "in", "-m", "m.png", "-o", "results.png")
    assert result.exit_code == 2
    assert "got a picture's name 'results.png'" in result.stderr


def test_a_format_that_cannot_be_written_here_is_refused(case, monkeypatch):
    for module in (options, outputs):
        monkeypatch.setattr(
            module, "reason_against_writing", lambda format: "no encoder" if format == "AVIF" else None
        )
    for arguments in (["-o", "o.avif"], ["-o", "o/", "--format", "avif"]):
        result = _run("-i", "a.png", "-m", "m.png", *arguments)
        assert result.exit_code == 2
        assert "no encoder" in result.stderr


@pytest.mark.parametrize("out", ["kept/o.png", "kept/new/deeper/", "kept/old.png", "link.png"])
def test_folders_without_the_right_to_write_are_refused_before_work(case, fake, monkeypatch, out):
    """By a spy, since the tests may run as root, who may write everywhere."""
    write_picture(case / "kept" / "old.png", noise(40, 60))
    (case / "link.png").symlink_to(case / "kept" / "old.png")
    access = os.access
    refuse = lambda path, mode: str(path) != str(case / "kept") and access(path, mode)  # noqa: E731
    monkeypatch.setattr(os, "access", refuse)
    result = _run("-i", "a.png", "-m", "m.png", "-o", out)
    assert result.exit_code == 2, result.output
    assert "no right to write in" in result.stderr
    assert fake.seen == []


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no file system that takes no files")
@pytest.mark.parametrize("out", ["/proc/o.png", "/proc/new/deeper/", "link.png"])
def test_folders_in_which_no_file_can_be_made_are_refused_before_work(case, fake, out):
    (case / "link.png").symlink_to("/proc/linked.png")
    result = _run("-i", "a.png", "-m", "m.png", "-o", out)
    assert result.exit_code == 2, result.output
    assert f"--output: '{out.rstrip('/')}' cannot be written: no" in result.stderr
    assert fake.seen == []


def test_the_trial_of_an_output_leaves_nothing(case, fake, monkeypatch):
    """Where the run ends before its first result."""
    (case / "new").mkdir()
    monkeypatch.setattr("lgnet_fast.jobs.fill.run_items", lambda *arguments, **options: None)
    for out in ("new/o.png", "new/deeper/", "new/"):
        assert _run("-i", "a.png", "-m", "m.png", "-o", out).exit_code == 0
    assert list((case / "new").iterdir()) == []


def test_a_picture_that_the_format_cannot_hold_fails_before_the_network_runs(case, fake):
    write_picture(case / "rgba.png", np.dstack([noise(40, 60), noise(40, 60)[..., 0]]))
    result = _run("-i", "rgba.png", "-m", "m.png", "-o", "o.jpg")
    assert result.exit_code == 1
    assert "JPEG holds" in result.stderr
    assert fake.seen == []
    write_picture(case / "long.png", noise(2, 16384))
    write_picture(case / "long_mask.png", (np.arange(2 * 16384).reshape(2, 16384) % 7 == 0).astype(np.uint8) * 255)
    result = _run("-i", "long.png", "-m", "long_mask.png", "-o", "o.webp")
    assert result.exit_code == 1
    assert "WEBP holds at most 16383 pixels a side, got 16384" in result.stderr
    assert fake.seen == []


def test_new_formats_pass_through_a_folder_run(case):
    for name in ("c.ppm", "d.tga", "e.jp2"):
        write_picture(case / "in" / name, noise(40, 60))
    assert _run("-i", "in", "-m", "m.png", "-o", "out").exit_code == 0
    assert _names(case / "out") == ["a.png", "b.jpg", "c.ppm", "d.tga", "e.jp2"]
    for name in ("c.ppm", "d.tga", "e.jp2"):
        np.testing.assert_array_equal(np.asarray(Image.open(case / "out" / name)), FILLED)


def test_a_photograph_becomes_a_tiff_with_its_exif(case):
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9003] = "2020:01:01 00:00:00"
    Image.fromarray(noise(40, 60)).save(case / "photo.jpg", exif=exif)
    result = _run("-i", "photo.jpg", "-m", "m.png", "-o", "o.tif")
    assert result.exit_code == 0, result.stderr
    with Image.open(case / "o.tif") as saved:
        assert (saved.format, saved.size) == ("TIFF", (60, 40))
        assert saved.getexif().get_ifd(0x8769) == {0x9003: "2020:01:01 00:00:00"}


def test_results_of_names_that_meet_are_all_kept(case):
    names = ["p.png", "P.PNG", "p.bmp", "p.png.png"]
    items = {}
    for name in names:
        write_picture(case / "many" / name, noise(40, 60), format="BMP" if name.endswith("bmp") else "PNG")
    for item in plan_items(case / "many", case / "m.png", case / "out", "png"):
        items[item.picture.name] = item.output.name
    assert len({name.casefold() for name in items.values()}) == len(list((case / "many").iterdir())), items
    assert items["p.png.png"] == "p.png.png"


# -- what is left out ---------------------------------------------------------------------------------------------


def test_pictures_that_are_not_read_are_named_and_the_exit_code_tells(case, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    for name in ("IMG_1.HEIC", "raw.CR2", "deep/art.psd", "notes.txt", ".hidden.heic"):
        (case / "in" / name).parent.mkdir(exist_ok=True)
        (case / "in" / name).write_bytes(b"x")
    result = _run("-i", "in", "-m", "m.png", "-o", "out", "--report", "r.json")
    assert result.exit_code == 1
    assert "2 filled, 0 skipped, 0 failed, 3 left out of 5" in result.stderr
    data = json.loads(Path("r.json").read_text())
    left = {Path(item["input"]).name: item["error"] for item in data["items"] if item["status"] == "left_out"}
    assert set(left) == {"IMG_1.HEIC", "raw.CR2", "art.psd"}
    assert "pip install 'lgnet-fast[heif]'" in left["IMG_1.HEIC"]
    assert "pip install 'lgnet-fast[heif]'" in result.stderr
    assert data["totals"]["left_out"] == 3
    assert _names(case / "out") == ["a.png", "b.jpg"]


def test_a_folder_in_the_place_of_a_result_fails_before_the_network_runs(case, fake):
    (case / "out" / "a.png").mkdir(parents=True)
    result = _run("-i", "in", "-m", "m.png", "-o", "out")
    assert result.exit_code == 1
    picture, folder = Path("in/a.png"), str(Path("out/a.png"))
    assert f"failed: {picture}: out: expected a file, got the folder {folder!r}" in result.stderr
    assert (_names(case / "out"), len(fake.seen)) == (["b.jpg"], 1)


def test_shards_beside_pictures_are_named(case):
    with tarfile.open(case / "in" / "more.tar", "w") as tar:
        tar.add(case / "a.png", "x.png")
    result = _run("-i", "in", "-m", "m.png", "-o", "out")
    assert result.exit_code == 1
    assert f"left out: {Path('in/more.tar')}: a tar shard beside pictures" in result.stderr
    assert "2 filled, 0 skipped, 0 failed, 1 left out of 3" in result.stderr
    assert _names(case / "out") == ["a.png", "b.jpg"]


@pytest.mark.parametrize("side", ["in", "masks"])
def test_folders_that_cannot_be_read_are_named(case, monkeypatch, side):
    """By a spy, since the tests may run as root, who can read everything."""
    for name in ("a", "b", "sub/c"):
        write_picture(case / "masks" / f"{name}.png", HOLE.astype(np.uint8) * 255)
    write_picture(case / "in" / "sub" / "c.png", noise(40, 60))
    walk, folder = os.scandir, os.path.join(side, "sub")

    def refuse(path):
        if str(path) == folder:
            raise PermissionError(13, "Permission denied", str(path))
        return walk(path)

    monkeypatch.setattr(os, "scandir", refuse)
    result = _run("-i", "in", "-m", "masks", "-o", "out", "--report", "r.json")
    assert result.exit_code == 1
    assert f"left out: {folder}: the folder cannot be read (Permission denied)" in result.stderr
    assert "1 left out of" in result.stderr
    items = {item["input"]: item for item in json.loads(Path("r.json").read_text())["items"]}
    assert items[folder]["status"] == "left_out"


def test_why_no_mask_of_a_folder_can_be_read_is_said(case, monkeypatch):
    (case / "masks").mkdir()
    (case / "masks" / "a.psd").write_bytes(b"x")
    result = _run("-i", "in", "-m", "masks", "-o", "out")
    assert result.exit_code == 2
    reason = f"{Path('masks/a.psd')}: pictures of the format .psd are not read here"
    assert f"error: --mask: no pictures in 'masks' ({reason})" in result.stderr
    _shard(case / "some.tar", {"a.png": png_bytes(noise(40, 60))})
    result = _run("-i", "some.tar", "-m", "masks", "-o", "out")
    assert f"error: --mask: no pictures in 'masks' ({reason})" in result.stderr


def test_links_to_folders_are_followed_once(case):
    write_picture(case / "elsewhere" / "c.png", noise(40, 60))
    (case / "elsewhere" / "loop").symlink_to(case / "elsewhere")
    (case / "in" / "linked").symlink_to(case / "elsewhere")
    (case / "in" / "again").symlink_to(case / "in")
    found = [path.relative_to(case / "in").as_posix() for path in folders.pictures_in(case / "in", [])]
    assert found == ["a.png", "b.jpg", "linked/c.png"]


def _shard(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo("replaced.png" if "\0" in name else name)
            info.pax_headers = {"path": name} if "\0" in name else {}
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_one_bad_name_in_a_shard_does_not_end_the_run(case):
    bad = ["nul\0byte.png", "line\nfeed.png", "\x1b[31mred.png", "../out.png", "/root.png", "l" * 300 + ".png"]
    _shard(case / "x.tar", {name: png_bytes(noise(40, 60)) for name in [*bad, "good.png", "caption.txt", "o.psd"]})
    result = _run("-i", "x.tar", "-m", "m.png", "-o", "out", "--report", "r.json", "--skip-existing")
    assert result.exit_code == 1
    assert f"1 filled, 0 skipped, {len(bad)} failed, 1 left out of {len(bad) + 2}" in result.stderr
    assert "Traceback" not in result.output
    assert "\x1b[31m" not in result.stderr
    assert _names(case / "out") == ["x/good.png"]
    assert len(json.loads(Path("r.json").read_text())["items"]) == len(bad) + 2


def test_dots_in_names_of_a_shard_are_left_out_and_named(case):
    """webdataset ends a name at its first dot: without a.png, a.1.png is no picture; beside it, it belongs to it."""
    names = ["a.1.png", "a.2.png", "good.png", "good.depth.png", "good.mask.png"]
    _shard(case / "x.tar", {name: png_bytes(noise(40, 60)) for name in names})
    result = _run("-i", "x.tar", "-m", "m.png", "-o", "out", "--report", "r.json")
    assert result.exit_code == 1
    assert "1 filled, 0 skipped, 0 failed, 2 left out of 3" in result.stderr
    left = {i["input"]: i["error"] for i in json.loads(Path("r.json").read_text())["items"] if i["error"]}
    assert left.keys() == {"x.tar/a.1.png", "x.tar/a.2.png"}
    assert "a name ends at its first dot, and there is no picture of the name 'a'" in left["x.tar/a.1.png"]


def test_pictures_of_a_shard_that_cannot_be_read_at_random_are_left_out_and_named(case):
    """A second name of a file is read; a link to elsewhere, and a file that tar stored sparse, are not."""
    picture = png_bytes(noise(40, 60))
    sparse = tarfile.TarInfo("sparse.png")
    sparse.size = len(picture)
    sparse.pax_headers = {"GNU.sparse.map": f"0,{len(picture)}", "GNU.sparse.size": str(len(picture))}
    with tarfile.open(case / "x.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for info in (tarfile.TarInfo("good.png"), sparse):
            info.size = len(picture)
            tar.addfile(info, io.BytesIO(picture))
        for name, kind, target in [
            ("second.png", tarfile.LNKTYPE, "good.png"),
            ("again.png", tarfile.LNKTYPE, "sparse.png"),
            ("hard.png", tarfile.LNKTYPE, "elsewhere.png"),
            ("soft.png", tarfile.SYMTYPE, "good.png"),
            ("folder.png", tarfile.DIRTYPE, ""),
            ("caption.txt", tarfile.SYMTYPE, "good.txt"),
        ]:
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, target
            tar.addfile(link)
    result = _run("-i", "x.tar", "-m", "m.png", "-o", "out", "--report", "r.json")
    assert result.exit_code == 1
    assert "2 filled, 0 skipped, 0 failed, 4 left out of 6" in result.stderr
    left = {i["input"]: i["error"] for i in json.loads(Path("r.json").read_text())["items"] if i["error"]}
    assert {name.removeprefix("x.tar/"): reason.partition(";")[0] for name, reason in left.items()} == {
        "sparse.png": "stored sparse",
        "again.png": "stored sparse",
        "hard.png": "a hard link to a file that is not before it in the shard",
        "soft.png": "a symbolic link",
    }
    assert _names(case / "out") == ["x/good.png", "x/second.png"]


def test_shards_of_names_that_meet_keep_all_results(case):
    folder = case / "shards"
    folder.mkdir()
    for name in ("s.tar", "s.TAR", "t.tar"):
        _shard(folder / name, {"a.png": png_bytes(noise(40, 60))})
    assert _run("-i", folder, "-m", "m.png", "-o", "out").exit_code == 0
    results = _names(case / "out")
    assert len({name.casefold() for name in results}) == len(list(folder.iterdir()))
    assert "t/a.png" in results


# -- masks --------------------------------------------------------------------------------------------------------


def test_a_picture_that_is_its_own_mask_is_refused(case):
    (case / "linked").symlink_to(case / "in")
    (case / "link.png").symlink_to(case / "a.png")
    os.link(case / "a.png", case / "hard.png")
    (case / "some").mkdir()
    (case / "some" / "b.png").symlink_to(case / "in" / "b.jpg")
    pairs = [("in", "in"), ("in", "linked"), ("in", "./in/"), ("a.png", "a.png"), ("a.png", "link.png")]
    for source, mask in [*pairs, ("a.png", "hard.png"), ("in", "some"), ("link.png", "a.png")]:
        result = _run("-i", source, "-m", mask, "-o", "out/")
        assert result.exit_code == 2, (source, mask, result.output)
        assert "itself; masks that lie beside their pictures as a_mask.png: --mask-suffix _mask" in result.stderr
    assert not (case / "out").exists()


@pytest.mark.parametrize("named", [True, False])
def test_lamas_layout_by_mask_suffix(case, named):
    small = box_mask(40, 60, (0, 0, 5, 5))
    folder = case / "lama"
    for name in ("image1.png", "image2.png", "sub/image1.png"):
        write_picture(folder / name, noise(40, 60))
    for name, hole in (
        ("image1_mask001.png", HOLE), ("image2_mask000.png", HOLE), ("image2_mask001.png", small),
        ("sub/image1_mask.png", small),
    ):  # fmt: skip
        write_picture(folder / name, hole.astype(np.uint8) * 255)
    result = _run("-i", folder, *(["-m", folder] if named else []), "-o", "out", "--mask-suffix", "_mask")
    assert result.exit_code == 0, result.output
    expected = {"image1.png": HOLE, "image2_mask000.png": HOLE, "image2_mask001.png": small, "sub/image1.png": small}
    assert _names(case / "out") == sorted(expected)
    for name, hole in expected.items():
        changed = (np.asarray(Image.open(case / "out" / name)) != noise(40, 60)).any(axis=2)
        assert not changed[~hole].any()
        assert changed[hole].mean() > 0.9


def test_a_picture_of_a_name_like_a_masks_is_filled_by_its_own_mask(case):
    """venetian_mask.png is no mask, because there is no venetian.png, and it has a mask; a_mask.png stays a's."""
    folder, mask = case / "lama", HOLE.astype(np.uint8) * 255
    for name in ("venetian_mask.png", "a.png"):
        write_picture(folder / name, noise(40, 60))
    for name in ("venetian_mask_mask.png", "a_mask.png", "a_mask_mask.png", "gone_mask.png"):
        write_picture(folder / name, mask)
    result = _run("-i", folder, "-o", "out", "--mask-suffix", "_mask")
    assert result.exit_code == 0, result.output
    assert _names(case / "out") == ["a.png", "venetian_mask.png"]
    for name in _names(case / "out"):
        np.testing.assert_array_equal(np.asarray(Image.open(case / "out" / name)), FILLED)


def test_the_suffixed_mask_of_another_picture_is_not_taken(case):
    for name in ("a.png", "sub/a.png", "sub/b.png"):
        write_picture(case / "lama" / name, noise(40, 60))
    for name in ("sub/a_mask.png", "b_mask.png"):  # b's mask is elsewhere, but no other picture's
        write_picture(case / "lama" / name, HOLE.astype(np.uint8) * 255)
    result = _run("-i", "lama", "-o", "out", "--mask-suffix", "_mask")
    assert result.exit_code == 1
    picture = Path("lama/a.png")
    assert f"failed: {picture}: mask: no file named 'a_mask' in 'lama' but those of other pictures" in result.stderr
    assert _names(case / "out") == ["sub/a.png", "sub/b.png"]


def test_links_that_lead_nowhere_or_in_a_circle_fail_alone(case):
    for name, target in (("circle.png", "circle.png"), ("gone.png", "nowhere.png")):
        (case / "in" / name).symlink_to(target)
    result = _run("-i", "in", "-m", "m.png", "-o", "out", "--report", "r.json")
    assert result.exit_code == 1
    assert "2 filled, 0 skipped, 2 failed of 4" in result.stderr
    assert _names(case / "out") == ["a.png", "b.jpg"]
    for option in ("-o", "--report"):
        arguments = ["-i", "a.png", "-m", "m.png", "-o", "o.png", option, "in/circle.png"]
        assert isinstance(_run(*arguments).exception, SystemExit | None), option


def test_results_of_an_earlier_run_are_no_masks(case):
    write_picture(case / "in" / "out" / "a_mask.png", HOLE.astype(np.uint8) * 255)
    result = _run("-i", "in", "-o", "in/out", "--mask-suffix", "_mask")
    assert result.exit_code == 1
    assert "0 filled, 0 skipped, 2 failed of 2" in result.stderr


def test_mask_suffix_with_a_folder_of_masks_one_picture_and_gaps(case):
    write_picture(case / "masks" / "a-hole.png", HOLE.astype(np.uint8) * 255)
    write_picture(case / "in" / "x-hole.png", noise(40, 60))  # a picture of such a name: the masks are elsewhere
    result = _run("-i", "in", "-m", "masks", "-o", "out", "--mask-suffix=-hole")
    assert result.exit_code == 1
    assert "1 filled, 0 skipped, 2 failed of 3" in result.stderr
    assert "no file named 'b-hole'" in result.stderr
    write_picture(case / "a_mask.png", HOLE.astype(np.uint8) * 255)
    assert _run("-i", "a.png", "-o", "o.png", "--mask-suffix", "_mask").exit_code == 0
    np.testing.assert_array_equal(np.asarray(Image.open("o.png")), FILLED)
    for arguments in (["-m", "m.png"], ["--mask-suffix", ""]):
        assert _run("-i", "a.png", "-o", "o.png", "--mask-suffix", "_mask", *arguments).exit_code == 2


@pytest.mark.parametrize("suffix", [None, "_mask"])
def test_the_work_of_pairing_grows_in_proportion(tmp_path, suffix):
    """Thousands of pictures and masks are paired in seconds."""

    def calls(number):
        for folder, ending in (("in", ""), ("masks", suffix or "")):
            (tmp_path / f"{folder}{number}").mkdir()
            for index in range(number):
                (tmp_path / f"{folder}{number}" / f"{index}{ending}.png").touch()
        counted = 0

        def count(frame, event, argument):
            nonlocal counted
            counted += event in ("call", "c_call")

        source, masks = tmp_path / f"in{number}", tmp_path / f"masks{number}"
        sys.setprofile(count)
        try:
            items = plan_items(source, masks, tmp_path / "out", mask_suffix=suffix)
        finally:
            sys.setprofile(None)
        assert [item.mask.stem for item in items] == [f"{item.picture.stem}{suffix or ''}" for item in items]
        return counted

    assert calls(200) < 6 * calls(50)


# -- other arguments -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["-i", "-m", "-o", "--model", "--report"])
def test_empty_texts_are_no_paths(case, option):
    arguments = {"-i": "a.png", "-m": "m.png", "-o": "o.png", option: ""}
    result = _run(*(text for pair in arguments.items() for text in pair))
    assert result.exit_code == 2
    assert "got an empty text" in result.stderr


@pytest.mark.parametrize("command", [["eval", "-i", "in", "-o"], ["convert", "in"], ["demo", "-o"]])
def test_other_commands_take_no_addresses_and_no_empty_names(case, command):
    for out, words in (("https://example.org/x", "got the address"), ("", "got an empty text")):
        result = CliRunner().invoke(cli.app, [*command, out])
        assert result.exit_code == 2
        assert words in result.stderr
    assert _names(case) == ["a.png", "in/a.png", "in/b.jpg", "m.png"]


@pytest.mark.parametrize("option", ["-i", "-m", "-o", "--model", "--report"])
def test_names_that_are_too_long_are_one_line(tmp_path, monkeypatch, option):
    monkeypatch.chdir(tmp_path)
    write_picture(tmp_path / "a.png", noise(40, 60))
    write_picture(tmp_path / "m.png", HOLE.astype(np.uint8) * 255)
    arguments = {"-i": "a.png", "-m": "m.png", "-o": "o.png", option: "z" * 300 + "/y"}
    result = _run(*(text for pair in arguments.items() for text in pair))
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1


def test_plan_items_raises_only_usage_errors(case):
    for source, mask in ((Path("z" * 300), case / "m.png"), (case / "a.png", Path("z" * 300))):
        with pytest.raises(UsageError):
            plan_items(source, mask, "o.png")
