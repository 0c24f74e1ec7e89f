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
    known = {path.name: path for path in Path(__file__).parent.iterdir() if (path / "config.json").is_file()}
    if name not in known:
        raise ValueError(f"name: expected one of {sorted(known)}, got {name!r}")
    return known[name]
