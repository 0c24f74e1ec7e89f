"""The model that ships with the package."""

from __future__ import annotations

from pathlib import Path

BUNDLED = "lgnet_small"


def bundled_path(name: str = BUNDLED) -> Path:
    """Directory of a bundled model, as ``LGNet.from_pretrained`` takes it. Raises ValueError: no such model."""
    path = Path(__file__).parent / name
    if not path.is_dir():
        known = sorted(p.name for p in Path(__file__).parent.iterdir() if (p / "config.json").is_file())
        raise ValueError(f"name: expected one of {known}, got {name!r}")
    return path
