"""Table IV's parameters and FLOPs: the paper's figures, those of its tools, and the true counts."""

from __future__ import annotations

from typing import Any

import pytest
from rich.console import Console

from bench import complexity
from bench.complexity import FOOTNOTES, Row, by_true_flops


@pytest.fixture(scope="module")
def table() -> dict[str, Row]:
    rows = complexity.rows()
    Console(width=100).print(complexity.render(rows))
    return {row.name: row for row in rows}


# Name: M parameters and G FLOPs of the paper, G by the rule of thop 0.0.31, true GFLOP.
FIGURES = {
    "PEN": (10.23, 48.07, 4.8066, 51.3172),
    "GConv": (4.05, 55.57, 25.2500, 55.4686),
    "MEDFE": (130.32, 137.93, 137.9332, 252.2661),
    "RFR": (30.59, 206.11, 206.1097, 343.8700),
    "MADF": (85.14, 51.77, 46.1209, 56.5213),
    "LGNet": (115.00, 69.62, 69.6240, 86.0587),
    "LGNet_share": (60.58, 69.62, 69.6240, 86.0587),
    "LGNet_light": (67.10, 53.73, 53.7323, 72.7691),
}
REFINED = {"PEN_LG": (70_818_744, 56.2653, 125.2460), "MEDFE_LG": (190_903_276, 189.3919, 326.1949)}
EXACT_PARAMETERS = {
    "PEN": 10_231_538,
    "GConv": 4_052_478,
    "MEDFE": 130_316_070,
    "RFR": 31_224_065,
    "MADF": 85_141_214,
    "LGNet": 115_002_185,
    "LGNet_share": 60_587_206,
    "LGNet_light": 67_095_337,
}


@pytest.mark.parametrize("name", FIGURES)
def test_row(name: str, table: dict[str, Row], record_property: Any) -> None:
    parameters, flops, thop, true = FIGURES[name]
    row = table[name]
    record_property("row", row.as_dict())
    assert row.published == (parameters, flops)
    assert row.total.parameters == EXACT_PARAMETERS[name]
    # The paper rounds, except for LGNet_share, where it truncates 60.587.
    assert abs(row.parameters / 1e6 - parameters) < (0.01 if name == "LGNet_share" else 0.005)
    assert row.total.thop_rule / 1e9 == pytest.approx(thop, abs=6e-5)
    assert row.total.flops / 1e9 == pytest.approx(true, abs=6e-5)
    if name == "MADF":
        assert row.differences is not None
        assert row.differences[1] == pytest.approx(100 * (46.1209 / 51.77 - 1), abs=1e-2)
    else:
        assert round(row.flops / 1e9, 2) == flops


@pytest.mark.parametrize("name", REFINED)
def test_refined_row(name: str, table: dict[str, Row]) -> None:
    parameters, thop, true = REFINED[name]
    row = table[name]
    assert row.published is None
    assert row.total.parameters == parameters
    assert row.total.thop_rule / 1e9 == pytest.approx(thop, abs=6e-5)
    assert row.total.flops / 1e9 == pytest.approx(true, abs=6e-5)


def test_what_the_footnotes_say(table: dict[str, Row]) -> None:
    assert table["PEN"].flops == 10 * table["PEN"].total.thop_rule
    assert round(table["RFR"].total.thop_parameters / 1e6, 2) == 30.59
    assert table["RFR"].total.thop_parameters == 30_593_248
    assert round(table["RFR"].total.parameters / 1e6, 2) == 31.22
    for name, figure in (("PEN", "4.807 G"), ("MADF", "46.12 G"), ("GConv", "25.25 G")):
        assert f"{table[name].total.thop_rule / 1e9:.{len(figure.split('.')[1]) - 2}f} G" == figure
        assert figure in FOOTNOTES[name]
    gconv = table["GConv"]
    assert f"({gconv.total.profiler_rule / 1e9:.3f} G)" in FOOTNOTES["GConv"]
    assert f" {(gconv.flops - gconv.total.profiler_rule) / 1e9:.3f} G" in FOOTNOTES["GConv"]
    # The original's profile, G: biases, products, softmax, sums, quotients, argmax, squares, summands, differences.
    profile = (0.051118, 0.033604, 0.005243, 0.004440, 0.001478, 0.001048, 0.000885, 0.000884, 0.000398)
    assert (gconv.flops - gconv.total.flops) / 1e9 == pytest.approx(sum(profile), abs=1e-5)


def test_true_flops_of_leaner_forms(table: dict[str, Row]) -> None:
    """The cost of RFR and MEDFE with cheaper mask sums, as the footnotes state it."""
    wide = 64 * 128**2 * 7 * 7  # one output of 64 channels, one input channel
    full = wide * (3 + 13 * 64) + 32 * 256**2 * 67 * 9
    one_output = wide * (3 + 13 * 64) // 64 + 256**2 * 67 * 9
    rfr = table["RFR"].total.flops - 2 * (full - one_output)
    assert f"{rfr / 1e9:.2f} GFLOP" in FOOTNOTES["RFR"]

    windows = 10 * (3 * 3 + 5 * 5 + 7 * 7) * 32**2
    gaussian = 1024 * 1024 * 512
    medfe = table["MEDFE"].total.flops - 2 * windows * (256**2 - 1) + 2 * gaussian
    assert f"{medfe / 1e9:.2f} GFLOP" in FOOTNOTES["MEDFE"]


def test_order_by_true_flops(table: dict[str, Row]) -> None:
    paper = [
        row.name for row in by_true_flops(list(table.values())) if not row.name.endswith(("_LG", "_share", "_light"))
    ]
    assert paper == ["PEN", "GConv", "MADF", "LGNet", "MEDFE", "RFR"]
