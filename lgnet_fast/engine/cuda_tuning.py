"""Measured choices on an NVIDIA GPU: block shapes of every product of a plan, timed with cold weights, and kept.

Candidates of a convolution are tiles of the kernels, over how many splits of the depth, those of the compiled kernel
for Hopper (`kernels/hopper.py`), and PyTorch's own convolution (cuDNN); of the attention block, shapes of its walk
over the keys, of the projection and of the sum over splits. All are compiled in parallel processes, run once and
compared with what runs without tuning, then timed in graphs that rotate copies of the weights, so that these come
from memory as in a whole run. What is found is kept in the user's cache folder product by product, for the card,
driver, PyTorch, Triton, version and dtype; the shipped tables hold wherever nothing better was found. Last, whole
runs say whether the deep layers share a launch (:mod:`.deep`).
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from .. import cache
from .cpu_tuning import entry_name
from .cuda_executor import CudaExecutor, CudaOptions
from .cuda_weights import CudaWeights, StepWeights, Tuned, conv_of, target_of, work_of
from .graphs import capture, error_text
from .plan import AttentionStep, ConvStep, Plan

if TYPE_CHECKING:
    from lgnet_fast.kernels.configs import Inference
    from lgnet_fast.kernels.conv_configs import Tile, Work

    from .cuda_weights import Choice

logger = logging.getLogger("lgnet_fast")

LAUNCHES = 24
"""Launches in a graph that times one kernel."""
ROTATED_BYTES = 96 << 20
"""Copies of a step's weights are made until they exceed this: twice the L2 cache of an H100."""
_WRONG = {torch.float16: 5e-3, torch.bfloat16: 4e-2, torch.float32: 2e-3}
"""Largest difference of a candidate's result from that without tuning, relative to its norm."""
_GAIN = 0.02
"""Share of the time by which a candidate must beat what runs without tuning."""
_TRIED = 30
_COMPILING_SHARE, _ATTENTION_SHARE = 0.4, 0.25
"""Of the time: for compiling tiles, and for the attention blocks."""
_SECONDS_A_KERNEL = 1.3
_DEEP_ROWS = (16, 64)
"""What whole runs are tried with: see :class:`.cuda_executor.CudaOptions`."""

Log = Callable[..., None]


class Timer:
    """How candidates are compiled and timed on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def compile(self, launches: Sequence[Any]) -> list[str]:
        """Compile recorded launches in parallel; one sentence for each that failed."""
        from lgnet_fast.kernels.precompile import compile_all

        return compile_all(launches, self.device.index or 0)

    def workers(self) -> int:
        """Processes that compile at a time."""
        from lgnet_fast.kernels.precompile import workers

        return workers(1000)

    def time(self, launches: Sequence[Callable[[], None]]) -> float:
        """Microseconds of a launch within a graph of these, the median of seven replays."""
        graph = capture(functools.partial(_run_all, launches), self.device, torch.cuda.graph_pool_handle())
        return self.median_us(graph.replay) / len(launches)

    def median_us(self, call: Callable[[], None], repeats: int = 7) -> float:
        """Microseconds of a call."""
        for _ in range(3):
            call()
        times = []
        for _ in range(repeats):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            end.synchronize()
            times.append(1e3 * begin.elapsed_time(end))
        return sorted(times)[len(times) // 2]

    def wait(self) -> None:
        """For what has been launched; raises what went wrong there."""
        torch.cuda.synchronize(self.device)


def _run_all(launches: Sequence[Callable[[], None]]) -> None:
    for launch in launches:
        launch()


# -- what is kept --------------------------------------------------------------------------------------------------


@dataclass
class Found:
    """What tuning measured of a plan.

    Attributes:
        tiles: product -> its fastest choice, microseconds, and the same without tuning; :func:`product_key`.
        attention: (channels, positions, batch) -> the same of block shapes.
        deep_rows: name of a plan -> most rows of the layers that share a launch.
        now_ms: milliseconds of a whole run with them; None where that was not reached.
        before_ms: of a run without tuning.
    """

    tiles: dict[tuple[Any, ...], Result] = field(default_factory=dict)
    attention: dict[tuple[int, int, int], Result] = field(default_factory=dict)
    now_ms: float | None = None
    before_ms: float | None = None
    deep_rows: dict[str, int] = field(default_factory=dict)

    def tuned(self) -> Tuned:
        """For the executor."""
        from lgnet_fast.kernels.configs import Inference

        tiles = {key: _choice_of(result.choice) for key, result in self.tiles.items()}
        attention = {key: Inference(*result.choice) for key, result in self.attention.items()}
        return Tuned(tiles, attention, dict(self.deep_rows))

    def as_dict(self) -> dict[str, Any]:
        """As the cache keeps it."""
        return {
            "tiles": [[list(key), *result.as_list()] for key, result in self.tiles.items()],
            "attention": [[list(key), *result.as_list()] for key, result in self.attention.items()],
            "now_ms": self.now_ms,
            "before_ms": self.before_ms,
            "deep_rows": self.deep_rows,
        }

    @classmethod
    def from_dict(cls, value: Any) -> Found | None:
        """From :meth:`as_dict`; None where that is something else."""
        try:
            found = cls(
                {_frozen(key): Result(*map(_frozen, result)) for key, *result in value["tiles"]},
                {_frozen(key): Result(*map(_frozen, result)) for key, *result in value["attention"]},
                value["now_ms"],
                value["before_ms"],
                {str(name): int(rows) for name, rows in value.get("deep_rows", {}).items()},
            )
            found.tuned()
        except (AttributeError, TypeError, KeyError, ValueError):
            return None
        return found

    def __str__(self) -> str:
        count = f"{len(self.tiles)} convolutions, {len(self.attention)} attention blocks measured"
        if self.now_ms is None or self.before_ms is None:
            return f"{count}, not to the end"
        deep = ", deep layers in one launch" if self.deep_rows else ""
        return f"{count}{deep}: {self.now_ms:.3f} ms a run, without {self.before_ms:.3f} ms"


@dataclass(frozen=True)
class Result:
    """The fastest choice of a product, microseconds, and the same without tuning."""

    choice: Any
    us: float
    default: Any
    default_us: float

    def as_list(self) -> list[Any]:
        """As the cache keeps it."""
        return [self.choice, self.us, self.default, self.default_us]


def _frozen(value: Any) -> Any:
    """Lists, as JSON gives them, as tuples."""
    return tuple(map(_frozen, value)) if isinstance(value, (list, tuple)) else value


def product_key(work: Work, kind: str) -> tuple[Any, ...]:
    """What a tile was measured for: (dtype kind, rows, columns, taps of every phase, input channels)."""
    return (kind, *work[:4])


def kept(device: torch.device, dtype: torch.dtype) -> Tuned:
    """Everything that was measured on a card in a dtype, of all networks and sizes."""
    key = cache.key_for(device, dtype)
    tiles: dict[tuple[Any, ...], Any] = {}
    attention: dict[tuple[int, int, int], Inference] = {}
    deep_rows: dict[str, int] = {}
    for entry in cache.entries(cache.CHOICES):
        found = Found.from_dict(entry.value) if entry.key == key else None
        if found is not None:
            tuned = found.tuned()
            tiles.update(tuned.tiles)
            attention.update(tuned.attention)
            deep_rows.update(tuned.deep_rows)
    return Tuned(tiles, attention, deep_rows)


# -- candidates ----------------------------------------------------------------------------------------------------


def tiles(work: Work, kind: str, generation: str, num_sms: int) -> Iterator[Tile]:
    """Tiles worth measuring, the most promising first."""
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
            if work.flat and block_k == 128:
                continue
            if not work.flat and (work.in_channels % block_k or block_k > work.in_channels):
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
    for _, tile in ranked:  # variety: the estimate is off by a fifth
        shape = (tile.block_m, tile.block_n, tile.block_k, tile.num_warps)
        taken[shape] += 1
        if taken[shape] <= 3:
            yield tile


# -- convolutions --------------------------------------------------------------------------------------------------


class Contest:
    """One step of a plan with many tiles, on memory of its own."""

    def __init__(self, plan: Plan, dtype: torch.dtype, device: torch.device) -> None:
        self.executor = CudaExecutor.of(plan, dtype, device=device, graphs=False)
        self.plan = plan
        self._plain = self.executor.weights

    def launch(self, number: int, choice: Choice, own: StepWeights) -> Callable[[], None]:
        """A dense launch of one step with some weights, of which "cudnn" needs the plain ones."""
        executor, name = self.executor, self.plan.steps[number].name
        steps = {**self._plain.steps, name: own if choice == "cudnn" else replace(own, plain=None)}
        executor.weights = replace(self._plain, chosen={name: choice}, steps=steps)
        (launch,) = executor.step_launches(executor.memory, number)
        executor.weights = self._plain
        return launch

    def weights(self, number: int) -> StepWeights:
        """Of a step, packed and plain."""
        step = self.plan.steps[number]
        own = self._plain.steps[step.name]
        plain = step.weight.detach().to(self.executor.device, self.executor.dtype)
        return replace(own, plain=plain.contiguous(memory_format=torch.channels_last))

    def clear(self, number: int) -> None:
        """NaN where the step writes, so that what is not written shows."""
        step, memory = self.plan.steps[number], self.executor.memory
        if step.merges:
            memory.outputs.zero_()
            memory.outputs[self._stage(number)].fill_(torch.nan)
        else:
            memory.view(step.stores[0].view).fill_(torch.nan)

    def _stage(self, number: int) -> int:
        """Which of the raw pictures the last step of a stage writes, counted from 1."""
        return sum(step.merges for step in self.plan.steps[: number + 1])

    def outputs(self, number: int) -> Tensor:
        """What the step wrote."""
        step, memory = self.plan.steps[number], self.executor.memory
        return memory.outputs.clone() if step.merges else memory.view(step.stores[0].view).float().clone()

    def candidates(self, number: int, tried: int) -> list[Choice]:
        """What a step is measured with, the default first; `tried`: Triton tiles at most."""
        from lgnet_fast.kernels import hopper

        step, executor = self.plan.steps[number], self.executor
        assert isinstance(step, ConvStep)
        work = work_of(self.plan, step)
        some = itertools.islice(tiles(work, *target_of(executor.device, executor.dtype)), tried)
        compiled = hopper.candidates(conv_of(step), work, executor.dtype, executor.device)
        return list(dict.fromkeys((self.default(number), *some, *compiled, "cudnn")))

    def default(self, number: int) -> Tile | Literal["cudnn"]:
        """What runs without tuning."""
        step = self.plan.steps[number]
        assert isinstance(step, ConvStep)
        return "cudnn" if self._plain.steps[step.name].plain is not None else self.executor.tile(step)

    def fill(self) -> None:
        """Noise in every map and picture; the hole is everywhere."""
        memory = self.executor.memory
        memory.arena.normal_()
        memory.image.normal_()
        memory.mask.fill_(1)


def groups_of(plan: Plan) -> dict[Any, list[int]]:
    """(product, and what else is part of the kernel) -> numbers of the steps that are such, the dearest first."""
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
    tried: int,
    expired: Callable[[], bool],
) -> None:
    """Measure the products of a plan into `found`.

    Args:
        contest: of the plan.
        found: gets the results.
        timer: compiles and times.
        log: called with a section's name and figures.
        keep: called after every product.
        tried: tiles a product.
        expired: whether the time is over.
    """
    from lgnet_fast.kernels.launch import record

    plan, executor = contest.plan, contest.executor
    kind, generation, _ = target_of(executor.device, executor.dtype)
    groups = groups_of(plan)
    candidates: dict[int, list[Choice]] = {}
    queue = []
    for numbers in groups.values():
        candidates[numbers[0]] = contest.candidates(numbers[0], tried)
        own = contest.weights(numbers[0])
        for choice in candidates[numbers[0]]:
            if choice != "cudnn":
                # what raises here raises again where it is measured
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
        times = _measure(contest, numbers[0], candidates[numbers[0]], timer, log)
        default = candidates[numbers[0]][0]
        if default not in times:
            continue
        key = product_key(work, kind)
        measured.setdefault(key, []).append((len(numbers), times))
        found.tiles[key] = _best(measured[key], default)
        _log_product(log, plan.steps[numbers[0]].name, len(numbers), (generation, *key), times, default)
        keep()


def _measure(contest: Contest, number: int, choices: Sequence[Choice], timer: Timer, log: Log) -> dict[Any, float]:
    """Microseconds of every choice that computes what the first one does."""
    name = contest.plan.steps[number].name
    own = contest.weights(number)
    size = own.packed.numel() * own.packed.element_size()
    count = 1 if size < 1 << 20 else max(1, min(LAUNCHES, -(-ROTATED_BYTES // size)))
    copies = [own, *(_copied(own) for _ in range(count - 1))]
    contest.fill()
    expected: Tensor | None = None
    times: dict[Any, float] = {}
    for choice in choices:
        try:
            contest.clear(number)
            contest.launch(number, choice, own)()
            timer.wait()
            actual = contest.outputs(number)
            expected = actual if expected is None else expected
            error = ((actual - expected).norm() / expected.norm()).item()
            if not error < _WRONG[contest.executor.dtype]:  # so that NaN fails
                log("convs", step=name, tile=_plain(choice), wrong=error)
                continue
            times[choice] = timer.time([contest.launch(number, choice, copies[i % count]) for i in range(LAUNCHES)])
        except torch.OutOfMemoryError:
            raise
        except Exception as raised:  # a tile that cannot run is no contestant
            log("convs", step=name, tile=_plain(choice), error=error_text(raised)[:200])
    return times


def _copied(own: StepWeights) -> StepWeights:
    plain = None if own.plain is None else own.plain.clone(memory_format=torch.preserve_format)
    return StepWeights(own.packed.clone(), own.bias, plain)


def _best(measured: Sequence[tuple[int, Mapping[Any, float]]], default: Any) -> Result:
    """The choice of least time, summed over the steps that share a product; the default unless that is beaten."""
    common = set.intersection(*(set(times) for _, times in measured))
    if default not in common:
        measured, common = measured[:1], set(measured[0][1])
    totals = {choice: sum(count * times[choice] for count, times in measured) for choice in common}
    steps = sum(count for count, _ in measured)
    best = min(totals, key=lambda choice: totals[choice])
    if totals[best] > (1 - _GAIN) * totals[default]:
        best = default
    return Result(_plain(best), totals[best] / steps, _plain(default), totals[default] / steps)


def _plain(choice: Any) -> Any:
    """A choice without its class, as the cache keeps it."""
    from lgnet_fast.kernels.hopper import HopperTile

    if isinstance(choice, HopperTile):
        return ("hopper", *choice)
    return choice if choice == "cudnn" else tuple(choice)


def _choice_of(plain: Any) -> Choice:
    """The inverse of :func:`_plain`."""
    from lgnet_fast.kernels.conv_configs import Tile
    from lgnet_fast.kernels.hopper import HopperTile

    if plain == "cudnn":
        return "cudnn"
    return HopperTile(*plain[1:]) if plain[0] == "hopper" else Tile(*plain)


def _log_product(
    log: Log, step: str, count: int, key: tuple[Any, ...], times: Mapping[Any, float], default: Any
) -> None:
    """The line that bench/write_tables.py makes its tables of."""
    ranked = sorted(times.items(), key=lambda item: item[1])
    log(
        "convs",
        step=step,
        times=count,
        key=list(key),
        default_us=times[default],
        default=_plain(default),
        best_us=ranked[0][1],
        best=_plain(ranked[0][0]),
        others=[
            [round(us, 2), choice] if choice == "cudnn" else [round(us, 2), *_plain(choice)]
            for choice, us in ranked[1:8]
        ],
    )


# -- attention -----------------------------------------------------------------------------------------------------


@dataclass
class _Block:
    """An attention block at a size: how to run it, and its block shapes so far."""

    name: str
    key: tuple[int, int, int]
    call: Callable[[], Tensor]
    default: Inference
    config: Inference

    def launch(self) -> None:
        self.call()

    @property
    def channels(self) -> int:
        return self.key[0]

    @property
    def positions(self) -> int:
        return self.key[1]


def _walks(block: _Block, batch: int, element: int, generation: str, num_sms: int) -> Iterator[Inference]:
    """Shapes of the walk over the keys."""
    from lgnet_fast.kernels.cards import SHARED_LIMITS
    from lgnet_fast.kernels.configs import _inference_bytes

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
        if _inference_bytes(new, channels, element) < 0.97 * SHARED_LIMITS[generation]:
            yield new


def _projections(block: _Block, batch: int, *_: object) -> Iterator[Inference]:
    """Shapes of the projection."""
    for p, o, d in itertools.product((16, 32, 64, 128), (32, 64, 128), (32, 64, 128)):
        programs = batch * -(-block.positions // p) * -(-block.channels // o)
        if o <= block.channels and d <= block.channels and p * o <= 64 * 128 and programs >= 24:
            yield block.config._replace(project_p=p, project_o=o, project_d=d)


def _sums(block: _Block, *_: object) -> Iterator[Inference]:
    """Shapes of the sum over splits."""
    for m in (2, 4, 8, 16, 32):
        yield block.config._replace(sum_m=m)


def _blocks(plan: Plan, dtype: torch.dtype, device: torch.device) -> list[_Block]:
    from lgnet_fast.kernels.attention_inference import attention_block_inference
    from lgnet_fast.kernels.configs import pick_inference

    kind, generation, num_sms = target_of(device, dtype)
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
            blocks.append(_Block(step.name, key, call, config, config))
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
    """Measure block shapes of every attention step into `found`: the walk, the projection and the sum, in turn.

    Args:
        plan, dtype, device: of the steps.
        found, timer, log, keep, expired: see :func:`tune_convolutions`.
        tried: shapes a block and part; None: all.
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
            shapes[block.name] = list(dict.fromkeys((block.config, *some)))
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
            if ranked[0][1] <= (1 - _GAIN) * times[block.config]:
                block.config = ranked[0][0]
            best = Result(tuple(block.config), times[block.config], tuple(block.default), default_us)
            found.attention[block.key] = best
            keep()


def _measure_block(
    block: _Block, part: str, shapes: Sequence[Inference], dtype: torch.dtype, timer: Timer, log: Log
) -> dict[Inference, float]:
    """Microseconds of every shape that computes what the first one does."""
    from lgnet_fast.kernels.configs import override

    expected: Tensor | None = None
    times: dict[Inference, float] = {}
    for config in shapes:
        try:
            with override("inference", config):
                actual = block.call().float().clone()
                timer.wait()
                expected = actual if expected is None else expected
                error = ((actual - expected).norm() / expected.norm()).item()
                if not error < 2 * _WRONG[dtype]:
                    log("attention", step=block.name, part=part, config=list(config), wrong=error)
                    continue
                times[config] = timer.time([block.launch] * 8)
        except torch.OutOfMemoryError:
            raise
        except Exception as raised:  # a shape that cannot run is no contestant
            log("attention", step=block.name, config=list(config), error=error_text(raised)[:200])
    return times


# -- all of it -----------------------------------------------------------------------------------------------------


def tune(
    plan: Plan,
    dtype: torch.dtype,
    device: torch.device,
    seconds: float,
    progress: Callable[[str], None] = lambda text: None,
    timer: Timer | None = None,
    tried: int | None = None,
) -> Found:
    """Measure a plan's products, then whole runs with and without what was found; it is kept where it is faster.

    Args:
        plan: dense, with float32 weights on `device`.
        dtype, device: what to compute in, and where.
        seconds: after so many nothing new is begun.
        progress: called with a line a product.
        timer: None: that of a GPU.
        tried: tiles a product; None: as many as can be compiled within the time.
    """
    timer = timer or Timer(device)
    begin = time.perf_counter()
    found = Found()
    key, name = cache.key_for(device, dtype), entry_name(plan)

    def log(section: str, **figures: Any) -> None:
        if "best_us" in figures:
            gain = figures["default_us"] / figures["best_us"]
            progress(
                f"{figures['step']}: {figures['default_us']:.1f} us, now {figures['best_us']:.1f} us, {gain:.2f}x"
            )
        elif "compiled" in figures:
            progress(f"{section}: {figures['compiled']} launches compiled in {figures['seconds']:.0f} s")

    def keep() -> None:
        cache.put(key, cache.CHOICES, name, found.as_dict())

    def after(share: float) -> Callable[[], bool]:
        return lambda: time.perf_counter() - begin > share * seconds

    if tried is None:
        affordable = _COMPILING_SHARE * seconds * timer.workers() / _SECONDS_A_KERNEL
        tried = max(3, min(_TRIED, int(affordable / max(1, len(groups_of(plan))))))
    with torch.inference_mode(False), torch.no_grad():
        contest = Contest(plan, dtype, device)
        tune_convolutions(contest, found, timer, log, keep, tried, after(1 - _ATTENTION_SHARE))
        weights = contest.executor.weights
        del contest
        tune_attention(plan, dtype, device, found, timer, log, keep, after(1.0), 3 * tried)
        tuned_weights = CudaWeights.pack(plan, dtype, device=device, tuned=found.tuned())
        both = [CudaExecutor(plan, one, CudaOptions(graphs=False)) for one in (weights, tuned_weights)]
        found.before_ms, found.now_ms = _whole_runs(both, timer)
        del both
        if found.now_ms > found.before_ms:
            progress(f"a run takes {found.now_ms:.3f} ms with, {found.before_ms:.3f} ms without: nothing is changed")
            found.tiles, found.attention, found.now_ms = {}, {}, found.before_ms
        rows, found.now_ms = _best_deep_rows(plan, tuned_weights if found.tiles else weights, found.now_ms, timer)
        if rows:
            found.deep_rows = {name: rows}
        keep()
    return found


def _whole_runs(executors: Sequence[CudaExecutor], timer: Timer) -> list[float]:
    """Milliseconds of a dense run of each, the least of three, in turn."""
    runs = []
    for executor in executors:
        executor.memory.arena.zero_()
        runs.append(functools.partial(_run_all, executor.launches()))
    best = [float("inf")] * len(runs)
    for _ in range(3):
        for number, run in enumerate(runs):
            best[number] = min(best[number], 1e-3 * timer.time([run]))
    return best


def _best_deep_rows(plan: Plan, weights: CudaWeights, now_ms: float, timer: Timer) -> tuple[int, float]:
    """Most rows of the layers that share a launch, 0 unless a whole run gains by it, and milliseconds of the run."""
    executors = [CudaExecutor(plan, weights, CudaOptions(graphs=False, deep_rows=rows)) for rows in (0, *_DEEP_ROWS)]
    executors = [executors[0], *(executor for executor in executors[1:] if executor.shares_launches)]
    if len(executors) == 1:
        return 0, now_ms
    without, *times = _whole_runs(executors, timer)
    best = min(range(len(times)), key=times.__getitem__)
    if times[best] > (1 - _GAIN) * without:
        return 0, now_ms
    return executors[1 + best].options.deep_rows or 0, times[best]


def gains(
    plan: Plan, dtype: torch.dtype, device: torch.device, found: Found
) -> list[tuple[str, str, float, str, float]]:
    """Of every step: its name, what ran without tuning and its microseconds, what runs now and its own.

    NaN stands for what was not measured.
    """
    kind, _, _ = target_of(device, dtype)
    rows = []
    for step in plan.steps:
        if isinstance(step, AttentionStep):
            source = plan.source(step)
            result = found.attention.get((step.out_channels, source.height * source.width, plan.batch))
        else:
            result = found.tiles.get(product_key(work_of(plan, step), kind))
        if result is None:
            rows.append((step.name, "", float("nan"), "", float("nan")))
        else:
            before, now = (_title(choice) for choice in (result.default, result.choice))
            rows.append((step.name, before, result.default_us, now, result.us))
    return rows


def _title(choice: Any) -> str:
    """A choice in few characters: "cudnn", a tile as the executor's `choices` has it, or block shapes."""
    if choice == "cudnn":
        return "cudnn"
    if choice[0] == "hopper":
        return f"hopper 8x{choice[1]}x64/{choice[2]}"
    if len(choice) == 7:
        m, n, k, splits, warps, stages, fused = choice
        return f"{m}x{n}x{k}/{splits}{'f' if fused else ''} w{warps} s{stages}"
    return "x".join(map(str, choice))
