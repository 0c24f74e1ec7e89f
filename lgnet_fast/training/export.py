"""The model that a run leaves: written for ``LGNet.from_pretrained``, and recognised again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..errors import LGNetError, TrainingError
from ..reference import LGNet
from ..reference.cascade import Cascade
from .checkpoints import load_checkpoint, save_checkpoint

_OF_AN_X_LG = "network.pt"


def write_model(network: Cascade, folder: Path) -> None:
    """Write an LGNet to `folder` for ``LGNet.from_pretrained``, an X_LG's state dict to its ``network.pt``.

    Raises:
        TrainingError: it cannot be written.
    """
    if not isinstance(network, LGNet):
        save_checkpoint(folder / _OF_AN_X_LG, dict(network.state_dict()))
        return
    try:
        network.save_pretrained(folder)
    except Exception as error:  # OSError, and safetensors' own on a full disk
        raise TrainingError(f"model: {folder} cannot be written ({error})") from error


def is_written(network: Cascade, tensors: Mapping[str, Tensor], folder: Path) -> bool:
    """Whether `folder` holds `tensors`, a state dict of `network`, as :func:`write_model` writes it."""
    found: Mapping[str, Tensor]
    try:
        if isinstance(network, LGNet):
            if not folder.is_dir():  # a folder's name could also be a name on the hub
                return False
            found = LGNet.from_pretrained(str(folder)).state_dict()
        else:
            found = load_checkpoint(folder / _OF_AN_X_LG)
    except (LGNetError, OSError):
        return False
    return found.keys() == tensors.keys() and all(_equal(found[name], tensors[name]) for name in found)


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b.to(a.device))
