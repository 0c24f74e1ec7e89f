"""`lgnet-fast ...`: the command line."""

from __future__ import annotations

import json as json_module
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import LGNetError

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


class Variant(str, Enum):
    """Values of --variant."""

    released = "released"
    paper = "paper"


class Stored(str, Enum):
    """Values of convert's --dtype."""

    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"


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
    with _one_line_errors(UsageError):
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
    raise typer.Exit(code)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="Folder with <epoch>_net_G1.pth, _G2.pth and _G3.pth.")],
    out: Annotated[Path, typer.Argument(help="Model folder to write: config.json and model.safetensors.")],
    epoch: Annotated[str | None, typer.Option(help="Which one, where the folder holds several.")] = None,
    variant: Annotated[Variant, typer.Option(help="Attention the weights were trained with.")] = Variant.released,
    dtype: Annotated[Stored | None, typer.Option(help="Store floating tensors so; default: as they are.")] = None,
) -> None:
    """Convert the authors' checkpoint files to a model folder."""
    import torch

    from .reference import LGNet

    with _one_line_errors():
        model = LGNet.from_released(source, epoch=epoch, variant=variant.value)
        model.save_pretrained(out, dtype=None if dtype is None else getattr(torch, dtype.value))
    parameters = sum(p.numel() for p in model.parameters())
    typer.echo(f"{out}: {parameters:,} parameters, widths {model.channels}, {variant.value} attention")


@app.command()
def info(
    json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
    plan: Annotated[str | None, typer.Option(help="Print the engine's plan of this model, measured here.")] = None,
) -> None:
    """Print versions, devices, and which backends run here, or why not."""
    from .info import collect, render

    if plan is None:
        _print(collect(), json, render)
        return
    from rich.console import Console

    from .engine import optimize
    from .reference import create_model

    try:
        model = create_model(plan)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--plan") from None
    Console(width=140).print(optimize(model, device="cpu").describe())


@app.command()
def flops(
    model: Annotated[str, typer.Option(help="A name as create_model takes it.")] = "lgnet",
    size: Annotated[str, typer.Option(help="HxW, multiples of 256.")] = "256x256",
    batch: Annotated[int, typer.Option(min=1, help="Pictures a batch.")] = 1,
    json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Print parameters and FLOPs, by the paper's rule and by true count, stage by stage."""
    from .counting import count, render

    try:
        height, width = (int(part) for part in size.lower().split("x"))
        report = count(model, (height, width), batch)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    _print(report, json, render, lambda r: r.as_dict())


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.")] = Path("demo_output"),
) -> None:
    """Fill the bundled pictures with the bundled model; writes results and contact sheets."""
    from .demo import run_demo
    from .pipeline import Inpainter

    with _one_line_errors():
        pipe = Inpainter.from_pretrained(None)
        typer.echo(f"ready after {pipe.warmup():.2f} s of warm-up")
        for item in run_demo(out, pipe):
            width, height = item.size
            typer.echo(f"{item.name}: {width}x{height} in {item.seconds:.2f} s -> {item.result}, {item.sheet}")


@contextmanager
def _one_line_errors(*more: type[Exception]) -> Iterator[None]:
    """What the user can put right becomes one line on stderr and exit code 2, without a traceback."""
    expected: tuple[type[Exception], ...] = (LGNetError, *more)
    try:
        yield
    except expected as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None


def _print(
    value: Any, as_json: bool, render: Callable[[Any], Any], plain: Callable[[Any], Any] = lambda value: value
) -> None:
    """`value` as JSON, or as the rich table that `render` makes of it."""
    if as_json:
        typer.echo(json_module.dumps(plain(value), indent=2))
        return
    from rich.console import Console

    Console().print(render(value))


def main() -> None:
    """The console script."""
    app()
