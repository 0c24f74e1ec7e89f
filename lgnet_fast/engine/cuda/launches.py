"""Launches of a plan's steps on a GPU: those that are no launcher of `kernels/` by themselves, and their times."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...ops.torch_state import engine_float32
from ...reference.attention import attention_block
from ..plan import LEAKY_SLOPE, PICTURE, AttentionStep, ConvStep
from ..torch_executor import ACTIVATIONS, convolution
from .graphs import Pool, Program, elapsed_ms
from .memory import Memory

if TYPE_CHECKING:
    from lgnet_fast.kernels.configs import Inference
    from lgnet_fast.kernels.results import Merge

    from .weights import StepWeights

Launch = Callable[[], None]


def run_all(launches: Sequence[Launch]) -> None:
    """Make the launches, in order."""
    for launch in launches:
        launch()


def attend(
    features: Tensor,
    weights: StepWeights,
    variant: str,
    stores: Sequence[tuple[Tensor, str]],
    tuned: Inference | None,
    overlap: bool,
    band: tuple[int, int] | None,
) -> None:
    """The attention block into every store (tensor, activation); band: its rows, None: all."""
    from lgnet_fast.kernels.attention_inference import attention_block_inference
    from lgnet_fast.kernels.configs import override

    for out, activation in stores:
        with contextlib.nullcontext() if tuned is None else override("inference", tuned):
            attention_block_inference(
                features, weights.packed, weights.bias, variant,
                out=out, activation=activation, overlap=overlap, band=band,
            )  # fmt: skip


def convolve(memory: Memory, step: ConvStep, weight: Tensor, bias: Tensor, merge: Merge | None) -> None:
    """A dense step by PyTorch's convolution. weight: channels last."""
    x = memory.view(step.source).permute(0, 3, 1, 2)
    with engine_float32(x.device, x.dtype):
        value = convolution(step.geometry, x, weight, bias.to(x.dtype))
    if step.residual is not None:
        value = value + memory.view(step.residual).permute(0, 3, 1, 2)
    if merge is None:
        for store in step.stores:
            activate_into(memory.view(store.view).permute(0, 3, 1, 2), value, store.activation)
        return
    torch.tanh(value.float(), out=merge.raw)
    merged = merge.image * (1 - merge.mask) + merge.raw * merge.mask
    if merge.last:
        merge.merged.copy_(merged)
    else:
        merge.merged[..., :3].copy_(merged.permute(0, 2, 3, 1))


def attend_by_operators(memory: Memory, step: AttentionStep, weight: Tensor, bias: Tensor) -> None:
    """The attention block by the reference."""
    x = memory.view(step.source).permute(0, 3, 1, 2)
    with engine_float32(x.device, x.dtype):
        value = attention_block(x, weight, bias, step.variant)
    for store in step.stores:
        activate_into(memory.view(store.view).permute(0, 3, 1, 2), value, store.activation)


def paint_by_operators(memory: Memory, painted: bool) -> None:
    """The same as `kernels.conv.paint_forward`."""
    start = memory.start if painted else torch.ones_like(memory.image)
    merged = memory.image * (1 - memory.mask) + start * memory.mask
    picture = memory.maps[PICTURE]
    picture[..., :3].copy_(merged.permute(0, 2, 3, 1))
    picture[..., 3:].copy_(memory.mask.permute(0, 2, 3, 1))
    memory.outputs[0].copy_(memory.image)


def activate_into(out: Tensor, x: Tensor, activation: str) -> None:
    """Store `x` with an activation, in one pass over the memory."""
    if activation == "relu":
        torch.clamp_min(x, 0, out=out)
    elif activation == "leaky_relu":
        torch.ops.aten.leaky_relu.out(x, LEAKY_SLOPE, out=out)
    else:
        out.copy_(ACTIVATIONS[activation](x))


def ends_by_graphs(
    parts: Sequence[Sequence[Launch]], device: torch.device, pool: Pool, spread: bool, rounds: int
) -> list[float]:
    """Milliseconds from the start to the end of each part, the least of `rounds`, by a graph up to each part.

    `pool`, `spread`: see :func:`.graphs.capture`.
    """
    programs = []
    for count in range(1, len(parts) + 1):
        launches = [launch for part in parts[:count] for launch in part]
        programs.append(Program(functools.partial(run_all, launches), device, pool, spread=spread))
        programs[-1]()
    best = [math.inf] * len(parts)
    for _ in range(rounds):  # in turn, so that a change of the GPU's clocks affects all of them
        for number, program in enumerate(programs):
            best[number] = min(best[number], elapsed_ms(functools.partial(run_all, [program] * 4), device) / 4)
    return list(itertools.accumulate(best, max))


def ends(parts: Sequence[Sequence[Launch]], device: torch.device, rounds: int) -> list[float]:
    """The same for launches without a graph, waiting for the device after each part."""
    best = [math.inf] * len(parts)
    for _ in range(rounds):
        for number, part in enumerate(parts):
            begin = time.perf_counter()
            run_all(part)
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()
            best[number] = min(best[number], 1e3 * (time.perf_counter() - begin))
    return list(itertools.accumulate(best))
