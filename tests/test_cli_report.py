"""`lgnet-fast run --report`: where it is written, what it tells of full disks, odd names and interrupted runs."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from lgnet_fast.jobs import entries
from lgnet_fast.pipeline import writing

from .cli_support import names as _names
from .cli_support import run as _run
from .pipeline_support import BlurFill, noise, png_bytes, write_picture


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_report_through_a_link_and_to_a_pipe(case):
    (case / "link.json").symlink_to(case / "target.json")
    arguments = ["-i", "a.png", "-m", "m.png", "-o", "o.png", "--report"]
    assert _run(*arguments, "link.json").exit_code == 0
    assert (case / "link.json").is_symlink()
    assert json.loads((case / "target.json").read_text())["complete"] is True
    os.mkfifo("pipe.json")
    result = _run(*arguments, "pipe.json")  # that nobody reads
    assert result.exit_code == 2
    assert "--report" in result.stderr
    with open(os.open("pipe.json", os.O_RDONLY | os.O_NONBLOCK), "rb") as reader:  # open before the run begins
        assert _run(*arguments, "pipe.json").exit_code == 0
        assert json.loads(reader.read())["totals"]["ok"] == 1
    assert writing.is_stream(case / "pipe.json")
    assert json.loads(_run(*arguments, "-").stdout)["totals"]["ok"] == 1
    assert _run(*arguments, os.devnull).exit_code == 0
    assert Path(os.devnull).is_char_device()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_one_line_for_each_file(case):
    result = _run("-i", "a.png", "-m", "m.png", "-o", "/dev/full", "--report", "r.json")
    assert result.exit_code == 1
    assert "failed: a.png: [Errno 28] No space left on device" in result.stderr
    assert "0 filled, 0 skipped, 1 failed of 1" in result.stderr
    assert "Errno 28" in json.loads(Path("r.json").read_text())["items"][0]["error"]
    result = _run("-i", "a.png", "-m", "m.png", "-o", "o.png", "--report", "/dev/full")
    assert result.exit_code == 1
    assert result.stderr.count("failed: the report '/dev/full' could not be written (No space left on device)") == 1
    assert "1 filled, 0 skipped, 0 failed of 1" in result.stderr


@pytest.mark.parametrize(
    "report",
    [
        "m.png/r.json",
        "y" * 300 + ".json",
        "ftp://host/r.json",
        pytest.param(
            "/proc/none/r.json", marks=pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc here")
        ),
    ],
)
def test_a_report_that_cannot_be_written_is_refused_before_work(case, fake, report):
    result = _run("-i", "a.png", "-m", "m.png", "-o", "o.png", "--report", report)
    assert result.exit_code == 2
    assert "--report" in result.stderr
    assert fake.seen == []
    assert not Path("o.png").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are bytes on Linux alone")
def test_names_that_are_not_utf8(case):
    name = os.fsencode("in/") + b"caf\xe9.png"
    with open(name, "wb") as file:
        file.write(png_bytes(noise(40, 60)))
    (case / "in" / "line\nfeed.png").write_bytes(b"broken")
    result = _run("-i", "in", "-m", "m.png", "-o", "out", "--report", "r.json")
    assert result.exit_code == 1
    assert "3 filled, 0 skipped, 1 failed of 4" in result.stderr
    assert "failed: in/line\\x0afeed.png" in result.stderr
    items = json.loads(Path("r.json").read_bytes().decode("utf-8"))["items"]
    assert name in [os.fsencode(item["input"]) for item in items]
    assert os.path.exists(b"out/caf\xe9.png")


def test_the_report_grows_with_the_run(case, monkeypatch):
    """The report that a killed run leaves: from the start, and after each picture, if one is due."""
    Path("r.json").write_text('{"complete": true, "planned": 9, "items": []}')  # of an earlier run
    seen = []
    real = entries.save_picture

    def spy(*arguments, **options):
        data = json.loads(Path("r.json").read_text())
        seen.append((data["complete"], data["planned"], len(data["items"])))
        real(*arguments, **options)

    monkeypatch.setattr(entries, "save_picture", spy)
    monkeypatch.setattr("lgnet_fast.jobs.report._INTERVAL", 0.0)
    monkeypatch.setattr("lgnet_fast.jobs.report._SHARE", 1e9)
    write_picture(case / "in" / "c.png", noise(40, 60))
    assert _run("-i", "in", "-m", "m.png", "-o", "out", "--report", "r.json").exit_code == 0
    assert seen == [(False, 3, 0), (False, 3, 1), (False, 3, 2)]
    data = json.loads(Path("r.json").read_text())
    assert (data["complete"], len(data["items"])) == (True, 3)


def test_a_report_that_cannot_be_written_during_the_run_is_told_once(case, fake, monkeypatch):
    tried = []

    def full(path, data):
        tried.append(len(json.loads(data)["items"]))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("lgnet_fast.jobs.report.write_file", full)
    arguments = ("-i", "in", "-m", "m.png", "-o", "out", "--report", "r.json")
    result = _run(*arguments)
    assert result.exit_code == 1
    assert result.stderr.count("failed: the report 'r.json' could not be written (No space left on device)") == 1
    assert tried == [0, 2]  # at the start, and at the end
    monkeypatch.setattr("lgnet_fast.jobs.report._INTERVAL", 0.0)
    monkeypatch.setattr("lgnet_fast.jobs.report._SHARE", 1e9)
    assert _run(*arguments).stderr.count("failed: ") == 1
    assert tried[2:] == [0, 1, 2, 2]


@pytest.fixture
def heeded_signals():
    """Handle SIGINT as in a terminal: in background jobs of a shell it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("number", "resume", "lost"),
    [
        (signal.SIGINT, False, False),
        (signal.SIGINT, True, False),
        (signal.SIGTERM, False, False),
        (signal.SIGINT, False, True),
    ],
)
def test_an_interrupted_run_tells_what_was_done_and_keeps_the_report(
    case, fake, monkeypatch, heeded_signals, number, resume, lost
):
    """`lost`: the exception is dropped, as in a destructor; then the picture under way is still finished."""
    for name in "cdef":
        write_picture(case / "in" / f"{name}.png", noise(40, 60))
    forward = BlurFill.forward

    def interrupted(self, *arguments, **options):
        if len(self.seen) == 3 - lost:
            with contextlib.suppress(KeyboardInterrupt) if lost else contextlib.nullcontext():
                signal.raise_signal(number)
                time.sleep(1)
        return forward(self, *arguments, **options)

    monkeypatch.setattr(BlurFill, "forward", interrupted)
    arguments = ["-i", "in", "-m", "m.png", "-o", "out", "--report", "r.json", *(["--resume"] if resume else [])]
    result = _run(*arguments)
    assert result.exit_code == 128 + number, result.output
    assert "interrupted: 3 filled, 0 skipped, 0 failed of 6 in " in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.output
    data = json.loads(Path("r.json").read_text())
    assert (data["complete"], data["planned"], data["totals"]["ok"]) == (False, 6, 3)
    assert [name for name in _names(case / "out") if "/" not in name] == ["a.png", "b.jpg", "c.png"]
    assert [Path(item["input"]).name for item in data["items"]] == ["a.png", "b.jpg", "c.png"]
    if resume:
        monkeypatch.setattr(BlurFill, "forward", forward)
        assert "6 filled (3 by an earlier run)" in _run(*arguments).stderr
        assert json.loads(Path("r.json").read_text())["complete"] is True
