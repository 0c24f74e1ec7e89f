"""`lgnet-fast run`: pipes, standard input and output, and how files are written."""

from __future__ import annotations

import io
import os
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lgnet_fast.errors import UsageError
from lgnet_fast.pipeline import writing
from lgnet_fast.pipeline.writing import remove_leftovers, write_atomically, write_file

from .cli_support import FILLED
from .cli_support import names as _names
from .cli_support import run as _run
from .pipeline_support import plan_items

# -- pipes ---------------------------------------------------------------------------------------------------------


def _fed(path: Path, data: bytes) -> threading.Thread:
    os.mkfifo(path)
    thread = threading.Thread(target=path.write_bytes, args=(data,), daemon=True)
    thread.start()
    return thread


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_pipes_as_picture_mask_and_result(case):
    thread = _fed(case / "picture", (case / "a.png").read_bytes())
    other = _fed(case / "mask", (case / "m.png").read_bytes())
    assert _run("-i", "picture", "-m", "mask", "-o", "o.png").exit_code == 0
    thread.join(60)
    other.join(60)
    np.testing.assert_array_equal(np.asarray(Image.open("o.png")), FILLED)

    os.mkfifo("result")
    received: list[bytes] = []
    reader = threading.Thread(target=lambda: received.append(Path("result").read_bytes()), daemon=True)
    reader.start()
    assert _run("-i", "a.png", "-m", "m.png", "-o", "result", "--format", "tiff").exit_code == 0
    reader.join(60)
    saved = Image.open(io.BytesIO(received[0]))
    assert saved.format == "TIFF"
    np.testing.assert_array_equal(np.asarray(saved), FILLED)
    assert writing.is_stream(case / "result")


def test_standard_input_and_output(case):
    result = _run("-i", "-", "-m", "m.png", "-o", "-", input=(case / "in" / "b.jpg").read_bytes())
    assert result.exit_code == 0, result.stderr
    assert "1 filled" in result.stderr
    assert Image.open(io.BytesIO(result.stdout_bytes)).format == "JPEG"
    result = _run("-i", "a.png", "-m", "-", "-o", "o.png", input=(case / "m.png").read_bytes())
    assert result.exit_code == 0, result.stderr
    np.testing.assert_array_equal(np.asarray(Image.open("o.png")), FILLED)
    assert _run("-i", "-", "-m", "m.png", "-o", "out/", input=(case / "a.png").read_bytes()).exit_code == 0
    assert _names(case / "out") == ["stdin.png"]


def test_a_launched_process_writes_to_standard_output_without_a_journal(case, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")  # as containers of training jobs have them
    result = _run("-i", "a.png", "-m", "m.png", "-o", "-")
    assert result.exit_code == 0, result.stderr
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(result.stdout_bytes))), FILLED)
    assert not (case / ".lgnet_fast").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-i", "in", "-m", "m.png", "-o", "-"], "one stream takes one picture"),
        (["-i", "-", "-m", "-", "-o", "o.png"], "the standard input is the picture already"),
        (["-i", "-", "-m", "in", "-o", "o.png"], "got the folder"),
        (["-i", "a.png", "-m", "m.png", "-o", "-", "--report", "-"], "has the picture already"),
        (["-i", "a.png", "-m", "m.png", "-o", "-", "--resume"], "got a stream"),
        (["-i", os.devnull, "-m", "m.png", "-o", "o.png"], "got the device"),
    ],
)
def test_streams_that_cannot_work_are_refused(case, arguments, words):
    result = _run(*arguments, input=b"")
    assert result.exit_code == 2, result.output
    assert words in result.stderr


def test_a_piped_picture_does_not_replace_its_mask(case):
    mask = (case / "m.png").read_bytes()
    result = _run("-i", "-", "-m", "m.png", "-o", "m.png", input=(case / "a.png").read_bytes())
    assert result.exit_code == 2, result.output
    assert "m.png" in result.stderr
    assert (case / "m.png").read_bytes() == mask


def test_closed_streams_are_refused(case, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(UsageError, match="out: expected a pipe or a file as standard output, got a closed one"):
        plan_items(case / "a.png", case / "m.png", "-")
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(UsageError, match="source: expected a picture on the standard input, got a closed one"):
        plan_items(Path("-"), case / "m.png", "o.png")


# -- writing -----------------------------------------------------------------------------------------------------


def test_links_stay_links_and_names_may_be_as_long_as_the_file_system_takes(tmp_path):
    target, link = tmp_path / "sub" / "target.bin", tmp_path / "link.bin"
    link.symlink_to(target)  # leads nowhere yet
    for data in (b"one", b"two"):
        write_atomically(link, data)
        assert link.is_symlink()
        assert target.read_bytes() == data
    long = tmp_path / ("字" * 83 + ".png")
    write_atomically(long, b"three")
    assert long.read_bytes() == b"three"
    assert len(_names(tmp_path)) == 3


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_written_through(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    received: list[bytes] = []
    reader = threading.Thread(target=lambda: received.append(pipe.read_bytes()), daemon=True)
    reader.start()
    write_file(pipe, b"data")
    reader.join(60)
    assert received == [b"data"]
    assert writing.is_stream(pipe)


def test_leftovers_of_killed_runs_go_and_files_being_written_stay(case):
    out = case / "out"
    out.mkdir()
    dead = out / f".a.png.{'0' * 32}.tmp"
    dead.write_bytes(b"half")
    for name in (".keep.tmp", "a.tmp", f".a.png.{'0' * 31}.tmp", f"a.png.{'0' * 32}.tmp"):
        (out / name).write_bytes(b"not ours")
    temporary, file = writing._open_temporary(out / "b.png")
    with file:
        assert _run("-i", "in", "-m", "m.png", "-o", out, "--skip-existing").exit_code == 0
        assert temporary.exists()
    assert not dead.exists()
    remove_leftovers([out, case / "nowhere"])
    assert not temporary.exists()
    assert len([name for name in _names(out) if name.endswith("tmp")]) == 4
