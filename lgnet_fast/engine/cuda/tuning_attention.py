"""Tuning the attention blocks of a plan on an NVIDIA GPU.

Candidates are block shapes of the loop over the keys (on Hopper also the tiles of the compiled kernel, which needs no
sum), of the projection and of the sum over splits, searched in turn.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..plan import AttentionStep, Plan
from .graphs import error_text
from .measure import GAIN, Found, Log, Result, Timer, excessive_error
from .weights import card_of, target_of

if TYPE_CHECKING:
    from lgnet_fast.kernels.configs import Inference
    from lgnet_fast.kernels.hopper_attention import AttentionTile


@dataclass
class _Block:
    """An attention block of one size: how to run it, and its best block shapes so far."""

    name: str
    key: tuple[int, int, int]
    call: Callable[[], Tensor]
    default: Inference
    config: Inference
    compiled: Sequence[AttentionTile]
    """Tiles of the compiled kernel, those of least estimated time first."""

    def launch(self) -> None:
        self.call()

    @property
    def channels(self) -> int:
        return self.key[0]

    @property
    def positions(self) -> int:
        return self.key[1]


def _walks(block: _Block, batch: int, element: int, generation: str, num_sms: int) -> Iterator[Inference]:
    """Block shapes of Triton's loop over the keys."""
    from lgnet_fast.kernels.cards import SHARED_LIMITS
    from lgnet_fast.kernels.configs import inference_bytes

    channels, positions = block.channels, block.positions
    for m, n, v, warps, stages, splits in itertools.product(
        (32, 64, 128), (32, 64, 128), (64, 128, 256), (4, 8), (2, 3), (1, 2, 4, 8)
    ):
        programs = batch * -(-positions // m) * -(-channels // v)
        if v > 1 << (channels - 1).bit_length() or m > positions or n > positions:
            continue
        if splits > 1 and (programs * splits > num_sms or positions // splits < n):
            continue
        if programs * splits < min(24, programs * positions // n) or m * v > 128 * 128 or m * n > 128 * 128:
            continue
        if (m == 32 and warps == 8) or (m == 128 and warps == 4 and n == 128):
            continue
        new = block.config._replace(
            block_m=m, block_n=n, block_v=v, num_warps=warps, num_stages=stages, max_splits=splits
        )
        if inference_bytes(new, channels, element) < 0.97 * SHARED_LIMITS[generation]:
            yield new


def _projections(block: _Block, batch: int, *_: object) -> Iterator[Inference]:
    """Block shapes of the projection."""
    for p, o, d in itertools.product((16, 32, 64, 128), (32, 64, 128), (32, 64, 128)):
        programs = batch * -(-block.positions // p) * -(-block.channels // o)
        if o <= block.channels and d <= block.channels and p * o <= 64 * 128 and programs >= 24:
            yield block.config._replace(project_p=p, project_o=o, project_d=d)


def _sums(block: _Block, *_: object) -> Iterator[Inference]:
    """Block shapes of the sum over splits."""
    if block.config.hopper is not None:
        return
    for m in (2, 4, 8, 16, 32):
        yield block.config._replace(sum_m=m)


def _blocks(plan: Plan, dtype: torch.dtype, device: torch.device) -> list[_Block]:
    from lgnet_fast.kernels import hopper_attention
    from lgnet_fast.kernels.attention_inference import attention_block_inference
    from lgnet_fast.kernels.configs import pick_inference

    kind, generation, num_sms = target_of(device, dtype)
    card = card_of(device, dtype)
    blocks = []
    for step in plan.steps:
        if isinstance(step, AttentionStep):
            source, channels = plan.source(step), step.out_channels
            x = torch.randn(plan.batch, channels, *source.size, device=device, dtype=dtype)
            x = x.to(memory_format=torch.channels_last).mul_(0.5)
            weight = (torch.randn(channels, 2 * channels, 1, 1, device=device) / channels**0.5).to(dtype)
            bias = torch.zeros(channels, device=device, dtype=dtype)
            out = torch.empty_like(x)
            call = functools.partial(attention_block_inference, x, weight, bias, step.variant, out=out)
            key = (channels, source.height * source.width, plan.batch)
            config = pick_inference(generation, kind, *key, num_sms)
            compiled = hopper_attention.candidates(*key, dtype, device, card)
            blocks.append(_Block(step.name, key, call, config, config, compiled))
    return blocks


def tune_attention(
    plan: Plan,
    dtype: torch.dtype,
    device: torch.device,
    found: Found,
    timer: Timer,
    log: Log,
    keep: Callable[[], None],
    expired: Callable[[], bool],
    tried: int | None = None,
) -> None:
    """Measure block shapes of every attention step into `found`: loop over the keys, projection and sum, in turn.

    Args:
        plan, dtype, device: of the steps.
        found, timer, log, keep, expired: see :func:`.tuning_convolutions.tune_convolutions`.
        tried: shapes per block and part; None: all.
    """
    from lgnet_fast.kernels.configs import override
    from lgnet_fast.kernels.launch import record

    kind, generation, num_sms = target_of(device, dtype)
    element = 4 if dtype == torch.float32 else 2
    blocks = _blocks(plan, dtype, device)
    for part, options in (("walk", _walks), ("projection", _projections), ("sum", _sums)):
        shapes: dict[str, list[Inference]] = {}
        queue = []
        for block in blocks:
            some = itertools.islice(options(block, plan.batch, element, generation, num_sms), tried)
            compiled = [block.config._replace(hopper=tile) for tile in block.compiled if part == "walk"]
            shapes[block.name] = list(dict.fromkeys((block.config, *compiled, *some)))
            for config in shapes[block.name]:
                with contextlib.suppress(Exception), override("inference", config), record() as launches:
                    block.call()
                queue += launches
        begin = time.perf_counter()
        failures = timer.compile(queue)
        log("attention", part=part, compiled=len(queue), seconds=time.perf_counter() - begin, failures=failures[:10])
        for block in blocks:
            if expired():
                log("attention", cut_off=block.name)
                return
            times = _measure_block(block, part, shapes[block.name], dtype, timer, log)
            if block.config not in times:
                continue
            ranked = sorted(times.items(), key=lambda item: item[1])
            before = found.attention.get(block.key)
            default_us = times[block.config] if before is None else before.default_us
            log(
                "attention",
                step=block.name,
                part=part,
                key=[generation, kind, *block.key],
                default_us=times[block.config],
                best_us=ranked[0][1],
                best=list(ranked[0][0]),
                others=[[round(us, 2), *config] for config, us in ranked[1:6]],
            )
            if ranked[0][1] <= (1 - GAIN) * times[block.config]:
                block.config = ranked[0][0]
            best = Result(tuple(block.config), times[block.config], tuple(block.default), default_us)
            found.attention[block.key] = best
            keep()


def compare_compiled(
    plan: Plan, dtype: torch.dtype, device: torch.device, found: Found, timer: Timer, log: Log, gain: float
) -> None:
    """Measure the tiles of the compiled kernel for every attention step into `found`, beside what runs otherwise.

    gain: share of the time of the whole block by which a tile must be faster.
    """
    for block in _blocks(plan, dtype, device):
        tiles = [block.config._replace(hopper=tile) for tile in block.compiled]
        times = _measure_block(block, "walk", [block.config, *tiles], dtype, timer, log)
        if block.config not in times:
            continue
        best = min(times, key=lambda config: times[config])
        choice = best if times[best] <= (1 - gain) * times[block.config] else block.config
        default_us, best_us = times[block.config], times[choice]
        found.attention[block.key] = Result(tuple(choice), best_us, tuple(block.config), default_us)
        log("attention", step=block.name, default_us=default_us, best_us=best_us, best=list(choice))


def _measure_block(
    block: _Block, part: str, shapes: Sequence[Inference], dtype: torch.dtype, timer: Timer, log: Log
) -> dict[Inference, float]:
    """Microseconds of every shape whose result agrees with that of the first."""
    from lgnet_fast.kernels.configs import override

    expected: Tensor | None = None
    times: dict[Inference, float] = {}
    for config in shapes:
        try:
            with override("inference", config):
                actual = block.call().float().clone()
                timer.wait()
                expected = actual if expected is None else expected
                wrong = excessive_error(actual, expected, dtype, 2)
                if wrong is not None:
                    log("attention", step=block.name, part=part, config=list(config), wrong=wrong)
                    continue
                times[config] = timer.time([block.launch] * 8)
        except Exception as raised:  # a shape that cannot run is left out
            log("attention", step=block.name, config=list(config), error=error_text(raised)[:200])
    return times
