"""What the tests of `lgnet-fast eval` share: pictures, and the command."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from typer.testing import CliRunner, Result

from lgnet_fast import cli

PLAIN = ("l1", "psnr", "ssim")


def write_waves(folder: Path) -> Path:
    """Five smooth pictures of several sizes, in a new folder."""
    folder.mkdir()
    for index, (height, width) in enumerate([(64, 64), (80, 64), (64, 100), (70, 70), (96, 128)]):
        rows, columns = np.mgrid[0:height, 0:width] / 20
        waves = [np.sin(rows + index), np.cos(columns * (index + 1) / 2), np.sin(rows + columns)]
        Image.fromarray((127 + 100 * np.stack(waves, axis=2)).astype(np.uint8)).save(folder / f"{index}.png")
    return folder


def invoke_eval(*arguments: object) -> Result:
    """`lgnet-fast eval` with these arguments."""
    return CliRunner().invoke(cli.app, ["eval", *map(str, arguments)])
