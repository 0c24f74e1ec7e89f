"""The first minutes on a GPU: does every step compute what it should, and where does the time go?

    python bench/gpu_contact.py RESULTS [--model lgnet] [--dtype float16] [--batch 1] [--minutes 5]
                                [--sections compile,buffers,...]

Each figure is written to RESULTS/contact_<model>_<dtype>_b<batch>.jsonl as it comes, one JSON object a line, so that
a run that is cut off leaves what it measured.

=========  ==========================================================================================================
compile    every kernel of the dense plan, in parallel processes
buffers    a run without graphs; every step's output beside the plan in plain PyTorch, float32: the first wrong step
           is named
graph      the whole forward: launched one by one, as a graph, with and without overlapping launches
steps      each step in place: graphs of the first k steps, and differences, so weights come from memory
attention  block shapes of `attention_inference`: the walk over the keys, the projection, the sum over splits
holes      graphs restricted to square holes of 16, 64 and 128 pixels
convs      tiles of every distinct convolution, timed in graphs that rotate copies of the weights (cold, as in place)
peers      the engine beside the model in eager PyTorch (channels last, with and without a graph) and torch.compile
=========  ==========================================================================================================
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LAUNCHES = 24
"""Launches in a graph that times one kernel."""
ROTATED_BYTES = 96 << 20
"""Copies of a step's weights are made until they exceed this: twice the L2 cache of an H100."""


class Log:
    """Lines of JSON, flushed as they come."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a")
        self._start = time.perf_counter()

    def __call__(self, section: str, **figures: Any) -> None:
        figures = {"section": section, "at_s": round(time.perf_counter() - self._start, 1), **figures}
        self._file.write(json.dumps(figures) + "\n")
        self._file.flush()
        print(json.dumps(figures)[:400], flush=True)


def median_us(call: Callable[[], None], repeats: int = 20, inner: int = 1) -> float:
    """Median of `repeats` event timings of `inner` calls, in microseconds a call."""
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(inner):
            call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / inner)
    return sorted(times)[len(times) // 2]


def graph_of(launches: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """`launches` captured, after one run."""
    from lgnet_fast.engine.graphs import capture

    device = torch.device("cuda", torch.cuda.current_device())
    return capture(launches, device, torch.cuda.graph_pool_handle())


def run_all(launches: Sequence[Callable[[], None]]) -> None:
    """One after another."""
    for launch in launches:
        launch()


def model_and_plan(name: str, batch: int) -> tuple[Any, Any]:
    """A network with random weights that keep features alive through all layers, on the GPU, and its dense plan."""
    from lgnet_fast import create_model
    from lgnet_fast.engine.engine import plan_stages
    from lgnet_fast.engine.plan import build_plan

    torch.manual_seed(0)
    model = create_model(name).eval()
    with torch.no_grad():
        for module in model.modules():
            weight = getattr(module, "weight", None)
            if isinstance(weight, Tensor) and weight.ndim == 4:
                transposed = isinstance(module, torch.nn.ConvTranspose2d)
                fan = weight.shape[0 if transposed else 1] * weight.shape[2] * weight.shape[3]
                weight.normal_(0, (2 * (4 if transposed else 1) / fan) ** 0.5)
    model = model.cuda()
    return model, build_plan(plan_stages(model), batch, 256, 256)


def picture(batch: int) -> tuple[Tensor, Tensor]:
    """A smooth picture with noise, and a hole of a quarter."""
    generator = torch.Generator(device="cuda").manual_seed(1)
    image = torch.randn(batch, 3, 256, 256, generator=generator, device="cuda").mul_(0.5).clamp_(-1, 1)
    mask = torch.zeros(batch, 1, 256, 256, device="cuda")
    mask[..., 64:192, 64:192] = 1
    return image, mask


def recorded(executor: Any) -> list[Any]:
    """The launches of a dense run, not made."""
    from lgnet_fast.kernels.launch import record

    with record() as launches:
        run_all(executor._launches(executor.memory, None, False))
    return launches


def check_buffers(executor: Any, plan: Any, log: Log) -> None:
    """Every step's output on the executor's own inputs, beside the same step in float32."""
    from lgnet_fast.engine.torch_executor import TorchExecutor

    image, mask = picture(plan.batch)
    executor.memory.arena.fill_(torch.nan)
    exact = TorchExecutor(plan)
    result, _ = executor.run(image, mask)
    expected, _ = exact.run(image, mask)
    hole = (mask != 0).expand_as(image)
    error = (result - expected)[hole]
    log(
        "buffers",
        step="picture",
        known_equal=torch.equal(result[~hole], image[~hole]),
        finite=bool(result.isfinite().all()),
        rms=error.square().mean().sqrt().item(),
        worst=error.abs().max().item(),
        deviation=expected[hole].std().item(),
    )
    # Every step by itself, so that an error stays where it arises.
    for number, step in enumerate(plan.steps):
        if step.merges:
            continue
        log_step_error(executor, plan, number, log)


def log_step_error(executor: Any, plan: Any, number: int, log: Log) -> None:
    """One step on noise, beside float32 PyTorch on the same noise."""
    import torch.nn.functional as F

    step = plan.steps[number]
    executor.memory.arena.normal_()
    run_all(executor.step_launches(executor.memory, number))
    own = executor.memory.view(step.stores[0].view).float()
    x = executor.memory.view(step.source).float().permute(0, 3, 1, 2)
    if step.kind == "attention":
        from lgnet_fast.reference.attention import attention_block

        value = attention_block(x, step.weight.float(), step.bias.float(), step.variant)
    elif step.kind == "deconv":
        value = F.conv_transpose2d(x, step.weight, step.bias, step.stride, step.padding, step.output_padding)
    elif step.reflect:
        value = F.conv2d(F.pad(x, [step.padding] * 4, mode="reflect"), step.weight, step.bias, step.stride)
    else:
        value = F.conv2d(x, step.weight, step.bias, step.stride, step.padding)
    if step.residual is not None:
        value = value + executor.memory.view(step.residual).float().permute(0, 3, 1, 2)
    activation = step.stores[0].activation
    value = {"relu": F.relu, "leaky_relu": lambda v: F.leaky_relu(v, 0.2)}.get(activation, lambda v: v)(value)
    value = value.permute(0, 2, 3, 1)
    error = ((own - value).norm() / value.norm()).item()
    log("buffers", step=step.name, relative_error=error, right=error < 2e-2)


def time_graph(plan: Any, dtype: torch.dtype, choices: dict[str, Any], log: Log, label: str) -> None:
    """The whole forward in several ways."""
    from lgnet_fast.engine.cuda_executor import CudaExecutor

    image, mask = picture(plan.batch)
    expected = None
    for overlap in (False, True):
        try:
            executor = CudaExecutor(plan, dtype, choices=choices, overlap=overlap, graphs=False)
        except RuntimeError as error:
            log("graph", label=label, overlap=overlap, error=str(error))
            continue
        launches = functools.partial(run_all, executor._launches(executor.memory, None, False))
        executor.run(image, mask)
        direct = median_us(launches, 10)
        graph = graph_of(launches)
        replayed = median_us(graph.replay, 50, inner=4)
        result = executor.memory.outputs[0].clone()
        same = 0
        for _ in range(50):
            graph.replay()
            same += torch.equal(executor.memory.outputs[0], result)
        if expected is None:
            expected = result
        log(
            "graph",
            label=label,
            overlap=overlap,
            direct_us=direct,
            graph_us=replayed,
            pictures_a_second=round(plan.batch * 1e6 / replayed),
            equal_of_50=same,
            equal_to_first=torch.equal(result, expected),
            worst=(result - expected).abs().max().item(),
        )


def time_steps(plan: Any, dtype: torch.dtype, choices: dict[str, Any], log: Log) -> None:
    """Graphs of the first k steps; a step's time is the difference."""
    from lgnet_fast.engine.cuda_executor import CudaExecutor

    executor = CudaExecutor(plan, dtype, choices=choices, graphs=False)
    image, mask = picture(plan.batch)
    executor.run(image, mask)
    launches = executor._launches(executor.memory, None, False)
    names = ["paint", *(step.name for step in plan.steps)]
    graphs = [graph_of(functools.partial(run_all, launches[: k + 1])) for k in range(len(launches))]
    best = [float("inf")] * len(graphs)
    for _ in range(3):  # in turn, so that a change of clocks meets all of them
        for k, graph in enumerate(graphs):
            best[k] = min(best[k], median_us(graph.replay, 10, inner=4))
    before = 0.0
    chosen = executor.choices
    for name, total in zip(names, best):
        log("steps", step=name, us=total - before, until_us=total, tile=chosen.get(name, ""))
        before = total


def time_holes(plan: Any, dtype: torch.dtype, log: Log) -> None:
    """Restricted graphs, beside the dense one and their share of its multiplications."""
    from lgnet_fast.kernels.launch import record
    from lgnet_fast.kernels.precompile import compile_all

    from lgnet_fast.engine.cuda_executor import CudaExecutor, bucket
    from lgnet_fast.engine.regions import Rect

    executor = CudaExecutor(plan, dtype, graphs=False)
    image, mask = picture(plan.batch)
    executor.run(image, mask)
    dense = plan.total_macs()
    for side in (16, 64, 128, None):
        regions, share = None, 1.0
        if side is not None:
            start = (plan.height - side) // 2 - 5  # off the grid that rectangles are rounded to
            hole = Rect(start, start + side, start, start + side)
            restricted = plan.restricted(bucket([hole], plan.height, plan.width))
            regions, share = tuple(step.regions for step in restricted.steps), restricted.total_macs() / dense
        launches = executor._launches(executor.memory, regions, False)
        with record() as kernels:
            run_all(launches)
        compile_all(kernels, 0)
        graph = graph_of(functools.partial(run_all, launches))
        log(
            "holes",
            side=side,
            nodes=len(kernels),
            share_of_macs=share,
            graph_us=median_us(graph.replay, 50, inner=4),
        )


def tiles(work: Any, num_sms: int) -> Iterator[Any]:
    """Tiles of 16-bit products to measure, the most promising first."""
    import triton
    from lgnet_fast.kernels.conv_configs import Tile

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
        if block_n > columns or block_m > rows:
            continue
        for block_k in (32, 64, 128):
            if work.flat and block_k == 128:
                continue
            if not work.flat and (work.in_channels % block_k or block_k > work.in_channels):
                continue
            steps = work.steps(block_k)
            blocks = -(-work.rows // block_m) * -(-work.columns // block_n) * len(work.taps)
            for splits in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64):
                if splits > 1 and (splits > max(steps) // 2 or blocks * splits > 2.2 * num_sms):
                    continue
                stage = block_k * (block_m + block_n) * 2
                stages = next((s for s in (5, 4, 3, 2) if s * stage <= 200_000 and s <= 2 + 64 * 6 // block_k), 2)
                for fused in (False, True) if splits > 1 else (False,):
                    tile = Tile(block_m, block_n, block_k, splits, warps, stages, fused)
                    ranked.append((_guess(work, tile, num_sms), tile))
    ranked.sort(key=lambda pair: pair[0])
    taken: Counter[tuple[int, ...]] = Counter()
    for _, tile in ranked:  # variety: the guess is no better than a factor of two
        shape = tile[:3] + tile[4:5]
        taken[shape] += 1
        if taken[shape] <= 3:
            yield tile


def _guess(work: Any, tile: Any, num_sms: int) -> float:
    """Clocks of a launch: matrix unit, issue and ingress of a multiprocessor, waves, weights from memory."""
    steps = work.steps(tile.block_k)
    per_step = max(
        tile.block_m * tile.block_n * tile.block_k / 2048 * (1.6 if tile.block_m < 64 else 1.2),
        tile.block_k * (tile.block_m + tile.block_n) * 2 / 56,
        160 * (tile.block_k / 64) ** 0.5,
    )
    longest = -(-max(steps) // tile.splits)
    blocks = -(-work.rows // tile.block_m) * -(-work.columns // tile.block_n) * len(work.taps)
    programs = blocks * tile.splits
    waves = -(-programs // num_sms) if programs > num_sms else 1
    weights = work.columns * sum(work.taps) * work.in_channels * 2 / 1700
    clocks = 1500 + max(waves * longest * per_step, weights / min(1.0, programs / num_sms))
    if tile.splits > 1:
        parts = tile.splits * tile.block_m * tile.block_n * 4
        clocks += (
            1000 + parts / 60 if tile.fused else 3500 + 2 * work.all_rows * work.columns * tile.splits * 4 / 3000
        )
    return clocks


class Contest:
    """One step with many tiles."""

    def __init__(self, plan: Any, dtype: torch.dtype) -> None:
        from lgnet_fast.engine.cuda_executor import CudaExecutor

        self.executor = CudaExecutor(plan, dtype, graphs=False)
        self.plan = plan

    def launch(self, number: int, tile: Any, weights: Any = None) -> Callable[[], None]:
        """A dense launch of one step."""
        executor, step = self.executor, self.plan.steps[number]
        kept = executor._weights[step.name]
        executor._chosen[step.name] = tile
        if weights is not None:
            executor._weights[step.name] = weights
        (launch,) = executor.step_launches(executor.memory, number)
        executor._weights[step.name] = kept
        return launch

    def outputs(self, number: int) -> Tensor:
        """What the step wrote."""
        step, memory = self.plan.steps[number], self.executor.memory
        if step.merges:
            return memory.outputs.clone()
        return memory.view(step.stores[0].view).float().clone()

    def time(self, number: int, tile: Any, copies: list[Any]) -> float:
        """Microseconds of a launch in a graph of LAUNCHES, over rotating copies of the weights."""
        launches = [self.launch(number, tile, copies[i % len(copies)]) for i in range(LAUNCHES)]
        graph = graph_of(functools.partial(run_all, launches))
        return median_us(graph.replay, 7) / LAUNCHES


def tune_convs(plan: Any, dtype: torch.dtype, log: Log, deadline: float, tried: int) -> dict[str, tuple[Any, float]]:
    """step -> (fastest right tile, microseconds) of every distinct product."""
    from lgnet_fast.kernels.launch import record
    from lgnet_fast.kernels.precompile import compile_all

    num_sms = torch.cuda.get_device_properties(0).multi_processor_count
    contest = Contest(plan, dtype)
    executor = contest.executor
    kind, generation, _ = executor._target()
    groups: dict[Any, list[int]] = {}
    for number, step in enumerate(plan.steps):
        if step.kind != "attention":
            work = executor._work(plan, step)
            # a residual, a second store and the end of a stage are part of the kernel, not of the product
            key = (work, step.merges, step.residual is not None, len(step.stores))
            groups.setdefault(key, []).append(number)
    chosen = {}
    queue = []
    for (work, *_), numbers in groups.items():
        default = executor.tile(plan.steps[numbers[0]])
        chosen[numbers[0]] = [default, *(t for t in list(tiles(work, num_sms))[:tried] if t != default)]
        with record() as launches:
            for tile in chosen[numbers[0]]:
                contest.launch(numbers[0], tile)()
        queue += launches
    begin = time.perf_counter()
    failures = compile_all(queue, 0)
    log("convs", compiled=len(queue), seconds=time.perf_counter() - begin, failures=failures[:20])
    best: dict[str, tuple[Any, float]] = {}
    # the steps that cost most first: NetL's blocks come eight times
    order = sorted(groups.items(), key=lambda item: -len(item[1]) * item[0][0].rows * sum(item[0][0].taps))
    for (work, *_), numbers in order:
        if time.perf_counter() > deadline:
            log("convs", cut_off=plan.steps[numbers[0]].name)
            break
        number = numbers[0]
        step = plan.steps[number]
        own = executor._weights[step.name]
        count = max(1, min(LAUNCHES, -(-ROTATED_BYTES // (own.packed.numel() * own.packed.element_size()))))
        if own.packed.numel() * own.packed.element_size() < 1 << 20:
            count = 1
        copies = [own, *(type(own)(own.packed.clone(), own.bias, None) for _ in range(count - 1))]
        executor.memory.arena.normal_()
        executor.memory.image.normal_()
        executor.memory.mask.fill_(1)
        expected = None
        results = []
        for tile in chosen[number]:
            try:
                executor.memory.outputs.zero_()
                contest.launch(number, tile)()
                torch.cuda.synchronize()
                actual = contest.outputs(number)
                if expected is None:
                    expected = actual
                error = ((actual - expected).norm() / expected.norm()).item()
                if not error < 5e-3:
                    log("convs", step=step.name, tile=list(tile), wrong=error)
                    continue
                results.append((contest.time(number, tile, copies), tile))
            except Exception as error:  # a tile that cannot run is no contestant
                log("convs", step=step.name, tile=list(tile), error=f"{type(error).__name__}: {error}"[:200])
        if not results:
            continue
        default_us = next((us for us, tile in results if tile == chosen[number][0]), None)
        results.sort()
        for other in numbers:
            best[plan.steps[other].name] = (results[0][1], results[0][0])
        log(
            "convs",
            step=step.name,
            times=len(numbers),
            key=[generation, kind, work.rows, work.columns, list(work.taps), work.in_channels],
            default_us=default_us,
            default=list(chosen[number][0]),
            best_us=results[0][0],
            best=list(results[0][1]),
            others=[[round(us, 2), *tile] for us, tile in results[1:8]],
        )
    return best


def tune_attention(plan: Any, dtype: torch.dtype, log: Log, deadline: float) -> None:
    """Block shapes of `attention_inference` for every attention step: the walk, the projection, the sum, in turn."""
    from lgnet_fast.kernels.attention_inference import attention_block_inference
    from lgnet_fast.kernels.cards import SHARED_LIMITS
    from lgnet_fast.kernels.configs import (
        _inference_bytes,
        config_kind,
        device_generation,
        override,
        pick_inference,
    )  # fmt: skip
    from lgnet_fast.kernels.conv_tables import INFERENCE
    from lgnet_fast.kernels.launch import dot_precision, record
    from lgnet_fast.kernels.precompile import compile_all

    kind = config_kind(dtype, dot_precision(dtype))
    generation, num_sms = device_generation(torch.device("cuda", 0))
    element = 4 if dtype == torch.float32 else 2

    def walks(config: Any, channels: int, positions: int) -> Iterator[Any]:
        for m, n, v, warps, stages, splits in itertools.product(
            (32, 64, 128), (32, 64, 128), (64, 128, 256), (4, 8), (2, 3), (1, 2, 4, 8)
        ):
            programs = plan.batch * -(-positions // m) * -(-channels // v)
            if v > triton_width(channels) or m > positions or n > positions:
                continue
            if splits > 1 and (programs * splits > num_sms or positions // splits < n):
                continue
            if programs * splits < min(24, programs * positions // n) or m * v > 128 * 128 or m * n > 128 * 128:
                continue
            if (m == 32 and warps == 8) or (m == 128 and warps == 4 and n == 128):
                continue
            new = config._replace(
                block_m=m, block_n=n, block_v=v, num_warps=warps, num_stages=stages, max_splits=splits
            )
            if _inference_bytes(new, channels, element) < 0.97 * SHARED_LIMITS[generation]:
                yield new

    def projections(config: Any, channels: int, positions: int) -> Iterator[Any]:
        for p, o, d in itertools.product((16, 32, 64, 128), (32, 64, 128), (32, 64, 128)):
            programs = plan.batch * -(-positions // p) * -(-channels // o)
            if o <= channels and d <= channels and p * o <= 64 * 128 and programs >= 24:
                yield config._replace(project_p=p, project_o=o, project_d=d)

    def sums(config: Any, channels: int, positions: int) -> Iterator[Any]:
        for m in (2, 4, 8, 16, 32):
            yield config._replace(sum_m=m)

    cases = []
    for step in plan.steps:
        if step.kind == "attention":
            source = plan.buffers[step.source.buffer]
            channels, side = step.out_channels, source.height
            x = torch.randn(plan.batch, channels, side, side, device="cuda", dtype=dtype)
            x = x.to(memory_format=torch.channels_last).mul_(0.5)
            weight = (torch.randn(channels, 2 * channels, 1, 1, device="cuda") / channels**0.5).to(dtype)
            bias = torch.zeros(channels, device="cuda", dtype=dtype)
            call = functools.partial(attention_block_inference, x, weight, bias, "released", out=torch.empty_like(x))
            config = pick_inference(generation, kind, channels, side * side, plan.batch, num_sms)
            cases.append([step.name, channels, side * side, call, config])
    for part, options in (("walk", walks), ("projection", projections), ("sum", sums)):
        queue = []
        for _, channels, positions, call, config in cases:
            for new in (config, *options(config, channels, positions)):
                with override("inference", new), record() as launches:
                    call()
                queue += launches
        begin = time.perf_counter()
        failures = compile_all(queue, 0)
        log("attention", part=part, compiled=len(queue), seconds=time.perf_counter() - begin, failures=failures[:10])
        for case in cases:
            name, channels, positions, call, config = case
            if time.perf_counter() > deadline:
                log("attention", cut_off=name)
                return
            results = []
            expected = None
            for new in dict.fromkeys((config, *options(config, channels, positions))):
                try:
                    with override("inference", new):
                        actual = call().float().clone()
                        torch.cuda.synchronize()
                        expected = actual if expected is None else expected
                        error = ((actual - expected).norm() / expected.norm()).item()
                        if not error < 1e-2:
                            log("attention", step=name, part=part, config=list(new), wrong=error)
                            continue
                        graph = graph_of(functools.partial(run_all, [call] * 8))
                    results.append((median_us(graph.replay, 7) / 8, new))
                except Exception as error:  # a shape that cannot run is no contestant
                    log("attention", step=name, config=list(new), error=f"{type(error).__name__}: {error}"[:200])
            if not results:
                continue
            default_us = results[0][0]
            results.sort()
            log(
                "attention",
                step=name,
                part=part,
                key=[generation, kind, channels, positions, plan.batch],
                default_us=default_us,
                best_us=results[0][0],
                best=list(results[0][1]),
                others=[[round(us, 2), *new] for us, new in results[1:6]],
            )
            case[4] = results[0][1]
            INFERENCE[generation, kind, channels, positions, plan.batch] = tuple(case[4])


def triton_width(channels: int) -> int:
    """The power of two that holds `channels`."""
    return 1 << (channels - 1).bit_length()


def peers(model: Any, plan: Any, dtype: torch.dtype, log: Log) -> None:
    """The engine's graph in turn with other forms of the same network; what compiles longest comes last."""
    import copy

    from lgnet_fast.engine.cuda_executor import CudaExecutor

    image, mask = picture(plan.batch)
    executor = CudaExecutor(plan, dtype, graphs=False)
    executor.run(image, mask)
    ours = graph_of(functools.partial(run_all, executor._launches(executor.memory, None, False)))
    half = copy.deepcopy(model).to(dtype).set_backend("eager")
    last = copy.deepcopy(half).to(memory_format=torch.channels_last)
    inputs = [t.to(dtype) for t in (image, mask)]
    inputs_last = [t.to(memory_format=torch.channels_last) for t in inputs]
    with torch.no_grad():
        captured = graph_of(lambda: last(*inputs_last))
        forms: dict[str, Callable[[], Any]] = {
            "eager": lambda: half(*inputs),
            "eager, channels last": lambda: last(*inputs_last),
            "eager, channels last, CUDA graph": captured.replay,
        }
        for mode in ("default", "max-autotune"):
            compiled = torch.compile(copy.deepcopy(last), mode=None if mode == "default" else mode)
            forms[f"torch.compile {mode}, channels last"] = functools.partial(compiled, *inputs_last)
        for name, form in forms.items():
            begin = time.perf_counter()
            try:
                for _ in range(4):
                    form()
                torch.cuda.synchronize()
                first = time.perf_counter() - begin
                rounds = [(median_us(ours.replay, 10, inner=4), median_us(form, 10, inner=4)) for _ in range(3)]
            except Exception as error:  # a form that cannot run here is no contestant
                log("peers", form=name, error=f"{type(error).__name__}: {error}"[:200])
                continue
            ratios = sorted(b / a for a, b in rounds)
            log(
                "peers",
                form=name,
                ours_us=[round(a, 1) for a, _ in rounds],
                us=[round(b, 1) for _, b in rounds],
                times_slower_than_ours=ratios[1],
                first_calls_s=round(first, 1),
                pictures_a_second_ours=round(plan.batch * 1e6 / min(a for a, _ in rounds)),
            )


def main() -> int:
    """Measure what the arguments name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--sections", default="compile,buffers,graph,steps,holes,peers,attention,convs")
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--model", default="lgnet")
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--tried", type=int, default=30, help="tiles a convolution")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("no NVIDIA GPU here: nothing to measure")
        return 0
    import triton
    from lgnet_fast.kernels.precompile import compile_all

    from lgnet_fast.engine.cuda_executor import CudaExecutor

    deadline = time.perf_counter() + 60 * args.minutes
    sections = args.sections.split(",")
    log = Log(args.results / f"contact_{args.model}_{args.dtype}_b{args.batch}.jsonl")
    properties = torch.cuda.get_device_properties(0)
    log(
        "machine",
        device=properties.name,
        multiprocessors=properties.multi_processor_count,
        torch=torch.__version__,
        triton=triton.__version__,
    )
    dtype = getattr(torch, args.dtype)
    model, plan = model_and_plan(args.model, args.batch)
    choices: dict[str, Any] = {}
    if "compile" in sections:
        for flag in (False, True) if properties.major >= 9 else (False,):
            launches = recorded(CudaExecutor(plan, dtype, overlap=flag, graphs=False))
            begin = time.perf_counter()
            failures = compile_all(launches, 0)
            log("compile", launches=len(launches), seconds=time.perf_counter() - begin, failures=failures)
    if "buffers" in sections:
        check_buffers(CudaExecutor(plan, dtype, graphs=False), plan, log)
    if "graph" in sections:
        time_graph(plan, dtype, choices, log, "shipped")
    if "steps" in sections:
        time_steps(plan, dtype, choices, log)
    if "holes" in sections:
        time_holes(plan, dtype, log)
    if "attention" in sections:
        tune_attention(plan, dtype, log, deadline)
    if "convs" in sections:
        best = tune_convs(plan, dtype, log, deadline - 30, args.tried)
        choices = {name: tile for name, (tile, _) in best.items()}
        time_graph(plan, dtype, choices, log, "tuned convolutions")
        time_steps(plan, dtype, choices, log)
    if "peers" in sections:
        peers(model, plan, dtype, log)
    return 0


if __name__ == "__main__":
    sys.exit(main())
