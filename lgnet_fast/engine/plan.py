"""A plan: a model as a list of steps over named buffers, which executors run.

BatchNorm is folded into weights. Every pointwise operation is in the epilogue of the step that produces its operand.
A concatenation is one buffer; two steps write its channel slices. An activation belongs to the step before it: an
encoder step stores its result twice, with the activation of the next encoder level, and with that of the decoder
level in the slice that this one reads. So no step needs an activation on its input.

One buffer [B, H, W, 4] = (merged picture, mask) holds the picture from the first stage to the last. The last step of
a stage writes ``image * (1 - mask) + tanh(result) * mask`` into it; nothing is copied between stages.
"""

from __future__ import annotations

import functools
import hashlib
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from .cover import fewer
from .geometry import Geometry
from .regions import Rect, join

Activation = Literal["none", "relu", "leaky_relu", "tanh"]

LEAKY_SLOPE = 0.2
"""The slope of "leaky_relu" below zero, in every executor."""

PICTURE = "picture"
"""Name of the buffer that holds (merged picture, mask)."""


@dataclass(frozen=True)
class Buffer:
    """A feature map [B, height, width, channels]."""

    name: str
    channels: int
    height: int
    width: int

    @property
    def size(self) -> tuple[int, int]:
        return self.height, self.width

    @property
    def everywhere(self) -> Rect:
        return Rect(0, self.height, 0, self.width)


@dataclass(frozen=True)
class View:
    """Channels [offset, offset + channels) of a buffer."""

    buffer: str
    offset: int
    channels: int


@dataclass(frozen=True)
class Store:
    """A result of a step: ``activation(value)`` written to `view`."""

    view: View
    activation: Activation = "none"


@dataclass(frozen=True, kw_only=True)
class _Layer(ABC):
    """One layer with its pointwise operations: a value is computed from `source`, then written by every store.

    weight, bias: in the layout of the layer's module, BatchNorm folded in. regions: rectangles of the output to
    compute.
    """

    name: str
    source: View
    stores: tuple[Store, ...]
    weight: Tensor = field(repr=False)
    bias: Tensor = field(repr=False)
    regions: tuple[Rect, ...] = ()
    weights_of: str = ""
    """Name of the first step with these weights: an earlier one where stages share a network, else this one."""

    def __post_init__(self) -> None:
        if not self.weights_of:
            object.__setattr__(self, "weights_of", self.name)

    @property
    def out_channels(self) -> int:
        return self.bias.shape[0]

    @property
    @abstractmethod
    def kind(self) -> str:
        """ "conv", "deconv" or "attention"."""

    @abstractmethod
    def reads(self, outputs: Rect, source: Buffer) -> Rect:
        """The rectangle of the source's buffer that a rectangle of outputs reads."""

    @abstractmethod
    def macs(self, outputs: Rect, source: Buffer) -> int:
        """Multiply-accumulates of a rectangle of outputs, of one sample."""


@dataclass(frozen=True, kw_only=True)
class ConvStep(_Layer):
    """A (transposed) convolution: value = conv(source) + bias [+ residual].

    merges: it ends a stage. Its single store is the raw picture, which it also merges into the picture buffer.
    """

    geometry: Geometry
    residual: View | None = None
    merges: bool = False

    @property
    def kind(self) -> str:
        return "deconv" if self.geometry.transposed else "conv"

    def reads(self, outputs: Rect, source: Buffer) -> Rect:
        return self.geometry.reads(outputs, source.size)

    def macs(self, outputs: Rect, source: Buffer) -> int:
        return self.geometry.macs(outputs, source.size, self.source.channels * self.out_channels)


@dataclass(frozen=True, kw_only=True)
class AttentionStep(_Layer):
    """The attention block of `source`; weight and bias are the combiner's."""

    variant: str

    @property
    def kind(self) -> str:
        return "attention"

    @property
    def residual(self) -> None:
        return None

    @property
    def merges(self) -> bool:
        return False

    def reads(self, outputs: Rect, source: Buffer) -> Rect:
        return source.everywhere

    def macs(self, outputs: Rect, source: Buffer) -> int:
        channels, positions = self.out_channels, source.height * source.width
        return outputs.area * (2 * positions * channels + 2 * channels * channels)


Step: TypeAlias = ConvStep | AttentionStep


@dataclass(frozen=True)
class Plan:
    """Steps over buffers, for pictures [batch, 3, height, width]."""

    batch: int
    height: int
    width: int
    buffers: dict[str, Buffer]
    steps: tuple[Step, ...]
    holes: tuple[Rect, ...] | None = None

    @property
    def digest(self) -> str:
        """Twelve characters that identify the layers of the network; weights and sizes of pictures do not enter."""
        layers = []
        for step in self.steps:
            more: object = step.geometry if isinstance(step, ConvStep) else step.variant
            activations = [store.activation for store in step.stores]
            layers.append((step.name, step.weights_of, tuple(step.weight.shape), more, activations))
        return hashlib.sha256(repr(layers).encode()).hexdigest()[:12]

    @property
    def name(self) -> str:
        """Names the measurements of this plan within their key of the cache."""
        return f"engine {self.digest}, {len(self.steps)} steps, {self.batch}x{self.height}x{self.width}"

    def source(self, step: Step) -> Buffer:
        """The buffer that a step reads."""
        return self.buffers[step.source.buffer]

    def target(self, step: Step) -> Buffer:
        """The buffer of a step's first store."""
        return self.buffers[step.stores[0].view.buffer]

    def macs(self, step: Step) -> int:
        """Multiply-accumulates of one step in its regions; zero padding counts, because it is computed."""
        return self.batch * sum(step.macs(region, self.source(step)) for region in step.regions)

    def total_macs(self) -> int:
        """Multiply-accumulates of the whole plan."""
        return sum(self.macs(step) for step in self.steps)

    def cost(self, region_macs: float = 0.0) -> float:
        """Multiply-accumulates of the steps, and `region_macs` for each region of a step."""
        return self.total_macs() + region_macs * sum(len(step.regions) for step in self.steps)

    def restricted(self, holes: Iterable[Rect], region_macs: float = 0.0) -> Plan:
        """The same plan computing only what pixels inside `holes` depend on.

        Regions of a step are replaced by their bounding box where that costs no more, and are disjoint (see
        :func:`.regions.join`). All holes are replaced by their bounding box where the plan then costs less, and more
        than 16 by fewer rectangles (:mod:`.cover`).

        Args:
            holes: rectangles that contain every hole pixel of the mask.
            region_macs: what a region costs beside its outputs, in multiply-accumulates of the whole batch.
        """
        rects = fewer(holes, (self.height, self.width))
        # `join` compares areas only. A larger box can be cheaper for the whole plan, or more expensive, because all
        # earlier layers compute what it reads. So the cost of the whole plan decides about one box for all holes.
        plan = self._restricted(join(rects), region_macs)
        if len(rects) > 1:
            box = self._restricted((functools.reduce(Rect.union, rects),), region_macs)
            if box.cost(region_macs) < plan.cost(region_macs):
                return box
        return plan

    def _restricted(self, holes: tuple[Rect, ...], region_macs: float) -> Plan:
        needed: dict[str, set[Rect]] = defaultdict(set)
        steps = []
        for step in reversed(self.steps):
            source = self.source(step)
            if step.merges:
                regions = holes
            else:
                wanted = set().union(*(needed[s.view.buffer] for s in step.stores))
                everywhere = self.target(step).everywhere
                macs = step.macs(everywhere, source) if len(wanted) > 1 else 1
                regions = join(wanted, region_macs * everywhere.area / (self.batch * macs))
            steps.append(replace(step, regions=regions))
            for region in regions:
                needed[step.source.buffer].add(step.reads(region, source))
                if step.residual is not None:
                    needed[step.residual.buffer].add(region)
        return replace(self, steps=tuple(reversed(steps)), holes=holes)

    def resized(self, batch: int, height: int, width: int) -> Plan:
        """The dense plan of the same network for other pictures."""
        buffers = {
            name: replace(b, height=b.height * height // self.height, width=b.width * width // self.width)
            for name, b in self.buffers.items()
        }
        steps = tuple(replace(s, regions=(buffers[s.stores[0].view.buffer].everywhere,)) for s in self.steps)
        return Plan(batch, height, width, buffers, steps)

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> Plan:
        """The same plan with its weights on `device`, in `dtype` (None: unchanged)."""
        moved = {
            s.name: (s.weight.to(device, dtype), s.bias.to(device, dtype))
            for s in self.steps
            if s.weights_of == s.name
        }
        steps = tuple(replace(s, weight=moved[s.weights_of][0], bias=moved[s.weights_of][1]) for s in self.steps)
        return replace(self, steps=steps)

    def without_weights(self) -> Plan:
        """The same plan with weights that have shapes but no memory."""
        return self.to(torch.device("meta"))
