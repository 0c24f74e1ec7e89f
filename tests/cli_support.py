"""What the tests of `lgnet-fast run` with unusual paths, streams and reports share, beside `case` of conftest.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

from lgnet_fast import cli
from lgnet_fast.pipeline import Inpainter

from .pipeline_support import HOLE, BlurFill, noise

FILLED = Inpainter(BlurFill())(noise(40, 60), HOLE)


def run(*arguments: object, **options: Any) -> Result:
    """The outcome of `lgnet-fast run` with these arguments; `options` of typer's `invoke`."""
    return CliRunner().invoke(cli.app, ["run", *map(str, arguments)], **options)


def names(folder: Path) -> list[str]:
    """Paths of the files in a folder and below, sorted."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
