"""`lgnet-fast ...`: the command line."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from .errors import BackendError, WeightsError

app = typer.Typer(
    name="lgnet-fast",
    help="LGNet image inpainting, made fast.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


class Strategy(str, Enum):
    """Values of --strategy."""

    auto = "auto"
    full = "full"
    crop = "crop"
    resize = "resize"
    tile = "tile"


class Format(str, Enum):
    """Values of --format."""

    png = "png"
    jpeg = "jpeg"
    webp = "webp"
    tiff = "tiff"
    bmp = "bmp"


@app.callback()
def commands() -> None:
    """LGNet image inpainting, made fast."""


@app.command()
def run(
    source: Annotated[Path, typer.Option("-i", "--input", help="A picture, or a folder of them.")],
    mask: Annotated[Path, typer.Option("-m", "--mask", help="A mask (white = fill), or a folder paired by name.")],
    out: Annotated[Path, typer.Option("-o", "--output", help="The result's file or folder; replaced if it exists.")],
    strategy: Annotated[Strategy, typer.Option(help="How large pictures are handled.")] = Strategy.auto,
    mask_threshold: Annotated[float, typer.Option(help="Mask levels above this share are hole; below 1.")] = 0.5,
    invert_mask: Annotated[bool, typer.Option("--invert-mask", help="Black = fill.")] = False,
    dilate: Annotated[int, typer.Option(min=0, help="Grow the hole by this many pixels.")] = 0,
    feather: Annotated[int, typer.Option(min=0, help="Blend over this many pixels around the hole.")] = 0,
    format: Annotated[Format | None, typer.Option(help="The results' format; default: each picture's.")] = None,
    quality: Annotated[int | None, typer.Option(min=1, max=100, help="For JPEG and WebP.")] = None,
    model: Annotated[str | None, typer.Option(help="A model folder or hub id; default: the bundled one.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, float16, bfloat16.")] = "auto",
    backend: Annotated[str, typer.Option(help="auto, eager, triton, cpp.")] = "auto",
    skip_existing: Annotated[bool, typer.Option("--skip-existing", help="Leave results that are there.")] = False,
    report: Annotated[Path | None, typer.Option(help="Write a JSON report to this file.")] = None,
) -> None:
    """Fill the holes of a picture or of a folder of pictures.

    Exit code: 0 all done, 1 some pictures failed, 2 the run could not start.
    """
    # Imported here so that --help does not wait for torch.
    from .pipeline.batch import UsageError
    from .pipeline.batch import run as run_batch

    if not 0 <= mask_threshold < 1:
        raise typer.BadParameter("expected 0 <= value < 1", param_hint="--mask-threshold")
    try:
        code = run_batch(
            source,
            mask,
            out,
            format=format and format.value,
            quality=quality,
            skip_existing=skip_existing,
            report=report,
            model=model,
            device=device,
            dtype=dtype,
            backend=backend,
            strategy=strategy.value,
            mask_threshold=mask_threshold,
            invert_mask=invert_mask,
            dilate=dilate,
            feather=feather,
        )
    except (UsageError, WeightsError, BackendError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    raise typer.Exit(code)


def main() -> None:
    """The console script."""
    app()
