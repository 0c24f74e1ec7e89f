"""Launches of a plan's steps on a GPU: those that are no launcher of `kernels/` by themselves, and their times."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .cuda_memory import Memory
from .cuda_weights import StepWeights
from .graphs import Program, elapsed_ms
from .plan import ConvStep
from .torch_executor import convolution

if TYPE_CHECKING:
    from lgnet_fast.kernels.configs import Inference
    from lgnet_fast.kernels.conv import Merge

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


def convolve(memory: Memory, step: ConvStep, weights: StepWeights, merge: Merge | None) -> None:
    """A dense step by PyTorch's own convolution."""
    assert weights.plain is not None
    x = memory.view(step.source).permute(0, 3, 1, 2)
    value = convolution(step.geometry, x, weights.plain, weights.bias.to(x.dtype))
    if step.residual is not None:
        value = value + memory.view(step.residual).permute(0, 3, 1, 2)
    if merge is None:
        for store in step.stores:
            out = memory.view(store.view).permute(0, 3, 1, 2)
            activate_(out.copy_(value), store.activation)
        return
    torch.tanh(value.float(), out=merge.raw)
    merged = merge.image * (1 - merge.mask) + merge.raw * merge.mask
    if merge.last:
        merge.merged.copy_(merged)
    else:
        merge.merged[..., :3].copy_(merged.permute(0, 2, 3, 1))


def activate_(x: Tensor, activation: str) -> None:
    """Apply a store's activation in place."""
    if activation == "relu":
        x.relu_()
    elif activation == "leaky_relu":
        F.leaky_relu_(x, 0.2)


def ends_by_graphs(
    parts: Sequence[Sequence[Launch]], device: torch.device, pool: Any, spread: bool, rounds: int
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
