"""The deep layers in one launch (`kernels/deep.py`) on a Hopper GPU: right, and how much faster?

    python -m bench.deep_contact RESULTS [--model lgnet] [--dtype float16] [--minutes 6] [--sections load,layers,...]

Each section runs in a process of its own, so that one that fails does not spoil the next; figures go to
RESULTS/deep_<model>_<dtype>.jsonl as they come, one JSON object a line.

======  =============================================================================================================
load    machine code, shared memory, how many clusters the GPU holds
layers  every layer by itself on noise beside float32: where it is wrong first, whether repeats are equal
chain   the whole group on noise, every layer on what the one before stored; repeats; state left as zeros
graph   the dense graph with and without, in turn, with variants of the launch; the pictures compared
steps   each group in place: graphs up to its end, less graphs up to its beginning, weights cold
clocks  where a launch's time goes: median clocks of every layer from its begin, over blocks
======  =============================================================================================================

A launch that hangs ends by itself after a fifth of a second and says who waited for what.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.gpu_contact import Log, graph_of, median_us, model_and_plan, picture, run_all

SECTIONS = ("load", "layers", "chain", "graph", "steps", "clocks")
TIMEOUT = 400_000_000
VARIANTS: dict[str, dict[str, Any]] = {
    "shipped": {},
    "weights kept in the L2 cache": {"evict_first": False},
    "not cooperative": {"cooperative": False},
    "overlapped": {"overlap": True, "cooperative": False},
    "clusters of 4": {"cluster": 4},
}


class Bench:
    """The plan, its packed weights, and groups of its steps."""

    def __init__(self, model: str, dtype: torch.dtype) -> None:
        from lgnet_fast.engine.cuda_executor import CudaExecutor

        self.model, self.plan = model_and_plan(model, 1)
        self.dtype = dtype
        self.executor = CudaExecutor(self.plan, dtype, graphs=False, deep_rows=0)
        self.weights = self.executor._weights
        self.packs: dict[int, dict[Any, Tensor]] = {}

    def groups(self, rows: int, **options: Any) -> dict[int, Any]:
        """First step -> group, or why there is none."""
        from lgnet_fast.kernels.deep import CLUSTER, clusters_on

        from lgnet_fast.engine import deep

        cluster = options.get("cluster", CLUSTER)
        clusters = clusters_on(self.executor.device, self.dtype, cluster)
        packs = self.packs.setdefault(cluster, {})
        options = {"timeout": TIMEOUT, **options}
        return {
            numbers[0]: deep.make_group(self.plan, numbers, self.weights, packs, clusters, **options)
            for numbers in deep.runs(self.plan, rows)
        }

    def launches(self, groups: dict[int, Any]) -> list[Any]:
        """A dense run with these groups."""
        self.executor._groups = groups
        return self.executor._launches(self.executor.memory, None, False)


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
    from lgnet_fast.kernels import deep

    log("load", unavailable=deep.unavailable(bench.executor.device, bench.dtype), cubin=deep.CUBIN.stat().st_size)
    for cluster in (8, 4, 2, 1):
        found = deep._kernel(bench.dtype, deep.SHARED_LIMIT, cluster).active_clusters()
        log("load", cluster=cluster, active_clusters=found)
    for rows in (16, 64):
        for first, group in bench.groups(rows).items():
            if isinstance(group, str):
                log("load", rows=rows, first=bench.plan.steps[first].name, refused=group)
            else:
                log("load", rows=rows, first=bench.plan.steps[first].name, grid=group.grid, shared=group.bytes)


def _check(bench: Bench, log: Log, section: str, rows: int, options: dict[str, Any], only: bool) -> bool:
    """Whether the groups are right; `only`: each layer by itself."""
    from lgnet_fast.engine import deep

    right = True
    for first, group in bench.groups(rows, **options).items():
        if isinstance(group, str):
            log(section, rows=rows, options=options, refused=group)
            continue
        steps = bench.plan.steps[first : first + len(group.layers)]
        for number in range(len(steps)) if only else (None,):
            checked = steps if number is None else steps[number : number + 1]
            maps = deep.noise_maps(bench.plan, steps, bench.dtype, bench.executor.device)
            view = functools.partial(deep.view_of, maps)
            launch, state = deep.group_launch(bench.plan, first, group, view, None, number)
            launch()
            torch.cuda.synchronize()
            error = group.error(state)
            state_left = int(state.count_nonzero())
            found = deep.step_errors(bench.plan, checked, bench.weights, maps)
            places = [where_wrong(stored, exact) for _, stored, exact in found]
            kept = [stored.clone() for _, stored, _ in found]
            equal = 0
            for _ in range(20 if error is None else 0):
                launch()
                again = deep.step_errors(bench.plan, checked, bench.weights, maps)
                equal += all(torch.equal(a, stored) for a, (_, stored, _) in zip(kept, again))
            for (step, _, _), place in zip(found, places):
                fine = "wrong" not in place and error is None and equal == 20 and state_left == 0
                right &= fine
                log(
                    section,
                    rows=rows,
                    options=options,
                    step=step.name,
                    right=fine,
                    error=error,
                    equal_of_20=equal,
                    state_left=state_left,
                    **place,
                )
            if error is not None:
                return False
    return right


def layers(bench: Bench, log: Log) -> None:
    _check(bench, log, "layers", 64, {}, True)


def chain(bench: Bench, log: Log) -> None:
    for rows, options in ((16, {}), (64, {}), *((64, options) for options in list(VARIANTS.values())[1:])):
        right = _check(bench, log, "chain", rows, options, False)
        log("chain", rows=rows, options=options, all_right=right)


def graph(bench: Bench, log: Log) -> None:
    image, mask = picture(1)
    bench.executor.memory.take(image, mask, None)
    captured: dict[str, Any] = {}
    pictures: dict[str, Tensor] = {}
    for rows, (name, options) in itertools.chain(
        [(0, ("one by one", {}))], itertools.product((16, 64), VARIANTS.items())
    ):
        label = name if rows == 0 else f"{name}, {rows} rows"
        try:
            groups = bench.groups(rows, **options) if rows else {}
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
            for _ in range(20):
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
            equal_of_20=equal,
            finite=bool(pictures[label].isfinite().all()),
            rms_to_one_by_one=difference.square().mean().sqrt().item(),
        )
    times: dict[str, list[float]] = {label: [] for label in captured}
    for _ in range(5):  # in turn, so that a change of clocks meets all of them
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


def steps(bench: Bench, log: Log) -> None:
    image, mask = picture(1)
    bench.executor.memory.take(image, mask, None)
    for rows in (16, 64):
        groups = bench.groups(rows)
        plain = bench.launches({})  # "paint", then one a step
        for first, group in groups.items():
            if isinstance(group, str):
                continue
            last = first + len(group.layers)
            joined = bench.launches({first: group})
            before = graph_of(functools.partial(run_all, plain[: 1 + first]))
            alone = graph_of(functools.partial(run_all, plain[: 1 + last]))
            together = graph_of(functools.partial(run_all, joined[: 2 + first]))
            rounds = [[median_us(one.replay, 20, inner=4) for one in (before, alone, together)] for _ in range(5)]
            low = [min(r[i] for r in rounds) for i in range(3)]
            log(
                "steps",
                rows=rows,
                first=bench.plan.steps[first].name,
                last=bench.plan.steps[last - 1].name,
                one_by_one_us=low[1] - low[0],
                together_us=low[2] - low[0],
                weight_bytes=sum(w.numel() * w.element_size() for w in group.weights),
            )


def clocks(bench: Bench, log: Log) -> None:
    from lgnet_fast.engine.deep import group_launch

    image, mask = picture(1)
    bench.executor.memory.take(image, mask, None)
    for rows, (name, options) in itertools.product((16, 64), VARIANTS.items()):
        for first, group in bench.groups(rows, **options).items():
            if isinstance(group, str):
                continue
            times = group.new_times()
            view = bench.executor.memory.view
            launch, state = group_launch(bench.plan, first, group, view, times)
            plain = bench.launches({})
            one = graph_of(functools.partial(run_all, [*plain[: 1 + first], launch]))
            seen = []
            for _ in range(15):
                one.replay()
                torch.cuda.synchronize()
                seen.append(times.clone())
            if group.error(state) is not None:
                log("clocks", variant=name, rows=rows, error=group.error(state))
                continue
            clock = torch.stack(seen).double()  # [repeats, layers, blocks, 6]
            begin = clock[:, :1, :, :1]
            since = (clock - begin).median(2).values.median(0).values
            late = (clock - begin).amax(2).median(0).values
            for number, layer in enumerate(group.layers):
                log(
                    "clocks",
                    variant=name,
                    rows=rows,
                    step=bench.plan.steps[first + number].name,
                    names=["begin", "layer before ends", "products", "sums sent", "sums received", "stored"],
                    median=[int(c) for c in since[number].tolist()],
                    last_block=[int(c) for c in late[number].tolist()],
                    size=list(layer.out_size),
                )


def main() -> int:
    """Measure what the arguments name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--sections", default=",".join(SECTIONS))
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--model", default="lgnet")
    parser.add_argument("--minutes", type=float, default=6)
    parser.add_argument("--here", action="store_true", help="run the sections in this process")
    args = parser.parse_args()
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        print("no Hopper GPU here: nothing to measure")
        return 0
    sections = args.sections.split(",")
    if args.here:
        log = Log(args.results / f"deep_{args.model}_{args.dtype}.jsonl")
        bench = Bench(args.model, getattr(torch, args.dtype))
        for section in sections:
            globals()[section](bench, log)
        return 0
    end = time.perf_counter() + 60 * args.minutes
    failed = 0
    for section in sections:
        command = [sys.executable, "-m", "bench.deep_contact", str(args.results), "--here", "--sections", section]
        command += ["--dtype", args.dtype, "--model", args.model]
        try:
            code: object = subprocess.run(command, timeout=max(10.0, end - time.perf_counter())).returncode
        except subprocess.TimeoutExpired:
            code = "cut off"
        print(f"== {section}: exit status {code}", flush=True)
        failed += code != 0
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
