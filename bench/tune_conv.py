"""Offline tuner of the convolutions: measures block shapes and cuDNN here, and rewrites kernels/conv_tables.py.

    python bench/tune_conv.py [--dtype half] [--size 256 256] [--batch 1] [--light] [--step net_l] [--dry-run]

For every distinct product of LGNet it tries the candidates of kernels/conv_configs.py, those of least estimated time
first, and PyTorch's own convolution with the same epilogue; checks each result against float32; and times each as a
CUDA graph. The executor then takes the fastest. Only this GPU generation's entries of the products measured change.
Without a GPU it says so and exits with 0.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

TABLES_FILE = Path(__file__).resolve().parent.parent / "kernels" / "conv_tables.py"
Tables = dict[str, dict[tuple[Any, ...], Any]]
MARK = "TUNED: dict[str, dict[Key, Choice]] = {"
TRIED = 24
DTYPES = {"half": torch.float16, "tf32": torch.float32, "ieee": torch.float32}
TOLERANCE = {"half": 1e-2, "tf32": 5e-3, "ieee": 1e-4}


def render(text: str, tables: Tables) -> str:
    """`text` of kernels/conv_tables.py with other tables; the same tables give the same text."""
    lines = [text[: text.index(MARK)] + MARK]
    for generation in sorted(tables):
        lines.append(f'    "{generation}": {{')
        for key in sorted(tables[generation]):
            choice = tables[generation][key]
            rest = ", ".join(str(part) for part in key[1:])
            value = '"cudnn"' if choice == "cudnn" else str(tuple(choice))
            lines.append(f'        ("{key[0]}", {rest}): {value},')
        lines.append("    },")
    return "\n".join(lines) + ("\n}\n" if tables else "}\n")


def alone(plan: Any, step: Any) -> Any:
    """A plan of one step."""
    names = {"picture", step.source.buffer, *(s.view.buffer for s in step.stores)}
    if step.residual is not None:
        names.add(step.residual.buffer)
    buffers = {name: buffer for name, buffer in plan.buffers.items() if name in names}
    return replace(plan, buffers=buffers, steps=(step,))


def run_step(plan: Any, dtype: torch.dtype, choice: Any, values: Any) -> tuple[Any, list[torch.Tensor]]:
    """What launches the only step of `plan`, and its results, on the feature maps and pictures of `values`."""
    from lgnet_fast.engine.cuda_executor import CudaExecutor

    step = plan.steps[0]
    executor = CudaExecutor(plan, dtype, choices={step.name: choice})
    memory = executor.memory
    for name in ("arena", "image", "mask"):
        getattr(memory, name).copy_(getattr(values, name))
    memory.outputs.zero_()
    (launch,) = executor.step_launches(memory, 0)
    launch()
    results = [memory.outputs] if step.merges else [memory.view(store.view) for store in step.stores]
    return launch, [result.float() for result in results]


def tune(plan: Any, step: Any, kind: str, generation: str, num_sms: int) -> Any:
    """The fastest correct choice of a step, or None where none ran."""
    import triton
    from lgnet_fast.kernels.conv_configs import candidates, estimate

    from lgnet_fast.engine.cuda_executor import Memory, describe

    plan, dtype = alone(plan, step), DTYPES[kind]
    source, out = plan.buffers[step.source.buffer], plan.buffers[step.stores[0].view.buffer]
    sizes = (source.height, source.width), (out.height, out.width)
    work = describe(step).work(plan.batch, *sizes, out.everywhere)
    tiles = sorted(
        candidates(work, kind, generation, num_sms), key=lambda t: estimate(work, t, kind, generation, num_sms)
    )
    values = Memory(plan, dtype, step.weight.device)
    for tensor in (values.arena, values.image, values.mask):
        tensor.normal_()
    torch.backends.cudnn.allow_tf32 = False
    _, exact = run_step(plan, torch.float32, "cudnn", values)
    torch.backends.cudnn.allow_tf32 = kind == "tf32"
    best = None
    for choice in (*tiles[:TRIED], "cudnn"):
        try:
            launch, results = run_step(plan, dtype, choice, values)
            torch.cuda.synchronize()
        except (triton.runtime.errors.OutOfResources, triton.CompilationError, RuntimeError):
            continue
        errors = [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(results, exact)]
        if not max(errors) <= TOLERANCE[kind]:  # NaN too
            print(f"  wrong result, left out: {step.name} {choice} {errors}", file=sys.stderr)
            continue
        seconds = triton.testing.do_bench_cudagraph(launch, rep=20, return_mode="median") * 1e-3
        if best is None or seconds < best[0]:
            best = seconds, choice
    if best is None:
        return None
    guess = estimate(work, tiles[0], kind, generation, num_sms)
    print(f"{step.name:<20} {best[1]!s:<100} {best[0] * 1e6:7.1f} us, estimated {guess * 1e6:.1f}", flush=True)
    return (kind, *work[:4]), best[1]


def main() -> int:
    """Tune what the arguments name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=tuple(DTYPES), action="append", help="default: all")
    parser.add_argument("--size", type=int, nargs=2, default=(256, 256))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--light", action="store_true", help="LGNet_light's channels")
    parser.add_argument("--step", default="", help="only steps whose name starts so")
    parser.add_argument("--dry-run", action="store_true", help="print, do not rewrite kernels/conv_tables.py")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU here: nothing to measure, kernels/conv_tables.py is left as it is")
        return 0
    from lgnet_fast.kernels.configs import device_generation
    from lgnet_fast.kernels.conv_tables import TUNED

    from lgnet_fast.engine.cuda_executor import describe
    from lgnet_fast.engine.engine import plan_stages
    from lgnet_fast.engine.plan import build_plan
    from lgnet_fast.reference.lgnet import LGNet

    channels = 48 if args.light else 64
    model = LGNet(coarse_channels=channels, global_channels=channels).eval().cuda()
    plan = build_plan(plan_stages(model), args.batch, *args.size)
    generation, num_sms = device_generation(torch.device("cuda", torch.cuda.current_device()))
    tables: Tables = {name: dict(entries) for name, entries in TUNED.items()}
    for kind in args.dtype or DTYPES:
        torch.backends.cuda.matmul.allow_tf32 = kind == "tf32"
        seen = set()
        for step in plan.steps:
            if step.kind == "attention" or not step.name.startswith(args.step):
                continue
            source = plan.buffers[step.source.buffer]
            key = (describe(step), source.height, source.width)
            if key in seen:
                continue
            seen.add(key)
            found = tune(plan, step, kind, generation, num_sms)
            if found is not None:
                tables.setdefault(generation, {})[found[0]] = found[1]
    text = render(TABLES_FILE.read_text(), tables)
    if args.dry_run:
        print(text)
    else:
        TABLES_FILE.write_text(text)
        print(f"rewrote {TABLES_FILE} ({generation})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
