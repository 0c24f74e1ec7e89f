"""Names and formats of results, and the checks that nothing is overwritten by mistake."""

from __future__ import annotations

import contextlib
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from .. import files
from ..data.shards import Member
from ..errors import UsageError
from ..pipeline.formats import EXTENSIONS, FORMATS, reason_against_writing
from ..pipeline.sources import Encoded, format_of
from ..pipeline.writing import STANDARD_STREAM, is_any_stream, is_stream
from .streams import check_standard


def result_files(
    pictures: Sequence[tuple[Path | Encoded, Path]], from_folder: bool, out: Path, format: str | None, is_folder: bool
) -> list[tuple[Path, str]]:
    """(file, Pillow format) of the result of every picture, given with the name of its result in a folder.

    `from_folder`: the pictures are from a folder. `is_folder`: `out` was named as a folder, with a slash.
    """
    if is_any_stream(out):
        if len(pictures) > 1:
            raise UsageError("out: one stream takes one picture; this one has several masks")
        if out == STANDARD_STREAM:
            check_standard("out", sys.stdout, "a pipe or a file as standard output")
        return [(out, format_for(pictures[0][0], format)[1])]
    if out.exists() and not out.is_dir() and (out.suffix.lower() not in EXTENSIONS or from_folder or is_folder):
        raise UsageError(f"out: expected a folder or a picture's name, got the file {str(out)!r}")
    if not from_folder and not is_folder and not out.is_dir() and out.suffix:
        by_suffix = EXTENSIONS.get(out.suffix.lower())
        if by_suffix is None:
            raise UsageError(
                f"out: expected a picture's name ({', '.join(EXTENSIONS)}) or a folder, got {out.name!r}; "
                "end it with a slash to make a folder of that name"
            )
        if (reason := reason_against_writing(by_suffix)) is not None:
            raise UsageError(f"out: {out.name!r} cannot be written: {reason}")
        if format is not None and FORMATS[format] != by_suffix:
            raise UsageError(f"out: {out.name!r} does not go with `format` {format}")
        if len(pictures) > 1:
            raise UsageError(f"out: expected a folder for {len(pictures)} results, got {out.name!r}")
        return [(out, by_suffix)]
    targets = [format_for(picture, format) for picture, _ in pictures]
    names = [name.with_suffix(suffix) for (_, name), (suffix, _) in zip(pictures, targets)]
    longer = [name.with_name(name.name + suffix) for (_, name), (suffix, _) in zip(pictures, targets)]
    return [
        (out / name, pillow_format) for name, (_, pillow_format) in zip(distinct(names, longer), targets, strict=True)
    ]


def distinct(names: Sequence[Path], longer: Sequence[Path]) -> list[Path]:
    """`names`; equal ones are replaced by the `longer` ones, numbered where these are not unique either."""

    fold = files.folded
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


def format_for(picture: Path | Member | Encoded, format: str | None) -> tuple[str, str]:
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


def refuse_unwritable(out: Path) -> None:
    """Raise UsageError before the run if no result could be written."""
    if out == STANDARD_STREAM:
        return
    if (is_stream(out) or out.is_file()) and not os.access(out, os.W_OK):
        raise UsageError(f"out: {str(out)!r} cannot be written (Permission denied)")
    if is_stream(out):
        return
    place = Path(os.path.realpath(out))
    place = place.parent if place.is_file() else place
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise UsageError(f"out: {str(out)!r} cannot be written: {str(place)!r} is no folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UsageError(f"out: {str(out)!r} cannot be written: no right to write in {str(place)!r}")
    try:
        files.check_writable(place)  # rights do not tell a read-only file system or one that takes no files
    except OSError as cause:
        raise UsageError(
            f"out: {str(out)!r} cannot be written: no file can be made in {str(place)!r} ({cause.strerror})"
        ) from cause
    # Only a system call shows whether a name is too long for the file system.
    with contextlib.suppress(FileNotFoundError):
        os.lstat(out)
