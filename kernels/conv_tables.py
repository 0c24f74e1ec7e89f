"""Measured block shapes of the engine: written by bench/write_tables.py, do not edit by hand.

TUNED: generation -> (dtype kind, rows, columns, taps of every phase, input channels) -> (BLOCK_M, BLOCK_N, BLOCK_K,
splits, num_warps, num_stages, fused), or "cudnn" where PyTorch's own convolution is faster.
INFERENCE: (generation, dtype kind, head size, positions, batch) -> the fields of `configs.Inference` but `hopper`.
What is not here is chosen by estimate or by rule.
"""

from typing import Literal

Key = tuple[str, int, int, tuple[int, ...], int]
Choice = tuple[int, int, int, int, int, int, bool] | Literal["cudnn"]

TUNED: dict[str, dict[Key, Choice]] = {
    "sm_90": {
        ("half", 1, 512, (1, 1, 1, 1), 512): (16, 64, 32, 4, 4, 5, True),
        ("half", 1, 512, (4,), 512): (16, 64, 64, 8, 4, 5, True),
        ("half", 4, 512, (4, 4, 4, 4), 1024): (16, 64, 64, 4, 4, 5, True),
        ("half", 4, 512, (16,), 512): (16, 64, 64, 16, 4, 5, True),
        ("half", 16, 512, (4, 4, 4, 4), 1024): (16, 64, 64, 4, 4, 5, True),
        ("half", 16, 512, (16,), 512): (16, 64, 64, 16, 4, 5, True),
        ("half", 64, 512, (4, 4, 4, 4), 1024): (64, 32, 128, 2, 4, 5, True),
        ("half", 64, 512, (16,), 512): (64, 16, 128, 4, 4, 5, True),
        ("half", 256, 256, (4, 4, 4, 4), 1024): (64, 64, 128, 2, 4, 5, True),
        ("half", 256, 512, (16,), 256): (64, 32, 128, 2, 4, 5, True),
        ("half", 1024, 128, (4, 4, 4, 4), 512): (64, 64, 128, 1, 4, 5, False),
        ("half", 1024, 256, (16,), 128): (64, 32, 128, 1, 4, 5, False),
        ("half", 4096, 64, (4, 4, 4, 4), 256): (128, 64, 64, 1, 4, 4, False),
        ("half", 4096, 64, (100,), 64): (128, 64, 64, 4, 4, 4, False),
        ("half", 4096, 128, (1, 2, 2, 4), 256): (64, 128, 64, 1, 4, 4, False),
        ("half", 4096, 128, (16,), 64): (64, 64, 64, 1, 4, 5, False),
        ("half", 4096, 256, (9,), 128): (64, 128, 128, 1, 8, 4, False),
        ("half", 4096, 256, (9,), 256): (64, 128, 64, 1, 4, 5, False),
        ("half", 16384, 16, (9,), 128): (128, 16, 64, 1, 4, 5, False),
        ("half", 16384, 64, (1, 2, 2, 4), 128): (128, 64, 64, 1, 4, 4, False),
        ("half", 16384, 64, (16,), 4): (32, 64, 64, 1, 4, 5, False),
        ("half", 16384, 128, (9,), 64): (64, 128, 32, 1, 8, 5, False),
        ("half", 65536, 64, (49,), 4): (128, 64, 32, 1, 8, 5, False),
        ("half", 1048576, 64, (49,), 4): (128, 64, 32, 1, 4, 5, False),
    },
}

INFERENCE: dict[tuple[str, str, int, int, int], tuple[int, ...]] = {
    ("sm_90", "half", 128, 4096, 1): (128, 64, 128, 8, 3, 32, 64, 128, 4, 4),
    ("sm_90", "half", 128, 4096, 16): (64, 64, 128, 4, 3, 32, 64, 64, 2, 1),
    ("sm_90", "half", 256, 1024, 1): (64, 64, 128, 4, 3, 16, 128, 32, 2, 4),
    ("sm_90", "half", 256, 1024, 16): (64, 32, 256, 8, 2, 32, 128, 32, 2, 1),
    ("sm_90", "half", 512, 256, 1): (64, 64, 64, 4, 2, 16, 64, 32, 2, 4),
    ("sm_90", "half", 512, 256, 16): (64, 32, 256, 8, 3, 32, 128, 32, 2, 1),
}
