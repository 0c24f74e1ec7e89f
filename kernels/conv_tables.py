"""Measured choices of the engine's convolutions: written by bench/tune_conv.py, do not edit by hand.

generation -> (dtype kind, rows, columns, taps of every phase, input channels) -> (BLOCK_M, BLOCK_N, BLOCK_K, splits,
num_warps, num_stages), or "cudnn" where PyTorch's own convolution is faster. What is not here is chosen by estimate.
"""

from typing import Literal

Key = tuple[str, int, int, tuple[int, ...], int]
Choice = tuple[int, int, int, int, int, int] | Literal["cudnn"]

TUNED: dict[str, dict[Key, Choice]] = {}
