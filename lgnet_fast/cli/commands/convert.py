"""`lgnet-fast convert`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from ..application import command
from ..options import folder, path, refuse_file
from ..output import say


class Variant(str, Enum):
    """Values of --variant."""

    released = "released"
    paper = "paper"


class Stored(str, Enum):
    """Values of convert's --dtype."""

    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"


@command()
def convert(
    source: Annotated[Path, typer.Argument(parser=path, help="Folder with <epoch>_net_G1.pth, _G2.pth and _G3.pth.")],
    out: Annotated[
        Path, typer.Argument(parser=folder, help="Model folder to write: config.json and model.safetensors.")
    ],
    epoch: Annotated[str | None, typer.Option(help="The epoch to convert, if the folder holds several.")] = None,
    variant: Annotated[Variant, typer.Option(help="Attention the weights were trained with.")] = Variant.released,
    dtype: Annotated[Stored | None, typer.Option(help="Store floating tensors so; default: as they are.")] = None,
) -> None:
    """Convert the authors' checkpoint files to a model folder.

    Exit code: 0 done, 2 it could not start.
    """
    import torch

    from ...reference import LGNet

    refuse_file("out", out)
    model = LGNet.from_released(source, epoch=epoch, variant=variant.value)
    model.save_pretrained(out, dtype=None if dtype is None else getattr(torch, dtype.value))
    parameters = sum(p.numel() for p in model.parameters())
    say(f"{out}: {parameters:,} parameters, widths {model.channels}, {variant.value} attention")
