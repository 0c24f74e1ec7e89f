"""Reading checkpoints of the compared networks: only tensors are loaded, and errors list all that does not fit."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from zipfile import BadZipFile

import torch
from torch import Tensor, nn

from lgnet_fast.errors import WeightsError
from lgnet_fast.reference.pretrained import check_names_and_shapes


def read_checkpoint(file: str | Path, key: str) -> dict[str, Tensor]:
    """The state dict of `file`: the value of `key`, or the whole file.

    Raises:
        WeightsError: the file is not there, cannot be read, holds no state dict, or would run code when loaded.
    """
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, BadZipFile, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(f"file: expected a readable checkpoint of tensors only, got {file}: {reason}") from error
    state = content.get(key, content) if isinstance(content, Mapping) else content
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise WeightsError(
            f"file: expected a state dict, or a dict with one as {key!r}, in {file}; got something else"
        )
    return dict(state)


def load_strictly(model: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Copy `state` into `model`.

    Raises:
        WeightsError: names or shapes do not fit; it begins with `what` and lists them.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    check_names_and_shapes(state, expected, what)
    model.load_state_dict(state)
