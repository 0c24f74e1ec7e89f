"""Options that several commands share, and parsers of their values."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated

import typer

from ..errors import UsageError
from .models import model_of


def given(text: str) -> str:
    """A path or name. An empty one (an unset shell variable) is an error: it would mean the current folder."""
    if not text.strip():
        raise typer.BadParameter("got an empty text")
    return text


def path(text: str) -> Path:
    """A file or folder; an address is an error."""
    from ..pipeline.formats import ADDRESS

    if ADDRESS.match(text) and not os.path.exists(text):
        raise typer.BadParameter(f"expected a file or a folder, got the address {text}; download it first")
    return Path(given(text))


def folder(text: str | Path) -> Path:
    """A folder to write to; Typer also passes an option's default through its parser."""
    from ..pipeline.formats import ADDRESS

    text = str(text)
    if ADDRESS.match(text):
        raise typer.BadParameter(f"expected a folder, got the address {text}")
    return path(text)


def refuse_file(name: str, out: Path | None) -> None:
    """Raise UsageError where the folder to write, of the parameter `name`, is a file."""
    if out is not None and out.exists() and not out.is_dir():
        raise UsageError(f"{name}: expected a folder, got the file {str(out)!r}")


def height_and_width(size: str) -> tuple[int, int]:
    """Height and width of --size."""
    found = re.fullmatch(r"(\d+)x(\d+)", size.strip().lower())
    if found is None:
        raise typer.BadParameter(f"expected HxW, such as 256x256, got {size!r}", param_hint="--size")
    return int(found[1]), int(found[2])


def _model(text: str) -> str | None:
    return model_of(given(text))


Model = Annotated[str | None, typer.Option(parser=_model, help="A model folder or hub id; default: the bundled one.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Dtype = Annotated[str, typer.Option(help="auto, float32, float16, bfloat16, float64.")]
Backend = Annotated[str, typer.Option(help="auto, eager, triton, cpp.")]
Size = Annotated[str, typer.Option(help="HxW, multiples of 256.")]
Batch = Annotated[int, typer.Option(min=1, help="Pictures a batch.")]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable.")]
