"""A model as a straight list of steps over named buffers: what every executor runs.

BatchNorm is folded into weights; every pointwise operation sits in the epilogue of the step that produces its
operand. Concatenations are channel slices of one buffer that two steps write. Because relu(leaky_relu(x)) = relu(x),
an encoder step stores its result twice, as leaky_relu(x) for the next encoder step and as relu(x) in the slice that
the decoder reads, and no step needs an activation on its input.

The picture lives in one buffer, [B, H, W, 4] = (merged picture, mask), from the first stage to the last: a stage's
final step overwrites the pixels of the hole, ``image * (1 - mask) + tanh(result) * mask``, and nothing else moves.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Literal, cast

import torch
from torch import Tensor, nn

from ..reference.attention import AttentionBlock
from ..reference.networks import ATTENTION_LEVELS, LEVELS, ConvBlock, Down, LocalNet, ResidualBlock, UNet, Up
from .regions import Rect, conv_input, deconv_input, join

Activation = Literal["none", "relu", "leaky_relu", "tanh"]
Kind = Literal["conv", "deconv", "attention"]

_FOLDED_ROWS = 32

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
    """One of a step's results: ``activation(value)`` written to `view`."""

    view: View
    activation: Activation = "none"


@dataclass(frozen=True)
class Step:
    """One layer with everything pointwise around it.

    value = conv(source) + bias [+ residual], or the attention block of source; then every store. A `merges` step
    ends a stage: its single store is the raw picture, which it also merges into the picture's buffer.
    """

    name: str
    kind: Kind
    source: View
    stores: tuple[Store, ...]
    weight: Tensor = field(repr=False)
    bias: Tensor = field(repr=False)
    stride: int = 1
    padding: int = 0
    reflect: bool = False
    output_padding: int = 0
    residual: View | None = None
    variant: str | None = None
    merges: bool = False
    regions: tuple[Rect, ...] = ()
    weights_of: str = ""
    """The first step with these weights: another one where two stages share a network, else this one."""

    def __post_init__(self) -> None:
        if not self.weights_of:
            object.__setattr__(self, "weights_of", self.name)

    @property
    def kernel(self) -> int:
        return self.weight.shape[-1]

    @property
    def out_channels(self) -> int:
        return self.bias.shape[0]


@dataclass(frozen=True)
class Plan:
    """Steps over buffers, for pictures [batch, 3, height, width]."""

    batch: int
    height: int
    width: int
    buffers: dict[str, Buffer]
    steps: tuple[Step, ...]
    holes: tuple[Rect, ...] | None = None

    def macs(self, step: Step) -> int:
        """Multiply-accumulates of one step in the regions it computes; zero padding counts, as it is computed."""
        source = self.buffers[step.source.buffer]
        total = 0
        for region in step.regions:
            if step.kind == "attention":
                channels, positions = step.out_channels, source.height * source.width
                total += region.area * (2 * positions * channels + 2 * channels * channels)
            elif step.kind == "conv":
                total += region.area * step.weight[0].numel() * step.out_channels
            else:  # every input position meets every tap once
                read = deconv_input(region, (source.height, source.width), step.kernel, step.stride, step.padding)
                full = source.height * source.width
                out = self.buffers[step.stores[0].view.buffer]
                exact = region.area / (out.height * out.width)
                total += round(min(read.area, full * exact) * step.weight.numel())
        return self.batch * total

    def total_macs(self) -> int:
        """Multiply-accumulates of the whole plan."""
        return sum(self.macs(step) for step in self.steps)

    def restricted(self, holes: Iterable[Rect]) -> Plan:
        """The same plan computing only what pixels inside `holes` depend on.

        Every hole pixel of the mask must lie in one of the rectangles.
        """
        holes = join(holes)
        needed: dict[str, set[Rect]] = defaultdict(set)
        steps = []
        for step in reversed(self.steps):
            regions = holes if step.merges else join(r for s in step.stores for r in needed[s.view.buffer])
            steps.append(replace(step, regions=regions))
            source = self.buffers[step.source.buffer]
            size = (source.height, source.width)
            for region in regions:
                if step.kind == "attention":
                    needed[source.name].add(source.everywhere)
                elif step.kind == "conv":
                    needed[source.name].add(
                        conv_input(region, size, step.kernel, step.stride, step.padding, step.reflect)
                    )
                else:
                    needed[source.name].add(deconv_input(region, size, step.kernel, step.stride, step.padding))
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
        """The same plan with its weights on `device`, in `dtype` (None: theirs)."""
        moved = {
            s.name: (s.weight.to(device, dtype), s.bias.to(device, dtype))
            for s in self.steps
            if s.weights_of == s.name
        }
        steps = tuple(replace(s, weight=moved[s.weights_of][0], bias=moved[s.weights_of][1]) for s in self.steps)
        return replace(self, steps=steps)

    def without_weights(self) -> Plan:
        """The same plan whose weights keep their shapes but no memory."""
        return self.to(torch.device("meta"))


def fold(conv: nn.Module, norm: nn.BatchNorm2d | None) -> tuple[Tensor, Tensor]:
    """Weight and bias of a (transposed) convolution followed by a BatchNorm in evaluation mode, in conv's dtype.

    The folding itself is done in float64: it must not cost accuracy.
    """
    assert isinstance(conv, (nn.Conv2d, nn.ConvTranspose2d))
    dtype = conv.weight.dtype
    weight = conv.weight.detach()
    bias = weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias.detach()
    if norm is None:
        return weight.clone(), bias.clone()
    bias = bias.double()
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight.detach().double() / (norm.running_var.double() + norm.eps).sqrt()
    bias = (bias - norm.running_mean.double()) * scale + norm.bias.detach().double()
    if weight.is_meta:
        return weight, bias.to(dtype)
    # A few rows at a time: what the system has to find in new memory takes longer than the arithmetic.
    folded = torch.empty_like(weight)
    scale = scale.view((-1, 1, 1, 1) if isinstance(conv, nn.Conv2d) else (1, -1, 1, 1)).expand(
        *weight.shape[:2], 1, 1
    )
    for target, rows, factor in zip(
        folded.split(_FOLDED_ROWS), weight.split(_FOLDED_ROWS), scale.split(_FOLDED_ROWS)
    ):
        target.copy_(rows.double() * factor)
    return folded, bias.to(dtype)


class _Builder:
    def __init__(self, batch: int, height: int, width: int) -> None:
        self.batch, self.height, self.width = batch, height, width
        self.buffers: dict[str, Buffer] = {}
        self.steps: list[Step] = []
        self.folded: dict[nn.Module, tuple[str, Tensor, Tensor]] = {}
        self.buffer(PICTURE, 4, 1)

    def buffer(self, name: str, channels: int, reduction: int) -> View:
        """A new buffer at 1/reduction of the picture's size, as a view of all its channels."""
        self.buffers[name] = Buffer(name, channels, self.height // reduction, self.width // reduction)
        return View(name, 0, channels)

    def fold(self, name: str, conv: nn.Module, norm: nn.BatchNorm2d | None) -> dict[str, object]:
        """The weights of a step, which belong to an earlier one if that has the same module."""
        if conv not in self.folded:
            self.folded[conv] = (name, *fold(conv, norm))
        return dict(zip(("weights_of", "weight", "bias"), self.folded[conv], strict=True))

    def add(self, step: Step) -> None:
        everywhere = self.buffers[step.stores[0].view.buffer].everywhere
        self.steps.append(replace(step, regions=(everywhere,)))

    def conv(
        self, name: str, module: nn.Module, norm: nn.BatchNorm2d | None, source: View, *stores: Store, **extra: object
    ) -> None:
        assert isinstance(module, (nn.Conv2d, nn.ConvTranspose2d))
        kind: Kind = "conv" if isinstance(module, nn.Conv2d) else "deconv"
        arguments: dict[str, object] = {
            "stride": module.stride[0],
            "padding": int(module.padding[0]),
            "output_padding": int(module.output_padding[0]),
            **self.fold(name, module, norm),
        }
        self.add(Step(name, kind, source, stores, **(arguments | extra)))  # type: ignore[arg-type]

    def unet(self, name: str, net: UNet, use_attention: bool) -> None:
        """Steps of NetC or NetG."""
        encoder = cast(dict[str, Down], net.encoder)
        decoder = cast(dict[str, Up], net.decoder)
        widths = [down.conv.out_channels for down in encoder.values()]
        ups = [decoder[f"d{i}"].deconv.out_channels for i in range(1, LEVELS + 1)]  # d1, d2, ...
        joined = {i: self.buffer(f"{name}.cat{i}", widths[i - 1] + ups[i], 2**i) for i in range(1, LEVELS)}
        source = View(PICTURE, 0, 4)
        for i in range(1, LEVELS + 1):
            down = encoder[f"e{i}"]
            out = self.buffer(f"{name}.e{i}", widths[i - 1], 2**i)
            if i < LEVELS:
                skip = View(joined[i].buffer, 0, widths[i - 1])
                stores: tuple[Store, ...] = (Store(out, "leaky_relu"), Store(skip, "relu"))
            else:
                stores = (Store(out, "relu"),)
            self.conv(f"{name}.e{i}", down.conv, down.norm, source, *stores)
            source = out
        for i in range(LEVELS, 0, -1):
            up = decoder[f"d{i}"]
            if i == 1:
                raw = self.buffer(f"{name}.raw", 3, 1)
                self.conv(f"{name}.d1", up.deconv, None, source, Store(raw, "tanh"), merges=True)
                return
            target = View(joined[i - 1].buffer, widths[i - 2], ups[i - 1])
            if use_attention and i in ATTENTION_LEVELS:
                features = self.buffer(f"{name}.d{i}", ups[i - 1], 2 ** (i - 1))
                self.conv(f"{name}.d{i}", up.deconv, up.norm, source, Store(features))
                self.attend(f"{name}.attention_d{i}", net.attention[f"d{i}"], features, Store(target, "relu"))
            else:
                self.conv(f"{name}.d{i}", up.deconv, up.norm, source, Store(target, "relu"))
            source = joined[i - 1]

    def attend(self, name: str, block: nn.Module, source: View, store: Store) -> None:
        assert isinstance(block, AttentionBlock)
        weights = self.fold(name, block.combiner, None)
        self.add(Step(name, "attention", source, (store,), variant=block.variant, **weights))  # type: ignore[arg-type]

    def local(self, name: str, net: LocalNet) -> None:
        """Steps of NetL."""

        def layer(part: str, block: ConvBlock, source: View, reduction: int, **extra: object) -> View:
            pad = block.pad.padding[0] if block.pad is not None else 0
            out = self.buffer(f"{name}.{part}", block.norm.num_features, reduction)
            activation: Activation = "none" if block.activation is None else "relu"
            arguments = {"padding": pad, "reflect": True} if pad else {}
            self.conv(f"{name}.{part}", block.conv, block.norm, source, Store(out, activation), **(arguments | extra))
            return out

        x = layer("stem", net.stem, View(PICTURE, 0, 4), 1)
        x = layer("down1", net.down1, x, 2)
        x = layer("down2", net.down2, x, 4)
        for i, block in enumerate(cast(list[ResidualBlock], net.blocks)):
            inner = layer(f"block{i}.first", block.first, x, 4)
            x = layer(f"block{i}.second", block.second, inner, 4, residual=x)
        x = layer("up1", net.up1, x, 2)
        x = layer("up2", net.up2, x, 1)
        raw = self.buffer(f"{name}.raw", 3, 1)
        pad = net.out_pad.padding[0]
        self.conv(f"{name}.out", net.out, None, x, Store(raw, "tanh"), padding=pad, reflect=True, merges=True)


def build_plan(stages: Iterable[tuple[str, nn.Module, bool]], batch: int, height: int, width: int) -> Plan:
    """The dense plan of a cascade.

    Args:
        stages: (name, NetC, NetL or NetG, whether its attention runs), in order.
        batch, height, width: of the pictures; height and width multiples of 256.

    Returns:
        The plan; weights in the modules' dtype, on their device.
    """
    builder = _Builder(batch, height, width)
    with torch.no_grad():
        for name, net, use_attention in stages:
            if isinstance(net, UNet):
                builder.unet(name, net, use_attention)
            elif isinstance(net, LocalNet):
                builder.local(name, net)
            else:
                raise TypeError(f"stages: expected a UNet or a LocalNet, got {type(net).__name__}")
    return Plan(batch, height, width, builder.buffers, tuple(builder.steps))
