"""The kernels of the CPU (csrc/conv.h) and the form that they take a convolution in: output phases, groups, taps.

========== ============================================================================================
kernel     what it computes
========== ============================================================================================
direct     patches times weights
winograd2  F(2x2, rxr) tiles of every phase: 1.78 times fewer multiplications for 2x2 taps, 2.25 for 3x3
winograd4  F(4x4, rxr) tiles: 2.56 times fewer for 2x2 taps, 4 for 3x3; the transformed weights are 6.25 and 4
           times larger
narrow     a stage's last step (3 channels), with tanh and merge
attention  the attention block
========== ============================================================================================

"/bf16" after a name means products of bf16 pairs with float32 sums. "/bf16x3" means products of float32 numbers, each
the sum of two bf16 (high + low), by three products of bf16: high high + high low + low high. The error of a product
is at most 2^-16 of it. Other libraries call this bf16x3 or BF16_BF16_F32_X3.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Literal, NamedTuple, get_args

from ..geometry import Geometry
from ..plan import PICTURE, AttentionStep, Step

TILES = {"direct": 1, "winograd2": 2, "winograd4": 4}
"""Outputs along a side of a tile, of the kernels that convolve."""
NARROW, ATTENTION = "narrow", "attention"
Products = Literal["float32", "bf16", "bf16x3"]
"""What a step multiplies, as csrc/common.h has it."""

BY_STAGES = -1
"""In place of a chunk's size: all tiles are transformed, then multiplied, then transformed back."""
CHUNKS = (BY_STAGES, 14, 28, 56, 112)
"""Chunks of tiles worth trying, beside the size that csrc finds by a rule."""


class Choice(NamedTuple):
    """How a step runs: its kernel, what it multiplies, and tiles of a chunk (0: by a rule).

    As text: the kernel, "/bf16" or "/bf16x3", and "@56" or "@stages" where it is not by the rule.
    """

    kernel: str
    products: Products = "float32"
    chunk: int = 0

    @classmethod
    def parse(cls, text: str) -> Choice:
        """From the text that :meth:`__str__` makes.

        Raises:
            ValueError: it is none.
        """
        packed, _, chunk = text.partition("@")
        kernel, _, suffix = packed.partition("/")
        products: dict[str, Products] = {name: name for name in get_args(Products)}
        choice = cls(kernel, products.get(suffix, "float32"), BY_STAGES if chunk == "stages" else int(chunk or 0))
        if (kernel not in TILES and kernel not in (NARROW, ATTENTION)) or str(choice) != text:
            raise ValueError(f"choices: expected {', '.join(TILES)}, narrow or attention, got {text!r}")
        return choice

    def __str__(self) -> str:
        chunk = "" if not self.chunk else "@stages" if self.chunk == BY_STAGES else f"@{self.chunk}"
        return self.kernel + ("" if self.products == "float32" else f"/{self.products}") + chunk

    @property
    def packed(self) -> Choice:
        """What the packed weights depend on: the same by the rule."""
        return self._replace(chunk=0)


def candidates(step: Step) -> list[str]:
    """Kernels that can run a step, the plainest first."""
    if isinstance(step, AttentionStep):
        return [ATTENTION]
    if step.merges:
        return [NARROW]
    # Transforms work on vectors of channels; few channels, or many taps, are better off as patches.
    few_taps = all(len(phase.taps) <= 3 for phase in step.geometry.phases())
    return list(TILES) if few_taps and step.source.buffer != PICTURE else ["direct"]


@dataclass(frozen=True)
class Group:
    """One product of the kernel; `taps` are (row, column) taps of each start, in the order of the depth."""

    ry: int
    rx: int
    starts: tuple[tuple[int, int], ...]
    taps: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]

    def points(self, m: int) -> int:
        return (m + self.ry - 1) * (m + self.rx - 1)


@dataclass(frozen=True)
class Job:
    oy: int
    ox: int
    groups: tuple[Group, ...]


def jobs_of(geometry: Geometry, m: int) -> list[Job]:
    """The products of one convolution, with tiles of m x m outputs (1: patches)."""
    phases = geometry.phases()
    jobs = []
    outs = sorted({phase.out for phase in phases})
    for oy, ox in product(outs, outs):
        pairs = [(y, x) for y in phases if y.out == oy for x in phases if x.out == ox]
        if m == 1:
            single = sorted(
                ((y.start + i * y.stride, x.start + j * x.stride), ((ty,), (tx,)))
                for y, x in pairs
                for i, ty in enumerate(y.taps)
                for j, tx in enumerate(x.taps)
            )
            groups = [Group(1, 1, tuple(s for s, _ in single), tuple(t for _, t in single))]
        else:
            groups = []
            for ry, rx in sorted({(len(y.taps), len(x.taps)) for y, x in pairs}, reverse=True):
                same = [(y, x) for y, x in pairs if (len(y.taps), len(x.taps)) == (ry, rx)]
                starts = tuple((y.start, x.start) for y, x in same)
                groups.append(Group(ry, rx, starts, tuple((y.taps, x.taps) for y, x in same)))
        jobs.append(Job(oy, ox, tuple(groups)))
    return jobs
