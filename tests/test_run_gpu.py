"""Order and time shares of `make gpu`, and its log: measurements are on disk even if the run is killed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bench import run_gpu

LOGGING = """
import sys, time
from pathlib import Path
from bench.gpu_contact import Log
log = Log(Path(sys.argv[1]))
for number in range(3):
    log("steps", step=f"step {number}", us=1.5 * number)
print("measured", flush=True)
time.sleep(60)
"""


def test_a_killed_run_leaves_its_figures(tmp_path: Path) -> None:
    file = tmp_path / "new folder" / "contact.jsonl"
    command = [sys.executable, "-c", LOGGING, str(file)]
    with subprocess.Popen(command, cwd=run_gpu.ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while "measured" not in process.stdout.readline():
            pass
        process.send_signal(signal.SIGKILL)
    figures = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(f["section"], f["step"], f["us"]) for f in figures] == [
        ("steps", f"step {number}", 1.5 * number) for number in range(3)
    ]


@pytest.mark.parametrize("minutes", [4.0, 8.0])
def test_parts_fit_the_minutes_and_correctness_comes_first(tmp_path: Path, minutes: float) -> None:
    parts = run_gpu.parts(tmp_path, minutes)
    assert [name for name, *_ in parts][:4] == ["build", "contact", "tests", "tuning"]
    assert sum(seconds for _, seconds, _ in parts) == pytest.approx(60 * minutes)
    for name, _, command in parts[1:]:
        assert str(tmp_path) in " ".join(command), name


def test_a_part_that_hangs_is_cut_off_and_one_that_fails_is_noticed(capfd: pytest.CaptureFixture[str]) -> None:
    assert not run_gpu.run("hangs", 0.5, [sys.executable, "-c", "import time; time.sleep(60)"])
    assert not run_gpu.run("fails", 60, [sys.executable, "-c", "raise SystemExit(3)"])
    assert run_gpu.run("works", 60, [sys.executable, "-c", "pass"])
    text = capfd.readouterr().out
    assert "hangs: exit status cut off after 0 s" in text or "hangs: exit status cut off after 1 s" in text
    assert "fails: exit status 3" in text
