"""`lgnet-fast holes`: how much of each mask is hole, and its class."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..data.folders import pictures_in
from ..data.masks import POLARITIES, hole_class, hole_ratio, read_mask
from ..errors import UsageError


@dataclass(frozen=True)
class HolesOptions:
    """What is measured.

    Args:
        masks: a mask, or a folder with its sub-folders.
        polarity: the colour of the hole, "white" or "black".
    """

    masks: Path
    polarity: str = "white"

    def __post_init__(self) -> None:
        if not self.masks.exists():
            raise UsageError(f"masks: {str(self.masks)!r} does not exist")
        if self.polarity not in POLARITIES:
            raise UsageError(f"polarity: expected one of {', '.join(POLARITIES)}, got {self.polarity!r}")


def holes(options: HolesOptions) -> Iterator[tuple[Path, float, int | None]]:
    """(file, hole ratio, index in HOLE_CLASSES or None) of each mask, sorted by name."""
    folder = options.masks
    for file in pictures_in(folder, []) if folder.is_dir() else [folder]:
        mask = read_mask(file, options.polarity)
        yield file, hole_ratio(mask), hole_class(mask)
