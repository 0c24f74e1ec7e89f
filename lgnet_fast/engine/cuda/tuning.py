"""Measured choices on an NVIDIA GPU: block shapes of every product of a plan, timed with cold weights, and kept.

The convolutions are tuned first (:mod:`.tuning_convolutions`), then the attention blocks
(:mod:`.tuning_attention`). Candidates are compiled in parallel processes, run once, compared with what runs without
tuning, and timed. The results are kept (:mod:`.measure`); where nothing was better, the shipped tables hold. Last,
whole runs are timed to find whether the deep layers should share a launch (:mod:`.deep_layers`), whether other
consecutive convolutions should (:mod:`.chains`), then whether launches should overlap.

Without a tuning, an engine's first use measures what takes seconds (:mod:`.first_use`).
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, get_args

import torch

from ... import cache
from ..plan import AttentionStep, Plan
from .executor import CudaExecutor, CudaOptions
from .first_use import whole_runs
from .graphs import CaptureError
from .launches import run_all
from .measure import GAIN, Found, Timer, kept, product_key, progress_of
from .tuning_attention import tune_attention
from .tuning_convolutions import Contest, groups_of, tune_convolutions
from .weights import CudaWeights, Overlap, target_of, work_of

logger = logging.getLogger("lgnet_fast")
waits = logging.getLogger("lgnet_fast.waits")  # which the command line shows

_COMPILING_SHARE, _ATTENTION_SHARE = 0.4, 0.25
"""Shares of the time: for compiling tiles, and for the attention blocks."""
_EQUAL_RUNS = 20
"""Runs with overlapping launches that must give the bits of one without."""
_DEEP_ROWS = (16, 64)
"""Values of `deep_rows` that are timed in whole runs, see :class:`.executor.CudaOptions`."""


def tune(
    plan: Plan,
    dtype: torch.dtype,
    device: torch.device,
    seconds: float,
    progress: Callable[[str], None] = lambda text: None,
    timer: Timer | None = None,
    tried: int | None = None,
) -> Found:
    """Measure the products of a plan, then whole runs with and without the choices. Faster choices are kept.

    Args:
        plan: dense, with float32 weights on `device`.
        dtype, device: of the computation.
        seconds: no new measurement begins after this time.
        progress: called with one line per product.
        timer: compiles and times; None: on the GPU.
        tried: tiles per product; None: as many as can be compiled within the time.
    """
    timer = timer or Timer(device)
    begin = time.perf_counter()
    found = Found()
    key, name = cache.key_for(device, dtype), plan.name
    log = progress_of(progress)

    def keep() -> None:
        cache.put(key, cache.CHOICES, name, found.as_dict())

    def after(share: float) -> Callable[[], bool]:
        return lambda: time.perf_counter() - begin > share * seconds

    if tried is None:
        tried = timer.affordable(_COMPILING_SHARE * seconds, len(groups_of(plan)))
    with torch.inference_mode(False), torch.no_grad():
        contest = Contest(plan, dtype, device)
        candidates = functools.partial(contest.candidates, tried=tried)
        tune_convolutions(contest, found, timer, log, keep, candidates, after(1 - _ATTENTION_SHARE))
        untuned = kept(device, dtype, at_first_use=True)
        weights = replace(contest.plain_weights, tuned=untuned)
        del contest
        tune_attention(plan, dtype, device, found, timer, log, keep, after(1.0), 3 * tried)
        tuned = found.tuned()
        tuned_weights = CudaWeights.pack(
            plan,
            dtype,
            device=device,
            tuned=replace(
                untuned,
                tiles={**untuned.tiles, **tuned.tiles},
                attention={**untuned.attention, **tuned.attention},
            ),
        )
        both = [CudaExecutor(plan, one, CudaOptions(graphs=False)) for one in (weights, tuned_weights)]
        before_ms, now_ms = whole_runs(both, timer)
        del both
        if now_ms > before_ms:
            progress(f"a run takes {now_ms:.3f} ms with, {before_ms:.3f} ms without: nothing is changed")
            found.tiles, found.attention, now_ms = {}, {}, before_ms
            tuned_weights = weights
        options, now_ms = _best_launches(plan, tuned_weights, now_ms, timer)
        found.deep_rows = {name: options.deep_rows} if options.deep_rows else {}
        chained = CudaExecutor(plan, tuned_weights, options).dense_chains
        found.chains = {name: tuple(plan.steps[numbers.start].name for numbers in chained)} if chained else {}
        keep()
        how, now_ms = _best_overlap(plan, tuned_weights, options, now_ms, timer)
        found.overlap = {name: how} if how != "none" else {}
        found.before_ms, found.now_ms = before_ms, now_ms  # last, because they say that the tuning came to its end
        keep()
    return found


def _fastest(executors: Sequence[CudaExecutor], now_ms: float, timer: Timer) -> tuple[CudaExecutor, float]:
    """The executor whose run is shortest, and its milliseconds; the first one where no other gains. Where one cannot
    be captured, the first one and `now_ms`."""
    try:
        without, *times = whole_runs(executors, timer)
    except CaptureError as error:  # such as a driver that does not let blocks be spread
        logger.info("whole runs are not compared: %s", error)
        return executors[0], now_ms
    best = min(range(len(times)), key=times.__getitem__)
    if times[best] > (1 - GAIN) * without:
        return executors[0], without
    return executors[1 + best], times[best]


def _best_launches(plan: Plan, weights: CudaWeights, now_ms: float, timer: Timer) -> tuple[CudaOptions, float]:
    """Which layers should share a launch, and milliseconds of a run. Where nothing gains, what `weights` say stays:
    none, or what the first use has chosen."""
    options = CudaOptions(graphs=False, deep_rows=weights.tuned.deep_rows.get(plan.name, 0), overlap="none")
    deep = [replace(options, deep_rows=rows) for rows in (0, *_DEEP_ROWS)]
    options, now_ms = _fastest_of(plan, weights, options, deep, "deep", now_ms, timer)
    chained = [replace(options, chains=wanted) for wanted in (False, True)]
    return _fastest_of(plan, weights, options, chained, "chain", now_ms, timer)


def _fastest_of(
    plan: Plan,
    weights: CudaWeights,
    now: CudaOptions,
    others: Sequence[CudaOptions],
    kind: str,
    now_ms: float,
    timer: Timer,
) -> tuple[CudaOptions, float]:
    """The options whose run is shortest, and its milliseconds; `now` where no others gain. Others without a launch of
    this kind are compared only where `now` has one."""
    executors = [CudaExecutor(plan, weights, options) for options in (now, *(o for o in others if o != now))]
    have = [kind in executor.choices.values() for executor in executors]
    compared = [one for one, has in zip(executors[1:], have[1:]) if has or have[0]]
    if not compared:
        return now, now_ms
    best, milliseconds = _fastest([executors[0], *compared], now_ms, timer)
    return best.options, milliseconds


def _best_overlap(
    plan: Plan, weights: CudaWeights, options: CudaOptions, now_ms: float, timer: Timer
) -> tuple[Overlap, float]:
    """How launches should overlap ("none" where a run is not faster), and milliseconds of a run.

    options: of the runs, but how they overlap.
    """
    from lgnet_fast.kernels.conv import can_overlap
    from lgnet_fast.kernels.launch import record

    if can_overlap(weights.device) is not None:
        return "none", now_ms
    executors = [CudaExecutor(plan, weights, replace(options, overlap=how)) for how in get_args(Overlap)]
    runs = executors[1].launches()
    with record() as launches:
        run_all(runs)
    timer.compile(launches)
    if not _equal_pictures(executors[0], executors[1]):
        return "none", now_ms
    best, milliseconds = _fastest(executors, now_ms, timer)
    return best.overlap, milliseconds


def _equal_pictures(one: CudaExecutor, other: CudaExecutor) -> bool:
    """Whether two executors give the same bits, several times: a missing wait shows only sometimes.

    The maps are zeroed before each run, because the run before has left the right values in them.
    """
    plan, device = one.plan, one.device
    generator = torch.Generator(device).manual_seed(0)
    size = (plan.batch, 3, plan.height, plan.width)
    image = torch.rand(size, generator=generator, device=device, dtype=torch.float32) * 2 - 1
    mask = (image[:, :1] > 0.5).to(torch.float32)
    one.memory.arena.zero_()
    expected, stages = one.run(image, mask)
    for _ in range(_EQUAL_RUNS):
        other.memory.arena.zero_()
        result, own_stages = other.run(image, mask)
        if not all(map(torch.equal, (result, *own_stages), (expected, *stages))):
            return False
    return True


def gains(
    plan: Plan, dtype: torch.dtype, device: torch.device, found: Found
) -> list[tuple[str, str, float, str, float]]:
    """For every step: its name, the choice without tuning and its microseconds, the choice now and its microseconds.

    NaN: not measured.
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
    """A choice as short text: "cudnn", a tile as in the executor's `choices`, or block shapes."""
    from lgnet_fast.kernels import compiled
    from lgnet_fast.kernels.configs import Inference
    from lgnet_fast.kernels.hopper_attention import AttentionTile

    if choice == "cudnn":
        return "cudnn"
    if (tile := compiled.tile_of(choice)) is not None:
        return tile.label
    if len(choice) == 7:
        m, n, k, splits, warps, stages, fused = choice
        return f"{m}x{n}x{k}/{splits}{'f' if fused else ''} w{warps} s{stages}"
    *shapes, hopper = Inference(*choice)
    return "x".join(map(str, shapes)) if hopper is None else AttentionTile(*hopper).label
