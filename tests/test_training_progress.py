"""Reports of a run: the log, TensorBoard and the terminal."""

from __future__ import annotations

import errno
import io
import json
import math

import pytest
import torch

from lgnet_fast.training import progress
from lgnet_fast.training.progress import Report, say
from tests.training_support import lines


def test_time_left_of_a_resumed_run(tmp_path, monkeypatch, capsys):
    """Half done by time when resumed; a tenth in one minute leaves four."""
    now = [1000.0]
    monkeypatch.setattr("lgnet_fast.training.progress.time.monotonic", lambda: now[0])
    report = Report(tmp_path, step=100, total=100_000, progress=0.5, tensorboard=False)
    now[0] += 60
    report.train(160, 1, {"G": 2.0}, progress=0.6, pictures=4)
    assert capsys.readouterr().err == "step 160/100000: epoch 1, G 2.0000, 4.0 pictures/s, 0:04:00 left\n"
    report.train(99_960, 1, {"G": 2.0}, progress=0.9996, pictures=4)  # 40 steps at 1664 a second
    assert capsys.readouterr().err.endswith(", 0:00:00 left\n")
    report.close(skipped=0, broken=0)


def test_names_on_a_terminal_are_shown_as_they_are(tmp_path, monkeypatch):
    """Brackets in a file's name are no markup."""
    screen = io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: True)
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    report = Report(tmp_path, step=0, total=10, progress=0.0, tensorboard=False)
    report.say("set[/a]/shot[red].png: cannot be read")
    report.close(skipped=0, broken=0)
    assert "set[/a]/shot[red].png: cannot be read" in screen.getvalue()


def test_the_bar_shows_the_share_and_the_losses(tmp_path, monkeypatch):
    """By time, 0.6 of the run; log.jsonl has the same line as without a terminal, and no line is printed."""
    now = [1000.0]
    monkeypatch.setattr("lgnet_fast.training.progress.time.monotonic", lambda: now[0])
    screen = io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: True)
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    report = Report(tmp_path, step=100, total=100_000, progress=0.5, tensorboard=False)
    now[0] += 60
    report.train(160, 1, {"G": 2.0, "D": 0.25}, progress=0.6, pictures=4)
    (task,) = report._bar.tasks
    assert (task.completed, task.total) == (0.6, 1.0)
    assert task.fields == {"step": 160, "steps": 100_000, "loss": "epoch 1, G 2.0000, D 0.2500, 4.0 pictures/s"}
    report.close(skipped=0, broken=0)
    text = screen.getvalue()
    assert "step 160/100000" in text
    assert "60%" in text
    assert "epoch 1, G 2.0000, D 0.2500, 4.0 pictures/s" in text
    assert " left" not in text
    assert lines(tmp_path) == [{"kind": "train", "step": 160, "G": 2.0, "D": 0.25}]


def test_lines_of_the_log_are_json(tmp_path):
    """Which has no infinity: null."""
    report = Report(tmp_path, step=0, total=4, progress=0.0, tensorboard=False)
    report.train(1, 0, {"G": math.inf, "D": 0.5}, progress=0.25, pictures=1)
    report.validation(1, {"psnr": math.nan}, best=False)
    report.close(skipped=0, broken=0)

    def refuse(name):
        raise AssertionError(name)

    texts = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(text, parse_constant=refuse) for text in texts] == [
        {"kind": "train", "step": 1, "G": None, "D": 0.5},
        {"kind": "validation", "step": 1, "psnr": None},
    ]


def test_lines_that_cannot_be_written_are_left_out_and_counted(tmp_path, monkeypatch, capsys):
    report = Report(tmp_path, step=0, total=4, progress=0.0, tensorboard=False)
    write = progress.write_stream

    def full(stream, data):
        write(stream, data[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    for step in range(1, 5):
        monkeypatch.setattr(progress, "write_stream", write if step in (1, 4) else full)
        report.train(step, 0, {"G": 1.0}, progress=step / 4, pictures=1)
    report.close(skipped=0, broken=0)
    assert [line["step"] for line in lines(tmp_path)] == [1, 4]  # no half line either
    text = capsys.readouterr().err
    assert (
        text.count("log.jsonl: a line could not be written ([Errno 28] No space left on device); the training") == 1
    )
    assert "2 lines of log.jsonl could not be written" in text


def test_tensorboard_that_cannot_write_is_left_out(tmp_path, monkeypatch, capsys):
    pytest.importorskip("tensorboard")
    report = Report(tmp_path, step=0, total=4, progress=0.0)

    def full(*given):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(report._writer, "add_scalar", full)
    for step in (1, 2):
        report.train(step, 0, {"G": 1.0}, progress=step / 4, pictures=1)
    report.pictures(2, torch.zeros(3, 4, 4))
    report.close(skipped=0, broken=0)
    assert capsys.readouterr().err.count("tensorboard: its files cannot be written ([Errno 28]") == 1
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


def test_without_standard_error_nothing_goes_to_standard_output(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr", None)
    say("a line")
    assert capsys.readouterr().out == ""
