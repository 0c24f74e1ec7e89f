"""The model that ships with the package."""

from __future__ import annotations

from pathlib import Path

BUNDLED = "lgnet_small"


def bundled_path(name: str = BUNDLED) -> Path:
    """The folder of a bundled model.

    Args:
        name: of the model; the package has "lgnet_small".

    Returns:
        The folder, as ``LGNet.from_pretrained`` and ``Inpainter.from_pretrained`` take it.

    Raises:
        ValueError: no such model.
    """
    path = Path(__file__).parent / name
    if not path.is_dir():
        known = sorted(p.name for p in Path(__file__).parent.iterdir() if (p / "config.json").is_file())
        raise ValueError(f"name: expected one of {known}, got {name!r}")
    return path
