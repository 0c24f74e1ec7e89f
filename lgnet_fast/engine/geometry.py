"""The algebra of convolutions: which sources they read, and how they split into sums with stride 1.

Along one axis (both are alike) output ``o`` is the sum over the kernel's taps ``t`` of ``w[t] * source[x]``::

    convolution             x = stride * o - padding + t
    transposed convolution  x = (o + padding - t) / stride, where that is a whole number

so the outputs ``[start, stop)`` read one range of sources (:meth:`Geometry.span`). Kernels group outputs by phases:
output ``out_step * i + out`` reads the sources from ``in_step * i + start``, with ``in_step = stride`` for a
convolution (one phase) and ``out_step = stride`` for a transposed one (`stride` phases). The CPU executor splits a
phase further by input phases (:meth:`Geometry.phases`). The GPU executor takes the sources of a phase in order, or
joins the outputs of a patch (:meth:`Geometry.axis`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from .regions import Rect


@dataclass(frozen=True)
class Phase:
    """One output phase along an axis, or a part of it.

    Output ``out_step * i + out`` is the sum over n of ``w[taps[n]] * source[in_step * i + start + n * stride]``.
    """

    out: int
    start: int
    stride: int
    taps: tuple[int, ...]


class Axis(NamedTuple):
    """Along one axis, ``out[out_step * g + phase] = sum_t source[in_step * g + origins[phase] + t] w[phase][t]``.

    `taps[phase]` is the number of taps t. With `patch` > 1, a row g of the product holds `patch` outputs side by
    side, and there is one phase.
    """

    in_step: int
    out_step: int
    origins: tuple[int, ...]
    taps: tuple[int, ...]
    patch: int

    @property
    def phases(self) -> int:
        return len(self.origins)

    def used(self, phase: int, in_size: int, out_size: int, reflect: bool) -> tuple[int, int]:
        """First tap and number of taps of a phase that read any of `in_size` sources, for `out_size` outputs."""
        if reflect:
            return 0, self.taps[phase]
        rows = range(-(-out_size // self.out_step))
        hits = [
            tap
            for tap in range(self.taps[phase])
            if any(0 <= self.in_step * g + self.origins[phase] + tap < in_size for g in rows)
        ]
        return (hits[0], hits[-1] + 1 - hits[0]) if hits else (0, 1)


@dataclass(frozen=True)
class Geometry:
    """A square (transposed) convolution, apart from its channels and sizes.

    reflect: reflection padding, else zero padding. output_padding: that of torch.nn.ConvTranspose2d.
    """

    kernel: int
    stride: int = 1
    padding: int = 0
    transposed: bool = False
    reflect: bool = False
    output_padding: int = 0

    @property
    def in_step(self) -> int:
        """Step between the first sources of neighbouring rows of a phase."""
        return 1 if self.transposed else self.stride

    @property
    def out_step(self) -> int:
        """Step between neighbouring outputs of a phase, which is the number of phases."""
        return self.stride if self.transposed else 1

    def tap(self, output: int, source: int) -> int | None:
        """The kernel's tap by which `output` reads `source`; None where it does not."""
        if self.transposed:
            tap = output + self.padding - self.stride * source
        else:
            tap = source - self.stride * output + self.padding
        return tap if 0 <= tap < self.kernel else None

    def span(self, start: int, stop: int) -> tuple[int, int]:
        """Sources [low, high) that outputs [start, stop) read, including padding."""
        if self.transposed:
            low = -(-(start + self.padding - self.kernel + 1) // self.stride)
            return low, (stop - 1 + self.padding) // self.stride + 1
        return start * self.stride - self.padding, (stop - 1) * self.stride - self.padding + self.kernel

    def _inside(self, start: int, stop: int, size: int) -> tuple[int, int]:
        """Sources [low, high) of a map of `size` that outputs [start, stop) read, without padding."""
        low, high = self.span(start, stop)
        if self.reflect:  # index -i reads i, index size - 1 + i reads size - 1 - i
            return max(0, min(low, 2 * (size - 1) - (high - 1))), min(size, max(high, 1 - low))
        return max(0, low), min(size, high)

    def reads(self, outputs: Rect, size: tuple[int, int]) -> Rect:
        """The rectangle that a rectangle of outputs reads of a source of `size` (height, width)."""
        rows = self._inside(outputs.top, outputs.bottom, size[0])
        return Rect(*rows, *self._inside(outputs.left, outputs.right, size[1]))

    def out_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) of the outputs of a source of `size`."""
        if self.transposed:
            more = self.kernel + self.output_padding - 2 * self.padding
            return (size[0] - 1) * self.stride + more, (size[1] - 1) * self.stride + more
        more = 2 * self.padding - self.kernel
        return (size[0] + more) // self.stride + 1, (size[1] + more) // self.stride + 1

    def macs(self, outputs: Rect, size: tuple[int, int], channels: int) -> int:
        """Multiply-accumulates of a rectangle of outputs; zero padding counts, as it is computed.

        Args:
            outputs: the rectangle.
            size: (height, width) of the source.
            channels: input channels times output channels.
        """
        weights = self.kernel**2 * channels
        if not self.transposed:
            return outputs.area * weights
        # every source is multiplied by every tap once
        height, width = self.out_size(size)
        share = size[0] * size[1] * (outputs.area / (height * width))
        return round(min(self.reads(outputs, size).area, share) * weights)

    def phases(self) -> tuple[Phase, ...]:
        """Every output phase along an axis, split by input phases of the stride: sums with stride 1."""
        found = []
        for out in range(self.out_step):
            low, high = self.span(out, out + 1)
            for first in range(low, min(high, low + self.in_step)):
                taps = (self.tap(out, source) for source in range(first, high, self.in_step))
                found.append(Phase(out, first, self.in_step, tuple(t for t in taps if t is not None)))
        return tuple(found)

    def axis(self, patch: int = 1) -> Axis:
        """The phases with their sources in order. With `patch` > 1, a multiple of `out_step`, there is one phase."""
        single = [self.span(out, out + 1) for out in range(self.out_step)]
        spans = single if patch == 1 else [self.span(0, patch)]
        origins, taps = tuple(low for low, _ in spans), tuple(high - low for low, high in spans)
        rows = max(patch, self.out_step)  # outputs from one row of the product to the next
        return Axis(rows * self.in_step // self.out_step, rows, origins, taps, patch)
