"""Checks and times the deep layers in one launch (`kernels/deep.py`) on a Hopper GPU.

    python -m bench.deep_contact RESULTS [--model lgnet] [--dtype float16] [--seconds 85] [--sections load,layers,...]

Sections run in separate processes, so that a failure does not affect the next; the most informative are first.
Figures are written to RESULTS/deep_<model>_<dtype>.jsonl at once, one JSON object per line. The Triton kernels of the
graph are compiled at the same time.

======  =============================================================================================================
load    machine code, how many clusters fit on the GPU, which are chosen, whether a cooperative launch is accepted
layers  every layer separately on noise, compared with float32: the first wrong element, whether repeats are equal
chain   the whole group on noise, every layer on the result of the previous one; repeats; whether the state is ready
graph   the dense graph with and without the kernel, in turn, with variants of the launch; the pictures compared
clocks  the parts of a launch's time: clocks of every layer since its begin, the median over blocks
======  =============================================================================================================

A launch that hangs ends after a fifth of a second and reports which wait timed out.
"""

from __future__ import annotations

import argparse
import functools
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.gpu_contact import Log, graph_of, median_us, model_and_plan, picture, sections_of
from lgnet_fast.engine.cuda.launches import run_all

SECTIONS = ("load", "layers", "chain", "graph", "clocks")
PROCESSES = (("load", "layers"), ("chain",), ("graph", "clocks"))
TIMEOUT = 400_000_000
REPEATS = 20
VARIANTS: dict[str, dict[str, Any]] = {
    "shipped": {},
    "overlapped": {"overlap": True, "cooperative": False},
    "weights kept in the L2 cache": {"evict_first": False},
    "clusters of 4": {"cluster": 4},
}
GRAPHS = (("shipped", 16), ("shipped", 64), ("overlapped", 16), ("overlapped", 64))


class Bench:
    """The plan, its packed weights, and groups of its steps."""

    def __init__(self, model: str, dtype: torch.dtype) -> None:
        from lgnet_fast.kernels.deep import held_clusters

        from lgnet_fast.engine.cuda.executor import CudaExecutor

        self.model, self.plan = model_and_plan(model, 1)
        self.dtype = dtype
        self.executor = CudaExecutor.of(self.plan, dtype, graphs=False, deep_rows=0)
        self.weights = self.executor.weights.steps
        self.packs: dict[Any, Tensor] = {}
        self.held = held_clusters(self.executor.device, dtype)
        self.defaults: dict[str, Any] = {"timeout": TIMEOUT}

    def groups(self, rows: int, cluster: int | None = None, **options: Any) -> dict[int, Any]:
        """First step -> group, or why there is none."""
        from lgnet_fast.kernels.deep_shapes import best_cluster

        from lgnet_fast.engine.cuda import deep_layers as deep
        from lgnet_fast.engine.cuda import grouped

        found: dict[int, Any] = {}
        for numbers in deep.runs(self.plan, rows):
            held = self.held if cluster is None else {cluster: self.held[cluster]}
            steps = grouped.steps_at(self.plan, numbers[0], len(numbers))
            best = best_cluster([grouped.layer_of(self.plan, step) for step in steps], held)
            found[numbers[0]] = best
            if not isinstance(best, str):
                given = {**self.defaults, **options}
                found[numbers[0]] = deep.make_group(self.plan, numbers, self.weights, self.packs, *best, **given)
        return found

    def launches(self, groups: dict[int, Any]) -> list[Any]:
        """A dense run with these groups."""
        self.executor._groups = groups
        return self.executor.launches()

    def choose_launch(self, log: Log) -> None:
        """Launch without the cooperative attribute where the driver rejects it."""
        from lgnet_fast.engine.cuda import deep_layers as deep
        from lgnet_fast.engine.cuda import grouped

        first, group = next((f, g) for f, g in self.groups(16).items() if not isinstance(g, str))
        steps = self.plan.steps[first : first + len(group.layers)]
        maps = grouped.noise_maps(self.plan, steps, self.dtype, self.executor.device)
        launch, _ = deep.group_launch(self.plan, first, group, functools.partial(grouped.view_of, maps))
        refused = None
        try:
            launch()
        except RuntimeError as error:
            refused = str(error)
            self.defaults["cooperative"] = False
        torch.cuda.synchronize()
        log("load", cooperative=refused is None, refused=refused)


def where_wrong(stored: Tensor, exact: Tensor) -> dict[str, Any]:
    """Relative error, and where the first wrong elements lie, [sample, y, x, channel]."""
    scale = exact.square().mean().sqrt().item()
    bad = ~((stored - exact).abs() <= 0.05 * scale)  # NaN is wrong
    found: dict[str, Any] = {"relative_error": ((stored - exact).norm() / exact.norm()).item()}
    if bad.any():
        places = bad.nonzero()
        found["wrong"] = len(places)
        found["of"] = bad.numel()
        found["nan"] = int(stored.isnan().sum())
        found["first"] = [
            [p, round(stored[tuple(p)].item(), 4), round(exact[tuple(p)].item(), 4)] for p in places[:4].tolist()
        ]
        found["wrong_channels_mod_32"] = sorted({p % 32 for p in places[:4096, 3].tolist()})
        found["wrong_pixels"] = sorted({tuple(p) for p in places[:4096, 1:3].tolist()})[:16]
    return found


def load(bench: Bench, log: Log) -> None:
    from lgnet_fast.kernels import deep, deep_shapes

    device = torch.cuda.get_device_name()
    log("load", device=device, unavailable=deep.unavailable(bench.executor.device, bench.dtype), held=bench.held)
    for rows in (16, 64):
        for cluster in (None, *deep_shapes.CLUSTERS):
            first, group = next(iter(bench.groups(rows, cluster).items()))
            figures = {"rows": rows, "asked": cluster, "first": bench.plan.steps[first].name}
            if isinstance(group, str):
                log("load", **figures, refused=group)
                continue
            weights = [sum(share.block_bytes(c) for share in group.shares) for c in range(group.clusters)]
            log(
                "load",
                **figures,
                cluster=group.cluster,
                clusters=group.clusters,
                slots=group.slots,
                shared=group.bytes,
                weights_of_a_block=[min(weights), max(weights)],
            )
    bench.choose_launch(log)


def _untouched(steps: Any, before: dict[str, Tensor], maps: dict[str, Tensor]) -> bool:
    """Whether nothing but the stores of `steps` has changed."""
    from lgnet_fast.engine.cuda.grouped import view_of

    kept = {name: value.clone() for name, value in maps.items()}
    for step in steps:
        for store in step.stores:
            view_of(kept, store.view).copy_(view_of(before, store.view))
    return all(torch.equal(kept[name], before[name]) for name in kept)


def _check(
    bench: Bench, log: Log, section: str, rows: int, options: dict[str, Any], only: bool, nets: int | None = None
) -> bool:
    """Whether the groups (the first `nets` of them) are right; `only`: each layer by itself."""
    from lgnet_fast.kernels.deep_exchange import ABSENT, STATE_STRIDE

    from lgnet_fast.engine.cuda import deep_layers as deep
    from lgnet_fast.engine.cuda import grouped

    right = True
    for first, group in list(bench.groups(rows, **options).items())[:nets]:
        if isinstance(group, str):
            log(section, rows=rows, options=options, refused=group)
            right = False
            continue
        steps = grouped.steps_at(bench.plan, first, len(group.layers))
        for number in range(len(steps)) if only else (None,):
            checked = steps if number is None else steps[number : number + 1]
            maps = grouped.noise_maps(bench.plan, steps, bench.dtype, bench.executor.device)
            before = {name: value.clone() for name, value in maps.items()}
            view = functools.partial(grouped.view_of, maps)
            launch, state = deep.group_launch(bench.plan, first, group, view, only=number)
            try:
                launch()
            except RuntimeError as refused:
                log(section, rows=rows, options=options, refused=str(refused))
                return False
            torch.cuda.synchronize()
            error = state.error()
            counters = state.counters[: 2 * STATE_STRIDE : STATE_STRIDE].tolist()
            untouched = _untouched(checked, before, maps)
            places = [
                (step, where_wrong(stored, exact))
                for step, stored, exact in grouped.step_errors(bench.plan, checked, bench.weights, maps)
            ]
            kept = {name: value.clone() for name, value in maps.items()}
            equal = 0
            for _ in range(REPEATS if error is None else 0):
                launch()
                equal += all(torch.equal(maps[name], kept[name]) for name in maps)
            turn = int(state.counters[2 * STATE_STRIDE])
            ready = not any(counters) and bool((state.exchange[turn] == ABSENT).all())
            for step, place in places:
                fine = "wrong" not in place and error is None and equal == REPEATS and untouched and ready
                right &= fine
                log(
                    section,
                    rows=rows,
                    options=options,
                    step=step.name,
                    right=fine,
                    error=error,
                    equal=equal,
                    ready=ready,
                    untouched=untouched,
                    **place,
                )
    return right


def layers(bench: Bench, log: Log) -> None:
    _check(bench, log, "layers", 64, {}, True, 1)


def chain(bench: Bench, log: Log) -> None:
    every = list(VARIANTS.values())
    for rows, options in ((64, every[0]), (16, every[0]), *((16, options) for options in every[1:])):
        right = _check(bench, log, "chain", rows, options, False, None if options == {} else 1)
        log("chain", rows=rows, options=options, all_right=right)


def graph(bench: Bench, log: Log) -> None:
    image, mask = picture(1)
    bench.executor.memory.take(image, mask, None)
    captured: dict[str, Any] = {}
    pictures: dict[str, Tensor] = {}
    for name, rows in (("one by one", 0), *GRAPHS):
        label = f"{name}, {rows} rows" if rows else name
        try:
            groups = bench.groups(rows, **VARIANTS[name]) if rows else {}
            if any(isinstance(group, str) for group in groups.values()):
                log("graph", label=label, refused=[str(group) for group in groups.values()])
                continue
            launches = bench.launches(groups)
            run_all(launches)
            torch.cuda.synchronize()
            one = graph_of(functools.partial(run_all, launches))
            one.replay()
            pictures[label] = bench.executor.memory.outputs[0].clone()
            equal = 0
            for _ in range(REPEATS):
                one.replay()
                equal += torch.equal(bench.executor.memory.outputs[0], pictures[label])
            captured[label] = one, launches
        except Exception as error:
            log("graph", label=label, failed=f"{type(error).__name__}: {error}"[:300])
            continue
        difference = pictures[label] - pictures["one by one"]
        log(
            "graph",
            label=label,
            nodes=len(launches),
            equal=equal,
            finite=bool(pictures[label].isfinite().all()),
            rms_to_one_by_one=difference.square().mean().sqrt().item(),
        )
    times: dict[str, list[float]] = {label: [] for label in captured}
    for _ in range(5):  # in turn, so that a change of the GPU's clocks affects all of them
        for label, (one, _) in captured.items():
            times[label].append(median_us(one.replay, 20, inner=4))
    base = min(times["one by one"])
    for label, found in times.items():
        log(
            "graph",
            label=label,
            graph_us=min(found),
            all_us=[round(t, 1) for t in found],
            gained_us=base - min(found),
        )


def clocks(bench: Bench, log: Log) -> None:
    from lgnet_fast.engine.cuda.deep_layers import group_launch

    image, mask = picture(1)
    bench.executor.memory.take(image, mask, None)
    for name, rows in (("shipped", 16), ("shipped", 64), ("weights kept in the L2 cache", 16), ("clusters of 4", 16)):
        for first, group in list(bench.groups(rows, **VARIANTS[name]).items())[:1]:
            if isinstance(group, str):
                continue
            times = group.new_times()
            view = bench.executor.memory.view
            launch, state = group_launch(bench.plan, first, group, view, times=times)
            plain = bench.launches({})
            one = graph_of(functools.partial(run_all, [*plain[: 1 + first], launch]))
            seen = []
            for _ in range(15):
                one.replay()
                torch.cuda.synchronize()
                seen.append(times.clone())
            if (error := state.error()) is not None:
                log("clocks", variant=name, rows=rows, error=error)
                continue
            clock = torch.stack(seen).double()  # [repeats, layers, blocks, 6]
            begin = clock[:, :1, :, :1]
            clock[clock == 0] = torch.nan  # of blocks without work
            since = (clock - begin).nanmedian(2).values.median(0).values
            late = (clock - begin).nan_to_num(0).amax(2).median(0).values
            for number, layer in enumerate(group.layers):
                log(
                    "clocks",
                    variant=name,
                    rows=rows,
                    step=bench.plan.steps[first + number].name,
                    names=["begin", "positions", "products", "sums sent", "sums received", "stored"],
                    median=[int(c) for c in since[number].tolist()],
                    last_block=[int(c) for c in late[number].tolist()],
                    size=list(layer.out_size),
                )


def compile_kernels(bench: Bench, log: Log) -> None:
    """Compile the Triton kernels of the graph into Triton's cache."""
    bench.executor.precompile()
    log("compile_kernels")


def main() -> int:
    """Measure the sections of the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    known = sections_of((*SECTIONS, "compile_kernels"))
    parser.add_argument("--sections", type=known, default=",".join(SECTIONS))
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--model", default="lgnet")
    parser.add_argument("--seconds", type=float, default=85)
    parser.add_argument("--here", action="store_true", help="run the sections in this process")
    args = parser.parse_args()
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        print("no Hopper GPU here: nothing to measure")
        return 0
    sections = args.sections.split(",")
    if args.here:
        log = Log(args.results / f"deep_{args.model}_{args.dtype}.jsonl")
        bench = Bench(args.model, getattr(torch, args.dtype))
        if not {"load", "compile_kernels"} & set(sections):
            bench.choose_launch(log)
        for section in sections:
            globals()[section](bench, log)
        return 0
    end = time.perf_counter() + args.seconds
    base = [sys.executable, "-m", "bench.deep_contact", str(args.results), "--here"]
    base += ["--dtype", args.dtype, "--model", args.model, "--sections"]
    compiling = subprocess.Popen([*base, "compile_kernels"]) if "graph" in sections or "clocks" in sections else None
    failed = 0
    for process in PROCESSES:
        wanted = ",".join(section for section in process if section in sections)
        if not wanted:
            continue
        try:
            if compiling is not None and "graph" in process:
                compiling.wait(max(1.0, end - time.perf_counter()))
            code: object = subprocess.run([*base, wanted], timeout=max(1.0, end - time.perf_counter())).returncode
        except subprocess.TimeoutExpired:
            code = "cut off"
        print(f"== {wanted}: exit status {code}", flush=True)
        failed += code != 0
    if compiling is not None and compiling.poll() is None:
        compiling.kill()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
