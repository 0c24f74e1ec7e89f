"""Checks every step on a GPU, and measures where the time goes: for the first minutes on a new one.

    python bench/gpu_contact.py RESULTS [--model lgnet] [--dtype float16] [--batch 1] [--minutes 5]
                                [--sections compile,buffers,...]

Each figure is written to RESULTS/contact_<model>_<dtype>_b<batch>.jsonl at once, one JSON object per line, so that an
interrupted run keeps its measurements. A section that fails is noted there, and the next one runs.

=========  ==========================================================================================================
compile    every kernel of the dense plan, in parallel processes
buffers    a run without graphs; every step's output beside the plan in plain PyTorch, float32: the first wrong step
           is named
graph      the whole forward: launched one by one, as a graph, without and with overlapping launches; by shipped
           choices, then by those of an engine's first use, which the sections after it have too
steps      each step in place: graphs of the first k steps, and differences, so weights come from memory
holes      graphs restricted to square holes of 16, 64 and 128 pixels
calls      whole calls of the engine on a picture on the GPU, with the host's work that a graph's replay does not need
attention  block shapes of `attention_inference`: the loop over the keys, the projection, the sum over splits
convs      tiles of every distinct convolution, timed in graphs that rotate copies of the weights (cold, as in place)
peers      the engine beside the model in eager PyTorch (channels last, with and without a graph) and torch.compile,
           each with its error
=========  ==========================================================================================================
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor

from lgnet_fast.engine.cuda.launches import run_all
from lgnet_fast.ops.torch_state import strict_float32

if TYPE_CHECKING:
    from lgnet_fast.engine.cuda.graph_executor import GraphExecutor


SECTIONS = ("compile", "buffers", "graph", "steps", "holes", "calls", "peers", "attention", "convs")


def sections_of(known: Sequence[str]) -> Callable[[str], str]:
    """A type for argparse: names of `known` between commas. Other names would measure nothing."""

    def checked(text: str) -> str:
        for name in text.split(","):
            if name not in known:
                raise argparse.ArgumentTypeError(f"expected names of {', '.join(known)}, got {name!r}")
        return text

    return checked


class Log:
    """Lines of JSON, flushed at once."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a")
        self._start = time.perf_counter()

    def __call__(self, section: str, **figures: Any) -> None:
        figures = {"section": section, "at_s": round(time.perf_counter() - self._start, 1), **figures}
        self._file.write(json.dumps(figures) + "\n")
        self._file.flush()
        print(json.dumps(figures)[:400], flush=True)


def median_us(call: Callable[[], object], repeats: int = 20, inner: int = 1) -> float:
    """Microseconds per call: the median of `repeats` event timings of `inner` calls."""
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


def graph_of(launches: Callable[[], None], spread: bool = False) -> torch.cuda.CUDAGraph:
    """A CUDA graph of `launches`, which run once before the capture; `spread`: see `capture`."""
    from lgnet_fast.engine.cuda.graphs import Pool, capture

    device = torch.device("cuda", torch.cuda.current_device())
    return capture(launches, device, Pool(device), spread)


def model_and_plan(name: str, batch: int) -> tuple[Any, Any]:
    """A network on the GPU with random weights that keep features nonzero through all layers, and its dense plan."""
    from lgnet_fast import create_model
    from lgnet_fast.engine.build import build_plan, plan_stages

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
    """A picture of noise, and a hole that covers a quarter of it."""
    generator = torch.Generator(device="cuda").manual_seed(1)
    image = torch.randn(batch, 3, 256, 256, generator=generator, device="cuda").mul_(0.5).clamp_(-1, 1)
    mask = torch.zeros(batch, 1, 256, 256, device="cuda")
    mask[..., 64:192, 64:192] = 1
    return image, mask


def recorded(executor: Any) -> list[Any]:
    """The recorded launches of a dense run."""
    from lgnet_fast.kernels.launch import record

    with record() as launches:
        run_all(executor.launches())
    return launches


def check_buffers(executor: Any, plan: Any, log: Log) -> None:
    """Compare the output of every step, on the executor's inputs, with the same step in float32."""
    from lgnet_fast.engine.torch_executor import TorchExecutor

    image, mask = picture(plan.batch)
    executor.memory.arena.fill_(torch.nan)
    exact = TorchExecutor(plan)
    result, _ = executor.run(image, mask)
    with strict_float32():  # PyTorch's convolutions are in TF32 by default
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
    # Every step separately, so that errors do not propagate.
    for number, step in enumerate(plan.steps):
        if step.merges:
            continue
        log_step_error(executor, plan, number, log)


def log_step_error(executor: Any, plan: Any, number: int, log: Log) -> None:
    """Compare one step on noise with PyTorch in float32."""
    import torch.nn.functional as F

    from lgnet_fast.engine.plan import AttentionStep
    from lgnet_fast.engine.torch_executor import convolution
    from lgnet_fast.reference.attention import attention_block

    step = plan.steps[number]
    executor.memory.arena.normal_()
    run_all(executor.step_launches(executor.memory, number))
    own = executor.memory.view(step.stores[0].view).float()
    x = executor.memory.view(step.source).float().permute(0, 3, 1, 2)
    with strict_float32():
        if isinstance(step, AttentionStep):
            value = attention_block(x, step.weight.float(), step.bias.float(), step.variant)
        else:
            value = convolution(step.geometry, x, step.weight.float(), step.bias.float())
    if step.residual is not None:
        value = value + executor.memory.view(step.residual).float().permute(0, 3, 1, 2)
    activation = step.stores[0].activation
    if activation == "relu":
        value = F.relu(value)
    elif activation == "leaky_relu":
        value = F.leaky_relu(value, 0.2)
    value = value.permute(0, 2, 3, 1)
    error = ((own - value).norm() / value.norm()).item()
    log("buffers", step=step.name, relative_error=error, right=error < 2e-2)


def time_graph(plan: Any, dtype: torch.dtype, tuned: Any, log: Log, label: str) -> None:
    """Time the whole forward in several forms; "operators": by PyTorch's alone, as on a GPU without Triton."""
    from lgnet_fast.engine.cuda.weights import Overlap

    first: list[Tensor] = []
    for overlap in (*get_args(Overlap), "operators"):
        try:
            time_form(plan, dtype, tuned, overlap, first, functools.partial(log, "graph", label=label))
        except Exception as error:  # a form that cannot run here is left out
            log("graph", label=label, overlap=overlap, error=f"{type(error).__name__}: {error}"[:400])


def time_form(
    plan: Any, dtype: torch.dtype, tuned: Any, overlap: Any, first: list[Tensor], log: Callable[..., None]
) -> None:
    """Time one form of the forward. first: the picture of the form that ran first, or empty."""
    from lgnet_fast.engine.cuda.executor import CudaExecutor
    from lgnet_fast.engine.cuda.operator_executor import OperatorExecutor

    image, mask = picture(plan.batch)
    executor: GraphExecutor
    if overlap == "operators":
        executor = OperatorExecutor.of(plan, dtype, device=image.device, graphs=False)
    else:
        executor = CudaExecutor.of(plan, dtype, tuned=tuned, overlap=overlap, graphs=False)
    launches = functools.partial(run_all, executor.launches())
    executor.run(image, mask)
    direct = median_us(launches, 10)
    graph = graph_of(launches, overlap == "spread")
    replayed = median_us(graph.replay, 50, inner=4)
    result = executor.memory.outputs[0].clone()
    same = 0
    for _ in range(50):
        graph.replay()
        same += torch.equal(executor.memory.outputs[0], result)
    first[:] = first or [result]
    log(
        overlap=overlap,
        direct_us=direct,
        graph_us=replayed,
        pictures_a_second=round(plan.batch * 1e6 / replayed),
        equal_of_50=same,
        equal_to_first=torch.equal(result, first[0]),
        worst=(result - first[0]).abs().max().item(),
    )


def time_steps(plan: Any, dtype: torch.dtype, tuned: Any, log: Log) -> None:
    """Time graphs of the first k steps; the time of a step is the difference."""
    from lgnet_fast.engine.cuda.executor import CudaExecutor

    executor = CudaExecutor.of(plan, dtype, tuned=tuned, graphs=False)
    image, mask = picture(plan.batch)
    executor.run(image, mask)
    launches = executor.launches()
    names = ["paint", *(step.name for step in plan.steps)]
    graphs = [graph_of(functools.partial(run_all, launches[: k + 1])) for k in range(len(launches))]
    best = [float("inf")] * len(graphs)
    for _ in range(3):  # in turn, so that a change of the GPU's clocks affects all of them
        for k, graph in enumerate(graphs):
            best[k] = min(best[k], median_us(graph.replay, 10, inner=4))
    before = 0.0
    chosen = executor.choices
    for name, total in zip(names, best):
        log("steps", step=name, us=total - before, until_us=total, tile=chosen.get(name, ""))
        before = total


def time_holes(plan: Any, dtype: torch.dtype, tuned: Any, log: Log) -> None:
    """Time restricted graphs, with the dense one and their share of its multiplications."""
    from lgnet_fast.kernels.launch import record
    from lgnet_fast.kernels.precompile import compile_all

    from lgnet_fast.engine.cuda.executor import CudaExecutor
    from lgnet_fast.engine.regions import Rect

    executor = CudaExecutor.of(plan, dtype, tuned=tuned, graphs=False)
    image, mask = picture(plan.batch)
    executor.run(image, mask)
    dense = plan.total_macs()
    for side in (16, 64, 128, None):
        regions, share = None, 1.0
        if side is not None:
            start = (plan.height - side) // 2 - 5  # off the grid that rectangles are rounded to
            hole = Rect(start, start + side, start, start + side)
            restricted = executor.restricted(plan, [hole])
            regions, share = tuple(step.regions for step in restricted.steps), restricted.total_macs() / dense
        launches = executor.launches(regions)
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


def time_calls(model: Any, plan: Any, dtype: torch.dtype, log: Log) -> None:
    """Time calls of an engine as a program makes them: until a call returns, and until its result is there."""
    from lgnet_fast import optimize

    image, mask = picture(plan.batch)
    size = (plan.height, plan.width)
    engine = optimize(model, size, device=image.device, dtype=dtype, batch_size=plan.batch)
    for side in (64, 128, None):
        mask.fill_(side is None)
        if side is not None:
            start = (plan.height - side) // 2 - 5
            mask[..., start : start + side, start : start + side] = 1
        times = []
        for number in range(60):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            engine(image, mask)
            returned = time.perf_counter()
            torch.cuda.synchronize()
            if number >= 10:  # the first ones compile kernels and capture graphs
                times.append((returned - begin, time.perf_counter() - begin))
        returns, ends = (1e6 * statistics.median(some) for some in zip(*times))
        log("calls", side=side, returns_us=round(returns, 1), ends_us=round(ends, 1))


def peer_forms(model: Any, dtype: torch.dtype, image: Tensor, mask: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Forms of `model` in plain PyTorch, each of which returns the whole picture."""
    import copy

    half = copy.deepcopy(model).to(dtype)
    last = copy.deepcopy(half).to(memory_format=torch.channels_last)
    inputs = [t.to(dtype) for t in (image, mask)]
    inputs_last = [t.to(memory_format=torch.channels_last) for t in inputs]
    result = torch.empty_like(inputs[0])

    def write_result() -> None:
        result.copy_(last(*inputs_last))

    captured = graph_of(write_result)

    def replayed() -> Tensor:
        captured.replay()
        return result

    forms: dict[str, Callable[[], Tensor]] = {
        "eager": lambda: half(*inputs),
        "eager, channels last": lambda: last(*inputs_last),
        "eager, channels last, CUDA graph": replayed,
    }
    for mode in ("default", "max-autotune"):
        compiled = torch.compile(copy.deepcopy(last), mode=None if mode == "default" else mode)
        forms[f"torch.compile {mode}, channels last"] = functools.partial(compiled, *inputs_last)
    return forms


@torch.no_grad()
def peers(model: Any, plan: Any, dtype: torch.dtype, log: Log) -> None:
    """Time the engine's graph in turn with other forms of the same network; the slowest to compile is last.

    Each form's error in the hole, relative to the model in float32, stands beside its time.
    """
    import copy

    from lgnet_fast.engine.cuda.executor import CudaExecutor

    image, mask = picture(plan.batch)
    executor = CudaExecutor.of(plan, dtype, graphs=False)
    executor.run(image, mask)
    ours = graph_of(functools.partial(run_all, executor.launches()))
    plain = copy.deepcopy(model).set_backend("eager")
    with strict_float32():
        exact = plain(image, mask)

    def error_of(output: Tensor) -> float:
        return ((output.float() - exact) * mask).norm().item() / (exact * mask).norm().item()

    own_error = error_of(executor.memory.outputs[0])
    for name, form in peer_forms(plain, dtype, image, mask).items():
        begin = time.perf_counter()
        try:
            for _ in range(4):
                error = error_of(form())
            first = time.perf_counter() - begin
            rounds = [(median_us(ours.replay, 10, inner=4), median_us(form, 10, inner=4)) for _ in range(3)]
        except Exception as problem:  # a form that cannot run here is left out
            log("peers", form=name, error=f"{type(problem).__name__}: {problem}"[:200])
            continue
        ratios = sorted(b / a for a, b in rounds)
        log(
            "peers",
            form=name,
            ours_us=[round(a, 1) for a, _ in rounds],
            us=[round(b, 1) for _, b in rounds],
            times_slower_than_ours=ratios[1],
            first_calls_s=round(first, 1),
            relative_error=error,
            relative_error_ours=own_error,
            right=max(error, own_error) < 16 * torch.finfo(dtype).eps,
            pictures_a_second_ours=round(plan.batch * 1e6 / min(a for a, _ in rounds)),
        )


def compile_dense(plan: Any, dtype: torch.dtype, can_overlap: bool, log: Log) -> None:
    """Compile the kernels of a dense run; where launches can overlap, also those of overlapping launches."""
    from lgnet_fast.kernels.precompile import compile_all

    from lgnet_fast.engine.cuda.executor import CudaExecutor

    for overlap in ("none", "plain") if can_overlap else ("none",):
        launches = recorded(CudaExecutor.of(plan, dtype, overlap=overlap, graphs=False))
        begin = time.perf_counter()
        failures = compile_all(launches, 0)
        log("compile", launches=len(launches), seconds=time.perf_counter() - begin, failures=failures)


def search_shapes(
    sections: Sequence[str], plan: Any, dtype: torch.dtype, log: Log, tried: int, deadline: float
) -> None:
    """Measure block shapes of attention and tiles of convolutions, then time whole runs with the fastest ones.

    Args:
        sections: those to measure, of "attention" and "convs".
        plan, dtype: of the measured steps.
        log: called with the figures.
        tried: tiles per convolution.
        deadline: no new measurement begins after this time of ``time.perf_counter``.
    """
    from lgnet_fast.engine.cuda.measure import Found, Timer
    from lgnet_fast.engine.cuda.tuning_attention import tune_attention
    from lgnet_fast.engine.cuda.tuning_convolutions import Contest, tune_convolutions

    device = torch.device("cuda", torch.cuda.current_device())
    found, timer = Found(), Timer(device)

    def over(seconds_before: float) -> bool:
        return time.perf_counter() > deadline - seconds_before

    if "attention" in sections:
        tune_attention(plan, dtype, device, found, timer, log, lambda: None, functools.partial(over, 0.0))
    if "convs" in sections:
        contest = Contest(plan, dtype, device)
        candidates = functools.partial(contest.candidates, tried=tried)
        tune_convolutions(contest, found, timer, log, lambda: None, candidates, functools.partial(over, 30.0))
        time_graph(plan, dtype, found.tuned(), log, "tuned")
        time_steps(plan, dtype, found.tuned(), log)


def measure(args: argparse.Namespace) -> int:
    """Measure the sections of the arguments on the current GPU; return the number of those that failed."""
    import triton

    from lgnet_fast.engine.cuda.executor import CudaExecutor
    from lgnet_fast.engine.cuda.first_use import at_first_use
    from lgnet_fast.engine.cuda.weights import Tuned

    deadline = time.perf_counter() + 60 * args.minutes
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
    asked = args.sections.split(",")

    @functools.cache
    def measured() -> Tuned:
        return at_first_use(plan, dtype, torch.device("cuda", torch.cuda.current_device()))

    def graph() -> None:
        time_graph(plan, dtype, Tuned(), log, "shipped")
        time_graph(plan, dtype, measured(), log, "first use")

    sections: dict[str, Callable[[], None]] = {
        "compile": lambda: compile_dense(plan, dtype, properties.major >= 9, log),
        "buffers": lambda: check_buffers(CudaExecutor.of(plan, dtype, graphs=False), plan, log),
        "graph": graph,
        "steps": lambda: time_steps(plan, dtype, measured(), log),
        "holes": lambda: time_holes(plan, dtype, measured(), log),
        "calls": lambda: time_calls(model, plan, dtype, log),
        "attention,convs": lambda: search_shapes(asked, plan, dtype, log, args.tried, deadline),
        "peers": lambda: peers(model, plan, dtype, log),
    }
    failed = 0
    for names, section in sections.items():
        if set(names.split(",")) & set(asked):
            try:
                section()
            except Exception as error:  # the others are measured nevertheless
                failed += 1
                log(names, failed=f"{type(error).__name__}: {error}"[:1000])
    return failed


def main() -> int:
    """Measure the sections of the arguments, where there is a GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--sections", type=sections_of(SECTIONS), default=",".join(SECTIONS))
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--model", default="lgnet")
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--tried", type=int, default=30, help="tiles a convolution")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("no NVIDIA GPU here: nothing to measure")
        return 0
    return 1 if measure(args) else 0


if __name__ == "__main__":
    sys.exit(main())
