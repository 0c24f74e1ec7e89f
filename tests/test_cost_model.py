"""The model of a GPU's time beside a run that was measured."""

from __future__ import annotations

import re

import pytest

from bench import cost_model

pytest.importorskip("triton")

STORED = "h100_contact_lgnet_float16_b1.jsonl"


@pytest.fixture
def table(capsys):
    def printed(*arguments: str) -> str:
        assert cost_model.main(arguments) == 0
        return capsys.readouterr().out

    return printed


def microseconds(text: str) -> int:
    match = re.search(r"estimated (\d+) us", text)
    assert match is not None
    return int(match[1])


def test_it_explains_the_measured_run_and_a_hole_costs_less(table) -> None:
    """Within 15 % of the H100's dense graph."""
    text = table()
    match = re.search(rf"measured (\d+) us \({STORED}\): the estimate is ([\d.]+) of it", text)
    assert match is not None, text[-400:]
    assert 500 < int(match[1]) < 600
    assert 0.85 < float(match[2]) < 1.15
    dense = microseconds(text)
    assert microseconds(table("--hole", "96", "160", "96", "160")) < 0.85 * dense
    assert microseconds(table("--card", "H200")) <= dense
    assert microseconds(table("--card", "L4")) > 2 * dense


def test_the_compiled_kernels_save_a_quarter(table) -> None:
    """On Hopper, in 26 launches: each U-Net's deep layers are one, NetL's blocks and three more chains, too,
    and no convolution has a second for its splits."""
    text = table("--compiled")
    assert microseconds(text) < 0.75 * microseconds(table())
    assert "H100 float16: 26 launches" in text
    rows = {row[0]: row for row in map(str.split, text.splitlines()) if row}
    assert rows["net_c.e5"][-2:] == ["deep", "120"]
    assert all(rows[f"net_g.d{layer}"][-1] == "deep" for layer in (5, 6, 7, 8))
    assert rows["net_l.block0.first"][-1] == "128"
    chained = [*(f"net_l.block{i}.second" for i in range(4)), "net_c.e3", "net_c.d2", "net_g.e4"]
    assert all("chain" in rows[name] for name in chained)
    assert all(rows[name][3] == "0" and 2 < float(rows[name][12]) < 9 for name in chained)
    assert "hopper" in rows["net_g.d4"]
    assert "picture" in rows["net_l.stem"]
    assert "hopper" not in table("--compiled", "--card", "B200")
