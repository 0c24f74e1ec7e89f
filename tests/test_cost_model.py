"""The model of a GPU's time beside a run that was measured."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

STORED = "h100_contact_lgnet_float16_b1.jsonl"


def table(*arguments: str) -> str:
    command = [sys.executable, "bench/cost_model.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_it_explains_the_measured_run() -> None:
    """Within 15 % of the H100's dense graph."""
    text = table()
    match = re.search(rf"measured (\d+) us \({STORED}\): the estimate is ([\d.]+) of it", text)
    assert match is not None, text[-400:]
    assert 500 < int(match[1]) < 600
    assert 0.85 < float(match[2]) < 1.15


def test_a_hole_costs_less_and_more_memory_bandwidth_helps() -> None:
    def microseconds(*arguments: str) -> int:
        match = re.search(r"estimated (\d+) us", table(*arguments))
        assert match is not None
        return int(match[1])

    dense = microseconds()
    assert microseconds("--hole", "96", "160", "96", "160") < 0.85 * dense
    assert microseconds("--card", "H200") <= dense
    assert microseconds("--card", "L4") > 2 * dense
