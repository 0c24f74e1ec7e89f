"""The report for given results, in HTML and Markdown, and the README's pictures."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
from importlib.util import find_spec
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from bench import report
from bench.regression import write_results
from lgnet_fast import cli

pytest.importorskip("matplotlib")

CPU = "cpu-test-2-cores"
GPU = "some-gpu"
INFO = {"torch": "2.13.0", "threads": 2, "openvino": "2026.4", "date": "2026-01-01T00:00:00+00:00"}
STAMP = {"commit": "abc1234", "date": "2026-01-01T00:00:00+00:00", "rounds": 9, "device": "cpu"}


def figures(unit: str = "ours", /, **ms: float) -> dict:
    slower = {name: round(value / ms[unit], 3) for name, value in ms.items() if name != unit}
    spreads = {name: 0.02 for name in slower}
    times = {"least_ms": ms, "median_ms": {name: 1.1 * value for name, value in ms.items()}}
    return {**times, "times_slower_than_ours": slower, "spread": spreads, "ours": unit, **STAMP}


@pytest.fixture(scope="module")
def rows():
    return report.complexity.rows()


def growth(size: str) -> dict:
    grown = figures("ours_256", ours_256=100.0, ours_512=410.0, eager_256=330.0, eager_512=1400.0)
    slopes = {"ours": {"slope": 2.036, "standard_error": None}, "eager": {"slope": 2.085, "standard_error": 0.013}}
    return grown | {"size": size, "slopes": slopes}


@pytest.fixture
def results(tmp_path, rows, monkeypatch):
    monkeypatch.setattr(report.complexity, "rows", lambda: rows)  # counted once
    folder = tmp_path / "results"
    inference = figures(ours=100.0, ours_hole_64=40.0, openvino=170.0, eager=330.0, frozen=190.0)
    table = figures("ours_LGNet", ours_LGNet=100.0, LGNet=330.0, MEDFE=12345.6, PEN=250.0)
    holes = figures(ours=100.0, **{"ours_square_0.1": 40.0, "ours_squares_0.1": 80.0}, eager=330.0)
    holes["hole_ratios"] = {"ours_square_0.1": 0.101, "ours_squares_0.1": 0.102}
    holes["times_faster_than_dense"] = {"ours_square_0.1": 2.5, "ours_squares_0.1": 1.25}
    roof = figures(ours=100.0, eager=290.0) | {"peaks": {"gflops": 286.3, "gigabytes_a_second": 17.9}}
    roof["steps"] = [["net_c.e1", 0.4, 17.0, 2.0], ["net_g.d1", 1.5, 30.0, 6.0]]
    scaling = {"test_resolution": growth("side"), "test_batch": growth("batch")}
    scaling |= {"test_hole_ratio": holes, "test_roofline": roof}
    modules = {
        "inference": {"test_inference[lgnet-fp32]": inference | {"wrong_peers": {"frozen": 0.26}}},
        "table4": {"test_table4[cpu]": table},
        "scaling": scaling,
        "merge_concat": {"test_merge_concat[cpu]": figures(ours=0.05, copy=0.02)},
    }
    for module, benches in modules.items():
        write_results(folder / f"{CPU}_{module}.json", benches, INFO)
    gpu = figures("ours_LGNet", ours_LGNet=0.8, ours_LGNet_fp16=0.3, LGNet=2.5)
    write_results(folder / f"{GPU}_table4.json", {"test_table4[cuda]": gpu}, INFO | {"cuda": "12.8"})
    return folder


def table_of(markdown: str, heading: str) -> list[list[str]]:
    """The cells of the table under a heading, without the line below the header."""
    part = markdown.split(f"## {heading}\n", 1)[1].split("\n#", 1)[0]
    rows = [line.strip("| ").split(" | ") for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows if not row[0].startswith("---")]


def test_report(results, tmp_path):
    files = report.write_report(tmp_path / "out", [results])
    assert all(file.stat().st_size > 0 for file in files)
    text = (tmp_path / "out" / "report.md").read_text()

    header, *rows = table_of(text, "Table IV beside the paper")
    assert [row[0] for row in rows[:6]] == ["PEN", "GConv", "MEDFE", "RFR", "MADF", "LGNet"]
    lgnet = dict(zip(header, rows[5]))
    assert lgnet["M params"] == "115.00"
    assert lgnet["G FLOPs, its tool"] == "69.62"
    assert (lgnet["CPU ms"], lgnet["ours"], lgnet["paper's Xeon"]) == ("330.0", "100.0", "589.8")
    assert (lgnet["GPU ms"], lgnet["ours fp32"], lgnet["ours fp16"]) == ("2.5", "0.8", "0.3")
    assert lgnet["paper's TITAN RTX"] == "13.6"
    assert dict(zip(header, rows[2]))["CPU ms"] == "12346"

    (_, row) = table_of(text, "The whole network")
    assert row[0] == "inference[lgnet-fp32]"
    assert row[1] == "110"
    assert row[2] == "ours_hole_64 0.40, openvino 1.70, frozen 1.90 (wrong result), eager 3.30"
    assert ["resolution", "eager", "2.085", "0.013"] in table_of(text, "Growth")
    assert ["square", "10.1%", "2.50"] in table_of(text, "Hole-aware speed-up")
    assert "(286 GFLOP/s)" in text
    assert "17.9 GB/s" in text
    assert "with AMX every step that multiplies bf16 parts" in text  # else what the picture shows there seems wrong
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", text):
        root = ElementTree.parse(tmp_path / "out" / picture).getroot()
        assert root.tag.endswith("svg")
    assert len(re.findall(r"!\[", text)) == 5  # no history: nothing was committed for this machine class


def test_every_version_is_told(results):
    """Modules are measured at different times; the report has one line for all of them."""
    file = results / f"{CPU}_inference.json"
    content = json.loads(file.read_text())
    write_results(file, content["benches"], INFO | {"torch": "2.14.0", "ncnn": "1.0", "MNN": "3.6"})
    told = {section.title: section.text for section in report.sections(report.load([results]))}
    expected = "torch 2.14.0 and 2.13.0, openvino 2026.4, ncnn 1.0, MNN 3.6; 2 CPU threads."
    assert told[f"Machine class {CPU}"] == expected
    assert told[f"Machine class {GPU}"] == "torch 2.13.0, openvino 2026.4, cuda 12.8; 2 CPU threads."


def test_one_self_contained_page(results, tmp_path):
    report.write_report(tmp_path / "out", [results])
    page = (tmp_path / "out" / "report.html").read_text()
    sources = re.findall(r'(?:src|href)="(.*?)"', page)
    assert len(sources) == 5
    for source in sources:
        kind, data = source.split(",", 1)
        assert kind == "data:image/svg+xml;base64"
        assert base64.b64decode(data) in [file.read_bytes() for file in (tmp_path / "out").glob("*.svg")]
    assert page.count("<table>") == page.count("</table>") == 5
    assert "<td>ours_hole_64 0.40, openvino 1.70, frozen 1.90 (wrong result), eager 3.30</td>" in page


def test_a_later_folder_counts(results, tmp_path):
    own = tmp_path / "own"
    newer = figures(ours=50.0, openvino=170.0)
    write_results(own / f"{CPU}_inference.json", {"test_inference[lgnet-fp32]": newer}, INFO)
    machine = report.load([results, own])[CPU]
    assert machine["inference"]["benches"]["test_inference[lgnet-fp32]"]["times_slower_than_ours"] == {
        "openvino": 3.4
    }
    assert machine["table4"]["benches"].keys() == {"test_table4[cpu]"}


def test_plots(results, tmp_path):
    """The documentation's two, the same bytes every time: ratios, and the machine's class."""
    first = {file.name: file.read_bytes() for file in report.write_plots(tmp_path / "a", [results])}
    second = {file.name: file.read_bytes() for file in report.write_plots(tmp_path / "b", [results])}
    assert first.keys() == {"latency.svg", "hole_ratio.svg"}
    assert first == second
    for text in (b"openvino", b">time, relative to our dense run<", b"> 1.7<", CPU.encode()):
        assert text in first["latency.svg"]
    assert b"frozen" not in first["latency.svg"], "its pixels are wrong"
    assert CPU.encode() in first["hole_ratio.svg"]
    assert max(map(len, first.values())) < 100_000
    (results / f"{CPU}_scaling.json").unlink()
    with pytest.raises(report.LGNetError, match=r"no CPU results for hole_ratio\.svg in"):
        report.write_plots(tmp_path / "c", [results])


def test_training_curve_of_a_log(results, tmp_path):
    """Drawn beside the log, the stages that it has."""
    log = [{"kind": "train", "step": step, "hole1": 1 / step, "hole3": 0.5 / step} for step in (50, 100, 150)]
    log += [{"kind": "validation", "step": step, "psnr": 20 + step / 100, "l1": 3.0} for step in (100, 150)]
    (tmp_path / "run.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    written = report.write_plots(tmp_path, [results])
    assert written[-1] == tmp_path / "run.svg"
    drawn = ElementTree.fromstring(written[-1].read_bytes())
    texts = {element.text for element in drawn.iter("{http://www.w3.org/2000/svg}text")}
    assert {"stage 1", "stage 3", "held-out PSNR, dB", "held-out l1, %"} <= texts
    assert "stage 2" not in texts


def test_history(tmp_path, monkeypatch):
    """One point a commit that was measured, oldest first, from every committed version of the results."""
    folder = tmp_path / "bench" / "results"
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "RESULTS", folder)

    def git(*arguments: str) -> None:
        own = ("-c", "user.name=t", "-c", "user.email=t@example.org")
        subprocess.run(("git", *own, *arguments), cwd=tmp_path, check=True, capture_output=True)

    git("init", "-q")
    for day, ours in enumerate((100.0, 80.0), 1):
        bench = figures(ours=ours, openvino=160.0, eager=330.0)
        bench |= {"commit": f"c{day}", "date": f"2026-01-0{day}T00:00:00+00:00"}
        write_results(folder / f"{CPU}_inference.json", {"test_inference[lgnet-fp32]": bench}, INFO)
        git("add", ".")
        git("commit", "-qm", str(day))
    past = report.history(CPU)
    assert past == [
        ("2026-01-01", "c1", {"test_inference[lgnet-fp32]": 1.6}),
        ("2026-01-02", "c2", {"test_inference[lgnet-fp32]": 2.0}),
    ]
    drawn = ElementTree.fromstring(report.plots.history(past))
    assert "inference[lgnet-fp32]" in "".join(drawn.itertext())
    assert report.history("another") == []


def test_errors(results, tmp_path, monkeypatch):
    run = CliRunner()
    monkeypatch.setattr(report, "RESULTS", tmp_path / "nothing")
    done = run.invoke(cli.app, ["bench", "--report", str(tmp_path / "out"), "--report-only"])
    assert done.exit_code == 2
    assert done.stderr == f"error: no results in {tmp_path / 'nothing'}: run `lgnet-fast bench` first\n"
    assert not (tmp_path / "out").exists()
    for options in (["--report-only"], ["--report-only", "--store", "--report", "x"]):
        done = run.invoke(cli.app, ["bench", *options])
        assert done.exit_code == 2
        assert "needs --report, and excludes --store" in done.stderr
    (results / f"{CPU}_inference.json").write_text(json.dumps({"what": 1}))
    monkeypatch.setattr(report, "RESULTS", results)
    done = run.invoke(cli.app, ["bench", "--report", str(tmp_path / "out"), "--report-only"])
    assert done.exit_code == 2
    assert "expected a results file: a JSON object with 'benches'" in done.stderr
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    done = run.invoke(cli.app, ["bench"])
    assert done.exit_code == 2
    assert done.stderr == "error: the benchmarks need pytest-benchmark: pip install 'lgnet-fast[bench]'\n"
    # What the report needs is asked before the suite runs for minutes.
    monkeypatch.setattr(report.subprocess, "run", lambda *_, **__: pytest.fail("the suite ran"))
    monkeypatch.setattr(report, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    done = run.invoke(cli.app, ["bench", "--report", str(tmp_path / "out")])
    assert done.exit_code == 2
    assert done.stderr == "error: the report needs matplotlib: pip install 'lgnet-fast[bench]'\n"
    monkeypatch.setattr(report, "find_spec", find_spec)
    (tmp_path / "file").write_text("")
    done = run.invoke(cli.app, ["bench", "--report", str(tmp_path / "file" / "out")])
    assert done.exit_code == 2
    assert done.stderr.startswith("error: ")
    assert repr(str(tmp_path / "file"))[1:-1] in done.stderr
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(report.LGNetError, match=r"the report needs matplotlib: pip install"):
        report.plots.table4(figures(ours=1.0, eager=2.0))


def test_command_runs_the_suite(results, tmp_path, monkeypatch):
    """`lgnet-fast bench`: pytest's exit code is the command's; the report has this run's own figures."""
    calls = []

    def suite(command, cwd):
        calls.append(command)
        return subprocess.CompletedProcess(command, 1)

    with monkeypatch.context() as patch:
        patch.setattr(report.subprocess, "run", suite)
        assert report.run_suite() == 1
        assert report.run_suite(tmp_path / "own", store=True) == 1
    assert calls[0] == [sys.executable, "-m", "pytest", "bench"]
    assert calls[1] == [*calls[0], "--bench-store", "--bench-run", str(tmp_path / "own")]

    def measured(own, store):
        write_results(own / f"{CPU}_inference.json", {"test_new": figures(ours=7.0, eager=21.0)}, INFO)
        return 1

    monkeypatch.setattr(report, "RESULTS", results)
    monkeypatch.setattr(report, "run_suite", measured)
    done = CliRunner().invoke(cli.app, ["bench", "--report", str(tmp_path / "out")])
    assert done.exit_code == 1, done.output
    assert isinstance(done.exception, SystemExit), done.exception
    assert "| new | 7.7 | eager 3.00 | 2.0% |" in (tmp_path / "out" / "report.md").read_text()
