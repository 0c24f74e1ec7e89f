"""What every step of LGNet should take on a GPU that need not be here, beside the least it could take.

    python bench/cost_model.py [--card H100] [--dtype float16] [--batch 1] [--size 256 256]
                               [--hole TOP BOTTOM LEFT RIGHT]

The estimate is the one that chooses block shapes (kernels/conv_configs.py): waves of programs, each bound by its
multiplications or its reads from the L2 cache, and launches. The floor of a step is the larger of its multiplications
at the card's rate and its bytes (weights, inputs, outputs, once each) at the memory's. Nothing here is measured.
"""

from __future__ import annotations

import argparse
import sys

import torch

KINDS = {"float16": "half", "bfloat16": "half", "float32": "ieee", "tf32": "tf32"}


def main() -> int:
    """Print the table."""
    from lgnet_fast.kernels.attention import VARIANTS
    from lgnet_fast.kernels.cards import CARDS
    from lgnet_fast.kernels.configs import num_splits, pick
    from lgnet_fast.kernels.conv_configs import LAUNCH_SECONDS, estimate, pick_tile, programs

    from lgnet_fast.engine.build import build_plan, plan_stages
    from lgnet_fast.engine.cuda_executor import CudaExecutor
    from lgnet_fast.engine.cuda_weights import work_of
    from lgnet_fast.engine.plan import AttentionStep, Plan
    from lgnet_fast.engine.regions import Rect, rounded
    from lgnet_fast.reference.lgnet import LGNet

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card", choices=tuple(CARDS), default="H100")
    parser.add_argument("--dtype", choices=tuple(KINDS), default="float16")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--size", type=int, nargs=2, default=(256, 256))
    parser.add_argument("--hole", type=int, nargs=4, metavar=("TOP", "BOTTOM", "LEFT", "RIGHT"))
    parser.add_argument("--variant", choices=VARIANTS, default="released")
    args = parser.parse_args()
    card, kind = CARDS[args.card], KINDS[args.dtype]
    element = 4 if kind in ("ieee", "tf32") else 2
    rate = card.macs * {"half": 1.0, "tf32": 0.5, "ieee": 0.06}[kind]
    with torch.device("meta"):
        model = LGNet(variant=args.variant).eval()
    plan = build_plan(plan_stages(model), args.batch, *args.size)
    if args.hole:
        plan = plan.restricted(rounded([Rect(*args.hole)], CudaExecutor.granularity, *args.size))

    def attention(step: AttentionStep, plan: Plan) -> tuple[float, int, str]:
        source = plan.buffers[step.source.buffer]
        channels, positions = step.out_channels, source.height * source.width
        config = pick("forward", card.generation, kind, channels, plan.batch * positions)
        blocks = plan.batch * -(-positions // config.block_m)
        splits, _ = num_splits(blocks, positions, config.block_n, card.num_sms)
        # preparation, product, merge of the splits, activation
        launches = 3 + (splits > 1)
        busy = min(1.0, blocks * splits / card.num_sms)
        # half the rate of plain products: the softmax stands between them
        seconds = plan.batch * positions * (2 * positions + 2 * channels) * channels / (0.5 * rate * busy)
        return seconds + launches * LAUNCH_SECONDS, launches, f"{config.block_m}x{config.block_n} s{splits}"

    row = "{:<20} {:>11} {:>11} {:>8} {:>8} {:>8} {:<22} {:>8} {:>8} {:>8} {:<7}".format
    print(row("step", "in", "out", "MMAC", "w MiB", "MiB", "tile", "programs", "est us", "floor us", "bound"))
    total = floor = 0.0
    all_launches, weight_bytes = 1, 0
    for step in plan.steps:
        source, out = plan.buffers[step.source.buffer], plan.buffers[step.stores[0].view.buffer]
        weights = element * step.weight.numel()
        outputs = sum(region.area for region in step.regions)
        share = outputs / (out.height * out.width)
        reads = source.height * source.width * (step.source.channels * share)
        if step.residual is not None:
            reads += outputs * step.residual.channels
        moved = weights + element * plan.batch * (reads + outputs * sum(s.view.channels for s in step.stores))
        seconds, count, launches, tiles = 0.0, 0, 0, ""
        if isinstance(step, AttentionStep):
            if step.regions:
                seconds, launches, tiles = attention(step, plan)
        else:
            for region in step.regions:
                work = work_of(plan, step, region)
                tile = pick_tile(work, kind, card.generation, card.num_sms)
                seconds += estimate(work, tile, kind, card.generation, card.num_sms)
                launches += 1 + (tile.splits > 1)
                count += programs(work, tile)
                tiles = f"{tile.block_m}x{tile.block_n}x{tile.block_k} s{tile.splits} w{tile.num_warps}"
                used = sum(work.taps) * work.in_channels * work.columns
                if not step.merges:
                    weights = element * used
        least_products, least_bytes = plan.macs(step) / rate, moved / card.memory
        least = max(least_products, least_bytes)
        total += seconds
        floor += least
        all_launches += launches
        weight_bytes += weights
        print(
            row(
                step.name,
                f"{source.height}x{source.width}x{step.source.channels}",
                f"{out.height}x{out.width}x{step.out_channels}",
                f"{plan.macs(step) / 1e6:.0f}",
                f"{weights / 2**20:.1f}",
                f"{moved / 2**20:.1f}",
                tiles,
                count,
                f"{seconds * 1e6:.1f}",
                f"{least * 1e6:.1f}",
                "bytes" if least_bytes > least_products else "products",
            )
        )
    total += LAUNCH_SECONDS
    products, streams = plan.total_macs() / rate, weight_bytes / card.memory
    print(f"{args.card} {args.dtype}: {all_launches} launches, estimated {total * 1e6:.0f} us")
    print(f"floor: step by step {floor * 1e6:.0f} us, products {products * 1e6:.0f}, weights {streams * 1e6:.0f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
