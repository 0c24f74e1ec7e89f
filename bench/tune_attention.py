"""Offline tuner of the attention kernels: measures block shapes on this GPU and rewrites kernels/tables.py.

    python bench/tune_attention.py [--dtype half] [--op forward] [--channels 128] [--dry-run]

For every operation, dtype, head size and batch (1 and 16, at the network's shapes for a 256 x 256 picture) it tries
all shapes that compile, checks each result against PyTorch, times the kernels concerned with triton.testing.do_bench,
and keeps the fastest. Only this GPU generation's entries change. Without a GPU it says so and exits with 0.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

TABLES_FILE = Path(__file__).resolve().parent.parent / "kernels" / "tables.py"
Row = tuple[int, tuple[int, int, int, int]]
Tables = dict[str, dict[tuple[str, str, int], tuple[Row, ...]]]

HEADER = '''"""Block shapes per GPU generation: written by bench/tune_attention.py, do not edit by hand.

generation -> (operation, dtype kind, largest head size) -> rows (least number of positions of all samples together,
(BLOCK_M, BLOCK_N, num_warps, num_stages)); the first row whose least number is reached holds. "rows" are the
bandwidth-bound kernels (positions, channels). "interpreted" is for Triton's interpreter.
"""

Rows = tuple[tuple[int, tuple[int, int, int, int]], ...]

'''
BATCHES = (16, 1)
KERNELS = {
    "forward": ("_attn_fwd_kernel", "_attn_merge_kernel"),
    "merge": ("_attn_merge_kernel",),
    "backward_dq": ("_attn_bwd_dq_kernel",),
    "backward_dkv": ("_attn_bwd_dkv_kernel",),
    "rows": ("_attn_prep_kernel", "_attn_bwd_delta_kernel", "_attn_bwd_finish_kernel"),
}


def render(tables: Tables) -> str:
    """The text of kernels/tables.py; the same tables give the same text."""
    lines = [HEADER + "TABLES: dict[str, dict[tuple[str, str, int], Rows]] = {"]
    for generation in sorted(tables):
        lines.append(f'    "{generation}": {{')
        for op, kind, head in sorted(tables[generation]):
            rows = sorted(tables[generation][op, kind, head], reverse=True)
            lines.append(f'        ("{op}", "{kind}", {head}): {tuple(rows)},')
        lines.append("    },")
    lines.append("}")
    return "\n".join(lines) + "\n"


def candidates(op: str) -> Iterator[tuple[int, int, int, int]]:
    """Candidate shapes, cheap ones first."""
    if op == "rows":
        yield from itertools.product((16, 32, 64), (32, 64, 128), (4, 8), (1, 2))
    elif op == "merge":
        yield from itertools.product((16, 32, 64), (32, 64, 128), (4, 8), (1, 2, 3))
    else:
        yield from itertools.product((16, 32, 64, 128), (16, 32, 64, 128), (4, 8), (1, 2, 3, 4))


def close(actual: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether a candidate's result is right (tests check its accuracy)."""
    tolerance = 1e-3 if dtype == torch.float32 else 4e-2
    scale = exact.abs().max().item()
    return bool(((actual.double() - exact).abs().max() <= tolerance * max(scale, 1e-3)).item())


def measure(op: str, dtype: torch.dtype, channels: int, side: int, batch: int) -> tuple[int, int, int, int] | None:
    """The fastest correct configuration, or None where none ran."""
    import triton
    from lgnet_fast.kernels import attention
    from lgnet_fast.kernels.configs import Config, override
    from lgnet_fast.kernels.launch import launch, record

    from lgnet_fast.reference.attention import attention_block

    generator = torch.Generator("cuda").manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", generator=generator).to(dtype)

    features = random(batch, channels, side, side)
    weight, bias = random(channels, 2 * channels, 1, 1) / channels**0.5, random(channels)
    grad = random(*features.shape)
    leaf = features.double().requires_grad_()
    exact = attention_block(leaf, weight.double(), bias.double(), "released")
    (exact_grad,) = torch.autograd.grad(exact, leaf, grad.double())
    exact = exact.detach()
    backward = op.startswith("backward") or op == "rows"
    best: tuple[float, tuple[int, int, int, int]] | None = None
    for shape in candidates(op):
        with override(op, Config(*shape)):
            try:
                out, attended, stats = attention.attention_block_forward(
                    features, weight, bias, "released", save_attended=True
                )
                assert attended is not None
                assert stats is not None
                df, _, _ = attention.attention_block_backward(
                    grad, features, attended, stats, weight, "released", needs=(True, False, False)
                )
                torch.cuda.synchronize()
            except (triton.runtime.errors.OutOfResources, triton.CompilationError, RuntimeError):
                continue
            if not close(out, exact, dtype) or (backward and (df is None or not close(df, exact_grad, dtype))):
                print(f"  wrong result, left out: {op} {shape}", file=sys.stderr)
                continue
            with record() as launches:
                _, attended, stats = attention.attention_block_forward(
                    features, weight, bias, "released", save_attended=True
                )
                if backward:
                    assert attended is not None
                    assert stats is not None
                    attention.attention_block_backward(
                        grad, features, attended, stats, weight, "released", needs=(True, False, False)
                    )
        concerned = [item for item in launches if item.kernel.__name__ in KERNELS[op]]
        if not concerned:  # the merge kernel, where the work is not split
            return None

        def once(items: list[Any] = concerned) -> None:
            for item in items:
                launch(item.kernel, item.grid, *item.args, **item.meta)

        time = triton.testing.do_bench(once, warmup=10, rep=50, return_mode="median")
        if best is None or time < best[0]:
            best = time, shape
    if best is None:
        return None
    print(f"{op} {dtype} C={channels} {side}x{side} batch {batch}: {best[1]} {best[0] * 1e3:.1f} us", flush=True)
    return best[1]


def main() -> int:
    """Tune the operations of the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("half", "tf32", "ieee"), action="append")
    parser.add_argument("--op", choices=tuple(KERNELS), action="append")
    parser.add_argument("--channels", type=int, choices=(64, 96, 128, 192, 256, 384, 512), action="append")
    parser.add_argument("--dry-run", action="store_true", help="print, do not rewrite kernels/tables.py")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU here: nothing to measure, kernels/tables.py is left as it is")
        return 0
    from lgnet_fast.kernels import aot
    from lgnet_fast.kernels.configs import HEAD_CLASSES, device_generation
    from lgnet_fast.kernels.tables import TABLES

    generation, _ = device_generation(torch.device("cuda", torch.cuda.current_device()))
    tables: Tables = {name: dict(entries) for name, entries in TABLES.items()}
    # LGNet's map, where several networks have a head of that size
    sides = dict(head for model in reversed(aot.MODELS) for head in aot.heads(model) if head[0] in HEAD_CLASSES)
    for op in args.op or KERNELS:
        kinds = ["any"] if op == "rows" else args.dtype or ["half", "tf32", "ieee"]
        for kind, channels in itertools.product(kinds, args.channels or sorted(sides)):
            side = sides[channels]
            allow_tf32 = torch.backends.cuda.matmul.allow_tf32
            torch.backends.cuda.matmul.allow_tf32 = kind == "tf32"
            dtype = torch.float32 if kind in ("tf32", "ieee") else torch.float16
            rows: list[Row] = []
            for batch in BATCHES:
                shape = measure(op, dtype, channels, side, batch)
                if shape is not None:
                    rows.append((0 if batch == 1 else 4 * side * side, shape))
            torch.backends.cuda.matmul.allow_tf32 = allow_tf32
            if rows:
                rows[-1] = (0, rows[-1][1])
                tables[generation][op, kind, channels] = tuple(rows)
    text = render(tables)
    if args.dry_run:
        print(text)
    else:
        TABLES_FILE.write_text(text)
        print(f"rewrote {TABLES_FILE} ({generation})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
