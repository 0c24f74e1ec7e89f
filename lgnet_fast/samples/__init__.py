"""Sample photographs with masks (see ATTRIBUTION.md)."""

from __future__ import annotations

from pathlib import Path


def sample_paths() -> dict[str, tuple[Path, Path]]:
    """{name: (picture, mask)} of the bundled samples."""
    folder = Path(__file__).parent
    masks = sorted(folder.glob("*_mask.png"))
    return {m.name.removesuffix("_mask.png"): (folder / m.name.replace("_mask", ""), m) for m in masks}
