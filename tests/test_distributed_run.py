"""`lgnet-fast run` split among processes: shards, journals, a killed process, one merged report."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from lgnet_fast.errors import BackendError, JobError, UsageError
from lgnet_fast.jobs import journal
from lgnet_fast.jobs.fill import fill
from lgnet_fast.jobs.journal import FOLDER, Journal, stamp
from lgnet_fast.jobs.options import FillOptions
from lgnet_fast.jobs.report import ReportFile
from lgnet_fast.jobs.world import World
from lgnet_fast.pipeline import Inpainter

from .pipeline_support import BlurFill, box_mask, noise, plan_items, png_bytes

ROOT = Path(__file__).resolve().parent.parent
HOLE = box_mask(40, 60, (10, 15, 30, 45))


@pytest.fixture
def folder(tmp_path) -> Path:
    """Seven pictures in a folder ``in``, and a mask ``m.png`` beside it."""
    (tmp_path / "in").mkdir()
    for index in range(7):
        Image.fromarray(noise(40, 60, index)).save(tmp_path / "in" / f"{index}.png")
    Image.fromarray(HOLE.astype(np.uint8) * 255).save(tmp_path / "m.png")
    return tmp_path


def _run(folder: Path, out: str = "out", world: World | None = None, **options) -> int:
    common = {
        "source": folder / "in",
        "mask": folder / "m.png",
        "out": folder / out,
        "report": folder / "report.json",
    }
    return fill(FillOptions(**{**common, **options}), world)


def _report(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


def _visible(folder: Path) -> dict[str, tuple[int, bytes]]:
    """(mtime in ns, content) of every result, by relative name."""
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file() and FOLDER not in path.parts
    }


def _shard(path: Path, files: dict[str, bytes], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def _samples(*numbers: int) -> dict[str, bytes]:
    files = {}
    for number in numbers:
        files[f"{number:04d}.png"] = png_bytes(noise(40, 60, number))
        files[f"{number:04d}.mask.png"] = png_bytes(HOLE.astype(np.uint8) * 255)
        files[f"{number:04d}.txt"] = b"a caption"
    return files


# -- real processes --------------------------------------------------------------------------------------------------


def _launch(arguments: list[object], log: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "3"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--main_process_port", "0", "-m", "lgnet_fast", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    with open(log, "wb") as file:
        return subprocess.Popen(command, env=environment, stdout=file, stderr=file)


def _journal(folder: Path, rank: int) -> list[dict]:
    """The lines of that process's journal so far, without a torn last one."""
    for part in folder.glob(f"{FOLDER}/run-*/*-{rank:05d}.jsonl"):
        return [json.loads(line) for line in part.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    return []


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL there")
def test_a_process_killed_under_accelerate_launch_loses_nothing_and_repeats_nothing(tmp_path):
    pytest.importorskip("accelerate")
    (tmp_path / "in").mkdir()
    for index in range(30):
        Image.fromarray(noise(64, 64, index)).save(tmp_path / "in" / f"{index:02d}.png")
    Image.fromarray(box_mask(64, 64, (20, 20, 40, 40)).astype(np.uint8) * 255).save(tmp_path / "m.png")
    out, report, log = tmp_path / "out", tmp_path / "report.json", tmp_path / "log.txt"
    arguments = ["run", "-i", tmp_path / "in", "-m", tmp_path / "m.png", "-o", out, "--report", report]

    first = _launch(arguments, log)
    try:
        deadline = time.monotonic() + 300
        while sum("done" in line for line in _journal(out, 1)) < 2:
            assert first.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.002)
        os.kill(_journal(out, 1)[0]["pid"], signal.SIGKILL)
        assert first.wait(300) != 0
    finally:
        first.kill()
    before = _visible(out)
    finished = {name: content for name, content in before.items() if name.endswith(".png") and name[0] != "."}
    assert 2 <= len(finished) < 30
    if report.exists():
        told = json.loads(report.read_text())
        # Process 0 may have done its part and noticed the death before the launcher ended it.
        assert not told["complete"] or told["processes"]["died"] == [1]

    second = _launch(arguments, log)
    try:
        assert second.wait(300) == 0, log.read_text()
    finally:
        second.kill()
    after = _visible(out)
    assert sorted(after) == [f"{index:02d}.png" for index in range(30)]  # no temporary files either
    for name, content in finished.items():
        assert after[name] == content, f"{name} was done twice"
    merged = json.loads(report.read_text())
    assert merged["totals"]["items"] == merged["totals"]["ok"] == 30
    assert merged["processes"] == {"count": 3, "died": []}
    earlier = {Path(item["output"]).name for item in merged["items"] if item["earlier"]}
    assert earlier == set(finished)
    assert f"30 filled ({len(finished)} by an earlier run), 0 skipped, 0 failed of 30" in log.read_text()

    for name in ("00.png", "29.png"):
        known = ~box_mask(64, 64, (20, 20, 40, 40))
        filled = np.asarray(Image.open(out / name))
        np.testing.assert_array_equal(filled[known], noise(64, 64, int(name[:2]))[known])
        assert (filled[~known] != noise(64, 64, int(name[:2]))[~known]).mean() > 0.9


# -- splitting and merging -------------------------------------------------------------------------------------------


def test_every_process_has_its_share_and_the_first_merges(fake, folder):
    assert _run(folder, "alone") == 0
    worlds = [World(rank, 3, launched=True, launch="a") for rank in range(3)]
    assert [_run(folder, world=world) for world in worlds[1:]] == [0, 0]
    assert not (folder / "report.json.tmp").exists()
    assert sorted(_visible(folder / "out")) == ["1.png", "2.png", "4.png", "5.png"]
    assert _run(folder, world=worlds[0]) == 0
    contents = [{name: data for name, (_, data) in _visible(folder / name_).items()} for name_ in ("alone", "out")]
    assert contents[0] == contents[1]
    merged = _report(folder)
    assert [Path(item["input"]).name for item in merged["items"]] == [f"{index}.png" for index in range(7)]
    assert merged["totals"]["ok"] == 7
    assert not any(item["earlier"] for item in merged["items"])


def test_the_report_of_processes_that_run_says_how_many_it_counts(fake, folder, monkeypatch):
    told = []
    write = ReportFile.write

    def spy(self, report):
        told.append(report)
        write(self, report)

    monkeypatch.setattr(ReportFile, "write", spy)
    monkeypatch.setattr("lgnet_fast.jobs.report._INTERVAL", 0.0)
    monkeypatch.setattr("lgnet_fast.jobs.report._SHARE", 1e9)
    assert _run(folder, world=World(1, 2, launched=True, launch="a")) == 0
    assert told == []
    assert _run(folder, world=World(0, 2, launched=True, launch="a")) == 0
    running, merged = told[:-1], told[-1]
    assert [(one["planned"], one["totals"]["items"]) for one in running] == [(4, done) for done in range(5)]
    assert all(one["processes"] == {"count": 2, "counted": 1} for one in running)
    assert (merged["totals"]["items"], merged["processes"]) == (7, {"count": 2, "died": []})


def test_the_same_job_again_does_only_what_changed(fake, folder):
    assert _run(folder, resume=True) == 0
    fake.seen.clear()
    assert _run(folder, resume=True) == 0
    assert fake.seen == []
    assert _report(folder)["totals"]["earlier"] == 7

    Image.fromarray(noise(40, 60, 99)).save(folder / "in" / "1.png")  # another picture of that name
    (folder / "out" / "2.png").unlink()
    Image.fromarray(noise(40, 60, 98)).save(folder / "out" / "3.png")  # not what the job wrote
    Image.fromarray(noise(40, 60, 7)).save(folder / "in" / "new.png")
    assert _run(folder, resume=True, world=World(0, 1, launched=True)) == 0
    again = {Path(item["input"]).stem for item in _report(folder)["items"] if not item["earlier"]}
    assert again == {"1", "2", "3", "new"}
    assert len(fake.seen) == 4
    assert len(list((folder / "out" / FOLDER).glob("*/*.jsonl"))) == 1  # earlier parts are repeated in the last one

    assert _run(folder, resume=True, feather=1) == 0  # other settings are another job
    assert _report(folder)["totals"]["earlier"] == 0


def test_failed_items_are_reported_by_the_first_process_and_tried_again(fake, folder):
    (folder / "in" / "1.png").write_bytes(b"broken")
    worlds = [World(rank, 2, launched=True, launch="a") for rank in range(2)]
    assert _run(folder, world=worlds[1]) == 0  # a launcher would end the other processes after another code
    assert _run(folder, world=worlds[0]) == 1
    assert _report(folder)["totals"]["failed"] == 1
    Image.fromarray(noise(40, 60)).save(folder / "in" / "1.png")
    worlds = [World(rank, 2, launched=True, launch="b") for rank in range(2)]
    assert [_run(folder, world=world) for world in reversed(worlds)] == [0, 0]
    totals = _report(folder)["totals"]
    assert (totals["ok"], totals["earlier"]) == (7, 6)


def test_a_record_without_the_fields_of_an_entry_is_done_again(fake, folder):
    assert _run(folder, resume=True) == 0
    (part,) = (folder / "out" / FOLDER).glob("*/*.jsonl")
    lines = [json.loads(line) for line in part.read_text().splitlines()]
    done = [line for line in lines if "done" in line]
    del done[0]["done"]["status"]
    done[1]["done"]["colour"] = "red"
    part.write_text("".join(json.dumps(line) + "\n" for line in lines))
    fake.seen.clear()
    assert _run(folder, resume=True) == 0
    assert len(fake.seen) == 2
    totals = _report(folder)["totals"]
    assert (totals["ok"], totals["earlier"]) == (7, 5)


def test_a_result_that_was_written_but_not_journalled_is_not_made_again(tmp_path):
    out = tmp_path / "x[1].png"
    out.write_bytes(b"old")
    first = Journal(tmp_path / "job", World(launch="a"))
    first.writing("written", {"n": 1}, out)
    out.write_bytes(b"newer")
    first.writing("begun", {"n": 2}, tmp_path / "y.png")
    left = tmp_path / ".x[1].png.0123.tmp"
    left.write_bytes(b"half")
    other = tmp_path / ".x1.png.0123.tmp"
    other.write_bytes(b"of another file")
    first.close()
    second = Journal(tmp_path / "job", World(launch="b"))
    assert second.earlier("written", out) == {"n": 1}
    assert second.earlier("begun", tmp_path / "y.png") is None
    assert not left.exists()
    assert other.exists()
    second.close()


@pytest.mark.parametrize(
    "line",
    [
        {"done": {}},
        {"key": "b", "done": {}},
        {"key": "b", "done": "yes", "written": None},
        {"key": ["b"], "done": {}, "written": None},
        {"key": "b", "done": {}, "written": 3},
        {"writing": {}},
        {"key": "b", "writing": {}, "output": "b.png"},
        {"key": "b", "writing": {}, "output": None, "before": None},
        ["b"],
        7,
    ],
)
def test_lines_of_a_journal_that_are_no_whole_record_are_ignored(tmp_path, line):
    first = Journal(tmp_path, World(launch="a"))
    first.done("a", {"n": 1})
    first._write(line)
    first.done("c", {"n": 3})
    first.finish()
    assert first.collect() == ([{"n": 1}, {"n": 3}], [])
    first.close()
    again = Journal(tmp_path, World(launch="b"))
    assert [again.earlier(key) for key in "abc"] == [{"n": 1}, None, {"n": 3}]
    again.close()


def test_two_runs_of_one_job_at_once_are_refused(tmp_path):
    pytest.importorskip("fcntl")
    first = Journal(tmp_path, World(0, 2, launch="a"))
    beside = Journal(tmp_path, World(1, 2, launch="a"))
    with pytest.raises(JobError, match="another run of this job is at work"):
        Journal(tmp_path, World(launch="b"))
    first.close()
    beside.close()
    Journal(tmp_path, World(launch="b")).close()


def test_two_runs_of_one_job_that_start_together_are_refused_too(tmp_path, monkeypatch):
    """Both read the folder before either had a journal in it that the other could find."""
    pytest.importorskip("fcntl")
    read = Journal._read_earlier

    def slowly(self):
        found = read(self)
        time.sleep(0.3)
        return found

    monkeypatch.setattr(Journal, "_read_earlier", slowly)

    def start(launch: str) -> Journal | JobError:
        try:
            return Journal(tmp_path, World(launch=launch))
        except JobError as refused:
            return refused

    with ThreadPoolExecutor(2) as pool:
        started = sorted(pool.map(start, "ab"), key=lambda one: isinstance(one, JobError))
    assert isinstance(started[0], Journal)
    assert "another run of this job is at work" in str(started[1])
    started[0].close()
    assert [path.suffix for path in tmp_path.iterdir()] == [".jsonl"]


def test_a_journal_that_takes_a_line_in_parts_has_all_of_it(tmp_path):
    class Narrow(io.FileIO):
        def write(self, data):
            return super().write(bytes(data)[:7])

    journal = Journal(tmp_path, World(launch="a"))
    (part,) = tmp_path.iterdir()
    with Narrow(part, "ab") as narrow:
        whole, journal._file = journal._file, narrow
        for number in range(3):
            journal.done(f"item {number}", {"n": number})
        journal._file = whole
    journal.close()
    lines = [json.loads(line) for line in part.read_text().splitlines()]
    assert [line["done"]["n"] for line in lines[1:]] == [0, 1, 2]


def test_a_dead_process_is_noticed_at_once_on_this_host_and_by_its_silence_elsewhere(tmp_path, monkeypatch):
    first = Journal(tmp_path, World(0, 3, launch="a"))
    first.done("0", {"n": 0})
    first.finish()
    killed = Journal(tmp_path, World(1, 3, launch="a"))
    killed.done("1", {"n": 1})
    killed.close()
    elsewhere = tmp_path / "a-00002.jsonl"
    elsewhere.write_text(
        '{"host": "another", "pid": 1, "rank": 2, "size": 3}\n{"key": "2", "done": {"n": 2}, "written": null}\n{"k'
    )
    now = [0.0]
    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=lambda seconds: now.append(now.pop() + seconds))
    monkeypatch.setattr(journal, "time", clock)
    records, dead = first.collect(patience=0.5)
    assert 0.5 < now[0] < 0.75  # the one of this host alone would take no time
    assert dead == [1, 2]
    assert [record["n"] for record in records] == [0, 1, 2]
    elsewhere.unlink()
    now[0] = 0.0
    assert first.collect(patience=0.2)[1] == [1, 2]  # one that never began gets five times as long
    assert 1 < now[0] < 1.25
    first.close()


def test_a_merge_without_a_dead_processs_part_says_so(fake, folder, monkeypatch, capsys):
    killed = World(1, 2, launched=True, launch="a")
    monkeypatch.setattr(Journal, "finish", lambda self: None)
    assert _run(folder, world=killed) == 0
    monkeypatch.undo()
    monkeypatch.setattr(Inpainter, "from_pretrained", classmethod(lambda cls, *args, **options: cls(fake)))
    assert _run(folder, world=World(0, 2, launched=True, launch="a")) == 1
    assert "process 1 of 2 ended before its part" in capsys.readouterr().err
    merged = _report(folder)
    assert merged["processes"] == {"count": 2, "died": [1]}
    assert merged["totals"]["ok"] == 7


# -- tar shards ------------------------------------------------------------------------------------------------------


def test_shards_hold_their_masks_and_results_are_files(fake, tmp_path):
    _shard(tmp_path / "in" / "a" / "0.tar", _samples(0, 1))
    _shard(tmp_path / "in" / "1.tar", {"deep/0002.jpg.png": b"", "0002.depth.png": b"", **_samples(2)})
    assert _run(tmp_path, mask=None) == 1
    assert sorted(_visible(tmp_path / "out")) == ["1/0002.png", "a/0/0000.png", "a/0/0001.png"]
    for name, number in (("1/0002.png", 2), ("a/0/0001.png", 1)):
        expected = Inpainter(BlurFill())(noise(40, 60, number), HOLE)
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out" / name)), expected)
    assert _report(tmp_path)["items"][2]["mask"].endswith("0.tar/0000.mask.png")
    items = plan_items(tmp_path / "in" / "1.tar", None, tmp_path / "o")
    assert [(item.picture.name, item.left_out) for item in items] == [
        ("0002.png", False),
        ("deep/0002.jpg.png", True),
    ]


def test_masks_of_a_shard_may_come_from_elsewhere(fake, tmp_path):
    files = {name: data for name, data in _samples(0, 1).items() if "mask" not in name}
    _shard(tmp_path / "in.tar", files)
    (tmp_path / "masks").mkdir()
    Image.fromarray(HOLE.astype(np.uint8) * 255).save(tmp_path / "masks" / "0000.png")
    items = plan_items(tmp_path / "in.tar", tmp_path / "masks", tmp_path / "out", "jpeg")
    assert [item.mask for item in items] == [tmp_path / "masks" / "0000.png", None]
    assert [item.output for item in items] == [tmp_path / "out" / "in" / f"000{index}.jpg" for index in range(2)]
    assert _run(tmp_path, source=tmp_path / "in.tar", mask=tmp_path / "masks" / "0000.png") == 0
    assert len(_visible(tmp_path / "out")) == 2


@pytest.mark.parametrize(("shards", "processes"), [(5, 3), (2, 3)])
def test_shards_are_split_whole_where_there_are_enough_else_by_pictures(tmp_path, shards, processes):
    for shard in range(shards):
        _shard(tmp_path / "in" / f"{shard}.tar", _samples(*range(4)))
    parts = [
        [
            str(item.picture)
            for item in plan_items(tmp_path / "in", None, tmp_path / "out", None, World(rank, processes))
        ]
        for rank in range(processes)
    ]
    together = sorted(name for part in parts for name in part)
    assert together == sorted(str(item.picture) for item in plan_items(tmp_path / "in", None, tmp_path / "out"))
    assert len(together) == 4 * shards
    sizes = sorted(len(part) for part in parts)
    assert sizes == ([4, 8, 8] if shards == 5 else [2, 3, 3])


def test_bad_shards_and_samples_fail_alone(fake, tmp_path):
    _shard(tmp_path / "in" / "0.tar", {"../../evil.png": png_bytes(noise(40, 60)), **_samples(0)})
    _shard(tmp_path / "in" / "1.tar", {"a.png": png_bytes(noise(40, 60)), "b.png": b"", "b.mask.png": b""})
    twice = {"c.png": png_bytes(noise(40, 60)), "c.jpg": b"", "c.mask.png": b""}
    _shard(tmp_path / "in" / "2.tar", twice)
    (tmp_path / "in" / "3.tar").write_bytes(b"not a tar file" * 100)
    _shard(tmp_path / "in" / "4.tar", _samples(1), mode="w:gz")
    assert _run(tmp_path, mask=None) == 1
    merged = _report(tmp_path)
    assert merged["totals"]["ok"] == 1
    errors = {
        item["input"].replace("\\", "/").split("in/")[-1]: item["error"] for item in merged["items"] if item["error"]
    }
    assert set(errors) == {"0.tar/../../evil.png", "1.tar/a.png", "1.tar/b.png", "2.tar/c.png", "3.tar", "4.tar"}
    assert "inside the shard" in errors["0.tar/../../evil.png"]
    assert "a.mask.<extension>" in errors["1.tar/a.png"]
    assert "expected a readable picture" in errors["1.tar/b.png"]
    assert "c.png, c.jpg" in errors["2.tar/c.png"]
    assert "uncompressed tar" in errors["3.tar"]
    assert "uncompressed tar" in errors["4.tar"]
    assert sorted(_visible(tmp_path / "out")) == ["0/0000.png"]
    assert not list(tmp_path.parent.glob("evil*"))


def test_of_samples_with_one_result_file_the_first_is_filled(fake, tmp_path):
    """Names that differ in case alone are one file on some systems."""
    renamed = {name.replace("0000", "A"): data for name, data in _samples(0).items()}
    again = {name.replace("0001", "a"): data for name, data in _samples(1).items()}
    _shard(tmp_path / "in" / "0.tar", {**renamed, **again})
    assert _run(tmp_path, mask=None) == 1
    assert list(_visible(tmp_path / "out")) == ["0/A.png"]
    (error,) = [item["error"] for item in _report(tmp_path)["items"] if item["error"]]
    assert "would replace that of" in error


def test_shards_without_pictures_and_pictures_without_masks_are_usage_errors(tmp_path):
    _shard(tmp_path / "in" / "0.tar", {"a.txt": b""})
    with pytest.raises(UsageError, match="no pictures in the tar shards"):
        plan_items(tmp_path / "in", None, tmp_path / "out")
    Image.fromarray(noise(4, 4)).save(tmp_path / "in" / "a.png")
    with pytest.raises(UsageError, match="^mask: expected a mask"):
        plan_items(tmp_path / "in", None, tmp_path / "out")


# -- the environment -------------------------------------------------------------------------------------------------


def test_the_place_among_the_processes_is_read_from_the_environment(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    alone = World.from_environment()
    assert (alone.rank, alone.size, alone.launched) == (0, 1, False)
    assert alone.part(range(5)) == [0, 1, 2, 3, 4]
    assert World(1, 3).part(range(8)) == [1, 4, 7]
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert World.from_environment().launched
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(BackendError, match="0 <= RANK < WORLD_SIZE = 1, got 2"):
        World.from_environment()
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(BackendError, match="MASTER_ADDR"):
        World.from_environment()
    monkeypatch.setenv("WORLD_SIZE", "three")
    with pytest.raises(BackendError, match="WORLD_SIZE: expected a whole number, got 'three'"):
        World.from_environment()


def test_each_process_has_its_own_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert [World(rank, 4, rank).device("auto") for rank in range(4)] == ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]
    assert World(1, 4, 1).device("cpu") == "cpu"
    assert World().device("auto") == "auto"


def test_stamps(tmp_path):
    assert stamp(tmp_path / "none") is None
    (tmp_path / "a").write_bytes(b"1")
    old = stamp(tmp_path / "a")
    (tmp_path / "a").write_bytes(b"12")
    assert old is not None
    assert old[0] == 1
    assert stamp(tmp_path / "a") != old
