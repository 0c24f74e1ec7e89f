"""Block shapes and numbers of splits of the attention and merge kernels, from tables: no tuning at run time.

`tables.py` holds the shapes for each GPU generation; `bench/tune_attention.py` rewrites it on a GPU. Where
``lgnet-fast tune --training`` has measured a block, its results (`tuned.py`) hold instead.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch

from .cards import SHARED_LIMITS, generation_of
from .conv_tables import INFERENCE
from .launch import is_interpreted
from .tables import TABLES

HEAD_CLASSES = (64, 96, 128, 192, 256, 384, 512)
MAX_SPLITS = 8
MAX_BAND_SPLITS = 16
"""Most splits of the keys where attention for inference computes a band of rows only."""


class Config(NamedTuple):
    """BLOCK_M queries (or positions) by BLOCK_N keys (or channels) per program, warps, pipeline stages."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    def meta(self) -> dict[str, int]:
        """As the kernels' keyword arguments."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


class Inference(NamedTuple):
    """Block shapes of `attention_inference`.

    block_m queries by block_n keys per step, block_v columns of the result per program. project_p, project_o,
    project_d: positions, columns and depth of the projection. sum_m: positions of the sum over splits. max_splits: of
    the keys. hopper: the tile by which `hopper_attention` takes the place of the loop over the keys and of the sum;
    None: Triton's kernels run.
    """

    block_m: int
    block_n: int
    block_v: int
    num_warps: int
    num_stages: int
    project_p: int
    project_o: int
    project_d: int
    sum_m: int
    max_splits: int = 8
    hopper: tuple[int, int] | None = None


_assumed: ContextVar[tuple[str, int] | None] = ContextVar("lgnet_fast_assumed_generation", default=None)

_overrides: ContextVar[dict[str, Any]] = ContextVar("lgnet_fast_config_overrides", default={})  # noqa: B039


@contextlib.contextmanager
def assume_generation(target: str, num_sms: int = 132) -> Iterator[None]:
    """Choose the block shapes of a GPU of generation `target`, such as "sm_90": for `aot` and tests."""
    token = _assumed.set((target, num_sms))
    try:
        yield
    finally:
        _assumed.reset(token)


@contextlib.contextmanager
def override(op: str, config: Config | Inference) -> Iterator[None]:
    """Use `config` instead of the table for every launch of `op`: for the tuner and for tests.

    op: a key of the table, or "inference".
    """
    token = _overrides.set({**_overrides.get(), op: config})
    try:
        yield
    finally:
        _overrides.reset(token)


@functools.lru_cache(maxsize=64)
def _cuda_generation(index: int) -> tuple[str, int]:
    properties = torch.cuda.get_device_properties(index)
    return generation_of(properties.major, properties.minor), properties.multi_processor_count


def device_generation(device: torch.device) -> tuple[str, int]:
    """Name of the device's table, and its number of multiprocessors."""
    assumed = _assumed.get()
    if assumed is not None:
        return assumed
    if is_interpreted():
        return "interpreted", 4
    return _cuda_generation(torch.cuda.current_device() if device.index is None else device.index)


def config_kind(dtype: torch.dtype, precision: str) -> str:
    """The table's name for a dtype: "half", "tf32" or "ieee"."""
    if dtype != torch.float32:
        return "half"
    return "tf32" if precision == "tf32" else "ieee"


def pick(
    op: str,
    generation: str,
    kind: str,
    channels: int,
    positions: int,
    measured: tuple[int, int, int, int] | None = None,
) -> Config:
    """The configuration of `op` for a head size and a number of positions, of all samples together.

    A head size without an entry takes that of the next larger one. measured: on this GPU, in place of the table's.
    """
    overridden: Config | None = _overrides.get().get(op)
    if overridden is not None:
        return overridden
    if measured is not None:
        return Config(*measured)
    table = TABLES[generation]
    rows = next(table[op, kind, size] for size in HEAD_CLASSES if channels <= size and (op, kind, size) in table)
    return Config(*next(shape for least, shape in rows if positions >= least))


def inference_bytes(config: Inference, channels: int, element: int) -> int:
    """Bytes of shared memory of the loop over the keys: queries once, keys and values of every stage."""
    width = 1 << (channels - 1).bit_length()
    return element * (
        config.block_m * width + config.num_stages * config.block_n * (width + config.block_v) + 16 * config.block_m
    )


def pick_inference(generation: str, kind: str, channels: int, positions: int, batch: int, num_sms: int) -> Inference:
    """Block shapes for head size `channels`: the tuned ones, else by rule, within the GPU's shared memory."""
    overridden: Inference | None = _overrides.get().get("inference")
    if overridden is not None:
        return overridden
    tuned: Any = INFERENCE.get((generation, kind, channels, positions, batch))
    if tuned is not None:
        return Inference(*tuned)
    width = max(16, 1 << (channels - 1).bit_length())
    if generation == "interpreted":
        return Inference(64, 64, min(128, width), 4, 1, 64, min(128, width), min(128, width), 64)
    element = 2 if kind == "half" else 4
    if kind == "ieee":
        rows = 32 if channels <= 256 else 16
        config = Inference(rows, 32 if channels <= 128 else 16, min(64, width), 8, 1, 16, min(64, width), 32, 16)
    elif kind == "tf32":
        config = Inference(64 if channels <= 128 else 32, 32, min(64, width), 4, 2, 32, min(64, width), 32, 16)
    else:
        many = positions * batch // 64 >= num_sms
        block_v = min(width, 128 if channels <= 128 or many else 64)
        block_m = 128 if channels <= 128 else 64
        # With 64 the products would wait for each other on Hopper, and registers would spill on all but the A100.
        large = 64 if generation == "sm_80" else 32
        project_p = large if positions * batch >= 16384 else 32 if positions * batch >= 1024 else 16
        warps = 8 if channels <= 128 or channels > 256 else 4
        # Where these hold, registers would spill otherwise.
        if generation == "sm_100" and channels <= 32:
            warps, project_p = 4, 16
        if generation in ("sm_89", "sm_100") and 256 < channels <= 384:
            warps = 4
        config = Inference(block_m, 64, block_v, warps, 3, project_p, min(64, width), min(64, width), 16)
    limit = SHARED_LIMITS[generation]
    while inference_bytes(config, channels, element) > 0.95 * limit:
        if config.num_stages > 2:
            config = config._replace(num_stages=config.num_stages - 1)
        elif config.block_n > 16:
            config = config._replace(block_n=config.block_n // 2)
        elif config.block_m > 16:
            config = config._replace(block_m=config.block_m // 2)
        else:
            break
    return config


def num_splits(programs: int, positions: int, block: int, num_sms: int, most: int = MAX_SPLITS) -> tuple[int, int]:
    """Number of splits of each program's loop over the positions, so that the programs fill the GPU, and their
    length.

    Every split is a whole number of blocks; none is empty.
    """
    blocks = -(-positions // block)
    splits = max(1, min(num_sms // programs, blocks, most))
    blocks_per_split = -(-blocks // splits)
    return -(-blocks // blocks_per_split), blocks_per_split * block


def inference_splits(
    config: Inference, channels: int, queries: int, positions: int, batch: int, num_sms: int
) -> tuple[int, int, int]:
    """Programs of a split of `attention_inference` for `queries` of the positions, number and length of splits."""
    programs = -(-queries // config.block_m) * batch * -(-channels // config.block_v)
    most = config.max_splits
    if queries < positions:  # a power of two, because each number of splits compiles a kernel
        most = min(MAX_BAND_SPLITS, 1 << (max(1, num_sms // programs).bit_length() - 1))
    return programs, *num_splits(programs, positions, config.block_n, num_sms, most)
