"""The table of parameters and FLOPs next to the paper's: its content and its form.

The figures themselves are asserted in bench/bench_complexity.py.
"""

from __future__ import annotations

import dataclasses
import io
import json

import pytest
from rich.console import Console
from typer.testing import CliRunner

from bench import complexity
from lgnet_fast import cli
from lgnet_fast.cli import checkout
from lgnet_fast.counting import count, difference_percent

NAMES = ["PEN", "GConv", "MEDFE", "RFR", "MADF", "LGNet", "LGNet_share", "LGNet_light", "PEN_LG", "MEDFE_LG"]


@pytest.fixture(scope="module")
def table():
    return complexity.rows()


def test_rows_and_stages(table):
    assert [row.name for row in table] == NAMES
    rows = {row.name: row for row in table}
    stages = {stage.name: stage for stage in count("lgnet").stages}
    assert rows["LGNet"].report.stages == tuple(stages.values())
    for first in ("PEN", "MEDFE"):
        refined = rows[f"{first}_LG"]
        # Without the merging that follows the network alone.
        elementwise = refined.report.stages[0].elementwise
        assert refined.report.stages[0] == dataclasses.replace(rows[first].report.stages[0], elementwise=elementwise)
        assert refined.report.stages[1:] == (stages["NetL"], stages["NetG"])
        assert refined.total.parameters == rows[first].total.parameters + 5_483_203 + 55_104_003
    for row in table:
        assert sum(stage.macs for stage in row.report.stages) == row.total.macs > 0


def test_each_row_by_its_tool(table):
    for row in table:
        if row.name == "GConv":  # besides: the original's graph
            assert 0 < row.flops - row.total.profiler_rule < 1e7
        else:
            assert row.flops == (10 if row.name == "PEN" else 1) * row.total.thop_rule
        by_thop = row.name == "RFR"
        assert row.parameters == (row.total.thop_parameters if by_thop else row.total.parameters)
        if row.published is None:
            assert row.differences is None
        else:
            assert row.differences[0] == pytest.approx(difference_percent(row.parameters / 1e6, row.published[0]))
            assert row.differences[1] == pytest.approx(difference_percent(row.flops / 1e9, row.published[1]))


def test_json(table):
    data = json.loads(json.dumps(complexity.as_dict(table)))
    assert [row["name"] for row in data["rows"]] == NAMES
    true = {row["name"]: row["true_flops"] for row in data["rows"]}
    assert data["order_by_true_flops"] == sorted(NAMES, key=true.__getitem__)
    assert {row["name"] for row in data["rows"] if row["footnote"]} == {"PEN", "GConv", "MEDFE", "RFR", "MADF"}
    refined = data["rows"][-1]
    assert refined["flops_paper_g"] is refined["flops_difference_percent"] is None
    assert [stage["name"] for stage in refined["stages"]] == ["MEDFE", "NetL", "NetG"]


def test_text(table):
    out = io.StringIO()
    Console(file=out, width=80).print(complexity.render(table))
    text = " ".join(out.getvalue().split())
    assert "…" not in text
    for name in NAMES:
        assert name in text
    for i, name in enumerate(complexity.FOOTNOTES, 1):
        assert f"{name} [{i}] " in text
        assert f"[{i}] {name}: " in text
    madf = next(row for row in table if row.name == "MADF")
    assert f"{madf.flops / 1e9:.2f} 51.77 {100 * (madf.flops / 51.77e9 - 1):+.2f}" in text
    assert "By true GFLOP: PEN 51 < GConv 55 < MADF 57 < LGNet_light 73 < LGNet 86 < LGNet_share 86 < " in text


def test_command(table, monkeypatch):
    monkeypatch.setattr(complexity, "rows", lambda: table)
    result = CliRunner().invoke(cli.app, ["flops", "--peers", "--json"])
    assert result.exit_code == 0
    assert json.loads(result.stdout) == json.loads(json.dumps(complexity.as_dict(table)))


def test_command_outside_a_checkout(monkeypatch, tmp_path):
    monkeypatch.setattr(checkout, "ROOT", tmp_path)
    result = CliRunner().invoke(cli.app, ["flops", "--peers"])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: bench.complexity is in the repository, not in the installed package")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("option", [("--size", "512x512"), ("--model", "lgnet_light"), ("--batch", "2")])
def test_command_at_the_papers_size_only(option):
    result = CliRunner().invoke(cli.app, ["flops", "--peers", *option])
    assert result.exit_code == 2
    assert "leave --model, --size and --batch out" in " ".join(result.stderr.replace("│", " ").split())
