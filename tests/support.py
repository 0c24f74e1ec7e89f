"""Shared by several test files: the conformance recipe, the accuracy rule, instruction sets, folders of files."""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lgnet_fast import native
from tests.data.conformance import recipe

CONFORMANCE = Path(__file__).parent / "data" / "conformance"


@cache
def keys() -> dict[str, dict[str, dict[str, list[int]]]]:
    """keys.json: names and shapes of the released networks, and which weights are transposed."""
    return json.loads((CONFORMANCE / "keys.json").read_text())


def released_state(net: str, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """The recipe's weights of released network `net` ("G1", "G2", "G3" or "D")."""
    transposed = keys()["transposed"][net]
    state = {}
    for name, shape in keys()["shapes"][net].items():
        if name in transposed:
            value = recipe.transposed_parameter(net, name, tuple(shape), transposed[name])
        else:
            value = recipe.parameter(net, name, tuple(shape))
        tensor = torch.from_numpy(np.asarray(value))
        state[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    return state


def case(name: str, batch: int, height: int, width: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """The recipe's image [B, 3, H, W] and mask [B, 1, H, W] of that name."""
    image = torch.from_numpy(recipe.image(name, batch, height, width)).to(dtype)
    return image, torch.from_numpy(recipe.mask(name, batch, height, width)).to(dtype)


# Roundings of the output's scale that the rule allows beyond twice eager's error. float32: the sums of eager have
# another order, whose error may be small by chance. float64: the reference has errors of the same size.
ROUNDINGS = {torch.float64: 4096, torch.float32: 8, torch.float16: 1, torch.bfloat16: 1}


def assert_accurate(
    name: str,
    actual: Tensor,
    exact: Tensor,
    eager: Tensor | None = None,
    *,
    terms: float = 0.0,
    roundings: float | None = None,
) -> None:
    """The project's accuracy rule: worst error at most twice eager's in the same dtype, plus roundings of the scale.

    It has no machine-dependent numbers: errors are relative to the largest exact value, in eps of the dtype. Where
    the exact value overflows the dtype nothing is compared; where only eager does, more roundings are allowed.

    Args:
        name: of the tensor, for the message.
        actual, exact: the tested value, and the value in float64 (or by an equivalent form, for `roundings`).
        eager: the result of plain PyTorch in the dtype of `actual` on this machine. None: only roundings are allowed.
        terms: size of the terms of a sum, whose roundings count if they cancel to a much smaller value.
        roundings: instead of `ROUNDINGS`, for outputs of many layers or without `eager`.
    """
    assert actual.shape == exact.shape, f"{name}: {tuple(actual.shape)}, exact {tuple(exact.shape)}"
    assert eager is None or actual.dtype == eager.dtype, f"{name}: {actual.dtype}, eager {eager.dtype}"
    if exact.numel() == 0:
        return
    info = torch.finfo(actual.dtype)
    exact, factor, allowed = exact.double(), 2.0, ROUNDINGS[actual.dtype] if roundings is None else roundings
    if actual.dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1":
        # Triton's interpreter truncates to bfloat16 instead of rounding.
        factor, allowed = 2 * factor, 2 * allowed
    representable = exact.abs() < info.max / 4
    error = torch.where(representable, (actual.double() - exact).abs(), 0.0).max().item()
    scale = max(terms, torch.where(representable, exact.abs(), 0.0).max().item())
    eager_error = 0.0
    if eager is not None:
        comparable = representable & eager.isfinite()
        eager_error = torch.where(comparable, (eager.double() - exact).abs(), 0.0).max().item()
        if not torch.equal(comparable, representable):
            allowed *= 8
    bound = factor * eager_error + allowed * info.eps * scale + info.tiny
    assert error <= bound, f"{name}: error {error:.3e} > {bound:.3e} (eager {eager_error:.3e}, scale {scale:.3e})"


def instruction_sets() -> list[str]:
    """Instruction sets of the C++ extension that this processor runs; none without the extension."""
    return native.library().isa_available() if native.unavailable_reason() is None else []


def write_files(folder: Path, files: dict[str, str]) -> Path:
    """Write texts by their paths within a folder; returns the folder."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder
