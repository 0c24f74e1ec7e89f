"""The complexity half of the paper's Table IV: parameters and FLOPs of LGNet and the five compared networks.

Every row is counted by the same code (:mod:`lgnet_fast.counting`) on the meta device. The paper's figures come from
three different tools, so some rows need a footnote: see :data:`FOOTNOTES`. Only true FLOPs have the same meaning in
every row; by them the order differs from the paper's.

    lgnet-fast flops --peers
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from bench.peers import PEERS
from bench.peers.adapter import REFINED, adapt
from lgnet_fast.counting import PUBLISHED, Counts, Report, count, difference_percent
from lgnet_fast.reference import create_model

if TYPE_CHECKING:
    from rich.console import RenderableType

# The profiler counts every node of a graph, whether it runs or not. GConv's graph has nodes besides the network:
# pictures are converted from and to 8 bit (4 operations per value), and a picture shows which patch each position
# takes: an argmax over 1024 x 1024 scores, and 3,850,240 products and as many sums for the colours. The last figure
# comes from a profile of the original.
_GCONV_GRAPH = 4 * 3 * 256**2 + 1024 * 1023 + 2 * 3_850_240
# How the paper's figure is reproduced: a count of Counts, a factor, and operations of the original's graph besides.
_TOOLS = {"PEN": ("thop_rule", 10, 0), "GConv": ("profiler_rule", 1, _GCONV_GRAPH)}
# thop misses parameters of sub-classed layers. For this network the paper prints thop's figure, elsewhere the plain
# sum.
_THOP_PARAMETERS = ("RFR",)

FOOTNOTES = {
    "PEN": "thop gives 4.807 G. The paper's figure is ten times that; the reason is not known.",
    "GConv": "The paper's figure is that of the TensorFlow profiler: 2 FLOPs for each multiply-accumulate, attention "
    "included, and 1 for each element-wise operation (55.558 G). Another 0.010 G are in the original's graph, not in "
    "the network (8-bit conversion, a picture of the attention). The other rows' rule gives 25.25 G here.",
    "MEDFE": "True FLOPs of the original, which computes mask sums by convolutions of full width; "
    "141.94 GFLOP with one-channel mask sums and the Gaussian as a matrix product.",
    "RFR": "Parameters by thop, which does not count partial convolutions; the true number is 31.22 M. True FLOPs of "
    "the original, which computes mask sums by convolutions of full width; 256.96 GFLOP with one output channel.",
    "MADF": "No rule that was tried gives the paper's 51.77 G; that of thop 0.0.31 gives 46.12 G.",
}


@dataclass(frozen=True)
class Row:
    """One network of the table, at 256x256, batch 1."""

    name: str
    report: Report
    published: tuple[float, float] | None
    """M parameters and G FLOPs as the paper prints them; None for networks that its table does not have."""

    @property
    def total(self) -> Counts:
        return self.report.total

    @property
    def parameters(self) -> int:
        """Counted by the paper's rule."""
        return self.total.thop_parameters if self.name in _THOP_PARAMETERS else self.total.parameters

    @property
    def flops(self) -> int:
        """Counted by the tool that gave the paper's figure; see the footnotes."""
        rule, factor, besides = _TOOLS.get(self.name, ("thop_rule", 1, 0))
        return getattr(self.total, rule) * factor + besides

    @property
    def differences(self) -> tuple[float, float] | None:
        """Deviations of parameters and of FLOPs from the paper's, in percent."""
        if self.published is None:
            return None
        ours = (self.parameters / 1e6, self.flops / 1e9)
        first, second = map(difference_percent, ours, self.published)
        return first, second

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        published, differences = self.published or (None, None), self.differences or (None, None)
        return {
            "name": self.name,
            "parameters": self.parameters,
            "parameters_paper_m": published[0],
            "parameters_difference_percent": differences[0],
            "flops_by_the_papers_tool": self.flops,
            "flops_paper_g": published[1],
            "flops_difference_percent": differences[1],
            "true_flops": self.total.flops,
            "footnote": FOOTNOTES.get(self.name),
            **{key: value for key, value in self.report.as_dict().items() if key in ("stages", "total")},
        }


def rows() -> list[Row]:
    """Table IV's eight networks in the paper's order, then PEN_LG and MEDFE_LG (Section IV-E)."""
    published = {name: peer.published for name, peer in PEERS.items()}
    published |= {name.replace("lgnet", "LGNet"): figures for name, figures in PUBLISHED.items()}
    return [_row(name, published.get(name)) for name in (*published, *REFINED)]


def _row(name: str, published: tuple[float, float] | None) -> Row:
    with torch.device("meta"):
        ours = name.lower() in PUBLISHED
        model = create_model(name.lower(), backend="eager") if ours else adapt(name)
    report = count(model)
    stages = tuple(replace(stage, name=stage.name.removesuffix("Adapter")) for stage in report.stages)
    return Row(name, replace(report, model=name, stages=stages), published)


def by_true_flops(table: list[Row]) -> list[Row]:
    """Names of the networks, the cheapest first."""
    return sorted(table, key=lambda row: row.total.flops)


def as_dict(table: list[Row]) -> dict[str, Any]:
    """For JSON."""
    return {
        "size": [256, 256],
        "batch_size": 1,
        "rows": [row.as_dict() for row in table],
        "order_by_true_flops": [row.name for row in by_true_flops(table)],
    }


def render(table: list[Row]) -> RenderableType:
    """`table` for a terminal, with footnotes and the order by true FLOPs."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Group
    from rich.padding import Padding
    from rich.table import Table

    notes = [row.name for row in table if row.name in FOOTNOTES]
    order = by_true_flops(table)
    view = Table(title="Table IV, 256x256, batch 1", box=SIMPLE_HEAD, padding=0)
    view.add_column("network", no_wrap=True)
    for heading in ("params\nM", "paper\nM", "diff.\n%", "thop\nG", "tool's\nG", "paper\nG", "diff.\n%",
                    "true\nGFLOP", "rank"):  # fmt: skip
        view.add_column(heading, justify="right")
    for row in table:
        published = [f"{value:.2f}" for value in row.published] if row.published else ["-", "-"]
        differences = [f"{value:+.2f}" for value in row.differences] if row.differences else ["-", "-"]
        mark = f" [{notes.index(row.name) + 1}]" if row.name in notes else ""
        view.add_row(
            # The mark is escaped, because rich reads brackets as markup.
            row.name + mark.replace("[", r"\["),
            f"{row.parameters / 1e6:.2f}",
            published[0],
            differences[0],
            f"{row.total.thop_rule / 1e9:.2f}",
            f"{row.flops / 1e9:.2f}",
            published[1],
            differences[1],
            f"{row.total.flops / 1e9:.2f}",
            str(order.index(row) + 1),
        )
    lines = [rf"\[{i}] {name}: {FOOTNOTES[name]}" for i, name in enumerate(notes, 1)]
    lines.append("Tool's: by the tool that gave the paper's figure. Rank: by true FLOPs.")
    ranking = " < ".join(f"{row.name} {row.total.flops / 1e9:.0f}" for row in order)
    lines.append(f"By true GFLOP: {ranking}.")
    return Group(view, *(Padding(line, (0, 0, 0, 1)) for line in lines))
