"""The report: results as one self-contained HTML page, and as Markdown with pictures.

lgnet-fast bench --report out/                 # run everything, then write the report
lgnet-fast bench --report out/ --report-only   # from stored results
python -m bench.report --plots docs            # the README's pictures and the bundled model's training curve
"""

from __future__ import annotations

import argparse
import base64
import html
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench import complexity, plots
from bench.peers import LGNET_MS, PEERS
from bench.regression import RESULTS, bench_spread, machine_class, read_results, rivals
from bench.timing import PACKAGES, ROOT
from lgnet_fast.errors import LGNetError
from lgnet_fast.pipeline.writing import write_atomically

Machine = dict[str, dict[str, Any]]
"""Module ("inference", "table4", ...) -> content of its results file."""


@dataclass(frozen=True)
class Section:
    """A heading, a paragraph, and a table or a picture or both."""

    title: str
    text: str
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    picture: str = ""
    """Name of the picture file, without extension."""


def load(folders: Iterable[Path]) -> dict[str, Machine]:
    """Machine class -> its results; benches in later folders replace those of the same name in earlier ones.

    Raises:
        LGNetError: a file is no results file, or there is none at all.
    """
    machines: dict[str, Machine] = {}
    for folder in folders:
        for file in sorted(folder.glob("*_*.json")):
            name, module = file.stem.split("_", 1)
            try:
                content = read_results(file.read_text())
            except ValueError as error:
                raise LGNetError(f"{file}: {error}") from error
            before = machines.setdefault(name, {}).get(module)
            if before:
                content["benches"] = before["benches"] | content["benches"]
            machines[name][module] = content
    if not machines:
        raise LGNetError(f"no results in {', '.join(map(str, folders))}: run `lgnet-fast bench` first")
    return machines


def preferred(machines: Mapping[str, Machine], cpu: bool) -> str | None:
    """The CPU's or GPU's class to show where one has to be chosen: this machine's, else that with most benches."""
    names = [name for name in machines if name.startswith("cpu-") == cpu]
    if cpu and machine_class("cpu") in names:
        return machine_class("cpu")
    return max(names, key=lambda name: sum(len(m["benches"]) for m in machines[name].values()), default=None)


def benches_of(machine: Machine, module: str) -> dict[str, Any]:
    """The benches of a module, by name; none where it was not measured."""
    return machine[module]["benches"] if module in machine else {}


def bench_of(machine: Machine, module: str, prefix: str) -> dict[str, Any] | None:
    """The first bench of a module whose name begins so."""
    return next((bench for name, bench in benches_of(machine, module).items() if name.startswith(prefix)), None)


def history(name: str) -> list[tuple[str, str, dict[str, float]]]:
    """(date, commit, bench -> how many times longer the fastest rival takes than ours), oldest first.

    From every committed version of the results of machine class `name`; empty without a git history.
    """

    def git(*arguments: str) -> str:
        try:
            done = subprocess.run(("git", *arguments), cwd=ROOT, capture_output=True, text=True)
        except FileNotFoundError:
            return ""
        return done.stdout if done.returncode == 0 else ""

    texts = [file.read_text() for file in RESULTS.glob(f"{name}_*.json")]
    folder = RESULTS.relative_to(ROOT).as_posix() if RESULTS.is_relative_to(ROOT) else ""
    for commit in git("log", "--format=%H", "--", folder).split() if folder else ():
        files = git("ls-tree", "--name-only", commit, f"{folder}/").split("\n")
        texts += [git("show", f"{commit}:{f}") for f in files if Path(f).name.startswith(f"{name}_")]
    points: dict[tuple[str, str], dict[str, float]] = {}
    for text in texts:
        try:
            benches = read_results(text)["benches"]
        except ValueError:
            continue
        for bench, figures in benches.items():
            others = rivals(figures)
            if others:
                points.setdefault((figures["date"], figures["commit"]), {})[bench] = min(others.values())
    # One point per commit: of several measurements the last one counts.
    merged: dict[str, tuple[str, dict[str, float]]] = {}
    for (date, commit), values in sorted(points.items()):
        clean = commit.removesuffix("-dirty")
        merged[clean] = (date[:10], merged.get(clean, ("", {}))[1] | values)
    return [(date, commit, values) for commit, (date, values) in merged.items()]


# -- sections ------------------------------------------------------------------------------------------------------


def table4(machines: Mapping[str, Machine]) -> Section | None:
    """Parameters, FLOPs and times, with the paper's."""
    shown = {cpu: preferred(machines, cpu) for cpu in (True, False)}
    times: dict[bool, dict[str, float]] = {}
    for cpu, name in shown.items():
        bench = bench_of(machines[name], "table4", "test_table4") if name else None
        times[cpu] = bench["least_ms"] if bench else {}
    if not times[True] and not times[False]:
        return None
    paper = {name: peer.published_ms for name, peer in PEERS.items()} | LGNET_MS

    def ms(value: float | None) -> str:
        return "" if value is None else f"{value:.1f}" if value < 1e4 else f"{value:.0f}"

    header = ["network", "M params", "paper", "G FLOPs, its tool", "paper", "true GFLOP"]
    header += ["CPU ms", "ours", "paper's Xeon"]
    if times[False]:
        header += ["GPU ms", "ours fp32", "ours fp16"]
    header += ["paper's TITAN RTX"]
    rows = []
    for row in complexity.rows():
        published = [f"{value:.2f}" for value in row.published] if row.published else ["", ""]
        then = paper.get(row.name, (None, None))
        cells = [row.name, f"{row.parameters / 1e6:.2f}", published[0], f"{row.flops / 1e9:.2f}", published[1]]
        cells += [f"{row.total.flops / 1e9:.2f}"]
        cells += [ms(times[True].get(row.name)), ms(times[True].get(f"ours_{row.name}")), ms(then[0])]
        if times[False]:
            cells += [ms(times[False].get(key)) for key in (row.name, f"ours_{row.name}", f"ours_{row.name}_fp16")]
        rows.append([*cells, ms(then[1])])
    notes = " ".join(f"{name}: {note}" for name, note in complexity.FOOTNOTES.items())
    where = " and ".join(name for name in shown.values() if name and times[name.startswith("cpu-")])
    text = (
        f"256x256, batch 1, float32, least times of one interleaved run on {where}, random weights. "
        "The paper's Xeon is an E5-2690 v4. PEN_LG and MEDFE_LG have no row in the paper's table. "
        f"On FLOPs: {notes}"
    )
    return Section("Table IV beside the paper", text, header, rows, "table4")


def contests(machine: Machine, module: str, title: str, text: str, picture: str = "") -> Section | None:
    """Every bench of a module: our time in ms, and how many times longer the others take."""
    content = machine.get(module)
    if content is None:
        return None
    rows = []
    for name, bench in content["benches"].items():
        ours = bench.get("ours", "ours")
        wrong = bench.get("wrong_peers", {})
        others = [
            f"{other} {slower:.2f}" + (" (wrong result)" if other in wrong else "")
            for other, slower in sorted(bench["times_slower_than_ours"].items(), key=lambda item: item[1])
        ]
        short = name.removeprefix("test_")
        rows.append([short, f"{bench['median_ms'][ours]:.3g}", ", ".join(others), f"{bench_spread(bench):.1%}"])
    return Section(title, text, ["bench", "ours, median ms", "times ours", "spread"], rows, picture)


def all_contests(name: str, machine: Machine) -> list[Section | None]:
    """The contests of every module on machine class `name`."""
    return [
        contests(
            machine,
            "inference",
            "The whole network",
            "256x256, batch 1, one centred hole; interleaved, correctness asserted first. Below 1 is faster than "
            "our dense run; ours_hole_64 computes only what a hole of 64x64 needs.",
            f"{name}_latency",
        ),
        contests(machine, "attention", "The attention block", "Forward, and forward with backward."),
        contests(machine, "merge_concat", "merge_concat", "ours_into: into memory that is already there."),
        contests(machine, "training", "A training step", "One generator and one discriminator step."),
        contests(
            machine,
            "pipeline",
            "Whole pictures",
            "8-bit in, 8-bit out, by Inpainter; ours_dense without hole-awareness.",
        ),
    ]


def growth(name: str, machine: Machine) -> Section | None:
    """How the cost grows with the size."""
    slopes = []
    for bench_name, bench in benches_of(machine, "scaling").items():
        for what, fit in bench.get("slopes", {}).items():
            error = "" if fit["standard_error"] is None else f"{fit['standard_error']:.3f}"
            slopes.append([bench_name.removeprefix("test_"), what, f"{fit['slope']:.3f}", error])
    if not slopes:
        return None
    text = "cost = constant * size ** slope, least squares in log-log; size is the side's length or the batch."
    return Section("Growth", text, ["bench", "of", "slope", "standard error"], slopes, f"{name}_scaling")


def hole_speed_up(name: str, machine: Machine) -> Section | None:
    """The speed-up of hole-aware runs, by the hole's share."""
    hole = bench_of(machine, "scaling", "test_hole_ratio")
    if not hole:
        return None
    text = "Speed-up of the hole-aware run over our dense run, 256x256, float32: one square hole, 2 x 2 of them."
    rows = [
        [key.removeprefix("ours_").split("_")[0], f"{hole['hole_ratios'][key]:.1%}", f"{faster:.2f}"]
        for key, faster in hole["times_faster_than_dense"].items()
    ]
    header = ["hole", "of the picture", "times faster"]
    return Section("Hole-aware speed-up", text, header, rows, f"{name}_hole_ratio")


def roofline(name: str, machine: Machine) -> Section | None:
    """The measured roofs, with a picture of every step under them."""
    roof = bench_of(machine, "scaling", "test_roofline")
    if not roof:
        return None
    peaks = roof["peaks"]
    text = (
        f"The roofs are measured: float32 multiply-adds in registers ({peaks['gflops']:.0f} GFLOP/s) and "
        f"a 128 MB copy ({peaks['gigabytes_a_second']:.1f} GB/s). FLOPs are those of the direct convolution in "
        "float32. So a Winograd step, which multiplies up to four times less, can lie above the roof, and with AMX "
        "every step that multiplies bf16 parts of float32. Bytes are source, result and weights once each."
    )
    return Section("Roofline of the plan's steps", text, picture=f"{name}_roofline")


def versions(machine: Machine) -> str:
    """The versions that the modules were measured with, all of them where they differ, and the threads."""
    environments = [content["environment"] for content in machine.values()]
    parts = []
    for key in ("torch", *PACKAGES, "cuda"):
        found = dict.fromkeys(info[key] for info in environments if key in info)
        if found:
            parts.append(f"{key} {' and '.join(found)}")
    return f"{', '.join(parts)}; {environments[0]['threads']} CPU threads."


def sections(machines: Mapping[str, Machine]) -> list[Section]:
    """The sections for which there are results."""
    found = [table4(machines)]
    for name, machine in machines.items():
        found.append(Section(f"Machine class {name}", versions(machine)))
        found += all_contests(name, machine)
        found += [growth(name, machine), hole_speed_up(name, machine), roofline(name, machine)]
        if len(history(name)) > 1:
            text = "How many times longer the fastest rival takes than ours, by the commit that was measured."
            found.append(Section("History", text, picture=f"{name}_history"))
    return [section for section in found if section is not None]


def pictures(machines: Mapping[str, Machine]) -> Iterator[tuple[str, bytes]]:
    """(name, SVG) of every picture that there are results for."""
    cpu = preferred(machines, cpu=True)
    bench = bench_of(machines[cpu], "table4", "test_table4") if cpu else None
    if bench:
        yield "table4", plots.table4(bench)
    for name, machine in machines.items():
        if benches := benches_of(machine, "inference"):
            yield f"{name}_latency", plots.latency(benches)
        growing = {k: b for k, b in benches_of(machine, "scaling").items() if "slopes" in b}
        if growing:
            yield f"{name}_scaling", plots.scaling(growing)
        if hole := bench_of(machine, "scaling", "test_hole_ratio"):
            yield f"{name}_hole_ratio", plots.hole_ratio(hole)
        if roof := bench_of(machine, "scaling", "test_roofline"):
            yield f"{name}_roofline", plots.roofline(roof)
        past = history(name)
        if len(past) > 1:
            yield f"{name}_history", plots.history(past)


# -- files ---------------------------------------------------------------------------------------------------------

_STYLE = """body{font:15px/1.45 system-ui,sans-serif;max-width:1060px;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:.7em 0;font-variant-numeric:tabular-nums}
th,td{border-bottom:1px solid #ddd;padding:.2em .7em;text-align:left}td+td,th+th{text-align:right}
img{max-width:100%}h2{margin-top:1.8em}.scroll{overflow-x:auto}"""


def as_html(found: Sequence[Section], images: Mapping[str, bytes]) -> str:
    """The report as one self-contained page."""
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>lgnet_fast benchmarks</title>",
        f"<style>{_STYLE}</style><h1>lgnet_fast benchmarks</h1>",
    ]
    for section in found:
        level = 1 if section.title.startswith("Machine class") else 2
        parts.append(f"<h{level}>{html.escape(section.title)}</h{level}><p>{html.escape(section.text)}</p>")
        if section.picture in images:
            data = base64.b64encode(images[section.picture]).decode()
            parts.append(f'<img alt="{html.escape(section.title)}" src="data:image/svg+xml;base64,{data}">')
        if section.rows:
            lines = [("th", section.header), *(("td", row) for row in section.rows)]
            cells = "".join(
                "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"
                for tag, row in lines
            )
            parts.append(f"<div class=scroll><table>{cells}</table></div>")
    return "\n".join(parts) + "\n</html>\n"


def as_markdown(found: Sequence[Section], images: Mapping[str, bytes]) -> str:
    """The report in Markdown, with pictures in files NAME.svg."""
    parts = ["# lgnet_fast benchmarks"]
    for section in found:
        parts.append(f"{'#' if section.title.startswith('Machine class') else '##'} {section.title}")
        parts.append(section.text)
        if section.picture in images:
            parts.append(f"![{section.title}]({section.picture}.svg)")
        if section.rows:
            lines = [section.header, ["---"] + ["---:"] * (len(section.header) - 1), *section.rows]
            parts.append("\n".join("| " + " | ".join(row) + " |" for row in lines))
    return "\n\n".join(parts) + "\n"


def write_report(out: Path, folders: Sequence[Path] = (RESULTS,)) -> list[Path]:
    """Write report.html, report.md and its pictures to `out`, from the results in `folders`; the files, HTML first.

    Raises:
        LGNetError: no results, or matplotlib is missing.
    """
    machines = load(folders)
    images = dict(pictures(machines))
    found = sections(machines)
    files = {"report.html": as_html(found, images).encode(), "report.md": as_markdown(found, images).encode()}
    files |= {f"{name}.svg": image for name, image in images.items()}
    for name, data in files.items():
        write_atomically(out / name, data)
    return [out / name for name in files]


def write_plots(out: Path, folders: Sequence[Path] = (RESULTS,)) -> list[Path]:
    """The documentation's latency.svg and hole_ratio.svg, of the preferred CPU, and X.svg of every X.jsonl in
    `out`, a training run's log; the files.

    Raises:
        LGNetError: results or matplotlib are missing.
    """
    machines = load(folders)
    name = preferred(machines, cpu=True) or ""
    machine = machines.get(name, {})
    benches = benches_of(machine, "inference")
    holes = bench_of(machine, "scaling", "test_hole_ratio")
    if not benches or not holes:
        missing = "hole_ratio.svg" if benches else "latency.svg"
        raise LGNetError(f"no CPU results for {missing} in {', '.join(map(str, folders))}")
    files = {
        out / "latency.svg": plots.latency(benches, name, relative=True),
        out / "hole_ratio.svg": plots.hole_ratio(holes, name),
    }
    for log in sorted(out.glob("*.jsonl")):
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        files[log.with_suffix(".svg")] = plots.training_curve(lines)
    for file, image in files.items():
        write_atomically(file, image)
    return list(files)


def run_suite(own: Path | None = None, store: bool = False) -> int:
    """`pytest bench` in this checkout; its exit code.

    Args:
        own: folder for this run's own results.
        store: make this run the one to compare with.

    Raises:
        LGNetError: pytest-benchmark is missing, or matplotlib, without which no report can be made of `own`.
        OSError: `own` cannot be made.
    """
    if find_spec("pytest_benchmark") is None:
        raise LGNetError("the benchmarks need pytest-benchmark: pip install 'lgnet-fast[bench]'")
    command = [sys.executable, "-m", "pytest", "bench", *(["--bench-store"] if store else [])]
    if own is not None:  # the suite takes minutes
        if find_spec("matplotlib") is None:
            raise LGNetError(plots.NEEDS_MATPLOTLIB)
        own.mkdir(parents=True, exist_ok=True)
        command += ["--bench-run", str(own.absolute())]
    return subprocess.run(command, cwd=ROOT).returncode


def main() -> int:
    """The pictures of the documentation."""
    parser = argparse.ArgumentParser(description="Draw the documentation's pictures from stored results.")
    parser.add_argument("--plots", type=Path, required=True, metavar="DIR")
    for file in write_plots(parser.parse_args().plots):
        print(file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
