"""`lgnet-fast ...`: the command line."""

from __future__ import annotations

import importlib
import json as json_module
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import JobError, LGNetError, MissingExtraError, UsageError, WeightsError
from .version import __version__

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


class Variant(str, Enum):
    """Values of --variant."""

    released = "released"
    paper = "paper"


class MaskKind(str, Enum):
    """Values of --mask-kind."""

    strokes = "strokes"
    boxes = "boxes"
    mixed = "mixed"


class Stored(str, Enum):
    """Values of convert's --dtype."""

    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"


def _given(text: str) -> str:
    """A path or name. An empty one (an unset shell variable) is an error: it would mean the current folder."""
    if not text.strip():
        raise typer.BadParameter("got an empty text")
    return text


def _path(text: str) -> Path:
    from .pipeline.formats import ADDRESS

    if ADDRESS.match(text) and not os.path.exists(text):
        raise typer.BadParameter(f"expected a file or a folder, got the address {text}; download it first")
    return Path(_given(text))


def _folder(given: str | Path) -> Path:
    """A folder's path; Typer also passes an option's default through its parser."""
    from .pipeline.formats import ADDRESS

    text = str(given)
    if ADDRESS.match(text):
        raise typer.BadParameter(f"expected a folder, got the address {text}")
    return _path(text)


def _sides(size: str) -> tuple[int, int]:
    """Height and width of --size."""
    found = re.fullmatch(r"(\d+)x(\d+)", size.strip().lower())
    if found is None:
        raise typer.BadParameter(f"expected HxW, such as 256x256, got {size!r}", param_hint="--size")
    return int(found[1]), int(found[2])


def _wrong_value(error: ValueError, **options: str) -> typer.BadParameter:
    """The usage error for a library's error about an argument; `options`: the arguments' names -> the options."""
    argument, _, expected = str(error).partition(": ")
    if argument in options:
        return typer.BadParameter(expected, param_hint=options[argument])
    return typer.BadParameter(str(error))


def _print_version(asked: bool) -> None:
    if asked:
        print(f"lgnet-fast {__version__}")
        raise typer.Exit


@app.callback()
def commands(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """LGNet image inpainting, made fast."""


@app.command()
def run(
    source: Annotated[
        Path, typer.Option("-i", "--input", parser=_path, help="A picture, a folder of them, tar shards; -: a pipe.")
    ],
    out: Annotated[
        str,
        typer.Option(
            "-o", "--output", parser=_given, help="The result's file or folder; replaced if it exists; -: a pipe."
        ),
    ],
    mask: Annotated[
        Path | None,
        typer.Option("-m", "--mask", parser=_path, help="A mask (white = fill), or a folder paired by name."),
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
    dilate: Annotated[int, typer.Option(min=0, help="Grow the hole by this many pixels.")] = 0,
    feather: Annotated[int, typer.Option(min=0, help="Blend over this many pixels around the hole.")] = 0,
    format: Annotated[Format | None, typer.Option(help="The results' format; default: each picture's.")] = None,
    quality: Annotated[int | None, typer.Option(min=1, max=100, help="For JPEG, WebP, AVIF, HEIC.")] = None,
    model: Annotated[
        str | None, typer.Option(parser=_given, help="A model folder or hub id; default: the bundled one.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, float16, bfloat16.")] = "auto",
    backend: Annotated[str, typer.Option(help="auto, eager, triton, cpp.")] = "auto",
    skip_existing: Annotated[bool, typer.Option("--skip-existing", help="Leave results that are there.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted run; always so under `accelerate launch`.")
    ] = False,
    report: Annotated[
        Path | None, typer.Option(parser=_path, help="Write a JSON report to this file, as the run goes.")
    ] = None,
) -> None:
    """Fill the holes of a picture, of a folder of pictures, or of tar shards.

    Started by `accelerate launch -m lgnet_fast run ...`, the processes share the work and merge one report; the same
    command run again does only what is not done.

    Exit code: 0 all done, 1 some pictures failed or were left out, 2 the run could not start, 130 after Ctrl-C.
    """
    # Imported here so that --help does not wait for torch.
    from .jobs.fill import fill
    from .jobs.options import FillOptions

    with _one_line_errors(FillOptions):
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
        code = fill(options)
    raise typer.Exit(code)


@app.command("eval")
def evaluate(
    pictures: Annotated[
        Path, typer.Option("-i", "--input", parser=_path, help="A folder of pictures, or one picture.")
    ],
    out: Annotated[
        Path, typer.Option("-o", "--output", parser=_folder, help="Folder for evaluation.json, .md and .png.")
    ],
    masks: Annotated[
        Path | None,
        typer.Option(
            "-m",
            "--masks",
            parser=_path,
            help="A folder of masks (white = hole), with --suite PICTURE_thin.png and so on; default: drawn ones.",
        ),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            parser=_given,
            help="A model folder or hub id, or TITLE=it ('bundled': the package's own); more than one allowed.",
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
    invert_mask: Annotated[bool, typer.Option("--invert-mask", help="Black = hole.")] = False,
    suite: Annotated[
        bool, typer.Option("--suite", help="Thin and thick strokes, a box, a blob; sharpness; docs/evaluation.md.")
    ] = False,
    baselines: Annotated[
        str | None,
        typer.Option(
            help="Rows to compare with: telea, ns, biharmonic, or none. Default: telea,ns; with --suite all three."
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
        int | None, typer.Option(min=0, help="Rows of the contact sheet; 0: none. Default: 6; with --suite 12.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, float16, bfloat16.")] = "auto",
    backend: Annotated[str, typer.Option(help="auto, eager, triton, cpp.")] = "auto",
) -> None:
    """Score models beside OpenCV's methods, by the paper's protocol: a table, JSON, Markdown, a contact sheet.

    The same command continues an interrupted evaluation; under `accelerate launch` the processes share the pictures.

    Exit code: 0 all done, 1 some pictures could not be evaluated, 2 the evaluation could not start.
    """
    from .evaluation.command import named_models
    from .evaluation.command import run as run_evaluation
    from .evaluation.options import EvaluationOptions

    with _one_line_errors(EvaluationOptions):
        options = EvaluationOptions(
            pictures,
            masks,
            named_models(model or []),
            classes,
            size=size,
            seed=seed,
            mask_kind=mask_kind.value,
            suite=suite,
            baselines=None if baselines is None else [] if baselines in ("", "none") else baselines.split(","),
            metrics=None if metrics is None else metrics.split(","),
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
        code = run_evaluation(options)
    raise typer.Exit(code)


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="A YAML or JSON file; configs/ has examples.")],
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the run's newest checkpoint, if there is one.")
    ] = False,
    change: Annotated[
        list[str] | None,
        typer.Option("--set", help="SECTION.NAME=VALUE, put over the file's, e.g. optim.steps=100; repeatable."),
    ] = None,
) -> None:
    """Train a model.

    Over N processes: `accelerate launch --multi_gpu --num_processes N -m lgnet_fast train ...`, on CPUs too.

    Ctrl-C and SIGTERM end it after the current step, with a checkpoint.

    Exit code: 0 trained, 1 stopped by a signal, 2 it could not start or go on.
    """
    from .training.config import load_config
    from .training.trainer import train as run_training

    with _one_line_errors():
        model = run_training(load_config(config, change or []), resume)
    if model is None:
        raise typer.Exit(1)
    if os.environ.get("RANK", "0") == "0":
        typer.echo(f"model: {model}")


@app.command()
def convert(
    source: Annotated[
        Path, typer.Argument(parser=_path, help="Folder with <epoch>_net_G1.pth, _G2.pth and _G3.pth.")
    ],
    out: Annotated[
        Path, typer.Argument(parser=_folder, help="Model folder to write: config.json and model.safetensors.")
    ],
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
        raise _wrong_value(error, name="--plan") from None
    Console(width=140).print(optimize(model, device="cpu").describe())


@app.command()
def verify(
    model: Annotated[
        str | None, typer.Option(parser=_given, help="A model folder or hub id; default: the bundled one.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, float16, bfloat16.")] = "auto",
    json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Check every kernel and the engine on this machine against plain PyTorch, anew, and print each error.

    On an NVIDIA GPU the verdicts are kept (`lgnet-fast info` shows them), and decide what later runs take.

    Exit code: 0 all as it should be, 1 something failed and something slower runs in its place, 2 it could not start.
    """
    from .engine.devices import resolve_device, resolve_dtype
    from .engine.verify import render
    from .engine.verify import verify as run_checks
    from .reference import LGNet
    from .weights import bundled_path

    with _one_line_errors():
        target = resolve_device(device)
        network = LGNet.from_pretrained(model or bundled_path())
        report = run_checks(network, target, resolve_dtype(dtype, target))
    _print(report, json, render, lambda r: r.as_dict())
    raise typer.Exit(0 if report.passed else 1)


@app.command()
def tune(
    seconds: Annotated[float, typer.Option(min=1, help="Nothing new is begun after so many.")] = 60,
    model: Annotated[
        str | None, typer.Option(parser=_given, help="A model folder or hub id; default: the bundled one.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="A network as create_model takes it, with random weights, in place of --model.")
    ] = None,
    size: Annotated[str, typer.Option(help="HxW, multiples of 256.")] = "256x256",
    batch: Annotated[int, typer.Option(min=1, help="Pictures a batch.")] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, float16, bfloat16.")] = "auto",
    training: Annotated[
        bool,
        typer.Option(
            "--training",
            help="Attention forward and backward as training launches them, in place of the steps; NVIDIA GPUs only.",
        ),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Measure every step's kernels on this machine, and keep the fastest for later runs of this network and size.

    Each candidate is checked before it is timed. Prints what every step had, what it has now, and the gain. What is
    measured is kept at once (`lgnet-fast info` shows where), so that an interrupted run loses little.

    With --training, give the size of the crops, the batch and the dtype (of autocast, if used) of the training.

    Exit code: 0 measured, 2 it could not start.
    """
    from .engine.devices import resolve_device, resolve_dtype
    from .engine.tuning import render, tune_training
    from .engine.tuning import tune as tune_steps
    from .reference import LGNet, create_model
    from .weights import bundled_path

    sides = _sides(size)
    with _one_line_errors():
        target = resolve_device(device)
        try:
            network = LGNet.from_pretrained(model or bundled_path()) if name is None else create_model(name).eval()
            report = (tune_training if training else tune_steps)(
                network,
                sides,
                batch,
                target,
                resolve_dtype(dtype, target),
                seconds,
                lambda text: typer.echo(text, err=True),
            )
        except ValueError as error:
            raise _wrong_value(error, name="--name", size="--size") from None
    _print(report, json, render, lambda r: r.as_dict())


@app.command()
def flops(
    model: Annotated[str, typer.Option(help="A name as create_model takes it.")] = "lgnet",
    size: Annotated[str, typer.Option(help="HxW, multiples of 256.")] = "256x256",
    batch: Annotated[int, typer.Option(min=1, help="Pictures a batch.")] = 1,
    peers: Annotated[
        bool, typer.Option("--peers", help="The paper's whole Table IV and X_LG instead; in a checkout only.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Print parameters and FLOPs, by the paper's rule and true, stage by stage, beside the paper's own figures."""
    from .counting import count, render

    if peers:
        if (model, size, batch) != ("lgnet", "256x256", 1):
            raise typer.BadParameter(
                "Table IV has its own models at 256x256, batch 1; leave --model, --size and --batch out",
                param_hint="--peers",
            )
        with _one_line_errors():
            complexity = _from_checkout("bench.complexity")
        _print(complexity.rows(), json, complexity.render, complexity.as_dict)
        return
    sides = _sides(size)
    try:
        report = count(model, sides, batch)
    except ValueError as error:
        raise _wrong_value(error, name="--model", size="--size") from None
    _print(report, json, render, lambda r: r.as_dict())


@app.command()
def bench(
    report: Annotated[Path | None, typer.Option(help="Folder for report.html, report.md and their pictures.")] = None,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Write the report from stored results; run nothing.")
    ] = False,
    store: Annotated[
        bool, typer.Option("--store", help="Make this run the one that later runs are compared with.")
    ] = False,
) -> None:
    """Run the benchmarks beside the stored ones of this kind of machine, and report; in a checkout only.

    Exit code: 0 fine, 1 something failed or got slower, 2 the run could not start.
    """
    if report_only and (report is None or store):
        raise typer.BadParameter("needs --report, and excludes --store", param_hint="--report-only")
    with _one_line_errors():
        suite = _from_checkout("bench.report")
        own = None if report is None else report / "results"
        code = 0 if report_only else suite.run_suite(own, store)
        if report is not None:
            folders = [suite.RESULTS, *([] if report_only else [own])]
            for file in suite.write_report(report, folders):
                typer.echo(file)
    raise typer.Exit(min(code, 2))


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--output", "-o", parser=_folder, help="Folder for the results.")] = Path(
        "demo_output"
    ),
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


@app.command()
def serve(
    host: Annotated[str, typer.Option(help="Address to listen on; others than this machine's own need a token.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free one.")] = 8080,
    model: Annotated[
        list[str] | None,
        typer.Option(
            parser=_given,
            help="A model folder or hub id, or NAME=it ('bundled': the package's own); more than one "
            "allowed, the first is the default.",
        ),
    ] = None,
    open_page: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
    token: Annotated[str | None, typer.Option(help="What clients have to send; made up if needed.")] = None,
    cors: Annotated[list[str] | None, typer.Option(help="Origins whose pages may call the API.")] = None,
    allowed_host: Annotated[list[str] | None, typer.Option(help="Names that this server is reached by.")] = None,
    max_bytes: Annotated[int, typer.Option(min=1, help="Of a request's body.")] = 64 * 2**20,
    max_pixels: Annotated[int, typer.Option(min=1, help="Of a picture.")] = 100_000_000,
    max_sessions: Annotated[int, typer.Option(min=1, help="Pictures open at the same time.")] = 50,
    queue: Annotated[int, typer.Option(min=1, help="Requests that may wait or run; more are told 429.")] = 32,
    timeout: Annotated[float, typer.Option(help="Seconds for one request.")] = 120.0,
    grace: Annotated[float, typer.Option(help="Seconds of 503 before the socket closes, at the end.")] = 0.5,
    shutdown: Annotated[float, typer.Option(help="Seconds that running work has to end in.")] = 30.0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, float16, bfloat16.")] = "auto",
    backend: Annotated[str, typer.Option(help="auto, eager, triton, cpp.")] = "auto",
) -> None:
    """Serve a page to paint holes on and see them filled, and the API of IOPaint, OpenAI and A1111; docs/serve.md.

    SIGTERM and Ctrl-C end it after the running work.

    Exit code: 0 ended by a signal, 2 it could not start.
    """
    from .serve.command import parse_models
    from .serve.command import run as run_server
    from .serve.options import ServeOptions

    try:
        options = ServeOptions(
            host=host,
            port=port,
            token=token,
            cors=tuple(cors or ()),
            allowed_hosts=tuple(allowed_host or ()),
            max_bytes=max_bytes,
            max_pixels=max_pixels,
            max_sessions=max_sessions,
            queue=queue,
            timeout=timeout,
            grace=grace,
            shutdown=shutdown,
        )
        models = parse_models(model or [])
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    with _one_line_errors():
        run_server(options, models, typer.echo, open_page, device=device, dtype=dtype, backend=backend)


def _from_checkout(module: str) -> Any:
    """Import a module of the repository that the installed package does not have."""
    root = Path(__file__).resolve().parents[1]
    if not (root / "bench" / "__init__.py").is_file():
        raise LGNetError(
            f"{module} is in the repository, not in the installed package: "
            "run this in a checkout after `pip install -e .`"
        )
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    return importlib.import_module(module)


_SPELLINGS = {"source": "--input", "pictures": "--input", "out": "--output", "models": "--model"}
"""Fields of options whose name on the command line differs from the field's name with hyphens."""


def _spelt(text: str, options: type) -> str:
    """A library's error with names of fields replaced by options: its first words, and words in backquotes."""
    names = {one.name: _SPELLINGS.get(one.name, "--" + one.name.replace("_", "-")) for one in fields(options)}
    text = re.sub(r"`(\w+)`", lambda found: names.get(found[1], found[0]), text)
    begin = re.match(r"(\w+(?:, \w+)*):", text)
    if begin is None:
        return text
    words = [names.get(word, word) for word in begin[1].split(", ")]
    return ", ".join(words) + text[begin.end(1) :]


@contextmanager
def _one_line_errors(options: type | None = None) -> Iterator[None]:
    """Print errors that the user can correct as one line on stderr and exit with code 2, without a traceback.

    OSError is one of them: a full disk, missing rights, a name that is too long. `options`: the dataclass of the
    command's options; errors that name its fields are shown with the names of the options.
    """
    try:
        yield
    except BrokenPipeError:
        raise  # the reader of standard output has ended: click ends the command without a word
    except (LGNetError, OSError) as error:
        about_options = isinstance(error, UsageError | JobError | MissingExtraError | WeightsError)
        text = _spelt(str(error), options) if options is not None and about_options else str(error)
        typer.echo(f"error: {text}", err=True)
        raise typer.Exit(2) from None


def _print(
    value: Any, as_json: bool, render: Callable[[Any], Any], plain: Callable[[Any], Any] = lambda value: value
) -> None:
    """Print `value` as JSON, or as the rich table that `render` makes of it."""
    if as_json:
        typer.echo(json_module.dumps(plain(value), indent=2))
        return
    from rich.console import Console

    Console().print(render(value))


def main() -> None:
    """The console script."""
    try:
        app()
    except OSError as error:  # standard output is full
        typer.echo(f"error: standard output: {error}", err=True)
        sys.stdout = None  # Python would try to write what is buffered once more, and print a traceback
        sys.exit(2)
