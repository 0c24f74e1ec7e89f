"""The pairing of the masks and pictures of folders by name."""

from __future__ import annotations

import re
from pathlib import Path

from ..pipeline.formats import EXTENSIONS


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
