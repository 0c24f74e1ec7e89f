"""The report's pictures: SVG files from results. Deterministic: unchanged results give unchanged files."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lgnet_fast.errors import LGNetError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OURS, OURS_LIGHT, OTHERS = "#0b6e4f", "#5bb99a", "#9aa5b1"
NEEDS_MATPLOTLIB = "the report needs matplotlib: pip install 'lgnet-fast[bench]'"
PALETTE = ("#0b6e4f", "#c8553d", "#28559a", "#8a5a9e", "#b58900", "#4f5d6b")


def _figure(rows: int, columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """An empty figure of width x height inches."""
    try:
        import matplotlib
    except ImportError as error:
        raise LGNetError(NEEDS_MATPLOTLIB) from error
    from matplotlib.figure import Figure

    matplotlib.rcParams.update(
        {
            "svg.fonttype": "none",  # text is kept as text, for small files
            "svg.hashsalt": "lgnet_fast",
            "font.family": "sans-serif",
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
        }
    )
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _svg(figure: Figure) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()


def _bars(axes: Axes, values: Mapping[str, float], colours: Mapping[str, str], unit: str) -> None:
    """Horizontal bars, the first on top, each with its value."""
    names = list(values)
    axes.barh(names, [values[name] for name in names], color=[colours[name] for name in names], height=0.7)
    axes.invert_yaxis()
    for i, name in enumerate(names):
        axes.text(values[name], i, f" {values[name]:.3g}", va="center", fontsize=8)
    axes.set_xlabel(unit)
    axes.margins(x=0.15)


def _colour(name: str) -> str:
    return OURS if name == "ours" else OURS_LIGHT if name.startswith("ours") else OTHERS


def latency(benches: Mapping[str, Any], title: str = "", relative: bool = False) -> bytes:
    """Bars of every whole-network bench and the peers: least times in ms, or medians relative to our dense run.

    Peers whose pixels are wrong are left out.
    """
    figure, axes = _figure((len(benches) + 1) // 2, min(2, len(benches)), 9, 2.4 * ((len(benches) + 1) // 2))
    for spare in axes[len(benches) :]:
        spare.remove()
    figure.suptitle(title, fontsize=9)
    for plot, (name, bench) in zip(axes, benches.items()):
        wrong = bench.get("wrong_peers", {})
        times = {"ours": 1.0} | bench["times_slower_than_ours"] if relative else bench["least_ms"]
        times = dict(
            sorted(((key, time) for key, time in times.items() if key not in wrong), key=lambda item: item[1])
        )
        axis = "time, relative to our dense run" if relative else "ms, least of one interleaved run"
        _bars(plot, times, {key: _colour(key) for key in times}, axis)
        plot.set_title(name.removeprefix("test_").replace("inference", "").strip("[]_") or name, loc="left")
    return _svg(figure)


def table4(bench: Mapping[str, Any]) -> bytes:
    """Bars of Table IV's times, on a logarithmic axis."""
    times = dict(sorted(bench["least_ms"].items(), key=lambda item: item[1]))
    figure, (axes,) = _figure(1, 1, 8, 0.9 + 0.24 * len(times))
    colours = {
        name: OURS if name.startswith("ours") else "#4f5d6b" if name.startswith("LGNet") else OTHERS for name in times
    }
    axes.set_xscale("log")
    _bars(axes, times, colours, "ms at 256x256, batch 1, float32")
    return _svg(figure)


def roofline(bench: Mapping[str, Any]) -> bytes:
    """Every step's GFLOP/s over its FLOP/byte, under the measured roofs."""
    figure, (axes,) = _figure(1, 1, 7.5, 4.5)
    flops, rate = bench["peaks"]["gflops"], bench["peaks"]["gigabytes_a_second"]
    nets: dict[str, list[tuple[float, float, float]]] = {}
    for name, gflop, megabytes, ms in bench["steps"]:
        if gflop > 0 and ms > 0:
            nets.setdefault(name.split(".")[0], []).append((1e3 * gflop / megabytes, 1e3 * gflop / ms, ms))
    for colour, (net, points) in zip(PALETTE, nets.items()):
        x, y, ms = zip(*points)
        axes.scatter(x, y, s=[12 + 30 * value for value in ms], color=colour, alpha=0.65, label=net, linewidths=0)
    lowest = min(x for points in nets.values() for x, _, _ in points) / 2
    highest = max(x for points in nets.values() for x, _, _ in points) * 2
    roof = [(x, min(flops, rate * x)) for x in sorted((lowest, flops / rate, highest))]
    axes.plot(*zip(*roof), color="#222", linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="FLOP a byte", ylabel="GFLOP/s")
    legend = axes.legend(title="stage; area: time", frameon=False)
    for handle in filter(None, legend.legend_handles):
        handle.set(sizes=[40])
    return _svg(figure)


def scaling(benches: Mapping[str, Any]) -> bytes:
    """Time over size in log-log, with the fitted slopes."""
    figure, axes = _figure(1, len(benches), 4.2 * len(benches), 3.4)
    for plot, bench in zip(axes, benches.values()):
        for colour, name in zip((OURS, "#4f5d6b"), ("ours", "eager")):
            points = [
                (int(key.removeprefix(f"{name}_")), ms)
                for key, ms in bench["least_ms"].items()
                if key.startswith(f"{name}_")
            ]
            label = f"{name}, slope {bench['slopes'][name]['slope']:.2f}"
            plot.plot(*zip(*points), marker="o", color=colour, label=label)
        plot.set(xscale="log", yscale="log", ylabel="ms")
        plot.set_xlabel({"side": "side of the picture, pixels", "batch": "batch, at 256x256"}[bench["size"]])
        ticks = sorted({int(key.rsplit("_", 1)[1]) for key in bench["least_ms"]})
        plot.set_xticks(ticks, [str(tick) for tick in ticks])
        plot.set_xticks([], minor=True)
        plot.legend(frameon=False)
    return _svg(figure)


def hole_ratio(bench: Mapping[str, Any], title: str = "") -> bytes:
    """Speed-up of the hole-aware run over the dense one and over eager, by the hole's share of the picture."""
    figure, (axes,) = _figure(1, 1, 6.5, 3.6)
    figure.suptitle(title, fontsize=9)
    kinds = {"square": ("one square hole", OURS, "o"), "squares": ("2 x 2 square holes", "#28559a", "s")}
    for kind, (label, colour, marker) in kinds.items():
        points = sorted(
            (100 * bench["hole_ratios"][name], faster)
            for name, faster in bench["times_faster_than_dense"].items()
            if name.startswith(f"ours_{kind}_")
        )
        axes.plot(*zip(*points), marker=marker, color=colour, label=label)
    axes.axhline(1, color="#222", linewidth=0.8)
    axes.set(
        xlabel="hole, % of the picture", ylabel="times faster than our dense run", xlim=(0, None), ylim=(0, None)
    )
    eager = bench["times_slower_than_ours"]["eager"]
    above = axes.secondary_yaxis("right", functions=(lambda y: y * eager, lambda y: y / eager))
    above.set_ylabel("times faster than eager PyTorch")
    axes.legend(frameon=False)
    return _svg(figure)


def training_curve(log: Sequence[Mapping[str, Any]]) -> bytes:
    """Of the lines of a run's log.jsonl: the l1 in the hole of every stage, and the held-out pictures' scores.

    Next to PSNR it shows LPIPS if the log has it, else l1, and a third plot if the log has the sharpness of kinds of
    holes. A dotted line marks the first step with the discriminator, a dashed one the end of a leg (lines of kind
    "leg").
    """
    steps = [line for line in log if line["kind"] == "train"]
    checks = [line for line in log if line["kind"] == "validation"]
    kinds = [key for key in (checks[-1] if checks else {}) if key.startswith("sharpness_")]
    figure, axes = _figure(1, 3 if kinds else 2, 12 if kinds else 9, 3.2)
    left, right = axes[:2]
    for stage, colour in zip(("1", "2", "3"), PALETTE):
        points = [(line["step"], line[f"hole{stage}"]) for line in steps if f"hole{stage}" in line]
        if points:
            left.plot(*zip(*points), color=colour, linewidth=0.9, label=f"stage {stage}")
    left.set(xlabel="step", ylabel="l1 in the hole, of [-1, 1]")
    left.legend(frameon=False)
    at = [line["step"] for line in checks]
    right.plot(at, [line["psnr"] for line in checks], color=PALETTE[0], label="PSNR")
    right.set(xlabel="step", ylabel="held-out PSNR, dB")
    other, label, unit = ("lpips", "LPIPS", "") if checks and "lpips" in checks[-1] else ("l1", "l1", ", %")
    beside = right.twinx()
    beside.plot(at, [line[other] for line in checks], color=PALETTE[1], label=label)
    beside.set_ylabel(f"held-out {label}{unit}")
    right.legend(handles=[*right.get_lines(), *beside.get_lines()], frameon=False, loc="center right")
    for kind, colour in zip(kinds, PALETTE):
        axes[2].plot(at, [line[kind] for line in checks], color=colour, label=kind.removeprefix("sharpness_"))
    if kinds:
        axes[2].set(xlabel="step", ylabel="held-out sharpness, 1 = the truth", ylim=(0, None))
        axes[2].legend(frameon=False, ncols=2)
    starts = [line["step"] for line in steps if "D" in line][:1]
    legs = [line["step"] for line in log if line["kind"] == "leg"][:-1]
    for plot in axes:
        plot.locator_params(axis="x", nbins=5)
        for step, style in [*((step, ":") for step in starts), *((step, "--") for step in legs)]:
            plot.axvline(step, color="#4f5d6b", linewidth=0.8, linestyle=style)
    return _svg(figure)


def history(past: Sequence[tuple[str, str, Mapping[str, float]]]) -> bytes:
    """The speed-up over the fastest rival, by measured commit, of benches that were measured more than once."""
    figure, (axes,) = _figure(1, 1, 9, 4)
    names = dict.fromkeys(name for _, _, values in past for name in values)
    several = [name for name in names if sum(name in values for _, _, values in past) > 1]
    headline = [name for name in several if name.startswith(("test_inference", "test_forward[cpu-64x64x128"))]
    shown = headline or several[:6]
    past = [point for point in past if any(name in point[2] for name in shown)]
    commits = [f"{commit}\n{date}" for date, commit, _ in past]
    for number, name in enumerate(shown):
        points = [(i, values[name]) for i, (_, _, values) in enumerate(past) if name in values]
        colour, style = PALETTE[number % len(PALETTE)], ("-", "--")[number // len(PALETTE) % 2]
        axes.plot(*zip(*points), marker="o", linestyle=style, color=colour, label=name.removeprefix("test_"))
    axes.set_xticks(range(len(commits)), commits, fontsize=7)
    axes.set_ylabel("times faster than the fastest rival")
    axes.set_ylim(0, None)
    if shown:
        axes.legend(frameon=False, fontsize=7, ncols=2)
    return _svg(figure)
