"""Sample photographs with masks (see ATTRIBUTION.md)."""

from __future__ import annotations

from pathlib import Path


def sample_paths() -> dict[str, tuple[Path, Path]]:
    """The files of the bundled samples.

    Returns:
        {name: (picture, mask)}. Pictures are 8-bit RGB; masks are 8-bit grey of the picture's size, white = hole.
    """
    folder = Path(__file__).parent
    masks = sorted(folder.glob("*_mask.png"))
    return {m.name.removesuffix("_mask.png"): (folder / m.name.replace("_mask", ""), m) for m in masks}
