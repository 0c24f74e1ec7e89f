"""Time of every step of LGNet on this CPU, and how far it is from the bound of its multiplications.

    python bench/profile_plan.py [--dtype float32] [--size 256 256] [--batch 1] [--threads 2] [--rounds 20]
                                 [--kernel direct|winograd2|winograd4] [--hole TOP BOTTOM LEFT RIGHT] [--channels 64]

Times are the least of the rounds. GFLOP/s counts the direct multiplications of a step, so a Winograd step can exceed
the peak of the CPU; "share" is the part of a step in the whole. `--kernel` forces one kernel wherever it can run.
The constants of the cost model in lgnet_fast/engine/cpu/choice.py were found by comparing such tables.
"""

from __future__ import annotations

import argparse
import sys

import torch

from lgnet_fast.engine.build import build_plan, plan_stages
from lgnet_fast.engine.cpu.choice import choose_kernels, kernels_for
from lgnet_fast.engine.cpu.executor import CpuExecutor
from lgnet_fast.engine.cpu.kernels import Choice
from lgnet_fast.engine.regions import Rect
from lgnet_fast.reference.lgnet import LGNet


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--size", type=int, nargs=2, default=(256, 256))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--kernel", choices=("direct", "winograd2", "winograd4"))
    parser.add_argument("--hole", type=int, nargs=4, metavar=("TOP", "BOTTOM", "LEFT", "RIGHT"))
    parser.add_argument("--channels", type=int, default=64)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    n = args.channels
    model = LGNet(coarse_channels=n, local_channels=n, global_channels=n).eval()
    plan = build_plan(plan_stages(model), args.batch, *args.size)
    dtype = getattr(torch, args.dtype)
    choices = choose_kernels(plan, dtype)
    if args.kernel:
        for step in plan.steps:
            products = Choice.parse(choices[step.name]).products
            if args.kernel in kernels_for(step, products):
                choices[step.name] = str(Choice(args.kernel, products))
    executor = CpuExecutor.of(plan, dtype, choices)
    image = torch.rand(args.batch, 3, *args.size) * 2 - 1
    mask = torch.ones(args.batch, 1, *args.size)
    shown, regions = plan, None
    if args.hole:
        shown = executor.restricted(plan, [Rect(*args.hole)])
        regions = [step.regions for step in shown.steps]
    rounds = torch.tensor([executor.step_times(image, mask, regions, 1) for _ in range(args.rounds)])
    best = rounds.min(dim=0).values
    print(f"{'step':24} {'kernel':16} {'MMAC':>8} {'ms':>8} {'GFLOP/s':>8} {'share':>6}")
    for step, ms in zip(shown.steps, best.tolist(), strict=True):
        macs = shown.macs(step)
        print(
            f"{step.name:24} {choices[step.name]:16} {macs / 1e6:8.1f} {ms:8.3f} {2e-6 * macs / max(ms, 1e-6):8.0f} "
            f"{ms / best.sum().item():6.1%}"
        )
    for net in dict.fromkeys(step.name.partition(".")[0] for step in shown.steps):
        ms = sum(t for step, t in zip(shown.steps, best.tolist(), strict=True) if step.name.startswith(net + "."))
        print(f"{net:24} {ms:34.2f} ms")
    print(f"{'best whole run':24} {rounds.sum(dim=1).min().item():34.2f} ms")
    print(f"weights {executor.packed_bytes / 2**20:.0f} MiB, buffers {executor.workspace_bytes / 2**20:.0f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
