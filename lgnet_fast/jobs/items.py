"""The items of a run: picture, mask and result file of each."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from ..data.folders import Found, scan
from ..data.shards import BESIDE_PICTURES, SHARD, Member, Sample, Shard, apart, is_shard, read_shard
from ..errors import InvalidImageError, UsageError
from ..files import folded, real_path
from ..pipeline.formats import ADDRESS, EXTENSIONS
from ..pipeline.sources import Encoded
from ..pipeline.writing import STANDARD_STREAM, is_any_stream
from .folders import MasksByName, MasksBySuffix, beside, of_mask
from .journal import fingerprint, stamp
from .options import FillOptions
from .outputs import distinct, format_for, refuse_unwritable, result_files
from .streams import opened_mask, read_stream
from .world import World

_SUFFIXES = (*EXTENSIONS, SHARD)

CONTROL = re.compile(r"[\x00-\x1f\x7f]")
"""Characters that are unsafe in terminals and scripts."""


_TAKEN = re.compile(r'[\\:*?"<>|]|[. ]$')
_DEVICE = re.compile(r"con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³]", re.IGNORECASE)


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
        """A key of this item and its input files; replaced files give another key."""
        sources = [source for source in (self.picture, self.mask) if source is not None]
        return fingerprint(str(self.picture), str(self.mask), str(self.output), [_stamp(one) for one in sources])


def plan_items(options: FillOptions, world: World | None = None) -> list[Item]:
    """The items of this process, in the order of their names.

    `source` and `mask` are files or folders; folders are searched with their sub-folders. A picture takes the mask of
    the same relative path without extension; without one, the only mask of that stem anywhere, if it is no other
    picture's; without any, or with several candidates, the item has a `problem`. `out` names a file (one picture) or
    a folder: relative paths are kept, and where two pictures would get the same name, it keeps their original
    extensions. For one picture, a name with an extension is a file, unless it is an existing folder or ends with a
    slash.

    With `mask_suffix`, e.g. "_mask", picture ``a`` takes ``a_mask`` or ``a_mask001`` (LaMa's layout), where `mask` is
    None beside it; of several such masks each gives a result, named by the mask.

    `source` may also be a tar shard, or a folder of shards and no pictures: its pictures ``<key>.<extension>`` take
    the mask ``<key>.mask.<extension>`` of their shard where `mask` is None; results are files, ``out/<shard>/<key>``.

    A pipe, and "-" for the standard input or output, takes the place of one picture, mask or result.

    Contents of a folder that cannot be run, such as unreadable sub-folders and pictures in unsupported formats,
    become items that are `left_out`.

    In a `world` of n processes each gets every n-th picture, or every n-th shard where there are at least n.

    Raises UsageError: nothing to run, an output that would replace a picture or mask of this run or that cannot be
    written, or a picture that is its own mask.
    """
    try:
        return _plan(options, world or World())
    except OSError as cause:  # names that are too long, folders without rights
        raise UsageError(f"source, mask, out: {cause}") from cause


def _plan(options: FillOptions, world: World) -> list[Item]:
    source, mask, out = options.source, options.mask, options.result
    for name, path in (("source", source), ("mask", mask)):
        if path is not None and path != STANDARD_STREAM and not path.exists():
            raise UsageError(f"{name}: {str(path)!r} does not exist")
    refuse_unwritable(out)
    if source == STANDARD_STREAM and mask == STANDARD_STREAM:
        raise UsageError("mask: the standard input is the picture already")
    if is_any_stream(source):
        return _plan_stream(read_stream("source", source), options, world)
    shards = _shards_in(source, out)
    if shards or source.is_dir():
        _refuse_one_result(options)
    if not shards:
        return _plan_pictures(options, world)
    if options.mask_suffix is not None:
        raise UsageError("mask_suffix: tar shards hold their masks as <key>.mask.<extension>")
    return _plan_shards(shards, options, world)


def _refuse_one_result(options: FillOptions) -> None:
    """Raise UsageError where `out` is a file or stream for one picture; for the results of a folder."""
    out = options.result
    if is_any_stream(out):
        raise UsageError("out: one stream takes one picture; expected a folder for the results of a folder")
    if not options.names_folder and not out.is_dir() and out.suffix.lower() in EXTENSIONS:
        raise UsageError(f"out: expected a folder for the results of a folder, got a picture's name {out.name!r}")


def _plan_pictures(options: FillOptions, world: World) -> list[Item]:
    source, mask, out = options.source, options.mask, options.result
    if mask is None and options.mask_suffix is None:
        raise UsageError(
            "mask: expected a mask or a folder of them, or `mask_suffix`, got none; only tar shards hold their own"
        )
    if options.mask_suffix is not None and mask is not None and not mask.is_dir():
        raise UsageError(f"mask_suffix: expected a folder as `mask`, or none, got the file {str(mask)!r}")
    base = source if source.is_dir() else source.parent
    mask_folder = base if mask is None else mask if mask.is_dir() else None
    one_mask = opened_mask(mask) if mask is not None and mask_folder is None else None
    found, found_masks = _search(options, base, mask_folder)
    pictures, masks = found.pictures, found_masks.pictures
    if not pictures and not found.left_out:
        raise _no_pictures("source", source, found)
    if mask_folder is not None and not masks:
        raise _no_pictures("mask", mask_folder, found_masks)
    named = [(picture, picture.relative_to(base)) for picture in pictures]
    if mask_folder is None:
        tasks = [_Task(picture, name, one_mask) for picture, name in named]
    elif options.mask_suffix is None:
        by_name = MasksByName(mask_folder, masks, (name for _, name in named))
        tasks = [_Task(picture, name, *by_name.of_picture(name)) for picture, name in named]
    else:
        by_suffix = MasksBySuffix(mask_folder, masks, options.mask_suffix, (name for _, name in named))
        tasks = [task for picture, name in named for task in _with_suffix(picture, name, by_suffix)]
    files = result_files(
        [(task.picture, task.name) for task in tasks], source.is_dir(), out, options.format, options.names_folder
    )
    items = [
        Item(task.picture, task.mask, file, pillow_format, task.problem)
        for task, (file, pillow_format) in zip(tasks, files, strict=True)
    ]
    _refuse_own_mask(items, options.mask_suffix)
    _refuse_to_overwrite(items, [*pictures, *(masks if one_mask is None or one_mask == mask else [])])
    problems = [*found.left_out, *(found_masks.left_out if mask is not None else [])]
    items += [Item(path, None, out, "PNG", reason, left_out=True) for path, reason in dict(problems).items()]
    return world.part(items)


def _no_pictures(name: str, folder: Path, found: Found) -> UsageError:
    """The error about a folder in which nothing can be read."""
    reason = ": ".join(map(str, found.left_out[0])) if found.left_out else ", ".join(EXTENSIONS)
    return UsageError(f"{name}: no pictures in {str(folder)!r} ({reason})")


@dataclass(frozen=True)
class _Task:
    """A picture, the name of its result in a folder, and its mask or the problem with it."""

    picture: Path
    name: Path
    mask: Path | Encoded | None
    problem: str | None = None


def _search(options: FillOptions, base: Path, mask_folder: Path | None) -> tuple[Found, Found]:
    """(pictures, masks); none of them are results of this run or of another."""
    source, mask, out, suffix = options.source, options.mask, options.result, options.mask_suffix
    # The source itself is searched even if it is one of them.
    excluded = [real_path(folder) for folder in (mask_folder, out) if folder is not None]
    found = _beside_shards(scan(source, excluded, _SUFFIXES)) if source.is_dir() else Found([source])
    masks = Found([] if mask is None else [mask])
    if mask_folder is not None:
        earlier = [real_path(out)]  # results of another run are not masks
        masks = scan(mask_folder, earlier) if source.is_dir() or mask is not None else Found(beside(source))
    together = suffix is not None and mask_folder is not None and real_path(mask_folder) == real_path(base)
    if suffix is not None and together and source.is_dir():
        stems = {one.stem for one in masks.pictures}
        masked = {of_mask(stem, suffix) for stem in stems}
        # A picture whose name is like that of a mask, but of no picture that is there, and that has a mask itself.
        alike = {stem for stem in stems & masked if of_mask(stem, suffix) not in stems}
        own = {one for one in masks.pictures if of_mask(one.stem, suffix) is None or one.stem in alike}
        found = replace(found, pictures=[picture for picture in found.pictures if picture in own])
    return found, masks


def _beside_shards(found: Found) -> Found:
    """The pictures of a folder; shards among them are left out."""
    shards, pictures = apart(found.pictures)
    left_out = [(shard, BESIDE_PICTURES) for shard in shards]
    return Found(pictures, found.left_out + left_out)


def _with_suffix(picture: Path, relative: Path, masks: MasksBySuffix) -> list[_Task]:
    """A picture's tasks, one for each of its masks."""
    own, problem = masks.of_picture(relative)
    if len(own) < 2:
        return [_Task(picture, relative, own[0] if own else None, problem)]
    return [_Task(picture, relative.with_stem(one.stem), one, problem) for one in own]


def _plan_stream(picture: Encoded, options: FillOptions, world: World) -> list[Item]:
    mask, out = options.mask, options.result
    if mask is None or mask.is_dir():
        got = "none" if mask is None else f"the folder {str(mask)!r}"
        raise UsageError(f"mask: expected a mask for the picture of a pipe, got {got}")
    own = opened_mask(mask)
    named = [(picture, Path(Path(picture.name).name))]
    ((file, pillow_format),) = result_files(named, False, out, options.format, options.names_folder)
    items = [Item(picture, own, file, pillow_format)]
    _refuse_to_overwrite(items, [own] if isinstance(own, Path) else [])
    return world.part(items)


def _shards_in(source: Path, out: Path) -> list[Path]:
    """The tar shard `source`, or the shards of a folder without pictures."""
    if not source.is_dir():
        return [source] if is_shard(source) else []
    shards, pictures = apart(scan(source, [real_path(out)], _SUFFIXES).pictures)
    return [] if pictures else shards


def _plan_shards(shards: list[Path], options: FillOptions, world: World) -> list[Item]:
    source, mask, out = options.source, options.mask, options.result
    if out.exists() and not out.is_dir():
        raise UsageError(f"out: expected a folder, got the file {str(out)!r}")
    base = source if source.is_dir() else source.parent
    found = scan(mask, []) if mask is not None and mask.is_dir() else Found([])
    masks = found.pictures
    one_mask = opened_mask(mask) if mask is not None and not mask.is_dir() else None
    if mask is not None and mask.is_dir() and not masks:
        raise _no_pictures("mask", mask, found)
    by_name = MasksByName(mask, masks) if mask is not None and masks else None
    relative = [shard.relative_to(base) for shard in shards]
    folders = dict(zip(shards, distinct([name.with_suffix("") for name in relative], relative)))
    # With many shards, each is read by one process; few shards are divided among all processes.
    whole = len(shards) >= world.size
    items: list[Item] = []
    for shard in world.part(shards) if whole else shards:
        folder = out / folders[shard]
        try:
            content = read_shard(shard)
        except InvalidImageError as error:
            items.append(Item(shard, None, folder, "PNG", str(error)))
            continue
        items += _shard_items(content, by_name or one_mask, folder, options.format)
    if not items and (world.size == 1 or not whole):
        raise UsageError(f"source: no pictures in the tar shards of {str(source)!r} ({', '.join(EXTENSIONS)})")
    items = _without_clashes(items)
    _refuse_to_overwrite(items, [*shards, *masks, *([one_mask] if isinstance(one_mask, Path) else [])])
    if world.rank == 0 or not whole:
        items += [Item(path, None, out, "PNG", reason, left_out=True) for path, reason in found.left_out]
    return items if whole else world.part(items)


def _shard_items(
    content: Shard, mask: Path | Encoded | MasksByName | None, folder: Path, format: str | None
) -> list[Item]:
    items = [_shard_item(sample, mask, folder, format) for sample in content.samples]
    left_out = [Item(other, None, folder, "PNG", reason, left_out=True) for other, reason in content.left_out]
    return items + left_out


def _shard_item(sample: Sample, mask: Path | Encoded | MasksByName | None, folder: Path, format: str | None) -> Item:
    picture, key = sample.pictures[0], PurePosixPath(sample.key)
    own: Path | Member | Encoded | None = None
    problem = None
    if mask is None:
        own = sample.masks[0] if len(sample.masks) == 1 else None
        if own is None:
            names = ", ".join(one.name for one in sample.masks) or "none"
            problem = f"mask: expected one file {sample.key}.mask.<extension> in the shard, got {names}"
    elif isinstance(mask, MasksByName):
        own, problem = mask.of_picture(Path(*key.parts), suffix=False)
    else:
        own = mask
    if len(sample.pictures) > 1:
        names = ", ".join(one.name for one in sample.pictures)
        problem = f"picture: expected one picture of the key {sample.key!r}, got {names}"
    suffix, pillow_format = format_for(picture, format)
    special = os.name == "nt" and is_special_on_windows(sample.key)
    unsafe = key.is_absolute() or ".." in key.parts or CONTROL.search(picture.name)
    if special or unsafe or any(CONTROL.search(one.name) for one in sample.masks):
        # Tar files are untrusted: names must not lead out of the output folder or contain control characters.
        problem = f"picture: expected a name inside the shard, without control characters, got {picture.name!r}"
        return Item(picture, own, folder, pillow_format, problem)
    return Item(picture, own, folder / f"{sample.key}{suffix}", pillow_format, problem)


def is_special_on_windows(key: str) -> bool:
    """Whether Windows takes a name, with "/" between its parts, for more than that: a drive, a stream of a file, a
    device, another folder; or drops its end."""
    parts = key.split("/")
    return any(_TAKEN.search(part) or _DEVICE.fullmatch(part.split(".")[0].rstrip()) for part in parts)


def _file_of(source: Path | Member | Encoded) -> Path | None:
    if isinstance(source, Encoded):
        return None
    return source.shard if isinstance(source, Member) else source


def _stamp(source: Path | Member | Encoded) -> Any:
    """Text that identifies the content of a source among files of the same name."""
    if isinstance(source, Encoded):
        return hashlib.sha256(source.data).hexdigest()
    return stamp(source.shard if isinstance(source, Member) else source)


def _without_clashes(items: list[Item]) -> list[Item]:
    """The items; one whose result would replace another's gets a `problem`."""
    taken: dict[str, Item] = {}
    kept = []
    for item in items:
        if item.problem is None:
            other = taken.setdefault(folded(item.output), item)
            if other is not item:
                item = replace(item, problem=f"picture: its result would replace that of {str(other.picture)!r}")
        kept.append(item)
    return kept


def _refuse_to_overwrite(items: list[Item], inputs: list[Path]) -> None:
    read = {real_path(path) for path in inputs}
    for item in items:
        if item.problem is None and real_path(item.output) in read:
            raise UsageError(f"out: {str(item.output)!r} would replace an input of this run")


def _refuse_own_mask(items: list[Item], mask_suffix: str | None) -> None:
    for item in items:
        if not isinstance(item.picture, Path) or not isinstance(item.mask, Path):
            continue
        try:
            same = os.path.samefile(item.picture, item.mask)
        except OSError:  # removed in the meantime: running the item reports it
            continue
        if same:
            advice = (
                "" if mask_suffix else "; masks that lie beside their pictures as a_mask.png: `mask_suffix` _mask"
            )
            raise UsageError(f"mask: {str(item.mask)!r} is the picture {str(item.picture)!r} itself{advice}")


def refuse_report_clash(report: Path, items: list[Item], out: Path) -> None:
    if ADDRESS.match(str(report)):
        raise UsageError(f"report: expected a file, got the address {str(report)!r}")
    if report.is_dir():
        raise UsageError(f"report: expected a file, got the folder {str(report)!r}")
    if report == STANDARD_STREAM and out == STANDARD_STREAM:
        raise UsageError("report: the standard output has the picture already")
    for item in items:
        files = [item.output, *(_file_of(path) for path in (item.picture, item.mask) if path is not None)]
        if not item.left_out and real_path(report) in {real_path(path) for path in files if path is not None}:
            raise UsageError(f"report: {str(report)!r} is a picture or mask of this run")
