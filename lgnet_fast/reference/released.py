"""The authors' checkpoint files: names, reading, and translation to and from this package's names.

``<epoch>_net_G1.pth`` (NetC), ``_G2.pth`` (NetL) and ``_G3.pth`` (NetG) each hold a state dict, possibly with a
``module.`` prefix. G1 nests one module per U-Net level, G3 lists the levels flat, G2 is one flat Sequential.
"""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import WeightsError
from .networks import LEVELS, LocalNet
from .pretrained import check_names_and_shapes, impostor, upcast

NETS = ("G1", "G2", "G3")
_MODULES = {"G1": "net_c", "G2": "net_l", "G3": "net_g"}
# Name of the tensor whose first dimension is the base width n.
_WIDTH_KEYS = {"G1": "model.model.0.weight", "G2": "model.1.weight", "G3": "model1.0.weight"}


def _unet_nested() -> dict[str, str]:
    """Native module -> released module of G1."""
    names = {"encoder.e1.conv": "model.model.0", "decoder.d1.deconv": "model.model.3"}
    prefix = "model.model"
    for i in range(2, LEVELS + 1):
        prefix += ".1.model" if i == 2 else ".3.model"
        names[f"encoder.e{i}.conv"] = f"{prefix}.1"
        if i < LEVELS:
            names[f"encoder.e{i}.norm"] = f"{prefix}.2"
            names[f"decoder.d{i}.deconv"], names[f"decoder.d{i}.norm"] = f"{prefix}.5", f"{prefix}.6"
        else:
            names[f"decoder.d{i}.deconv"], names[f"decoder.d{i}.norm"] = f"{prefix}.3", f"{prefix}.4"
    return names


def _unet_flat() -> dict[str, str]:
    """Native module -> released module of G3."""
    names = {"encoder.e1.conv": "model1.0", "encoder.e8.conv": "model8.1", "decoder.d1.deconv": "model15.1"}
    for i in range(2, LEVELS):
        names[f"encoder.e{i}.conv"], names[f"encoder.e{i}.norm"] = f"model{i}.1", f"model{i}.2"
        k = 2 * LEVELS - i  # model9 is d7, ..., model14 is d2
        names[f"decoder.d{i}.deconv"], names[f"decoder.d{i}.norm"] = f"model{k}.1", f"model{k}.2"
    names["decoder.d8.deconv"], names["decoder.d8.norm"] = "model8.3", "model8.4"
    for level, size in ((5, 16), (4, 32), (3, 64)):
        names[f"attention.d{level}.combiner"] = f"att_{size}.combiner"
    return names


def _local() -> dict[str, str]:
    """Native module -> released module of G2."""
    names = {}
    layers = (("stem", 1), ("down1", 4), ("down2", 7), ("up1", 14), ("up2", 17))
    for name, index in layers:
        names[f"{name}.conv"], names[f"{name}.norm"] = f"model.{index}", f"model.{index + 1}"
    for b in range(LocalNet.BLOCKS):
        for part, index in (("first", 1), ("second", 5)):
            block = f"model.{10 + b}.conv_block"
            names[f"blocks.{b}.{part}.conv"] = f"{block}.{index}"
            names[f"blocks.{b}.{part}.norm"] = f"{block}.{index + 1}"
    names["out"] = "model.21"
    return names


_NAMES = {"G1": _unet_nested(), "G2": _local(), "G3": _unet_flat()}


def _translate(state: Mapping[str, Tensor]) -> dict[str, dict[str, str]]:
    """{"G1": {released name: native name}, ...} for every tensor of a state dict of LGNet."""
    nets = {module: net for net, module in _MODULES.items()}
    result: dict[str, dict[str, str]] = {net: {} for net in NETS}
    for name in state:
        module, key = name.split(".", 1)
        owner, leaf = key.rsplit(".", 1)
        result[nets[module]][f"{_NAMES[nets[module]][owner]}.{leaf}"] = name
    return result


def unreadable(path: Path, error: Exception) -> str:
    """Why ``torch.load(path, weights_only=True)`` raised `error`: the rest of a sentence that starts with the path.

    PyTorch's message is not used, because it advises to disable the protection and may contain terminal codes.
    """
    if (what := impostor(path)) is not None:
        return f"is {what}"
    if isinstance(error, pickle.UnpicklingError):
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        detail = f" ({refused[1]})" if refused else ""
        return f"was refused: it is damaged, or holds more than tensors and would run code when loaded{detail}"
    first = (str(error) or type(error).__name__).splitlines()[0]
    return f"is not a readable checkpoint: {first}"


def check_sums(path: str | os.PathLike[str]) -> None:
    """Compare every record of a file of ``torch.save`` with its checksum, which ``torch.load`` does not do.

    A file in PyTorch's format before 1.6, which is no zip file, has none, nor has one that was written with
    ``torch.serialization.set_crc32_options(False)``: they are zeros there.

    Raises:
        zipfile.BadZipFile: one differs. OSError: the file cannot be read.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            written = any(record.CRC for record in archive.infolist())
            if written and (record := archive.testzip()) is not None:
                raise zipfile.BadZipFile(f"{record} does not have its checksum")


def load_state_dict_file(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """A state dict from a .pth file, tensors only.

    Raises:
        WeightsError: the file is not there, cannot be read, or holds anything but a state dict. Pickles that
            would run code are rejected (``torch.load(weights_only=True)``).
    """
    path = Path(path)
    if not os.path.isfile(path):
        raise WeightsError(f"weights: expected a checkpoint file, got {path}, which does not exist")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        check_sums(path)
    except Exception as error:  # pickle, zip and torch errors of many kinds
        raise WeightsError(f"weights: {path} {unreadable(path, error)}") from error
    if not isinstance(state, Mapping) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()
    ):
        raise WeightsError(f"weights: expected a state dict (name -> tensor) in {path}, got {type(state).__name__}")
    return dict(state)


def _files(directory: Path, epoch: str | int | None) -> dict[str, Path]:
    """The three files of one epoch in `directory`."""
    if not os.path.isdir(directory):  # False, not an error, for a name that is too long
        raise WeightsError(f"weights: expected a directory with *_net_G1.pth, got {directory}")
    found: dict[str, dict[str, Path]] = {}
    for file in directory.iterdir():
        match = re.fullmatch(r"(.+)_net_(G[123])\.pth", file.name)
        if match:
            found.setdefault(match[1], {})[match[2]] = file
    if not found:
        raise WeightsError(f"weights: expected <epoch>_net_G1.pth, _G2.pth and _G3.pth in {directory}, found none")
    if epoch is None:
        if len(found) > 1:
            raise WeightsError(f"epoch: {directory} holds several, expected one of {sorted(found)}")
        epoch = next(iter(found))
    if str(epoch) not in found:
        raise WeightsError(f"epoch: expected one of {sorted(found)} in {directory}, got {str(epoch)!r}")
    files = found[str(epoch)]
    missing = [f"{epoch}_net_{net}.pth" for net in NETS if net not in files]
    if missing:
        raise WeightsError(f"weights: missing in {directory}: {', '.join(missing)}")
    return files


def read_net(net: str, source: Any) -> dict[str, Tensor]:
    """The state dict of one network from a file or a mapping, without ``module.`` prefixes, float32 at least.

    Raises:
        WeightsError: `source`, which is of `net`, is neither, or see :func:`load_state_dict_file`.
    """
    if isinstance(source, (str, os.PathLike)):
        state = load_state_dict_file(source)
    elif isinstance(source, Mapping) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in source.items()):
        # The network must not share memory with the caller's tensors.
        state = {k: v.detach().clone() for k, v in source.items()}
    else:
        what = "other things in the mapping" if isinstance(source, Mapping) else type(source).__name__
        raise WeightsError(f"{net}: expected a state dict (name -> tensor) or a path, got {what}")
    return upcast({k.removeprefix("module."): v for k, v in state.items()})


def read(source: Any, epoch: str | int | None = None) -> dict[str, dict[str, Tensor]]:
    """State dicts {"G1", "G2", "G3"} of `source`, without ``module.`` prefixes, in one common float dtype."""
    if isinstance(source, Mapping):
        if epoch is not None:
            raise ValueError(f"epoch: only a directory has epochs, got {epoch!r} beside a mapping")
        missing = [net for net in NETS if net not in source]
        unexpected = [str(key) for key in source if key not in (*NETS, "D")]
        if missing or unexpected:
            raise WeightsError(
                f"weights: expected a mapping with keys {NETS}, missing {missing}, unexpected {unexpected}"
            )
        items = {net: source[net] for net in NETS}
    elif isinstance(source, (str, os.PathLike)):
        items = dict(_files(Path(source), epoch))
    else:
        raise TypeError(f"source: expected a directory or a mapping, got {type(source).__name__}")
    nets = {net: read_net(net, item) for net, item in items.items()}
    double = any(t.dtype == torch.float64 for state in nets.values() for t in state.values())
    if double:  # one dtype for the whole model, without loss of precision
        nets = {
            net: {k: v.double() if v.is_floating_point() else v for k, v in state.items()}
            for net, state in nets.items()
        }
    return nets


def widths(nets: Mapping[str, Mapping[str, Tensor]]) -> tuple[int, int, int]:
    """Base widths (n of NetC, NetL, NetG) from the shapes."""
    result = []
    for net in NETS:
        first = nets[net].get(_WIDTH_KEYS[net])
        if first is None or first.dim() != 4 or first.shape[0] < 1:
            raise WeightsError(
                f"{net}: expected a tensor {_WIDTH_KEYS[net]} of 4 dimensions, got "
                + (
                    "none; names found: " + ", ".join(sorted(nets[net])[:8])
                    if first is None
                    else f"{list(first.shape)}"
                )
            )
        result.append(int(first.shape[0]))
    return result[0], result[1], result[2]


def to_native(nets: Mapping[str, Mapping[str, Tensor]], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """LGNet's state dict, named as `like`, from released ones; WeightsError lists what does not fit."""
    native_shapes = {k: tuple(v.shape) for k, v in like.items()}
    state: dict[str, Tensor] = {}
    problems = []
    for net, names in _translate(like).items():
        try:
            check_names_and_shapes(nets[net], {r: native_shapes[n] for r, n in names.items()}, net)
        except WeightsError as error:
            problems.append(str(error))
            continue
        state.update({native: nets[net][name] for name, native in names.items()})
    if problems:
        raise WeightsError("\n".join(problems))
    return state


def from_native(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Released state dicts of the state dict of a plain LGNet."""
    return {net: {r: state[n] for r, n in names.items()} for net, names in _translate(state).items()}
