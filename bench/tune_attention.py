"""Rewrites the shipped block shapes of attention in training, kernels/tables.py, from measurements on this GPU.

    python bench/tune_attention.py [--dtype half] [--channels 128] [--seconds 120] [--dry-run]

The search is that of `lgnet-fast tune --training` (lgnet_fast/engine/cuda/tuning_training.py), for every dtype, head
size and batch (1 and 16, at the network's shapes for a 256 x 256 picture). Only this GPU generation's entries change.
Without a GPU it prints so and exits with 0.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from lgnet_fast.kernels.tuned import Training

    from lgnet_fast.engine.cuda.tuning_training import Attention

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


def training_blocks(kind: str, channels: int, side: int, dtype: torch.dtype, device: torch.device) -> list[Attention]:
    """Attention blocks of a head size, [batch, channels, side, side], at both batches."""
    from lgnet_fast.kernels.tuned import Block

    from lgnet_fast.engine.cuda.tuning_training import Attention

    return [
        Attention.of(
            f"C={channels} {side}x{side} batch {batch}",
            Block(kind, "released", channels, side * side, batch),
            (side, side),
            dtype,
            device,
        )
        for batch in BATCHES
    ]


def rows_of(results: Iterable[Training], side: int) -> dict[str, tuple[Row, ...]]:
    """Operation -> its rows of the table, in the order of the results, for maps of `side` x `side` positions.

    The shapes of a batch of 16 hold from the positions of four samples on.
    """
    rows: dict[str, list[Row]] = {}
    for found in results:
        for op, result in found.operations.items():
            rows.setdefault(op, []).append((0 if found.block.batch == 1 else 4 * side * side, result.shape))
    # The last row holds for all smaller batches, also where it was not measured at batch 1.
    return {op: (*found[:-1], (0, found[-1][1])) for op, found in rows.items()}


def measure(kind: str, channels: int, side: int, seconds: float) -> dict[str, tuple[Row, ...]]:
    """Operation -> its rows of the table for a head size, from the fastest correct shapes at both batches."""
    from lgnet_fast.engine.cuda.measure import progress_of
    from lgnet_fast.engine.cuda.tuning_training import tune_training

    device = torch.device("cuda", torch.cuda.current_device())
    dtype = torch.float16 if kind == "half" else torch.float32
    blocks = training_blocks(kind, channels, side, dtype, device)
    log = progress_of(lambda text: print(text, flush=True))
    return rows_of(tune_training(blocks, dtype, device, seconds, log), side)


def main() -> int:
    """Tune the head sizes and dtypes of the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("half", "tf32", "ieee"), action="append")
    parser.add_argument("--channels", type=int, choices=(64, 96, 128, 192, 256, 384, 512), action="append")
    parser.add_argument("--seconds", type=float, default=120, help="for each head size and dtype")
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
    # of several networks with a head of that size, the side of LGNet's map holds
    sides = dict(head for model in reversed(aot.MODELS) for head in aot.heads(model) if head[0] in HEAD_CLASSES)
    for kind, channels in itertools.product(args.dtype or ["half", "tf32", "ieee"], args.channels or sorted(sides)):
        allow_tf32 = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = kind == "tf32"
        try:
            measured = measure(kind, channels, sides[channels], args.seconds)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = allow_tf32
        for op, rows in measured.items():
            tables[generation][op, "any" if op == "rows" else kind, channels] = rows
    text = render(tables)
    if args.dry_run:
        print(text)
    else:
        TABLES_FILE.write_text(text)
        print(f"rewrote {TABLES_FILE} ({generation})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
