"""Estimating the memory of a run before anything is allocated."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager

import torch

from ..engine.devices import available_memory as available_memory
from ..engine.engine import KEPT_SHARE, SHAPES_KEPT
from ..errors import OutOfMemoryError
from ..ops.torch_state import is_out_of_memory
from .strategies import check, padded

# Bytes per pixel of a file in 8-bit colour: the decoded picture and mask, the copy that is painted, the result.
_FILE_BYTES = 20
# Strips of a picture that are scaled or painted at a time.
_STRIP_BYTES = 12 * 2**20
# Live tensors of n channels at full resolution at NetL's widest point, where its last deconvolution's output and
# that output normalised meet the half-resolution input with twice the channels (n/2). NetC and NetG peak lower.
_LIVE_COPIES = 2.5
# Image, mask, their padded and 32-bit copies, concatenations, every stage's output and merged picture, and layout
# copies of those: channels at full resolution, for every n.
_LIVE_PICTURE_CHANNELS = 72
# Live tensors vary little (n = 64 at 512 pixels: 1040 bytes per pixel; n = 16: 320), but freed blocks of changing
# sizes fragment the C library's heap: 900 to 1675 bytes per pixel from run to run, where this estimates 1835.
# tests/test_pipeline_memory.py measures the live part, with blocks returned to the system when freed.
_MARGIN = 1.9

# An engine on the CPU: bytes per pixel of its buffers, which share addresses, and of the tensors that go in and out;
# bytes of each thread's scratch. For n = 32 and 512 pixels the two come to 406 per pixel, where 300 were measured.
_ENGINE_CHANNEL_BYTES = 8
_ENGINE_BYTES = 150
_ENGINE_THREAD_BYTES = 2**16


def estimate_memory(
    height: int,
    width: int,
    strategy: str = "full",
    *,
    base_channels: int = 64,
    dtype: torch.dtype = torch.float32,
    size_multiple: int = 256,
    window: int = 512,
    engine: bool = False,
) -> int:
    """Most bytes that one picture of `height` x `width` pixels takes, besides the weights, whatever its hole.

    `strategy`: "full" pads the whole picture; "crop", "tile" and "resize" never run more than `window`^2 network
    pixels at once. `base_channels` is the network's n (64 in the paper). `engine`: whether it runs as an engine on
    the CPU, which takes less. Attention scores take no memory, because they are never stored. Small holes take much
    less: before a run, `Inpainter` counts with the holes that there are. Raises ValueError for an unknown strategy.
    """
    check(strategy)
    pixels = padded(height, size_multiple) * padded(width, size_multiple)
    if strategy != "full":
        pixels = min(pixels, max(window, size_multiple) ** 2)
    passes = [pixels, pixels // 2] if strategy == "tile" else [pixels]
    if strategy in ("auto", "crop"):  # any number of windows of any shape
        shapes = _shapes(pixels // size_multiple**2)
        passes = [cells * size_multiple**2 for cells in itertools.islice(shapes, SHAPES_KEPT)]
    network = network_bytes(passes, base_channels, dtype, engine)
    return height * width * _FILE_BYTES + fill_bytes(height * width) + network


def _shapes(most: int) -> Iterator[int]:
    """The cells of every shape of a pass (windows, cells down, cells across), at most so many, the largest first."""
    for cells in range(most, 0, -1):
        for windows in _divisors(cells):
            yield from (cells for _ in _divisors(cells // windows))


def _divisors(number: int) -> list[int]:
    return [one for one in range(1, number + 1) if number % one == 0]


def fill_bytes(pixels: int, results: int = 1) -> int:
    """Bytes of the fills of boxes of so many pixels: float32 sums of colours, for each result, and of weights."""
    return pixels * (12 * results + 4) + _STRIP_BYTES


def network_bytes(
    passes: Sequence[int], base_channels: int, dtype: torch.dtype, engine: bool = False, room: int | None = None
) -> int:
    """Bytes of the activations of passes over so many padded pixels each, which have different shapes.

    An engine on the CPU keeps the buffers of the shapes that it ran last, others return them. `room`: the free memory
    by which the engine bounds what it keeps besides the pass that runs; None: only the number of shapes bounds it.
    """
    if engine:
        scratch = torch.get_num_threads() * base_channels * _ENGINE_THREAD_BYTES
        each = [one * (_ENGINE_CHANNEL_BYTES * base_channels + _ENGINE_BYTES) + scratch for one in sorted(passes)]
        kept = sum(each[-SHAPES_KEPT:])
        return kept if room is None else max(each[-1], min(kept, int(KEPT_SHARE * room)))
    channels = _LIVE_COPIES * base_channels + _LIVE_PICTURE_CHANNELS
    return int(max(passes) * channels * _MARGIN * dtype.itemsize)


class OutOfMemoryErrors(AbstractContextManager[None]):
    """Turns failed allocations of torch and numpy into OutOfMemoryError.

    A class, because the frame of a generator's context manager would keep the failed run's buffers (Python 3.13).
    """

    def __init__(self, what: str) -> None:
        self.what = what

    def __exit__(self, kind: type[BaseException] | None, cause: BaseException | None, trace: object) -> None:
        # torch's are RuntimeErrors
        known = isinstance(cause, OutOfMemoryError)
        if isinstance(cause, (MemoryError, RuntimeError)) and not known and is_out_of_memory(cause):
            reason = str(cause).splitlines()[0] if str(cause) else "out of memory"
            raise OutOfMemoryError(f"{self.what}: {reason}") from cause


def human(size: int) -> str:
    """1536 -> "1.5 KiB"."""
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:.3g} TiB"
