"""`lgnet-fast holes`."""

from __future__ import annotations

import numpy as np
from PIL import Image
from typer.testing import CliRunner

from lgnet_fast import cli


def run(*arguments: object):
    return CliRunner().invoke(cli.app, ["holes", "-m", *map(str, arguments)])


def test_each_mask_has_a_line(tmp_path):
    for name, rows in (("a.png", 3), ("b.png", 0)):
        mask = np.zeros((10, 10), np.uint8)
        mask[:rows] = 255
        Image.fromarray(mask).save(tmp_path / name)
    result = run(tmp_path)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == [
        f"{tmp_path / 'a.png'}: 30.0 %, class 2",
        f"{tmp_path / 'b.png'}: 0.0 %, class none",
    ]
    assert run(tmp_path / "a.png", "--polarity", "black").stdout == f"{tmp_path / 'a.png'}: 70.0 %, class none\n"


def test_errors_name_the_option(tmp_path):
    for arguments, words in (
        ((tmp_path / "no",), "error: --masks: "),
        ((tmp_path, "--polarity", "green"), "error: --polarity: expected one of white, black, got 'green'"),
    ):
        result = run(*arguments)
        assert result.exit_code == 2
        assert result.stderr.startswith(words)
        assert result.stderr.count("\n") == 1
