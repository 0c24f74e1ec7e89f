"""Tuning attention forward and backward, as training launches them, on an NVIDIA GPU.

Candidates are block shapes of every operation in turn, those nearest to the shipped ones first. Each is compiled, run
once, compared with what the shipped shapes compute, and timed with the kernels on which it has an influence. Last,
forward and backward are timed together: a block that its choices make slower gets the shipped shapes back. Each
result is kept at once (`kernels/tuned.py`), and every launch of the operators uses it.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..plan import AttentionStep, Plan
from .graphs import error_text
from .measure import GAIN, Log, Timer, excessive_error
from .weights import target_of

if TYPE_CHECKING:
    from lgnet_fast.kernels.configs import Config
    from lgnet_fast.kernels.tuned import Block, Training

OPERATIONS = {
    "rows": ("_attn_prep_kernel", "_attn_bwd_delta_kernel", "_attn_bwd_finish_kernel"),
    "forward": ("_attn_fwd_kernel", "_attn_merge_kernel"),
    "merge": ("_attn_merge_kernel",),
    "backward_dq": ("_attn_bwd_dq_kernel", "_attn_bwd_finish_kernel"),
    "backward_dkv": ("_attn_bwd_dkv_kernel", "_attn_bwd_finish_kernel"),
}
"""Operation of the tables -> the kernels whose time depends on its shape."""
REPEATS = 8
"""Launches of the kernels in the graph that times a shape."""
_COMPILING_SHARE = 0.5


@dataclass
class Attention:
    """An attention block in training on fixed tensors, and its best shapes so far."""

    step: str
    block: Block
    features: Tensor
    weight: Tensor
    bias: Tensor
    grad: Tensor
    shapes: dict[str, Config] = field(default_factory=dict)

    @classmethod
    def of(
        cls, step: str, block: Block, size: tuple[int, int], dtype: torch.dtype, device: torch.device
    ) -> Attention:
        """With random values."""
        generator = torch.Generator("cpu").manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device="cpu").to(device, dtype)

        features = normal(block.batch, block.channels, *size) * 0.5
        weight = normal(block.channels, 2 * block.channels, 1, 1) / block.channels**0.5
        return cls(step, block, features, weight, normal(block.channels), normal(*features.shape))

    def run(self, shapes: Mapping[str, Config]) -> tuple[Tensor, Tensor]:
        """The result and the gradient of the features, computed with these shapes and the shipped ones."""
        from lgnet_fast.kernels import attention
        from lgnet_fast.kernels.configs import override

        with contextlib.ExitStack() as stack:
            for op, shape in shapes.items():
                stack.enter_context(override(op, shape))
            out, attended, stats = attention.attention_block_forward(
                self.features, self.weight, self.bias, self.block.variant, save_attended=True
            )
            assert attended is not None
            assert stats is not None
            df, _, _ = attention.attention_block_backward(
                self.grad, self.features, attended, stats, self.weight, self.block.variant, needs=(True, False, False)
            )
        assert df is not None
        return out, df

    def launches(self, shapes: Mapping[str, Config], kernels: Sequence[str] | None = None) -> list[Any]:
        """The launches of a run, not made; kernels: only these."""
        from lgnet_fast.kernels.launch import record

        with record() as recorded:
            self.run(shapes)
        return [one for one in recorded if kernels is None or one.kernel.__name__ in kernels]

    def without_memory(self) -> Attention:
        """The same block on tensors without values: its recorded launches hold no memory of the GPU."""
        tensors = (self.features, self.weight, self.bias, self.grad)
        features, weight, bias, grad = (tensor.to("meta") for tensor in tensors)
        return replace(self, features=features, weight=weight, bias=bias, grad=grad)

    def launch(self, launches: Sequence[Any]) -> None:
        """Make recorded launches."""
        from lgnet_fast.kernels.launch import device_guard, launch

        with device_guard(self.features):
            for one in launches:
                launch(one.kernel, one.grid, *one.args, **one.meta)


def candidates(op: str, default: Config, block: Block, generation: str) -> Iterator[Config]:
    """Shapes of an operation that registers and shared memory can hold, those nearest to the default first."""
    from lgnet_fast.kernels.cards import SHARED_LIMITS
    from lgnet_fast.kernels.configs import Config

    width = max(16, 1 << (block.channels - 1).bit_length())
    element = 2 if block.kind == "half" else 4
    by_bandwidth = op in ("rows", "merge")
    sizes = (16, 32, 64) if by_bandwidth else (8, 16, 32, 64, 128) if element * width > 1024 else (16, 32, 64, 128)
    found = []
    for shape in itertools.starmap(
        Config, itertools.product(sizes, (32, 64, 128) if by_bandwidth else sizes, (4, 8), (1, 2, 3, 4))
    ):
        m, n, warps, stages = shape
        if shape == default or m > max(16, block.positions):
            continue
        if not by_bandwidth:
            held, streamed = (n, m) if op == "backward_dkv" else (m, n)
            operands = 1 if op == "forward" else 2
            # what is certainly in shared memory; a shape that needs more is left out when it is measured
            rows = held + (stages - 1) * operands * streamed
            crowded = held * width > 160 * 32 * warps or m * n > 64 * 32 * warps
            if crowded or element * rows * width > SHARED_LIMITS[generation]:
                continue
        found.append((sum(abs(math.log2(a / b)) for a, b in zip(shape, default)), shape))
    yield from (shape for _, shape in sorted(found))


def blocks_of(plan: Plan, dtype: torch.dtype, device: torch.device) -> list[Attention]:
    """The attention blocks of a plan, each size once."""
    from lgnet_fast.kernels.tuned import Block

    kind, _, _ = target_of(device, dtype)
    found: dict[Block, Attention] = {}
    for step in plan.steps:
        if isinstance(step, AttentionStep):
            size = plan.source(step).size
            block = Block(kind, step.variant, step.out_channels, size[0] * size[1], plan.batch)
            if block not in found:
                found[block] = Attention.of(step.name, block, size, dtype, device)
    return list(found.values())


def tune_training(
    blocks: Sequence[Attention],
    dtype: torch.dtype,
    device: torch.device,
    seconds: float,
    log: Log,
    timer: Timer | None = None,
    tried: int | None = None,
) -> list[Training]:
    """Measure block shapes of attention forward and backward. Faster ones are kept, and run from then on.

    Args:
        blocks: from :func:`blocks_of`.
        dtype, device: of the blocks.
        seconds: no new measurement begins after this time.
        log: called with a section's name and figures.
        timer: compiles and times; None: on the GPU.
        tried: shapes per operation and block; None: as many as can be compiled within the time.

    Returns:
        The measurements of every block.
    """
    from lgnet_fast.kernels import tuned

    timer = timer or Timer(device)
    begin = time.perf_counter()
    if tried is None:
        tried = timer.affordable(_COMPILING_SHARE * seconds, len(blocks) * len(OPERATIONS))
    found = [tuned.Training(one.block) for one in blocks]
    with torch.inference_mode(False), torch.no_grad():
        shipped = [_shipped(one) for one in blocks]
        for op in OPERATIONS:
            shapes = _compiled(op, blocks, shipped, device, timer, log, tried)
            for one, measured in zip(blocks, found):
                if time.perf_counter() - begin > seconds:
                    log("training", cut_off=f"{one.step} {op}")
                    return found
                times = _measure(one, op, shapes[one.step], dtype, timer, log)
                if times and next(iter(times)) == shapes[one.step][0]:
                    _take(one, op, times, measured, log)
                    tuned.keep(device, dtype, measured)
        for one, measured, defaults in zip(blocks, found, shipped):
            _compare_whole(one, measured, defaults, timer, log)
            tuned.keep(device, dtype, measured)
    return found


def _shipped(one: Attention) -> dict[str, Config]:
    """The shapes of the tables for a block."""
    from lgnet_fast.kernels.attention_forward import AttentionCall

    call = AttentionCall.of(one.features, one.block.variant)._replace(measured={})
    return {op: call.pick(op) for op in OPERATIONS}


def _compiled(
    op: str,
    blocks: Sequence[Attention],
    shipped: Sequence[Mapping[str, Config]],
    device: torch.device,
    timer: Timer,
    log: Log,
    tried: int,
) -> dict[str, list[Config]]:
    """Step -> the shapes to measure, the shipped one first; none where the block does not launch the kernels."""
    from lgnet_fast.kernels.configs import assume_generation, device_generation

    generation, num_sms = device_generation(device)
    shapes: dict[str, list[Config]] = {}
    queue: list[Any] = []
    for one, defaults in zip(blocks, shipped):
        one.shapes = {**defaults, **one.shapes}
        shapes[one.step] = []
        with assume_generation(generation, num_sms):
            light = one.without_memory()
            if not light.launches(one.shapes, OPERATIONS[op][:1]):
                continue
            some = itertools.islice(candidates(op, defaults[op], one.block, generation), tried)
            shapes[one.step] = [defaults[op], *some]
            for shape in shapes[one.step]:
                # an error here is raised again, and reported, when the shape is measured
                with contextlib.suppress(Exception):
                    queue += light.launches({**one.shapes, op: shape}, OPERATIONS[op])
    begin = time.perf_counter()
    failures = timer.compile(queue)
    log("training", part=op, compiled=len(queue), seconds=time.perf_counter() - begin, failures=failures[:10])
    return shapes


def _measure(
    one: Attention, op: str, shapes: Sequence[Config], dtype: torch.dtype, timer: Timer, log: Log
) -> dict[Config, float]:
    """Microseconds of every shape whose result and gradient agree with those of the first."""
    expected: tuple[Tensor, ...] | None = None
    times: dict[Config, float] = {}
    for shape in shapes:
        own = {**one.shapes, op: shape}
        try:
            actual = tuple(tensor.float() for tensor in one.run(own))
            timer.wait()
            expected = expected or actual
            errors = [excessive_error(a, b, dtype, 2) for a, b in zip(actual, expected)]
            wrong = next((error for error in errors if error is not None), None)
            if wrong is not None:
                log("training", step=one.step, part=op, config=list(shape), wrong=wrong)
                continue
            launches = one.launches(own, OPERATIONS[op])
            times[shape] = timer.time([functools.partial(one.launch, launches)] * REPEATS)
        except Exception as raised:  # a shape that cannot run is left out
            log("training", step=one.step, part=op, config=list(shape), error=error_text(raised)[:200])
    return times


def _take(one: Attention, op: str, times: Mapping[Config, float], measured: Training, log: Log) -> None:
    """Note the fastest shape of an operation, if its gain over the first is large enough."""
    from lgnet_fast.kernels.tuned import Measured

    default = next(iter(times))
    best = min(times, key=lambda shape: times[shape])
    if times[best] > (1 - GAIN) * times[default]:
        best = default
    one.shapes[op] = best
    measured.operations[op] = Measured(best, times[best], default, times[default])
    log(
        "training",
        step=f"{one.step} {op}",
        key=list(one.block),
        default_us=times[default],
        best_us=times[best],
        best=list(best),
    )


def _compare_whole(
    one: Attention, measured: Training, defaults: Mapping[str, Config], timer: Timer, log: Log
) -> None:
    """Time forward and backward with the shipped shapes and with the choices; slower choices are dropped."""
    runs = [functools.partial(one.launch, one.launches(shapes)) for shapes in (defaults, one.shapes)]
    best = [math.inf, math.inf]
    for _ in range(3):
        for number, run in enumerate(runs):
            best[number] = min(best[number], timer.time([run]))
    measured.before_us, measured.now_us = best
    if measured.now_us > measured.before_us:
        log("training", step=one.step, dropped=True, before_us=best[0], now_us=best[1])
        measured.operations = {
            op: result._replace(shape=result.default, us=result.default_us)
            for op, result in measured.operations.items()
        }
        measured.now_us = measured.before_us
        one.shapes = dict(defaults)
