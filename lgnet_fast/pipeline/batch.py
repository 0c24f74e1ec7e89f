"""`lgnet-fast run`: one picture or a folder of them, masks paired by name, results written atomically, a report."""

from __future__ import annotations

import json
import os
import platform
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..errors import BackendError, InvalidImageError, LGNetError, WeightsError
from .files import EXTENSIONS, FORMATS, format_of, save_picture, write_atomically
from .inpainter import Inpainter


class UsageError(Exception):
    """A run that cannot start: its arguments contradict each other or the files that are there."""


@dataclass(frozen=True)
class Item:
    """One picture to fill. `problem`: why it cannot be run; then `mask` may be None. `format`: Pillow's name."""

    picture: Path
    mask: Path | None
    output: Path
    format: str
    problem: str | None = None


@dataclass
class Entry:
    """One line of the report. `status`: "ok", "failed" or "skipped"; `size`: [height, width] in pixels."""

    input: str
    mask: str | None
    output: str
    status: str
    seconds: float = 0.0
    size: list[int] | None = None
    strategy: str | None = None
    passes: int = 0
    hole_ratio: float | None = None
    warnings: list[str] = field(default_factory=list)
    error: str | None = None


def plan_items(source: Path, mask: Path, out: Path, format: str | None = None) -> list[Item]:
    """What to run, in the order of the names, for `--input`, `--mask`, `--output` and `--format`.

    `source` and `mask` are files or folders; folders are searched with their sub-folders. A picture takes the mask of
    the same relative path without extension; if there is none, the only mask of that stem anywhere; none, or several
    candidates, are that item's problem. `out` names a file (one picture) or a folder: relative paths are kept, and
    where two pictures would get the same name, their own extensions are kept in it. `format`: a key of FORMATS.

    Raises UsageError: nothing there to run, or an output that would replace a picture or mask of this run.
    """
    if format is not None and format not in FORMATS:
        raise UsageError(f"--format: expected one of {', '.join(FORMATS)}, got {format!r}")
    for name, path in (("--input", source), ("--mask", mask)):
        if not path.exists():
            raise UsageError(f"{name}: {str(path)!r} does not exist")
    excluded = [folder.resolve() for folder in (mask, out) if folder.is_dir()]
    excluded = [folder for folder in excluded if folder != source.resolve()]
    pictures = list(_pictures_in(source, excluded)) if source.is_dir() else [source]
    if not pictures:
        raise UsageError(f"--input: no pictures in {str(source)!r} ({', '.join(EXTENSIONS)})")
    masks = list(_pictures_in(mask, [])) if mask.is_dir() else []
    if mask.is_dir() and not masks:
        raise UsageError(f"--mask: no pictures in {str(mask)!r} ({', '.join(EXTENSIONS)})")

    base = source if source.is_dir() else source.parent
    outputs = _outputs(pictures, base, source, out, format)
    items = []
    for picture, (output, pillow_format) in zip(pictures, outputs, strict=True):
        own, problem = (mask, None) if not mask.is_dir() else _pair(picture.relative_to(base), mask, masks)
        items.append(Item(picture, own, output, pillow_format, problem))
    _refuse_to_overwrite(items, [*pictures, *(masks or [mask])])
    return items


def run_items(
    items: list[Item],
    inpainter: Inpainter,
    *,
    quality: int | None = None,
    skip_existing: bool = False,
    tell: Callable[[Entry], None] = lambda entry: None,
    **options: Any,
) -> list[Entry]:
    """Fills and writes every item and goes on after one that fails; `options` go to the Inpainter's call.

    `tell` hears each entry as it is finished. Raises BackendError and WeightsError: they would fail every item.
    """
    entries = []
    for item in items:
        mask = None if item.mask is None else str(item.mask)
        entry = Entry(str(item.picture), mask, str(item.output), "ok")
        start = time.perf_counter()
        if skip_existing and item.output.exists():
            entry.status = "skipped"
        else:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                try:
                    _run_item(item, inpainter, entry, quality, options)
                except (BackendError, WeightsError):
                    raise
                except (LGNetError, OSError) as error:
                    entry.status, entry.error = "failed", str(error)
                except Exception as error:  # one picture that breaks something must not stop the others
                    entry.status, entry.error = "failed", f"{type(error).__name__}: {error}"
            entry.warnings = [str(one.message) for one in caught]
        entry.seconds = round(time.perf_counter() - start, 4)
        entries.append(entry)
        tell(entry)
    return entries


def write_report(path: Path, entries: list[Entry], settings: dict[str, Any], seconds: float) -> None:
    """Writes the report as JSON, atomically: `items`, `totals`, `settings`, `versions`."""
    from .. import __version__

    counts = Counter(entry.status for entry in entries)
    report = {
        "items": [asdict(entry) for entry in entries],
        "totals": {
            "items": len(entries),
            **{status: counts[status] for status in ("ok", "failed", "skipped")},
            "seconds": round(seconds, 4),
        },
        "settings": settings,
        "versions": {
            "lgnet_fast": __version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "pillow": PIL.__version__,
            "python": platform.python_version(),
        },
    }
    write_atomically(path, (json.dumps(report, indent=2, ensure_ascii=False) + "\n").encode())


def run(
    source: Path,
    mask: Path,
    out: Path,
    *,
    format: str | None = None,
    quality: int | None = None,
    skip_existing: bool = False,
    report: Path | None = None,
    model: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    backend: str = "auto",
    **options: Any,
) -> int:
    """The run command: its exit code, 0 when every item is done, 1 when some failed.

    Raises UsageError, WeightsError, BackendError before or instead of running.
    """
    start = time.perf_counter()
    items = plan_items(source, mask, out, format)
    if report is not None:
        if report.is_dir():
            raise UsageError(f"--report: expected a file, got the folder {str(report)!r}")
        _refuse_report_clash(report, items)
    inpainter = Inpainter.from_pretrained(model, device=device, dtype=dtype, backend=backend)

    # File names are printed as they are: rich would read [brackets] in them as markup, and wrap long ones.
    console = Console(stderr=True, soft_wrap=True, markup=False, highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("filling", total=len(items))

        def tell(entry: Entry) -> None:
            for text in entry.warnings:
                console.print(f"warning: {entry.input}: {text}")
            if entry.error is not None:
                console.print(f"failed: {entry.input}: {entry.error}")
            progress.advance(task)

        entries = run_items(items, inpainter, quality=quality, skip_existing=skip_existing, tell=tell, **options)
    seconds = time.perf_counter() - start
    if report is not None:
        settings = {
            "model": model or "bundled",
            "device": str(inpainter.device),
            "dtype": str(inpainter.dtype).removeprefix("torch."),
            "backend": backend,
            "format": format,
            "quality": quality,
            "skip_existing": skip_existing,
            **options,
        }
        write_report(report, entries, settings, seconds)
    counts = Counter(entry.status for entry in entries)
    console.print(
        f"{counts['ok']} filled, {counts['skipped']} skipped, {counts['failed']} failed of {len(entries)} "
        f"in {seconds:.1f} s"
    )
    return 1 if counts["failed"] else 0


def _run_item(item: Item, inpainter: Inpainter, entry: Entry, quality: int | None, options: dict[str, Any]) -> None:
    if item.problem is not None:
        raise InvalidImageError(item.problem)
    done = inpainter.inpaint(item.picture, item.mask, **options)
    entry.size, entry.strategy, entry.passes = list(done.size), done.strategy, done.passes
    entry.hole_ratio = round(done.hole_ratio, 6)
    with Image.open(item.picture) as original:
        save_picture(done.picture, item.output, like=original, format=item.format, quality=quality)


def _pictures_in(folder: Path, excluded: list[Path]) -> Iterable[Path]:
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(
            name for name in folders if not name.startswith(".") and (Path(parent) / name).resolve() not in excluded
        )
        for name in sorted(names):
            if not name.startswith(".") and Path(name).suffix.lower() in EXTENSIONS:
                yield Path(parent) / name


def _outputs(pictures: list[Path], base: Path, source: Path, out: Path, format: str | None) -> list[tuple[Path, str]]:
    """(file, Pillow format) of every picture."""
    names_file = not source.is_dir() and not out.is_dir() and out.suffix.lower() in EXTENSIONS
    if names_file:
        by_suffix = EXTENSIONS[out.suffix.lower()]
        if format is not None and FORMATS[format] != by_suffix:
            raise UsageError(f"--output: {out.name!r} does not go with --format {format}")
        return [(out, by_suffix)]
    if out.exists() and not out.is_dir():
        raise UsageError(f"--output: expected a folder or a picture's name, got the file {str(out)!r}")
    targets = [_target(picture, format) for picture in pictures]
    plain = [
        picture.relative_to(base).with_suffix(suffix) for picture, (suffix, _) in zip(pictures, targets, strict=True)
    ]
    # Case is folded because some file systems do not tell a.png from A.png.
    taken = Counter(str(name).casefold() for name in plain)
    outputs = []
    for picture, name, (suffix, pillow_format) in zip(pictures, plain, targets, strict=True):
        if taken[str(name).casefold()] > 1:
            name = name.with_name(picture.name + suffix)
        outputs.append((out / name, pillow_format))
    return outputs


def _target(picture: Path, format: str | None) -> tuple[str, str]:
    """(extension, Pillow format): the format asked for, or else the picture's own; PNG for those not written here."""
    own = EXTENSIONS.get(picture.suffix.lower())
    wanted = FORMATS[format] if format is not None else format_of(picture) or own or "PNG"
    if wanted not in EXTENSIONS.values():
        wanted = "PNG"
    if wanted == own:
        return picture.suffix, wanted
    return next(suffix for suffix, pillow_format in EXTENSIONS.items() if pillow_format == wanted), wanted


def _pair(relative: Path, folder: Path, masks: list[Path]) -> tuple[Path | None, str | None]:
    """(mask, problem) of the picture at `relative`."""
    same_place = [mask for mask in masks if mask.relative_to(folder).with_suffix("") == relative.with_suffix("")]
    candidates = same_place or [mask for mask in masks if mask.stem == relative.stem]
    if len(candidates) > 1:
        candidates = [mask for mask in candidates if mask.name == relative.name] or candidates
    if len(candidates) == 1:
        return candidates[0], None
    if not candidates:
        return None, f"mask: no file named {relative.stem!r} in {str(folder)!r}"
    names = ", ".join(str(mask.relative_to(folder)) for mask in candidates)
    return None, f"mask: expected one file named {relative.stem!r} in {str(folder)!r}, got {names}"


def _refuse_to_overwrite(items: list[Item], inputs: list[Path]) -> None:
    read = {path.resolve() for path in inputs}
    for item in items:
        if item.output.resolve() in read:
            raise UsageError(f"--output: {str(item.output)!r} would replace an input of this run")


def _refuse_report_clash(report: Path, items: list[Item]) -> None:
    for item in items:
        if report.resolve() in {
            path.resolve() for path in (item.picture, item.output, item.mask) if path is not None
        }:
            raise UsageError(f"--report: {str(report)!r} is a picture or mask of this run")
