"""`lgnet-fast run`: a picture, a folder or tar shards, masks paired by name, results written atomically, a report."""

from __future__ import annotations

import json
import os
import platform
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import PIL
import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..errors import BackendError, InvalidImageError, InvalidMaskError, LGNetError, WeightsError
from .distributed import FOLDER, JobError, Journal, World, fingerprint, model_stamp, stamp
from .files import EXTENSIONS, FORMATS, format_of, save_picture, write_atomically
from .inpainter import Inpainter
from .shards import Member, Sample, samples_in


class UsageError(Exception):
    """A run that cannot start: its arguments contradict each other or the files that are there."""


@dataclass(frozen=True)
class Item:
    """One picture to fill. `problem`: why it cannot be run; then `mask` may be None. `format`: Pillow's name."""

    picture: Path | Member
    mask: Path | Member | None
    output: Path
    format: str
    problem: str | None = None

    def key(self) -> str:
        """A name of this item and of the very files it is made from: others under the same names get another."""
        files = [_file_of(source) for source in (self.picture, self.mask) if source is not None]
        return fingerprint(str(self.picture), str(self.mask), str(self.output), [stamp(file) for file in files])


@dataclass
class Entry:
    """One line of the report. `status`: "ok", "failed" or "skipped"; `size`: [height, width] in pixels; `earlier`:
    done by an earlier launch of the same job."""

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
    earlier: bool = False


def plan_items(
    source: Path, mask: Path | None, out: Path, format: str | None = None, world: World | None = None
) -> list[Item]:
    """What this process is to run, in the order of the names, for `--input`, `--mask`, `--output` and `--format`.

    `source` and `mask` are files or folders; folders are searched with their sub-folders. A picture takes the mask of
    the same relative path without extension; if there is none, the only mask of that stem anywhere; none, or several
    candidates, are that item's problem. `out` names a file (one picture) or a folder: relative paths are kept, and
    where two pictures would get the same name, their own extensions are kept in it. `format`: a key of FORMATS.

    `source` may also be a tar shard, or a folder of shards and no pictures: its pictures ``<key>.<extension>`` take
    the mask ``<key>.mask.<extension>`` of their shard where `mask` is None; results are files, ``out/<shard>/<key>``.

    In a `world` of n processes each gets every n-th picture, or every n-th shard where there are at least n.

    Raises UsageError: nothing there to run, or an output that would replace a picture or mask of this run.
    """
    if format is not None and format not in FORMATS:
        raise UsageError(f"--format: expected one of {', '.join(FORMATS)}, got {format!r}")
    world = world or World()
    for name, path in (("--input", source), ("--mask", mask)):
        if path is not None and not path.exists():
            raise UsageError(f"{name}: {str(path)!r} does not exist")
    shards = _shards_in(source, out)
    if shards:
        return _plan_shards(shards, source, mask, out, format, world)
    if mask is None:
        raise UsageError("--mask: expected a mask or a folder of them, got none; only tar shards can hold their own")
    excluded = [folder.resolve() for folder in (mask, out) if folder.is_dir()]
    excluded = [folder for folder in excluded if folder != source.resolve()]
    pictures = list(pictures_in(source, excluded)) if source.is_dir() else [source]
    if not pictures:
        raise UsageError(f"--input: no pictures in {str(source)!r} ({', '.join(EXTENSIONS)})")
    masks = list(pictures_in(mask, [])) if mask.is_dir() else []
    if mask.is_dir() and not masks:
        raise UsageError(f"--mask: no pictures in {str(mask)!r} ({', '.join(EXTENSIONS)})")

    base = source if source.is_dir() else source.parent
    outputs = _outputs(pictures, base, source, out, format)
    items = []
    for picture, (output, pillow_format) in zip(pictures, outputs, strict=True):
        own, problem = (mask, None) if not mask.is_dir() else pair_mask(picture.relative_to(base), mask, masks)
        items.append(Item(picture, own, output, pillow_format, problem))
    _refuse_to_overwrite(items, [*pictures, *(masks or [mask])])
    return world.part(items)


def run_items(
    items: list[Item],
    inpainter: Inpainter,
    *,
    quality: int | None = None,
    skip_existing: bool = False,
    journal: Journal | None = None,
    tell: Callable[[Entry], None] = lambda entry: None,
    **options: Any,
) -> list[Entry]:
    """Fills and writes every item and goes on after one that fails; `options` go to the Inpainter's call.

    `tell` hears each entry as it is finished. With a `journal`, what an earlier launch finished is passed over.
    Raises BackendError, WeightsError and JobError: they would fail every item.
    """
    entries = []
    for item in items:
        mask = None if item.mask is None else str(item.mask)
        entry = Entry(str(item.picture), mask, str(item.output), "ok")
        start = time.perf_counter()
        key = "" if journal is None else item.key()
        record = None if journal is None else journal.earlier(key, item.output)
        if journal is not None and record is not None:
            entry = Entry(**{**record, "earlier": True})
            journal.done(key, asdict(entry), item.output)
            entries.append(entry)
            tell(entry)
            continue
        if skip_existing and item.output.exists():
            entry.status = "skipped"
        else:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                try:
                    _run_item(item, inpainter, entry, quality, options, journal, key)
                except (BackendError, WeightsError, JobError):
                    raise
                except (LGNetError, OSError) as error:
                    entry.status, entry.error = "failed", str(error)
                except Exception as error:  # one picture that breaks something must not stop the others
                    entry.status, entry.error = "failed", f"{type(error).__name__}: {error}"
            entry.warnings = [str(one.message) for one in caught]
        entry.seconds = round(time.perf_counter() - start, 4)
        if journal is not None:
            journal.done(key, asdict(entry), item.output)
        entries.append(entry)
        tell(entry)
    return entries


def write_report(
    path: Path,
    entries: list[Entry],
    settings: dict[str, Any],
    seconds: float,
    processes: dict[str, Any] | None = None,
) -> None:
    """Writes the report as JSON, atomically: `items`, `totals`, `settings`, `versions`; for a job with a journal also
    `processes`, and what was done earlier."""
    from .. import __version__

    counts = Counter(entry.status for entry in entries)
    items = [asdict(entry) for entry in entries]
    if processes is None:
        for item in items:
            del item["earlier"]
    report = {
        "items": items,
        "totals": {
            "items": len(entries),
            **{status: counts[status] for status in ("ok", "failed", "skipped")},
            **({} if processes is None else {"earlier": sum(entry.earlier for entry in entries)}),
            "seconds": round(seconds, 4),
        },
        "settings": settings,
        **({} if processes is None else {"processes": processes}),
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
    mask: Path | None,
    out: Path,
    *,
    format: str | None = None,
    quality: int | None = None,
    skip_existing: bool = False,
    resume: bool = False,
    report: Path | None = None,
    model: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    backend: str = "auto",
    world: World | None = None,
    **options: Any,
) -> int:
    """The run command: its exit code, 0 when every item is done, 1 when some failed.

    With `resume`, and always under `accelerate launch`, journals in the hidden folder ``.lgnet_fast`` of the output
    folder say what is done: the same command run again does only the rest, and its report covers all. Of several
    processes the first one waits for the others' parts, merges the report and returns the code of the whole;
    the others return 0 once their failures are in the report, because launchers end all processes after another code.

    Raises UsageError, WeightsError, BackendError, JobError before or instead of running.
    """
    start = time.perf_counter()
    world = world or World.from_environment()
    items = plan_items(source, mask, out, format, world)
    if report is not None:
        if report.is_dir():
            raise UsageError(f"--report: expected a file, got the folder {str(report)!r}")
        _refuse_report_clash(report, items)
    chosen = {
        "model": model or "bundled",
        "dtype": dtype,
        "backend": backend,
        "format": format,
        "quality": quality,
        "skip_existing": skip_existing,
        **options,
    }
    journal = None
    if resume or world.launched:
        from .. import __version__

        # One picture may be written to a file: then the journal is beside it.
        folder = out.parent if out.suffix.lower() in EXTENSIONS and not out.is_dir() else out
        journal = Journal(folder / FOLDER / f"run-{fingerprint(chosen, model_stamp(model), __version__)}", world)
    try:
        inpainter = Inpainter.from_pretrained(model, device=world.device(device), dtype=dtype, backend=backend)
        # File names are printed as they are: rich would read [brackets] in them as markup, and wrap long ones.
        console = Console(stderr=True, soft_wrap=True, markup=False, highlight=False)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        shown = console.is_terminal and world.rank == 0
        with Progress(*columns, console=console, disable=not shown, transient=True) as progress:
            share = "" if world.size == 1 else f" (process 1 of {world.size})"
            task = progress.add_task(f"filling{share}", total=len(items))

            def tell(entry: Entry) -> None:
                if not entry.earlier:
                    for text in entry.warnings:
                        console.print(f"warning: {entry.input}: {text}")
                if entry.error is not None:
                    console.print(f"failed: {entry.input}: {entry.error}")
                progress.advance(task)

            entries = run_items(
                items, inpainter, quality=quality, skip_existing=skip_existing, journal=journal, tell=tell, **options
            )
        dead: list[int] = []
        if journal is not None:
            journal.finish()
            if world.rank > 0:
                return 0
            records, dead = journal.collect()
            entries = [Entry(**record) for record in records]
            entries.sort(key=lambda entry: entry.input)
            if not dead:
                journal.remove_earlier()
    finally:
        if journal is not None:
            journal.close()
    seconds = time.perf_counter() - start
    if report is not None:
        settings = {
            **chosen,
            "device": str(inpainter.device),
            "dtype": str(inpainter.dtype).removeprefix("torch."),
        }
        processes = None if journal is None else {"count": world.size, "died": dead}
        write_report(report, entries, settings, seconds, processes)
    counts = Counter(entry.status for entry in entries)
    earlier = sum(entry.earlier for entry in entries)
    note = f" ({earlier} by an earlier run)" if earlier else ""
    console.print(
        f"{counts['ok']} filled{note}, {counts['skipped']} skipped, {counts['failed']} failed of {len(entries)} "
        f"in {seconds:.1f} s"
    )
    for rank in dead:
        console.print(f"failed: process {rank} of {world.size} ended before its part; run the same command again")
    return 1 if counts["failed"] or dead else 0


def _run_item(
    item: Item,
    inpainter: Inpainter,
    entry: Entry,
    quality: int | None,
    options: dict[str, Any],
    journal: Journal | None,
    key: str,
) -> None:
    if item.problem is not None:
        raise InvalidImageError(item.problem)
    picture = item.picture.open() if isinstance(item.picture, Member) else item.picture
    mask = item.mask.open(InvalidMaskError, "mask") if isinstance(item.mask, Member) else item.mask
    done = inpainter.inpaint(picture, mask, **options)
    entry.size, entry.strategy, entry.passes = list(done.size), done.strategy, done.passes
    entry.hole_ratio = round(done.hole_ratio, 6)
    if journal is not None:
        journal.writing(key, asdict(entry), item.output)
    with picture if isinstance(picture, Image.Image) else Image.open(picture) as original:
        save_picture(done.picture, item.output, like=original, format=item.format, quality=quality)


def _shards_in(source: Path, out: Path) -> list[Path]:
    """The tar shards that `source` is, or holds where it holds no pictures."""
    if not source.is_dir():
        return [source] if source.suffix.lower() == ".tar" else []
    excluded = [out.resolve()] if out.is_dir() and out.resolve() != source.resolve() else []
    if next(iter(pictures_in(source, excluded)), None) is not None:
        return []
    return list(_files_in(source, excluded, (".tar",)))


def _plan_shards(
    shards: list[Path], source: Path, mask: Path | None, out: Path, format: str | None, world: World
) -> list[Item]:
    if out.exists() and not out.is_dir():
        raise UsageError(f"--output: expected a folder, got the file {str(out)!r}")
    base = source if source.is_dir() else source.parent
    masks = list(pictures_in(mask, [])) if mask is not None and mask.is_dir() else []
    if mask is not None and mask.is_dir() and not masks:
        raise UsageError(f"--mask: no pictures in {str(mask)!r} ({', '.join(EXTENSIONS)})")
    # Whole shards are read in order and their headers by one process; few shards are shared by all.
    whole = len(shards) >= world.size
    items = []
    for shard in world.part(shards) if whole else shards:
        folder = out / shard.relative_to(base).with_suffix("")
        try:
            samples = samples_in(shard)
        except InvalidImageError as error:
            items.append(Item(shard, None, folder, "PNG", str(error)))
            continue
        for sample in samples:
            items.append(_shard_item(sample, mask, masks, folder, format))
    if not items and (world.size == 1 or not whole):
        raise UsageError(f"--input: no pictures in the tar shards of {str(source)!r} ({', '.join(EXTENSIONS)})")
    _refuse_to_overwrite(items, [*shards, *masks, *([mask] if mask is not None else [])])
    return items if whole else world.part(items)


def _shard_item(sample: Sample, mask: Path | None, masks: list[Path], folder: Path, format: str | None) -> Item:
    picture, key = sample.pictures[0], PurePosixPath(sample.key)
    own: Path | Member | None = None
    problem = None
    if mask is None:
        own = sample.masks[0] if len(sample.masks) == 1 else None
        if own is None:
            names = ", ".join(one.name for one in sample.masks) or "none"
            problem = f"mask: expected one file {sample.key}.mask.<extension> in the shard, got {names}"
    elif mask.is_dir():
        own, problem = pair_mask(Path(*key.parts), mask, masks, suffix=False)
    else:
        own = mask
    if len(sample.pictures) > 1:
        names = ", ".join(one.name for one in sample.pictures)
        problem = f"picture: expected one picture of the key {sample.key!r}, got {names}"
    suffix, pillow_format = _target(picture, format)
    if key.is_absolute() or ".." in key.parts:
        # A tar file may come from a stranger: its names must not lead out of the output folder.
        problem = f"picture: expected a name inside the shard, got {picture.name!r}"
        return Item(picture, own, folder, pillow_format, problem)
    return Item(picture, own, folder / f"{sample.key}{suffix}", pillow_format, problem)


def _file_of(source: Path | Member) -> Path:
    return source.shard if isinstance(source, Member) else source


def pictures_in(folder: Path, excluded: list[Path]) -> Iterable[Path]:
    """The files in `folder` and below with an extension of EXTENSIONS, sorted, without hidden and `excluded` folders
    (resolved paths)."""
    return _files_in(folder, excluded, tuple(EXTENSIONS))


def _files_in(folder: Path, excluded: list[Path], suffixes: tuple[str, ...]) -> Iterable[Path]:
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(
            name for name in folders if not name.startswith(".") and (Path(parent) / name).resolve() not in excluded
        )
        for name in sorted(names):
            if not name.startswith(".") and Path(name).suffix.lower() in suffixes:
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


def _target(picture: Path | Member, format: str | None) -> tuple[str, str]:
    """(extension, Pillow format): the format asked for, or else the picture's own (a shard's member's by its name);
    PNG for those not written here."""
    own = EXTENSIONS.get(picture.suffix.lower())
    by_header = format_of(picture) if isinstance(picture, Path) and format is None else None
    wanted = FORMATS[format] if format is not None else by_header or own or "PNG"
    if wanted not in EXTENSIONS.values():
        wanted = "PNG"
    if wanted == own:
        return picture.suffix, wanted
    return next(suffix for suffix, pillow_format in EXTENSIONS.items() if pillow_format == wanted), wanted


def pair_mask(relative: Path, folder: Path, masks: list[Path], suffix: bool = True) -> tuple[Path | None, str | None]:
    """(mask, None) or (None, problem) of the picture at `relative`, whose name has an extension if `suffix`.

    `masks`: those in `folder`. See `plan_items` for the rule.
    """
    place = relative.with_suffix("") if suffix else relative
    same_place = [mask for mask in masks if mask.relative_to(folder).with_suffix("") == place]
    candidates = same_place or [mask for mask in masks if mask.stem == place.name]
    if len(candidates) > 1:
        candidates = [mask for mask in candidates if mask.name == relative.name] or candidates
    if len(candidates) == 1:
        return candidates[0], None
    if not candidates:
        return None, f"mask: no file named {place.name!r} in {str(folder)!r}"
    names = ", ".join(str(mask.relative_to(folder)) for mask in candidates)
    return None, f"mask: expected one file named {place.name!r} in {str(folder)!r}, got {names}"


def _refuse_to_overwrite(items: list[Item], inputs: list[Path]) -> None:
    read = {path.resolve() for path in inputs}
    for item in items:
        if item.output.resolve() in read:
            raise UsageError(f"--output: {str(item.output)!r} would replace an input of this run")


def _refuse_report_clash(report: Path, items: list[Item]) -> None:
    for item in items:
        if report.resolve() in {
            _file_of(path).resolve() for path in (item.picture, item.output, item.mask) if path is not None
        }:
            raise UsageError(f"--report: {str(report)!r} is a picture or mask of this run")
