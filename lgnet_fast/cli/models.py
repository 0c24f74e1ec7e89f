"""The values of ``--model``."""

from __future__ import annotations

import os

from ..errors import UsageError

BUNDLED = "bundled"


def model_of(text: str) -> str | None:
    """A model folder or hub id; None for "bundled", the package's own, where no folder has that name."""
    return None if text == BUNDLED and not os.path.exists(text) else text


def named_model(text: str) -> tuple[str | None, str | None]:
    """("NAME", model) of "NAME=MODEL", (None, model) of "MODEL", where `model` is that of `model_of`.

    A path that exists is the latter, whatever signs are in its name. Raises UsageError: an empty name or model.
    """
    name, equals, model = text.partition("=")
    if not equals or os.path.exists(text):
        return None, model_of(text)
    if not name.strip() or not model.strip():
        raise UsageError(f"models: expected NAME=MODEL, got {text!r}")
    return name, model_of(model)
