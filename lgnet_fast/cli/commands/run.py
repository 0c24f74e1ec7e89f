"""`lgnet-fast run`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from ..application import command
from ..options import Backend, Device, Dtype, Model, given, path


class Strategy(str, Enum):
    """Values of --strategy."""

    auto = "auto"
    full = "full"
    crop = "crop"
    resize = "resize"
    tile = "tile"


class MaskChannel(str, Enum):
    """Values of --mask-channel."""

    auto = "auto"
    luma = "luma"
    alpha = "alpha"
    inverse_alpha = "inverse_alpha"
    colour = "colour"


class Format(str, Enum):
    """Values of --format."""

    png = "png"
    jpeg = "jpeg"
    webp = "webp"
    tiff = "tiff"
    bmp = "bmp"
    avif = "avif"
    jp2 = "jp2"
    ppm = "ppm"
    tga = "tga"


@command()
def run(
    source: Annotated[
        Path, typer.Option("-i", "--input", parser=path, help="A picture, a folder of them, tar shards; -: a pipe.")
    ],
    out: Annotated[
        str,
        typer.Option(
            "-o", "--output", parser=given, help="The result's file or folder; replaced if it exists; -: a pipe."
        ),
    ],
    mask: Annotated[
        Path | None,
        typer.Option("-m", "--mask", parser=path, help="A mask (white = fill), or a folder paired by name."),
    ] = None,
    mask_suffix: Annotated[
        str | None,
        typer.Option(help="Masks are named like their pictures with this added, e.g. _mask (also _mask001)."),
    ] = None,
    strategy: Annotated[Strategy, typer.Option(help="How large pictures are handled.")] = Strategy.auto,
    mask_threshold: Annotated[float, typer.Option(help="Mask levels above this share are hole; below 1.")] = 0.5,
    invert_mask: Annotated[bool, typer.Option("--invert-mask", help="Black = fill.")] = False,
    mask_channel: Annotated[
        MaskChannel, typer.Option(help="What tells the hole; auto refuses masks that may mean two things.")
    ] = MaskChannel.auto,
    allow_any_mask: Annotated[
        bool, typer.Option("--allow-any-mask", help="Let masks pass that select nothing, or more than 95 %.")
    ] = False,
    dilate: Annotated[int, typer.Option(min=0, help="Grow the hole by this many pixels on every side (a disk).")] = 0,
    feather: Annotated[
        int, typer.Option(min=0, help="Blend over this many pixels around the grown hole (a linear ramp).")
    ] = 0,
    format: Annotated[Format | None, typer.Option(help="The results' format; default: each picture's.")] = None,
    quality: Annotated[int | None, typer.Option(min=1, max=100, help="For JPEG, WebP, AVIF, HEIC.")] = None,
    model: Model = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    backend: Backend = "auto",
    skip_existing: Annotated[bool, typer.Option("--skip-existing", help="Leave results that are there.")] = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Keep a journal beside the results, and go on where an earlier run with --resume stopped; always so "
            "under `accelerate launch`.",
        ),
    ] = False,
    report: Annotated[
        Path | None, typer.Option(parser=path, help="Write a JSON report to this file, as the run goes.")
    ] = None,
) -> None:
    """Fill the holes of a picture, of a folder of pictures, or of tar shards.

    Started by `accelerate launch -m lgnet_fast run ...`, the processes share the work and merge one report; the same
    command run again does only what is not done.

    Exit code: 0 all done, 1 some pictures failed or were left out, 2 the run could not start, 130 after Ctrl-C,
    143 after SIGTERM.
    """
    from ...jobs.fill import fill
    from ...jobs.options import FillOptions

    options = FillOptions(
        source,
        mask,
        out,
        mask_suffix=mask_suffix,
        format=format and format.value,
        quality=quality,
        skip_existing=skip_existing,
        resume=resume,
        report=report,
        model=model,
        device=device,
        dtype=dtype,
        backend=backend,
        strategy=strategy.value,
        mask_threshold=mask_threshold,
        invert_mask=invert_mask,
        mask_channel=mask_channel.value,
        allow_any_mask=allow_any_mask,
        dilate=dilate,
        feather=feather,
    )
    raise typer.Exit(fill(options))
