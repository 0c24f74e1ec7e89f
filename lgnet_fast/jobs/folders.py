"""The contents of folders: pictures, masks, and the pairing of masks and pictures by name."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from ..pipeline.formats import EXTENSIONS, OTHER_EXTENSIONS, reason_against_reading


@dataclass(frozen=True)
class Found:
    """Contents of a folder: `pictures` to run, sorted, and `left_out` paths with reasons."""

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
            # Folders of this tree are listed under their real names; the target of a link is listed once.
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
                found.left_out.append((path, reason or unread(suffix)))
    for error in errors:
        found.left_out.append((Path(error.filename), f"the folder cannot be read ({error.strerror})"))
    return found


def unread(suffix: str) -> str:
    return f"pictures of the format {suffix} are not read here"


def beside(picture: Path) -> list[Path]:
    """The pictures in the folder of a picture, sorted."""
    return sorted(path for path in picture.parent.iterdir() if path.suffix.lower() in EXTENSIONS)


def of_mask(stem: str, suffix: str) -> str | None:
    """The stem of the picture to which a mask of this stem belongs; None where the stem is not that of a mask."""
    found = re.fullmatch(rf"(.+){re.escape(suffix)}\d*", stem, re.DOTALL)
    return None if found is None else found[1]


def masks_by_suffix(relative: Path, folder: Path, masks: list[Path], suffix: str) -> tuple[list[Path], str | None]:
    """The masks of the picture at `relative`, or the problem with them; see `plan_items`."""
    place = relative.with_suffix("")
    named = [mask for mask in masks if of_mask(mask.stem, suffix) == place.name]
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
