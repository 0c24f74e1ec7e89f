"""`lgnet-fast run`: a picture, a folder or tar shards, masks paired by name, results written atomically, a report."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
import signal
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
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
from .files import (
    ADDRESS,
    EXTENSIONS,
    FORMATS,
    OTHER_EXTENSIONS,
    STANDARD_STREAM,
    Encoded,
    format_of,
    is_stream,
    reason_against_reading,
    reason_against_writing,
    remove_leftovers,
    save_picture,
)
from .inpainter import Inpainter
from .pictures import picture_of
from .report import ReportFile
from .shards import Member, Sample, read_shard

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


class UsageError(Exception):
    """A run that cannot start: its arguments contradict each other or the files that are there."""


@dataclass(frozen=True)
class Item:
    """One picture to fill. `problem`: why it cannot be run; then `mask` may be None. `format`: Pillow's name.

    `left_out`: not a picture to fill, but something that a folder run cannot enter or read; `problem` says why.
    """

    picture: Path | Member | Encoded
    mask: Path | Member | Encoded | None
    output: Path
    format: str
    problem: str | None = None
    left_out: bool = False

    def key(self) -> str:
        """A name for this item and the exact files it is made from; replaced files give another key."""
        sources = [source for source in (self.picture, self.mask) if source is not None]
        return fingerprint(str(self.picture), str(self.mask), str(self.output), [_stamp(one) for one in sources])


@dataclass
class Entry:
    """One line of the report. `status`: "ok", "failed", "skipped" or "left_out"; `size`: [height, width] in pixels;
    `earlier`: done by an earlier launch of the same job."""

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
    source: Path,
    mask: Path | None,
    out: Path | str,
    format: str | None = None,
    world: World | None = None,
    mask_suffix: str | None = None,
) -> list[Item]:
    """The items this process runs, in the order of their names, for `--input`, `--mask`, `--output` and `--format`.

    `source` and `mask` are files or folders; folders are searched with their sub-folders. A picture takes the mask of
    the same relative path without extension; if there is none, the only mask of that stem anywhere; none, or several
    candidates, are that item's problem. `out` names a file (one picture) or a folder: relative paths are kept, and
    where two pictures would get the same name, their own extensions are kept in it. `format`: a key of FORMATS. For
    one picture, a name with an extension is a file's, unless it is a folder that is there or a slash ends it.

    With `mask_suffix`, e.g. "_mask", picture ``a`` takes ``a_mask`` or ``a_mask001`` (LaMa's layout), where `mask` is
    None beside it; of several such masks each gives a result, named by the mask.

    `source` may also be a tar shard, or a folder of shards and no pictures: its pictures ``<key>.<extension>`` take
    the mask ``<key>.mask.<extension>`` of their shard where `mask` is None; results are files, ``out/<shard>/<key>``.

    A pipe, and "-" for the standard input or output, takes the place of one picture, mask or result.

    What a folder holds and cannot be run, such as sub-folders without the right to read them and pictures in formats
    that are not read here, comes as an item that is `left_out`.

    In a `world` of n processes each gets every n-th picture, or every n-th shard where there are at least n.

    Raises UsageError: nothing there to run, an output that would replace a picture or mask of this run or that cannot
    be written, or a picture that is its own mask.
    """
    try:
        return _plan(source, mask, out, format, world or World(), mask_suffix)
    except OSError as cause:  # names that are too long, folders without rights
        raise UsageError(f"--input, --mask, --output: {cause}") from cause


def _plan(
    source: Path, mask: Path | None, out: Path | str, format: str | None, world: World, mask_suffix: str | None
) -> list[Item]:
    if format is not None and format not in FORMATS:
        raise UsageError(f"--format: expected one of {', '.join(FORMATS)}, got {format!r}")
    if format is not None and (reason := reason_against_writing(FORMATS[format])) is not None:
        raise UsageError(f"--format: {reason}")
    if mask_suffix is not None and (not mask_suffix or "/" in mask_suffix):
        raise UsageError(f"--mask-suffix: expected the end of the masks' names, such as _mask, got {mask_suffix!r}")
    if ADDRESS.match(str(out)):
        raise UsageError(f"--output: expected a file or a folder, got the address {str(out)!r}")
    is_folder, out = str(out).endswith(("/", os.sep)), Path(out)
    for name, path in (("--input", source), ("--mask", mask)):
        if path is not None and path != STANDARD_STREAM and not path.exists():
            raise UsageError(f"{name}: {str(path)!r} does not exist")
    _refuse_unwritable(out)
    if source == STANDARD_STREAM and mask == STANDARD_STREAM:
        raise UsageError("--mask: the standard input is the picture already")
    if source == STANDARD_STREAM or is_stream(source):
        return _plan_stream(_read_stream("--input", source), mask, out, format, is_folder, world)
    shards = _shards_in(source, out)
    if (shards or source.is_dir()) and (out == STANDARD_STREAM or is_stream(out)):
        raise UsageError("--output: one stream takes one picture; expected a folder for the results of a folder")
    if (shards or source.is_dir()) and not is_folder and not out.is_dir() and out.suffix.lower() in EXTENSIONS:
        raise UsageError(
            f"--output: expected a folder for the results of a folder, got a picture's name {out.name!r}"
        )
    if shards:
        if mask_suffix is not None:
            raise UsageError("--mask-suffix: tar shards hold their masks as <key>.mask.<extension>")
        return _plan_shards(shards, source, mask, out, format, world)
    if mask is None and mask_suffix is None:
        raise UsageError("--mask: expected a mask or a folder of them, got none; only tar shards can hold their own")
    if mask_suffix is not None and mask is not None and not mask.is_dir():
        raise UsageError(f"--mask-suffix: expected a folder as --mask, or none, got the file {str(mask)!r}")

    base = source if source.is_dir() else source.parent
    mask_folder = base if mask is None else mask if mask.is_dir() else None
    one_mask = _opened_mask(mask) if mask is not None and mask_folder is None else None
    excluded = [folder.resolve() for folder in (mask_folder, out) if folder is not None and folder.is_dir()]
    excluded = [folder for folder in excluded if folder != source.resolve()]
    found = scan(source, excluded) if source.is_dir() else Found([source])
    found_masks = Found([] if mask is None else [mask])
    if mask_folder is not None:
        earlier = [out.resolve()]  # results of another run are not masks
        found_masks = scan(mask_folder, earlier) if source.is_dir() or mask is not None else Found(_beside(source))
    pictures, masks = found.pictures, found_masks.pictures
    if mask_suffix is not None and mask_folder is not None and mask_folder.resolve() == base.resolve():
        own = set(masks) - {one for one in masks if _of_mask(one.stem, mask_suffix) is not None}
        pictures = [picture for picture in pictures if picture in own] if source.is_dir() else pictures
    if not pictures and not found.left_out:
        raise UsageError(f"--input: no pictures in {str(source)!r} ({', '.join(EXTENSIONS)})")
    if mask_folder is not None and not masks:
        raise UsageError(f"--mask: no pictures in {str(mask_folder)!r} ({', '.join(EXTENSIONS)})")

    tasks: list[tuple[Path, Path, Path | Encoded | None, str | None]] = []
    for picture in pictures:
        relative = picture.relative_to(base)
        if mask_folder is None:
            tasks.append((picture, relative, one_mask, None))
        elif mask_suffix is None:
            tasks.append((picture, relative, *pair_mask(relative, mask_folder, masks)))
        else:
            own_masks, problem = _masks_by_suffix(relative, mask_folder, masks, mask_suffix)
            choices: list[Path | None] = [*own_masks] or [None]
            for one in choices:
                named = relative if one is None or len(own_masks) == 1 else relative.with_stem(one.stem)
                tasks.append((picture, named, one, problem))
    outputs = _outputs([task[:2] for task in tasks], source.is_dir(), out, format, is_folder)
    items = [
        Item(picture, own, output, pillow_format, problem)
        for (picture, _, own, problem), (output, pillow_format) in zip(tasks, outputs, strict=True)
    ]
    _refuse_own_mask(items, mask_suffix)
    _refuse_to_overwrite(items, [*pictures, *(masks if one_mask is None or one_mask == mask else [])])
    problems = [*found.left_out, *(found_masks.left_out if mask is not None else [])]
    items += [Item(path, None, out, "PNG", reason, left_out=True) for path, reason in dict(problems).items()]
    return world.part(items)


def _plan_stream(
    picture: Encoded, mask: Path | None, out: Path, format: str | None, is_folder: bool, world: World
) -> list[Item]:
    if mask is None or mask.is_dir():
        got = "none" if mask is None else f"the folder {str(mask)!r}"
        raise UsageError(f"--mask: expected a mask for the picture of a pipe, got {got}")
    own = _opened_mask(mask)
    ((output, pillow_format),) = _outputs([(picture, Path(Path(picture.name).name))], False, out, format, is_folder)
    items = [Item(picture, own, output, pillow_format)]
    _refuse_to_overwrite(items, [own] if isinstance(own, Path) else [])
    return world.part(items)


def _opened_mask(mask: Path) -> Path | Encoded:
    return _read_stream("--mask", mask) if mask == STANDARD_STREAM or is_stream(mask) else mask


def _read_stream(name: str, path: Path) -> Encoded:
    """A pipe's bytes. Raises UsageError: a terminal or another device."""
    if path == STANDARD_STREAM:
        if sys.stdin.isatty():
            raise UsageError(f"{name}: expected a picture on the standard input, got a terminal")
        return Encoded("stdin", sys.stdin.buffer.read())
    if path.is_char_device() or path.is_block_device():
        raise UsageError(f"{name}: expected a file, a folder or a pipe, got the device {str(path)!r}")
    return Encoded(str(path), path.read_bytes())


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
    """Fills and writes every item, and continues after one that fails; `options` go to the Inpainter's call.

    `tell` is called with each finished entry. With a `journal`, items that an earlier launch finished are skipped.
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
        if item.left_out:
            entry.status, entry.error = "left_out", item.problem
        else:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                try:
                    if skip_existing and item.output.is_file():
                        entry.status = "skipped"
                    else:
                        _run_item(item, inpainter, entry, quality, options, journal, key)
                except (BackendError, WeightsError, JobError):
                    raise
                except (LGNetError, OSError) as error:
                    entry.status, entry.error = "failed", str(error)
                except Exception as error:  # an unexpected error of one picture must not stop the others
                    entry.status, entry.error = "failed", f"{type(error).__name__}: {error}"
            entry.warnings = [str(one.message) for one in caught]
        entry.seconds = round(time.perf_counter() - start, 4)
        if journal is not None:
            journal.done(key, asdict(entry), item.output)
        entries.append(entry)
        tell(entry)
    return entries


def report_of(
    entries: Sequence[Entry],
    settings: dict[str, Any],
    seconds: float,
    processes: dict[str, Any] | None = None,
    planned: int | None = None,
) -> dict[str, Any]:
    """The report as JSON has it: `items`, `totals`, `settings`, `versions`; for a job with a journal `processes` too,
    and what was done earlier. `complete`: whether these are all of the `planned` items (None: they are)."""
    from .. import __version__

    counts = Counter(entry.status for entry in entries)
    items = [asdict(entry) for entry in entries]
    if processes is None:
        for item in items:
            del item["earlier"]
    return {
        "complete": planned is None,
        **({} if planned is None else {"planned": planned}),
        "items": items,
        "totals": {
            "items": len(entries),
            **{status: counts[status] for status in ("ok", "failed", "skipped", "left_out")},
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


def run(
    source: Path,
    mask: Path | None,
    out: Path | str,
    *,
    mask_suffix: str | None = None,
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
    """The run command: its exit code, 0 when all is done, 1 when some failed or were left out, 130 after Ctrl-C, 143
    after SIGTERM.

    The report is rewritten during the run, so that a killed run leaves one too, with `complete` false.

    With `resume`, and always under `accelerate launch`, journals in the hidden folder ``.lgnet_fast`` of the output
    folder say what is done: the same command run again does only the rest, and its report covers all. Of several
    processes the first one waits for the others' parts, merges the report and returns the code of the whole;
    the others return 0 once their failures are in the report, because launchers end all processes after another code.

    Raises UsageError, WeightsError, BackendError, JobError before or instead of running.
    """
    start = time.perf_counter()
    world = world or World.from_environment()
    items = plan_items(source, mask, out, format, world, mask_suffix)
    keeps_journal = resume or world.launched
    folder = Path(out)
    if keeps_journal and (folder == STANDARD_STREAM or is_stream(folder)):
        raise UsageError("--resume: expected a file or a folder as --output, got a stream")
    file = None
    if report is not None and world.rank == 0:
        try:
            _refuse_report_clash(report, items, folder)
            file = ReportFile(report)
        except OSError as cause:
            raise UsageError(
                f"--report: expected a file that can be written, got {str(report)!r} ({cause})"
            ) from cause
    chosen = {
        "model": model or "bundled",
        "dtype": dtype,
        "backend": backend,
        "format": format,
        "quality": quality,
        "skip_existing": skip_existing,
        "mask_suffix": mask_suffix,
        **options,
    }
    journal = None
    if keeps_journal:
        from .. import __version__

        # A single result may be a file; the journal then lies beside it.
        names_file = folder.suffix.lower() in EXTENSIONS and not folder.is_dir() and not str(out).endswith("/")
        folder = folder.parent if names_file else folder
        journal = Journal(folder / FOLDER / f"run-{fingerprint(chosen, model_stamp(model), __version__)}", world)
    dead: list[int] = []
    entries: list[Entry] = []
    interrupted = False
    came: list[int] = []
    processes = None
    # File names are printed as they are: rich would read [brackets] in them as markup, and wrap long ones.
    console = Console(stderr=True, soft_wrap=True, markup=False, highlight=False)
    settings = dict(chosen)

    def write(planned: int | None) -> bool:
        """Rewrites the report; returns whether it could be written."""
        if file is None:
            return True
        try:
            file.write(report_of(entries, settings, time.perf_counter() - start, processes, planned))
        except OSError as cause:
            console.print(f"failed: the report {str(report)!r} could not be written ({cause})")
            return False
        return True

    written = finished = False
    try:
        if world.rank == 0:
            files = [item.output for item in items if item.problem is None and not is_stream(item.output)]
            own = (file.parent for file in files if file != STANDARD_STREAM)
            remove_leftovers(own, age=0 if world.size == 1 else 600)
        inpainter = Inpainter.from_pretrained(model, device=world.device(device), dtype=dtype, backend=backend)
        settings |= {"device": str(inpainter.device), "dtype": str(inpainter.dtype).removeprefix("torch.")}
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        shown = console.is_terminal and world.rank == 0
        with Progress(*columns, console=console, disable=not shown, transient=True) as progress:
            share = "" if world.size == 1 else f" (process 1 of {world.size})"
            task = progress.add_task(f"filling{share}", total=len(items))

            def tell(entry: Entry) -> None:
                entries.append(entry)
                if not entry.earlier:
                    for text in entry.warnings:
                        console.print(f"warning: {shown_text(entry.input)}: {shown_text(text)}")
                if entry.error is not None:
                    what = "left out" if entry.status == "left_out" else "failed"
                    console.print(f"{what}: {shown_text(entry.input)}: {shown_text(entry.error)}")
                progress.advance(task)
                if file is not None and file.due:
                    write(len(items))
                if came:
                    raise KeyboardInterrupt

            try:
                with _signals_told(came):
                    run_items(
                        items,
                        inpainter,
                        quality=quality,
                        skip_existing=skip_existing,
                        journal=journal,
                        tell=tell,
                        **options,
                    )
            except KeyboardInterrupt:
                interrupted = True
        if journal is not None and not interrupted:
            journal.finish()
            if world.rank > 0:
                return 0
            records, dead = journal.collect()
            entries[:] = [Entry(**record) for record in records]
            entries.sort(key=lambda entry: entry.input)
            if not dead:
                journal.remove_earlier()
        processes = None if journal is None else {"count": world.size, "died": dead}
        finished = True
        written = write(len(items) if interrupted else None)
    finally:
        if journal is not None:
            journal.close()
        if file is not None:
            if not finished and entries:
                write(len(items))
            file.close()
    # As shells have it: 130 after Ctrl-C, 143 after SIGTERM.
    interrupted_code = 128 + (came[0] if came else signal.SIGINT)
    if interrupted and world.rank > 0:
        return interrupted_code
    seconds = time.perf_counter() - start
    counts = Counter(entry.status for entry in entries)
    earlier = sum(entry.earlier for entry in entries)
    note = f" ({earlier} by an earlier run)" if earlier else ""
    left = f", {counts['left_out']} left out" if counts["left_out"] else ""
    console.print(
        f"{'interrupted: ' if interrupted else ''}{counts['ok']} filled{note}, {counts['skipped']} skipped, "
        f"{counts['failed']} failed{left} of {len(items) if interrupted else len(entries)} in {seconds:.1f} s"
    )
    for rank in dead:
        console.print(f"failed: process {rank} of {world.size} ended before its part; run the same command again")
    if interrupted:
        return interrupted_code
    return 1 if counts["failed"] or counts["left_out"] or dead or not written else 0


@contextlib.contextmanager
def _signals_told(came: list[int]) -> Iterator[None]:
    """Inside this context Ctrl-C and SIGTERM raise KeyboardInterrupt and are appended to `came`.

    `came` is needed because Python drops an exception that is raised in a destructor.
    """

    def handle(number: int, frame: Any) -> None:
        came.append(number)
        raise KeyboardInterrupt

    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) not in (signal.SIG_IGN, None):  # ignored, as in background jobs of a shell
                before[number] = signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def shown_text(text: str) -> str:
    """`text` for a terminal: control characters and bytes of names that are not UTF-8 escaped."""
    text = _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)
    return text.encode("utf-8", "backslashreplace").decode()


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
    source = item.picture.read() if isinstance(item.picture, Member) else item.picture
    picture = picture_of(source)
    # Checked before the network runs: a result that the format cannot hold would be lost.
    picture.check_format(item.format)
    mask = item.mask if isinstance(item.mask, Path) or item.mask is None else item.mask.open(InvalidMaskError, "mask")
    done = inpainter.inpaint(picture, mask, **options)
    entry.size, entry.strategy, entry.passes = list(done.size), done.strategy, done.passes
    entry.hole_ratio = round(done.hole_ratio, 6)
    if journal is not None:
        journal.writing(key, asdict(entry), item.output)
    if item.format != "JPEG":
        save_picture(done.picture, item.output, format=item.format, quality=quality)
        return
    with source.open() if isinstance(source, Encoded) else Image.open(source) as original:
        save_picture(done.picture, item.output, like=original, format=item.format, quality=quality)


def _shards_in(source: Path, out: Path) -> list[Path]:
    """The tar shards that `source` is, or holds where it holds no pictures."""
    if not source.is_dir():
        return [source] if source.suffix.lower() == ".tar" else []
    excluded = [out.resolve()] if out.is_dir() and out.resolve() != source.resolve() else []
    found = scan(source, excluded, [*EXTENSIONS, ".tar"]).pictures
    shards = [path for path in found if path.suffix.lower() == ".tar"]
    return shards if len(shards) == len(found) else []


def _plan_shards(
    shards: list[Path], source: Path, mask: Path | None, out: Path, format: str | None, world: World
) -> list[Item]:
    if out.exists() and not out.is_dir():
        raise UsageError(f"--output: expected a folder, got the file {str(out)!r}")
    base = source if source.is_dir() else source.parent
    found = scan(mask, []) if mask is not None and mask.is_dir() else Found([])
    masks = found.pictures
    one_mask = _opened_mask(mask) if mask is not None and not mask.is_dir() else None
    if mask is not None and mask.is_dir() and not masks:
        raise UsageError(f"--mask: no pictures in {str(mask)!r} ({', '.join(EXTENSIONS)})")
    relative = [shard.relative_to(base) for shard in shards]
    folders = dict(zip(shards, _distinct([name.with_suffix("") for name in relative], relative)))
    # Whole shards are read in order and their headers by one process; few shards are shared by all.
    whole = len(shards) >= world.size
    items = []
    for shard in world.part(shards) if whole else shards:
        folder = out / folders[shard]
        try:
            content = read_shard(shard)
        except InvalidImageError as error:
            items.append(Item(shard, None, folder, "PNG", str(error)))
            continue
        for sample in content.samples:
            items.append(_shard_item(sample, one_mask or mask, masks, folder, format))
        for other in content.others:
            items.append(Item(other, None, folder, "PNG", _unread(other.suffix), left_out=True))
    if not items and (world.size == 1 or not whole):
        raise UsageError(f"--input: no pictures in the tar shards of {str(source)!r} ({', '.join(EXTENSIONS)})")
    items = _without_clashes(items)
    _refuse_to_overwrite(items, [*shards, *masks, *([one_mask] if isinstance(one_mask, Path) else [])])
    if world.rank == 0 or not whole:
        items += [Item(path, None, out, "PNG", reason, left_out=True) for path, reason in found.left_out]
    return items if whole else world.part(items)


def _shard_item(
    sample: Sample, mask: Path | Encoded | None, masks: list[Path], folder: Path, format: str | None
) -> Item:
    picture, key = sample.pictures[0], PurePosixPath(sample.key)
    own: Path | Member | Encoded | None = None
    problem = None
    if mask is None:
        own = sample.masks[0] if len(sample.masks) == 1 else None
        if own is None:
            names = ", ".join(one.name for one in sample.masks) or "none"
            problem = f"mask: expected one file {sample.key}.mask.<extension> in the shard, got {names}"
    elif isinstance(mask, Path) and mask.is_dir():
        own, problem = pair_mask(Path(*key.parts), mask, masks, suffix=False)
    else:
        own = mask
    if len(sample.pictures) > 1:
        names = ", ".join(one.name for one in sample.pictures)
        problem = f"picture: expected one picture of the key {sample.key!r}, got {names}"
    suffix, pillow_format = _target(picture, format)
    unsafe = key.is_absolute() or ".." in key.parts or _CONTROL.search(picture.name)
    if unsafe or any(_CONTROL.search(one.name) for one in sample.masks):
        # Tar files are untrusted: their names must not lead out of the output folder, nor hold control characters.
        problem = f"picture: expected a name inside the shard, without control characters, got {picture.name!r}"
        return Item(picture, own, folder, pillow_format, problem)
    return Item(picture, own, folder / f"{sample.key}{suffix}", pillow_format, problem)


def _file_of(source: Path | Member | Encoded) -> Path | None:
    if isinstance(source, Encoded):
        return None
    return source.shard if isinstance(source, Member) else source


def _stamp(source: Path | Member | Encoded) -> Any:
    """Identifies a source's content among files of the same name."""
    if isinstance(source, Encoded):
        return hashlib.sha256(source.data).hexdigest()
    return stamp(source.shard if isinstance(source, Member) else source)


@dataclass(frozen=True)
class Found:
    """What a folder holds: `pictures` to run, sorted, and what is `left_out`, as (path, reason)."""

    pictures: list[Path]
    left_out: list[tuple[Path, str]] = field(default_factory=list)


def pictures_in(folder: Path, excluded: list[Path]) -> list[Path]:
    """The files in `folder` and below with an extension of EXTENSIONS, sorted, without hidden and `excluded` folders
    (resolved paths)."""
    return scan(folder, excluded).pictures


def scan(folder: Path, excluded: list[Path], suffixes: Iterable[str] = EXTENSIONS) -> Found:
    """The files with one of the `suffixes` in a folder and below, also through links to folders elsewhere."""
    suffixes = set(suffixes)
    found = Found([])
    errors: list[OSError] = []
    root = folder.resolve()
    seen: set[Path] = set()
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=errors.append):
        kept = []
        for name in sorted(folders):
            path = Path(parent) / name
            real = path.resolve()
            # Folders of this tree are listed under their own names; the target of a link is listed once.
            inside = root == real or root in real.parents or real in root.parents
            if name.startswith(".") or real in excluded or (path.is_symlink() and (inside or real in seen)):
                continue
            seen.add(real)
            kept.append(name)
        folders[:] = kept
        for name in sorted(names):
            suffix = Path(name).suffix.lower()
            if name.startswith("."):
                continue
            path = Path(parent) / name
            reason = reason_against_reading(EXTENSIONS[suffix]) if suffix in EXTENSIONS else None
            if suffix in suffixes and reason is None:
                found.pictures.append(path)
            elif suffix in OTHER_EXTENSIONS or reason is not None:
                found.left_out.append((path, reason or _unread(suffix)))
    for error in errors:
        found.left_out.append((Path(error.filename), f"the folder cannot be read ({error.strerror})"))
    return found


def _unread(suffix: str) -> str:
    return f"pictures of the format {suffix} are not read here"


def _beside(picture: Path) -> list[Path]:
    """The pictures in the folder of a picture, sorted."""
    return sorted(path for path in picture.parent.iterdir() if path.suffix.lower() in EXTENSIONS)


def _outputs(
    pictures: Sequence[tuple[Path | Encoded, Path]], from_folder: bool, out: Path, format: str | None, is_folder: bool
) -> list[tuple[Path, str]]:
    """(file, Pillow format) of every picture, given with the name that its result has in a folder.

    `from_folder`: the pictures are a folder's. `is_folder`: `out` was named as a folder, with a slash.
    """
    if out == STANDARD_STREAM or is_stream(out):
        if len(pictures) > 1:
            raise UsageError("--output: one stream takes one picture; this one has several masks")
        if out == STANDARD_STREAM and sys.stdout.isatty():
            raise UsageError("--output: expected a pipe or a file as standard output, got a terminal")
        return [(out, _target(pictures[0][0], format)[1])]
    if out.exists() and not out.is_dir() and (out.suffix.lower() not in EXTENSIONS or from_folder):
        raise UsageError(f"--output: expected a folder or a picture's name, got the file {str(out)!r}")
    if not from_folder and not is_folder and not out.is_dir() and out.suffix:
        by_suffix = EXTENSIONS.get(out.suffix.lower())
        if by_suffix is None:
            raise UsageError(
                f"--output: expected a picture's name ({', '.join(EXTENSIONS)}) or a folder, got {out.name!r}; "
                "end it with a slash to make a folder of that name"
            )
        if (reason := reason_against_writing(by_suffix)) is not None:
            raise UsageError(f"--output: {out.name!r} cannot be written: {reason}")
        if format is not None and FORMATS[format] != by_suffix:
            raise UsageError(f"--output: {out.name!r} does not go with --format {format}")
        if len(pictures) > 1:
            raise UsageError(f"--output: expected a folder for {len(pictures)} results, got {out.name!r}")
        return [(out, by_suffix)]
    targets = [_target(picture, format) for picture, _ in pictures]
    names = [name.with_suffix(suffix) for (_, name), (suffix, _) in zip(pictures, targets)]
    longer = [name.with_name(name.name + suffix) for (_, name), (suffix, _) in zip(pictures, targets)]
    return [
        (out / name, pillow_format)
        for name, (_, pillow_format) in zip(_distinct(names, longer), targets, strict=True)
    ]


def _distinct(names: Sequence[Path], longer: Sequence[Path]) -> list[Path]:
    """`names`, but where several meet the `longer` ones, numbered where those meet others too."""

    def fold(name: Path) -> str:
        # Some file systems ignore case.
        return str(name).casefold()

    wanted = Counter(fold(name) for name in names)
    taken = {fold(name) for name in names if wanted[fold(name)] == 1}
    chosen = []
    for name, instead in zip(names, longer, strict=True):
        if wanted[fold(name)] > 1:
            name, number = instead, 2
            while fold(name) in taken:
                name, number = instead.with_name(f"{instead.stem}-{number}{instead.suffix}"), number + 1
            taken.add(fold(name))
        chosen.append(name)
    return chosen


def _without_clashes(items: list[Item]) -> list[Item]:
    """The items; one whose result would replace another's gets a `problem`."""
    taken: dict[str, Item] = {}
    kept = []
    for item in items:
        if item.problem is None:
            other = taken.setdefault(str(item.output).casefold(), item)
            if other is not item:
                item = replace(item, problem=f"picture: its result would replace that of {str(other.picture)!r}")
        kept.append(item)
    return kept


def _target(picture: Path | Member | Encoded, format: str | None) -> tuple[str, str]:
    """(extension, Pillow format): the format asked for, or else the picture's own (a shard's member's by its name);
    PNG for those not written here."""
    own = EXTENSIONS.get(picture.suffix.lower())
    by_header = None if isinstance(picture, Member) or format is not None else format_of(picture)
    wanted = FORMATS[format] if format is not None else by_header or own or "PNG"
    if reason_against_writing(wanted) is not None:
        wanted = "PNG"
    if wanted == own:
        return picture.suffix, wanted
    return next(suffix for suffix, pillow_format in EXTENSIONS.items() if pillow_format == wanted), wanted


def _of_mask(stem: str, suffix: str) -> str | None:
    """The stem of the picture that a mask of this stem belongs to, None where it is no mask's."""
    found = re.fullmatch(rf"(.+){re.escape(suffix)}\d*", stem, re.DOTALL)
    return None if found is None else found[1]


def _masks_by_suffix(relative: Path, folder: Path, masks: list[Path], suffix: str) -> tuple[list[Path], str | None]:
    """The masks of the picture at `relative`, or what is wrong with them; see `plan_items`."""
    place = relative.with_suffix("")
    named = [mask for mask in masks if _of_mask(mask.stem, suffix) == place.name]
    own = [mask for mask in named if mask.parent == folder / place.parent] or named
    if not own:
        return [], f"mask: no file named {place.name + suffix!r} in {str(folder)!r}"
    if len({mask.stem for mask in own}) < len(own):
        names = ", ".join(str(mask.relative_to(folder)) for mask in own)
        return [], f"mask: expected masks of names of their own, got {names}"
    return own, None


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
        if item.problem is None and item.output.resolve() in read:
            raise UsageError(f"--output: {str(item.output)!r} would replace an input of this run")


def _refuse_own_mask(items: list[Item], mask_suffix: str | None) -> None:
    for item in items:
        if not isinstance(item.picture, Path) or not isinstance(item.mask, Path):
            continue
        try:
            same = os.path.samefile(item.picture, item.mask)
        except OSError:  # removed meanwhile: the run of the item reports it
            continue
        if same:
            advice = (
                "" if mask_suffix else "; masks that lie beside their pictures as a_mask.png: --mask-suffix _mask"
            )
            raise UsageError(f"--mask: {str(item.mask)!r} is the picture {str(item.picture)!r} itself{advice}")


def _refuse_unwritable(out: Path) -> None:
    """Raises UsageError where no result could be written, before anything is done."""
    if out == STANDARD_STREAM:
        return
    if (is_stream(out) or out.is_file()) and not os.access(out, os.W_OK):
        raise UsageError(f"--output: {str(out)!r} cannot be written (Permission denied)")
    if is_stream(out):
        return
    place = Path(os.path.realpath(out))
    place = place.parent if place.is_file() else place
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise UsageError(f"--output: {str(out)!r} cannot be written: {str(place)!r} is no folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UsageError(f"--output: {str(out)!r} cannot be written: no right to write in {str(place)!r}")
    # Only a system call tells whether a name is too long for the file system.
    with contextlib.suppress(FileNotFoundError):
        os.lstat(out)


def _refuse_report_clash(report: Path, items: list[Item], out: Path) -> None:
    if ADDRESS.match(str(report)):
        raise UsageError(f"--report: expected a file, got the address {str(report)!r}")
    if report.is_dir():
        raise UsageError(f"--report: expected a file, got the folder {str(report)!r}")
    if report == STANDARD_STREAM and out == STANDARD_STREAM:
        raise UsageError("--report: the standard output has the picture already")
    for item in items:
        files = [item.output, *(_file_of(path) for path in (item.picture, item.mask) if path is not None)]
        if not item.left_out and report.resolve() in {path.resolve() for path in files if path is not None}:
            raise UsageError(f"--report: {str(report)!r} is a picture or mask of this run")
