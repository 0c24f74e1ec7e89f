"""Estimated and least time of every step of LGNet on a GPU, which this machine need not have.

    python bench/cost_model.py [--card H100] [--dtype float16] [--batch 1] [--size 256 256]
                               [--hole TOP BOTTOM LEFT RIGHT] [--compiled] [--measured FILE]

Columns: launches; megabytes that all programs read from the L2 cache; microseconds of the start (launch and pipeline
fill), of the longest program's products, reads and issue, of all programs of a multiprocessor together, of reading
the weights from memory, of adding the splits; the estimate; its bottleneck; the least time (the larger of the
multiplications at the GPU's rate and of weights, inputs and outputs, once each, at the memory's rate); the
measurement, if there is one.

The estimate is the one that chooses block shapes (kernels/conv_configs.py, which names the source of each constant).
--compiled: with the CUDA C++ kernels (picture_conv, hopper, hopper_attention, hopper_chain, deep) where their
estimate is less, for a single convolution a tenth less. An engine uses those that its first use or `lgnet-fast tune`
measured as faster; these forms of the kernels have not been measured yet. In a chain the first layer's start is that
of the launch, the others' is the wait for the layer before. Deep layers have their cost at the first of them.
MEASURED: lines of bench/gpu_contact.py; for a dense fp16 run of the H100, bench/results/h100_contact_*.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

KINDS = {"float16": "half", "bfloat16": "half", "float32": "ieee", "tf32": "tf32"}
RESULTS = Path(__file__).resolve().parent / "results"
ROW = (
    "{:<20} {:>11} {:>11} {:>3} {:>6} {:>5} {:>6} {:>6} {:>6} {:>6} {:>6} {:>6} {:>7} {:<9} {:>6} {:>8} {:<16} {:>8}"
)


def attention_costs(step: Any, plan: Any, kind: str, card: Any, compiled: bool) -> tuple[list[Any], str]:
    """The costs of the projection, the loop over the keys and the sum of an attention step, and the loop's blocks."""
    from lgnet_fast.kernels import hopper_attention, hopper_shapes
    from lgnet_fast.kernels.configs import inference_splits, pick_inference
    from lgnet_fast.kernels.conv_configs import Tile, Work, cost

    source = plan.source(step)
    channels, positions = step.out_channels, source.height * source.width
    config = pick_inference(card.generation, kind, channels, positions, plan.batch, card.num_sms)
    target = (kind, card.generation, card.num_sms)
    project = Tile(config.project_p, config.project_o, config.project_d, 1, 4, 2)
    projection = cost(Work(plan.batch * positions, channels, (1,), channels, 0, (1,), False), project, *target)
    band = max(r.bottom for r in step.regions) - min(r.top for r in step.regions)
    queries = band * source.width
    size = channels, queries, positions, plan.batch
    _, splits, _ = inference_splits(config, *size, card.num_sms)
    # each program: block_m positions by block_v values over all keys, and their scores over all channels
    walk = Tile(config.block_m, config.block_v, config.block_n, splits, config.num_warps, config.num_stages)
    values = cost(Work(plan.batch * queries, channels, (1,), positions, 0, (1,), False), walk, *target)
    scores = channels / config.block_v
    walk_cost = values._replace(
        products=values.products * (1 + scores),
        reads=values.reads * (config.block_n * (channels + config.block_v))
        / (config.block_n * (config.block_m + config.block_v)),
        issue=values.issue * 2,
        together=values.together * (1 + scores),
        memory=0.0,
        splits=0.0,
    )  # fmt: skip
    total = projection._replace(
        products=0.0, reads=0.0, issue=0.0, together=0.0, memory=0.0,
        splits=4 * plan.batch * queries * channels * splits / card.l2, l2_bytes=0.0,
    )  # fmt: skip
    if compiled and kind == "half" and card.capability == hopper_shapes.CAPABILITY:
        for tile, least in hopper_attention.ranked(channels, positions, queries, plan.batch, card)[:1]:
            if least.seconds < walk_cost.seconds + total.seconds:
                return [projection, least], tile.label
    return [projection, walk_cost, total], f"{config.block_m}x{config.block_n}x{config.block_v}/{splits}"


def conv_costs(step: Any, plan: Any, kind: str, card: Any) -> tuple[list[Any], str, int]:
    """The costs of a convolution's launches, the tile of the last one, and the number of programs."""
    from lgnet_fast.kernels.conv_configs import cost, pick_tile, programs

    from lgnet_fast.engine.cuda.weights import work_of

    costs, name, count = [], "", 0
    for region in step.regions:
        work = work_of(plan, step, region)
        tile = pick_tile(work, kind, card.generation, card.num_sms)
        costs.append(cost(work, tile, kind, card.generation, card.num_sms))
        count += programs(work, tile)
        name = tile.label
    return costs, name, count


def compiled_cost(step: Any, plan: Any, card: Any) -> tuple[Any, str, int] | None:
    """The least cost of a step by a compiled kernel, its tile, the number of blocks; None: unsupported."""
    from lgnet_fast.kernels import hopper_shapes, picture_conv
    from lgnet_fast.kernels.hopper import describe_launch

    from lgnet_fast.engine.cuda.weights import conv_of

    conv, source, out = conv_of(step), plan.source(step), plan.target(step)
    if len(step.regions) != 1:
        return None
    (region,) = step.regions
    product = conv, plan.batch, source.size, out.size, tuple(region), card
    if card.capability == hopper_shapes.CAPABILITY and (best := hopper_shapes.ranked(*product)):
        fastest, least = best[0]
        return least, fastest.label, describe_launch(*product[:-1], fastest, card.num_sms).grid
    if picture_conv.unsupported(conv) is not None:
        return None
    tile, launch = picture_conv.pick_tile(*product)
    stored = 2 * plan.batch * region.area * sum(s.view.channels for s in step.stores)
    return picture_conv.cost(launch, card)._replace(memory=stored / card.memory), tile.label, launch.grid


def deep_costs(plan: Any, card: Any) -> dict[range, tuple[Any, int]]:
    """Numbers of consecutive steps that `kernels/deep.py` can compute in one launch -> its cost and blocks."""
    from lgnet_fast.kernels import deep_shapes
    from lgnet_fast.kernels.cards import CLUSTERED

    from lgnet_fast.engine.cuda.deep_layers import applies, runs
    from lgnet_fast.engine.cuda.grouped import layer_of

    if card.capability != deep_shapes.CAPABILITY:
        return {}
    found = {}
    for numbers in runs(plan, deep_shapes.MAX_ROWS):
        if not applies(plan, numbers, [step.regions for step in plan.steps]):
            continue
        layers = [layer_of(plan, plan.steps[number]) for number in numbers]
        cluster = deep_shapes.CLUSTERS[0]
        clusters = int(card.num_sms * CLUSTERED) // cluster
        shares = deep_shapes.plan_splits(layers, cluster, clusters)
        if not isinstance(shares, str):
            found[numbers] = deep_shapes.cost(layers, shares, card), cluster * clusters
    return found


def chain_costs(plan: Any, card: Any) -> dict[range, list[tuple[Any, str, int]]]:
    """Numbers of consecutive steps that `kernels/hopper_chain.py` computes in one launch -> cost, tile, blocks of
    each."""
    from lgnet_fast.kernels.hopper_chain import describe_chain
    from lgnet_fast.kernels.hopper_shapes import CAPABILITY

    from lgnet_fast.engine.cuda import chains

    found = {}
    for numbers in chains.runs(plan, card) if card.capability == CAPABILITY else []:
        # a group that does not gain in a dense run is not measured at first use
        rects = (chains.rectangles(plan, numbers, None) if chains.gains(plan, numbers, card) else None) or ()
        for tiles, costs in chains.tiles(plan, numbers, rects, card)[:1] if rects else ():
            steps = [chains.shape_of(plan, plan.steps[n], rect) for n, rect in zip(numbers, rects)]
            launch = describe_chain(steps, plan.batch, tiles)
            labels = [tile.label.replace("hopper", "chain") for tile in tiles]
            found[numbers] = list(zip(costs, labels, [args.tiles for args in launch.args]))
    return found


def measured_steps(path: Path) -> dict[str, float]:
    """Step -> microseconds within a run, from the last run in a file of bench/gpu_contact.py."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {line["step"]: line["us"] for line in lines if line["section"] == "steps"}


def floor_seconds(step: Any, plan: Any, card: Any, rate: float, element: int) -> float:
    """Least time of a step: its multiplications, or its bytes from memory once each."""
    source, out = plan.source(step), plan.target(step)
    outputs = sum(region.area for region in step.regions)
    reads = source.height * source.width * source.channels * outputs / (out.height * out.width)
    if step.residual is not None:
        reads += outputs * step.residual.channels
    moved = step.weight.numel() + plan.batch * (reads + outputs * sum(s.view.channels for s in step.stores))
    return float(max(plan.macs(step) / rate, element * moved / card.memory))


def step_costs(step: Any, plan: Any, kind: str, card: Any, compiled: bool) -> tuple[list[Any], str, int, int]:
    """The costs of a step's launches, the tile of the last one, the numbers of programs (0: unknown) and kernels."""
    from lgnet_fast.engine.cuda.measure import GAIN_ALONE
    from lgnet_fast.engine.plan import AttentionStep

    if isinstance(step, AttentionStep):
        costs, name = attention_costs(step, plan, kind, card, compiled) if step.regions else ([], "")
        return costs, name, 0, len(costs)
    costs, name, count = conv_costs(step, plan, kind, card)
    other = compiled_cost(step, plan, card) if compiled and kind == "half" else None
    if other is not None and other[0].seconds < (1 - GAIN_ALONE) * sum(cost.seconds for cost in costs):
        return [other[0]], *other[1:], 1
    return costs, name, count, len(costs) + sum(not name.endswith("f") and not name.endswith("/1") for _ in costs)


def all_costs(plan: Any, kind: str, card: Any, compiled: bool) -> list[tuple[list[Any], str, int, int]]:
    """:func:`step_costs` of every step, with launches that compute several of them."""
    found = [step_costs(step, plan, kind, card, compiled) for step in plan.steps]
    if not compiled or kind != "half":
        return found
    groups: dict[range, list[tuple[list[Any], str, int, int]]] = {
        numbers: [([shared], "deep", blocks, 1), *[([], "deep", 0, 0)] * (len(numbers) - 1)]
        for numbers, (shared, blocks) in deep_costs(plan, card).items()
    }
    for numbers, chain in chain_costs(plan, card).items():
        groups[numbers] = [([cost], tile, blocks, int(i == 0)) for i, (cost, tile, blocks) in enumerate(chain)]
    for numbers, group in groups.items():
        now = (cost.seconds for number in numbers for cost in found[number][0])
        if sum(cost.seconds for costs, *_ in group for cost in costs) < sum(now):
            found[numbers.start : numbers.stop] = group
    return found


def print_step(
    step: Any,
    plan: Any,
    costs: Sequence[Any],
    least: float,
    measured: float | None,
    tile: str,
    programs: int,
    kernels: int,
) -> None:
    """Print one row of the table. least: seconds; measured: microseconds."""
    source, out = plan.source(step), plan.target(step)
    parts = [
        f"{1e6 * sum(getattr(c, part) for c in costs):.1f}"
        for part in ("start", "products", "reads", "issue", "together", "memory", "splits")
    ]
    print(
        ROW.format(
            step.name,
            f"{source.height}x{source.width}x{step.source.channels}",
            f"{out.height}x{out.width}x{step.out_channels}",
            kernels,
            f"{sum(c.l2_bytes for c in costs) / 1e6:.0f}",
            *parts,
            f"{sum(c.seconds for c in costs) * 1e6:.1f}",
            max(costs, key=lambda c: c.seconds).bound if costs else "",
            f"{least * 1e6:.1f}",
            "" if measured is None else f"{measured:.1f}",
            tile,
            programs or "",
        )
    )


def main(arguments: Sequence[str]) -> int:
    """Print the table; return the exit code."""
    from lgnet_fast.kernels.attention import VARIANTS
    from lgnet_fast.kernels.cards import CARDS
    from lgnet_fast.kernels.conv_configs import LAUNCH_SECONDS

    from lgnet_fast.engine.build import build_plan, plan_stages
    from lgnet_fast.engine.cuda.executor import CudaExecutor
    from lgnet_fast.engine.regions import Rect
    from lgnet_fast.reference.lgnet import LGNet

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card", choices=tuple(CARDS), default="H100")
    parser.add_argument("--dtype", choices=tuple(KINDS), default="float16")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--size", type=int, nargs=2, default=(256, 256))
    parser.add_argument("--hole", type=int, nargs=4, metavar=("TOP", "BOTTOM", "LEFT", "RIGHT"))
    parser.add_argument("--variant", choices=VARIANTS, default="released")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--measured", type=Path)
    args = parser.parse_args(arguments)
    card, kind = CARDS[args.card], KINDS[args.dtype]
    element = 4 if kind in ("ieee", "tf32") else 2
    rate = card.macs * {"half": 1.0, "tf32": 0.5, "ieee": 0.06}[kind]
    with torch.device("meta"):
        model = LGNet(variant=args.variant).eval()
    plan = build_plan(plan_stages(model), args.batch, *args.size)
    stored = RESULTS / f"{args.card.lower()}_contact_lgnet_{args.dtype}_b{args.batch}.jsonl"
    if args.hole:
        plan = CudaExecutor.restricted(plan, [Rect(*args.hole)])
    elif args.measured is None and stored.exists() and tuple(args.size) == (256, 256):
        args.measured = stored
    measured = measured_steps(args.measured) if args.measured else {}
    print(
        ROW.format(
            "step", "in", "out", "n", "L2 MB", "start", "prod", "reads", "issue", "togeth", "memory", "splits",
            "est us", "bound", "floor", "measured", "tile", "programs",
        )
    )  # fmt: skip
    total = floor = found = 0.0
    launches = 1
    for step, (costs, tile, programs, kernels) in zip(plan.steps, all_costs(plan, kind, card, args.compiled)):
        least = floor_seconds(step, plan, card, rate, element)
        print_step(step, plan, costs, least, measured.get(step.name), tile, programs, kernels)
        total, floor, launches = total + sum(c.seconds for c in costs), floor + least, launches + kernels
        found += measured.get(step.name, 0.0)
    total += LAUNCH_SECONDS
    found += measured.get("paint", 0.0)
    print(
        f"{args.card} {args.dtype}: {launches} launches, estimated {total * 1e6:.0f} us, floor {floor * 1e6:.0f} us"
    )
    if measured:
        print(f"measured {found:.0f} us ({args.measured.name}): the estimate is {total * 1e6 / found:.2f} of it")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
