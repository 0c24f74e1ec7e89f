"""The contents of folders: one rule for runs, evaluation and training.

Hidden files and folders are left out. Links are followed; a folder is listed once.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import DataError
from ..files import is_link, real_path
from ..pipeline.formats import EXTENSIONS, OTHER_EXTENSIONS, reason_against_reading
from ..pipeline.notices import warn
from ..pipeline.writing import is_stream


@dataclass(frozen=True)
class Found:
    """Contents of a folder: `pictures` to read, sorted, and `left_out` paths with reasons."""

    pictures: list[Path]
    left_out: list[tuple[Path, str]] = field(default_factory=list)


def pictures_in(folder: Path, excluded: list[Path]) -> list[Path]:
    """The files in `folder` and below with an extension of EXTENSIONS, sorted, without hidden and `excluded` folders
    (as :func:`.files.real_path` gives them)."""
    return scan(folder, excluded).pictures


def scan(folder: Path, excluded: list[Path], suffixes: Iterable[str] = EXTENSIONS) -> Found:
    """The files with one of the `suffixes` in a folder and below, also through links to folders elsewhere."""
    suffixes = set(suffixes)
    found = Found([])
    errors: list[OSError] = []
    root = real_path(folder)
    seen: set[Path] = set()
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=errors.append):
        kept = []
        for name in sorted(folders):
            path = Path(parent) / name
            real = real_path(path)
            # Folders of this tree are listed under their real names; the target of a link is listed once.
            inside = root == real or root in real.parents or real in root.parents
            if name.startswith(".") or real in excluded or (is_link(path) and (inside or real in seen)):
                continue
            seen.add(real)
            kept.append(name)
        folders[:] = kept
        for name in sorted(names):
            path = Path(parent) / name
            suffix = path.suffix.lower()
            if name.startswith("."):
                continue
            if suffix in suffixes:
                reason = _reason_against(path, suffix)
                if reason is None:
                    found.pictures.append(path)
                else:
                    found.left_out.append((path, reason))
            elif suffix in OTHER_EXTENSIONS:
                found.left_out.append((path, unread(suffix)))
    for error in errors:
        found.left_out.append((Path(error.filename), f"the folder cannot be read ({error.strerror})"))
    return found


def _reason_against(path: Path, suffix: str) -> str | None:
    """Why a file with a suffix that is looked for cannot be read, or None."""
    reason = reason_against_reading(EXTENSIONS[suffix]) if suffix in EXTENSIONS else None
    if reason is None and is_stream(path):
        return "a pipe or a device, which may never end"
    return reason


def unread(suffix: str) -> str:
    return f"pictures of the format {suffix} are not read here"


def all_below(folder: str | Path, expected: str, suffixes: Iterable[str] = EXTENSIONS) -> list[Path]:
    """The files of :func:`scan`, sorted as paths; one warning for those that are left out.

    Raises DataError, which begins with `expected`: no such folder, or no such file in it.
    """
    if not Path(folder).is_dir():
        raise DataError(f"{expected}, got {str(folder)!r}, which is not a folder")
    found = scan(Path(folder), [], suffixes)
    left_out = [f"{path}: {reason}" for path, reason in found.left_out]
    if not found.pictures:
        reason = f" ({left_out[0]})" if left_out else ""
        raise DataError(f"{expected}, got {str(folder)!r}, which has none{reason}")
    warn_of_left_out(left_out, repr(str(folder)))
    return sorted(found.pictures, key=lambda path: path.parts)  # paths ignore case on Windows


def warn_of_left_out(left_out: Sequence[str], place: str) -> None:
    """One warning for what is `left_out` of a place, path and reason each; none where that is nothing."""
    if left_out:
        warn(f"{len(left_out)} left out of {place}, the first: {left_out[0]}")
