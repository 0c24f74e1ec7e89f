"""Tuning the convolutions of a plan on an NVIDIA GPU.

Candidates are tiles of the Triton kernels with a number of splits of the depth, tiles of the compiled kernels
(`kernels/compiled.py`), and PyTorch's own convolution (cuDNN). Each result is compared with that without tuning.
Timing rotates copies of the weights, so that they come from memory as in a whole run.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ..plan import ConvStep, Plan
from .executor import CudaExecutor
from .graphs import error_text
from .measure import GAIN, Found, Log, Result, Timer, excessive_error, plain, product_key
from .weights import StepWeights, conv_of, target_of, work_of

if TYPE_CHECKING:
    from lgnet_fast.kernels.conv_configs import Tile, Work

    from .weights import Choice

LAUNCHES = 24
"""Launches in a graph that times one kernel."""
ROTATED_BYTES = 96 << 20
"""Copies of a step's weights are made until they exceed this: twice the L2 cache of an H100."""


def tiles(work: Work, kind: str, generation: str, num_sms: int) -> Iterator[Tile]:
    """Candidate tiles, those of least estimated time first."""
    import triton

    from lgnet_fast.kernels.cards import SHARED_LIMITS
    from lgnet_fast.kernels.conv_configs import Tile, estimate

    element = 2 if kind == "half" else 4
    limit = 0.86 * SHARED_LIMITS[generation]
    columns = max(16, triton.next_power_of_2(work.columns))
    rows = max(16, triton.next_power_of_2(work.rows))
    ranked = []
    shapes = [
        (16, 64, 4), (16, 128, 4), (16, 128, 8), (16, 256, 8), (32, 64, 4), (32, 128, 4), (64, 16, 4), (64, 32, 4),
        (64, 64, 4), (64, 128, 4), (64, 128, 8), (64, 256, 8), (64, 256, 4), (128, 16, 4), (128, 16, 8), (128, 32, 4),
        (128, 64, 4), (128, 64, 8), (128, 128, 8), (128, 128, 4), (256, 16, 8), (256, 64, 8), (256, 128, 8),
        (128, 256, 8),
    ]  # fmt: skip
    for block_m, block_n, warps in shapes:
        if block_n > columns or block_m > rows or (kind == "ieee" and block_m * block_n > 64 * 64):
            continue
        for block_k in (32, 64, 128) if kind == "half" else (16, 32):
            if work.tap_row and (block_k == 128 or block_k < work.tap_row):
                continue
            if not work.tap_row and (work.in_channels % block_k or block_k > work.in_channels):
                continue
            steps = work.steps(block_k)
            blocks = -(-work.rows // block_m) * -(-work.columns // block_n) * len(work.taps)
            stage = block_k * (block_m + block_n) * element
            stages = next((s for s in (5, 4, 3, 2) if s * stage <= limit and s <= 2 + 64 * 6 // block_k), 2)
            if stages * stage > limit:
                continue
            for splits in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64):
                if splits > 1 and (splits > max(steps) // 2 or blocks * splits > 2.2 * num_sms):
                    continue
                for fused in (False, True) if splits > 1 else (False,):
                    tile = Tile(block_m, block_n, block_k, splits, warps, 1 if kind == "ieee" else stages, fused)
                    ranked.append((estimate(work, tile, kind, generation, num_sms), tile))
    ranked.sort(key=lambda pair: pair[0])
    taken: Counter[tuple[int, ...]] = Counter()
    for _, tile in ranked:  # few per shape, for variety: the estimate is off by a fifth
        shape = (tile.block_m, tile.block_n, tile.block_k, tile.num_warps)
        taken[shape] += 1
        if taken[shape] <= 3:
            yield tile


class Contest:
    """Runs single steps of a plan with different tiles, on separate buffers.

    Args:
        plan: dense, with weights.
        dtype, device: of the computation.
        gain: share of the time by which a candidate must beat what runs without tuning.
    """

    def __init__(self, plan: Plan, dtype: torch.dtype, device: torch.device, gain: float = GAIN) -> None:
        self.executor = CudaExecutor.of(plan, dtype, device=device, graphs=False)
        self.plan, self.gain = plan, gain
        self.plain_weights = self.executor.weights

    def launch(self, number: int, choice: Choice, own: StepWeights) -> Callable[[], None]:
        """A dense launch of one step with the weights `own`; "cudnn" needs the plain ones."""
        executor, name = self.executor, self.plan.steps[number].name
        steps = {**self.plain_weights.steps, name: own if choice == "cudnn" else replace(own, plain=None)}
        executor.weights = replace(self.plain_weights, chosen={name: choice}, steps=steps)
        try:
            (launch,) = executor.step_launches(executor.memory, number)
        finally:
            executor.weights = self.plain_weights
        return launch

    def weights(self, number: int) -> StepWeights:
        """The weights of a step, packed and plain."""
        step = self.plan.steps[number]
        own = self.plain_weights.steps[step.name]
        plain = step.weight.detach().to(self.executor.device, self.executor.dtype)
        return replace(own, plain=plain.contiguous(memory_format=torch.channels_last))

    def clear(self, number: int) -> None:
        """Fill the results of the step with NaN, so that unwritten values are detected."""
        step, memory = self.plan.steps[number], self.executor.memory
        if step.merges:
            memory.outputs.zero_()
            memory.outputs[self._stage(number)].fill_(torch.nan)
        else:
            memory.view(step.stores[0].view).fill_(torch.nan)

    def _stage(self, number: int) -> int:
        """Index of the raw picture that the last step of a stage writes, counted from 1."""
        return sum(step.merges for step in self.plan.steps[: number + 1])

    def outputs(self, number: int) -> Tensor:
        """The results of the step."""
        step, memory = self.plan.steps[number], self.executor.memory
        return memory.outputs.clone() if step.merges else memory.view(step.stores[0].view).float().clone()

    def candidates(self, number: int, tried: int) -> list[Choice]:
        """Choices to measure for a step, the default first. tried: most Triton tiles."""
        from lgnet_fast.kernels import compiled

        step, executor = self.plan.steps[number], self.executor
        assert isinstance(step, ConvStep)
        work = work_of(self.plan, step)
        some = itertools.islice(tiles(work, *target_of(executor.device, executor.dtype)), tried)
        others = compiled.candidates(conv_of(step), work, executor.dtype, executor.device)
        return list(dict.fromkeys((self.default(number), *some, *others, "cudnn")))

    def few_candidates(self, number: int) -> list[Choice]:
        """The default, and some tiles of a compiled kernel, for which nothing is compiled."""
        from lgnet_fast.kernels import compiled

        step, plan = self.plan.steps[number], self.plan
        assert isinstance(step, ConvStep)
        product = conv_of(step), plan.batch, plan.source(step).size, plan.target(step).size
        return [self.default(number), *compiled.few_candidates(*product, self.executor.dtype, self.executor.device)]

    def default(self, number: int) -> Tile | Literal["cudnn"]:
        """The choice without tuning."""
        step = self.plan.steps[number]
        assert isinstance(step, ConvStep)
        return "cudnn" if self.plain_weights.steps[step.name].plain is not None else self.executor.tile(step)

    def fill(self) -> None:
        """Fill every map and picture with noise, and the mask with ones."""
        memory = self.executor.memory
        memory.arena.normal_()
        memory.image.normal_()
        memory.mask.fill_(1)


def groups_of(plan: Plan) -> dict[Any, list[int]]:
    """(product, and other properties of the kernel) -> numbers of its steps, the most expensive first."""
    groups: dict[Any, list[int]] = {}
    for number, step in enumerate(plan.steps):
        if isinstance(step, ConvStep):
            key = (work_of(plan, step), step.merges, step.residual is not None, len(step.stores))
            groups.setdefault(key, []).append(number)
    dearest = sorted(groups.items(), key=lambda item: -len(item[1]) * item[0][0].rows * sum(item[0][0].taps))
    return dict(dearest)


def tune_convolutions(
    contest: Contest,
    found: Found,
    timer: Timer,
    log: Log,
    keep: Callable[[], None],
    candidates: Callable[[int], list[Choice]],
    expired: Callable[[], bool],
) -> None:
    """Measure the products of a plan into `found`.

    Args:
        contest: of the plan.
        found: the results are added to it.
        timer: compiles and times.
        log: called with a section's name and figures.
        keep: called after every product.
        candidates: gives the choices to measure for the step of a number, the default first.
        expired: returns whether the time is over.
    """
    from lgnet_fast.kernels.launch import record

    plan, executor = contest.plan, contest.executor
    kind, generation, _ = target_of(executor.device, executor.dtype)
    groups = groups_of(plan)
    choices: dict[int, list[Choice]] = {}
    queue = []
    for numbers in groups.values():
        choices[numbers[0]] = candidates(numbers[0])
        own = contest.weights(numbers[0])
        for choice in choices[numbers[0]]:
            if choice != "cudnn":
                # an error here is raised again, and reported, when the choice is measured
                with contextlib.suppress(Exception), record() as launches:
                    contest.launch(numbers[0], choice, own)()
                queue += launches
    begin = time.perf_counter()
    failures = timer.compile(queue)
    log("convs", compiled=len(queue), seconds=time.perf_counter() - begin, failures=failures[:20])
    measured: dict[tuple[Any, ...], list[tuple[int, dict[Any, float]]]] = {}
    for (work, *_), numbers in groups.items():
        if expired():
            log("convs", cut_off=plan.steps[numbers[0]].name)
            return
        times = _measure(contest, numbers[0], choices[numbers[0]], timer, log)
        default = choices[numbers[0]][0]
        if default not in times:
            continue
        key = product_key(work, kind)
        measured.setdefault(key, []).append((len(numbers), times))
        found.tiles[key] = _best(measured[key], default, contest.gain)
        _log_product(log, plan.steps[numbers[0]].name, len(numbers), (generation, *key), times, default)
        keep()


def _measure(contest: Contest, number: int, choices: Sequence[Choice], timer: Timer, log: Log) -> dict[Any, float]:
    """Microseconds of every choice whose result agrees with that of the first."""
    name = contest.plan.steps[number].name
    own = contest.weights(number)
    size = own.packed.numel() * own.packed.element_size()
    count = 1 if size < 1 << 20 else max(1, min(LAUNCHES, -(-ROTATED_BYTES // size)))
    copies = [own, *(_copied(own) for _ in range(count - 1))]
    contest.fill()

    def launches(choice: Choice) -> list[Callable[[], None]]:
        return [contest.launch(number, choice, copies[i % count]) for i in range(LAUNCHES)]

    expected: Tensor | None = None
    times: dict[Any, float] = {}
    for choice in choices:
        try:
            contest.clear(number)
            contest.launch(number, choice, own)()
            timer.wait()
            actual = contest.outputs(number)
            expected = actual if expected is None else expected
            wrong = excessive_error(actual, expected, contest.executor.dtype)
            if wrong is not None:
                log("convs", step=name, tile=plain(choice), wrong=wrong)
                continue
            times[choice] = timer.time(launches(choice))
        except Exception as raised:  # a tile that cannot run is left out
            log("convs", step=name, tile=plain(choice), error=error_text(raised)[:200])
    if choices[0] in times and len(times) > 1:  # again: the GPU's clocks may have been rising when it was timed
        with contextlib.suppress(Exception):
            times[choices[0]] = min(times[choices[0]], timer.time(launches(choices[0])))
    return times


def _copied(own: StepWeights) -> StepWeights:
    """Copies of all weights of a step."""
    plain = None if own.plain is None else own.plain.clone(memory_format=torch.preserve_format)
    fragments = None if own.fragments is None else own.fragments.clone()
    return StepWeights(own.packed.clone(), own.bias, plain, fragments)


def _best(measured: Sequence[tuple[int, Mapping[Any, float]]], default: Any, gain: float) -> Result:
    """The choice of least time over the steps that share a product, or the default if the gain is too small."""
    common = set.intersection(*(set(times) for _, times in measured))
    if default not in common:
        measured, common = measured[:1], set(measured[0][1])
    totals = {choice: sum(count * times[choice] for count, times in measured) for choice in common}
    steps = sum(count for count, _ in measured)
    best = min(totals, key=lambda choice: totals[choice])
    if totals[best] > (1 - gain) * totals[default]:
        best = default
    return Result(plain(best), totals[best] / steps, plain(default), totals[default] / steps)


def _log_product(
    log: Log, step: str, count: int, key: tuple[Any, ...], times: Mapping[Any, float], default: Any
) -> None:
    """Log the line from which bench/write_tables.py makes its tables."""
    ranked = sorted(times.items(), key=lambda item: item[1])
    log(
        "convs",
        step=step,
        times=count,
        key=list(key),
        default_us=times[default],
        default=plain(default),
        best_us=ranked[0][1],
        best=plain(ranked[0][0]),
        others=[
            [round(us, 2), choice] if choice == "cudnn" else [round(us, 2), *plain(choice)]
            for choice, us in ranked[1:8]
        ],
    )
