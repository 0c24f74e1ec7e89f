"""`lgnet-fast eval`."""

from __future__ import annotations

from enum import Enum
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ...errors import UsageError
from ..application import command
from ..models import named_model
from ..options import Backend, Device, Dtype, folder, given, path
from ..output import draw


class MaskKind(str, Enum):
    """Values of --mask-kind."""

    strokes = "strokes"
    boxes = "boxes"
    mixed = "mixed"


@command("eval")
def evaluate(
    pictures: Annotated[
        Path, typer.Option("-i", "--input", parser=path, help="A folder of pictures, one picture, or tar shards.")
    ],
    out: Annotated[
        Path, typer.Option("-o", "--output", parser=folder, help="Folder for evaluation.json, .md and .png.")
    ],
    masks: Annotated[
        Path | None,
        typer.Option(
            "-m",
            "--masks",
            parser=path,
            help="A folder of masks (white = hole), with --suite PICTURE_thin.png and so on; default: drawn ones.",
        ),
    ] = None,
    models: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            parser=given,
            help="A model folder or hub id, or TITLE=MODEL ('bundled': the package's own); more than one allowed.",
        ),
    ] = None,
    classes: Annotated[
        str | None,
        typer.Option(
            help="Hole ratios, e.g. 10-20,20-30, or their numbers 0 to 5, e.g. 1,2; with --suite kinds, e.g. "
            "thin,box; default: all."
        ),
    ] = None,
    size: Annotated[int, typer.Option(min=0, help="Shorter edge, then centre crop; 0: pictures as they are.")] = 256,
    seed: Annotated[int, typer.Option(min=0, help="Of the masks, and of which picture gets which.")] = 0,
    mask_kind: Annotated[MaskKind, typer.Option(help="Of drawn masks.")] = MaskKind.strokes,
    pair_by_name: Annotated[
        bool, typer.Option("--pair-by-name", help="Each picture has a mask of its name.")
    ] = False,
    invert_mask: Annotated[
        bool, typer.Option("--invert-mask", help="In the masks of --masks, black = hole.")
    ] = False,
    suite: Annotated[
        bool,
        typer.Option(
            "--suite", help="Score by kind of hole (thin and thick strokes, box, blob) instead of by hole ratio."
        ),
    ] = False,
    baselines: Annotated[
        str | None,
        typer.Option(
            help="Methods to compare with: telea, ns, biharmonic, or none. Default: telea,ns; with --suite all three."
        ),
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            help="Which to measure. Default: l1,psnr,ssim,lpips,fid; with --suite l1,psnr,ssim,lpips,sharp."
        ),
    ] = None,
    paper_compat: Annotated[
        bool, typer.Option("--paper-compat", help="Truncate to 8 bits as the released test script does.")
    ] = False,
    lpips: Annotated[
        Path | None,
        typer.Option(
            help="LPIPS weights: AlexNet's or VGG-16's, torchvision's file or one with the heads; default: "
            "$LGNET_FAST_LPIPS, or, without --suite, downloaded."
        ),
    ] = None,
    fid: Annotated[Path | None, typer.Option(help="torch-fidelity's Inception weights; default: downloaded.")] = None,
    sheet_rows: Annotated[
        int | None,
        typer.Option(
            min=0, help="Rows of the contact sheet; 0: none. Default: 6; with --suite 12, shared by the kinds."
        ),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    backend: Backend = "auto",
) -> None:
    """Score models beside OpenCV's methods, by the paper's protocol: a table, JSON, Markdown, a contact sheet.

    The same command continues an interrupted evaluation; under `accelerate launch` the processes share the pictures.

    Exit code: 0 all done, 1 some pictures could not be evaluated, 2 the evaluation could not start.
    """
    from ...evaluation.command import run
    from ...evaluation.options import EvaluationOptions

    options = EvaluationOptions(
        pictures,
        masks,
        models_of(models or []),
        classes,
        size=size,
        seed=seed,
        mask_kind=mask_kind.value,
        suite=suite,
        baselines=None if baselines is None else [] if baselines == "none" else names_in(baselines),
        metrics=None if metrics is None else names_in(metrics),
        paper_compat=paper_compat,
        pair_by_name=pair_by_name,
        invert_mask=invert_mask,
        lpips=lpips,
        fid=fid,
        out=out,
        sheet_rows=sheet_rows,
        device=device,
        dtype=dtype,
        backend=backend,
    )
    raise typer.Exit(run(options, partial(draw, piped=120)))


def names_in(text: str) -> list[str]:
    """Names between commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def models_of(texts: list[str]) -> dict[str, str | None] | list[str | None]:
    """The values of ``--model``, each "MODEL" or "TITLE=MODEL"; none: the bundled model.

    Raises UsageError: titles for some only, or a title twice.
    """
    named = [named_model(text) for text in texts] or [(None, None)]
    titles = [title for title, _ in named if title is not None]
    if not titles:
        return [model for _, model in named]
    if len(set(titles)) < len(named):
        given = ", ".join(texts)
        raise UsageError(f"models: expected a title of its own for each, as TITLE=DIR, or for none, got {given}")
    return {str(title): model for title, model in named}
