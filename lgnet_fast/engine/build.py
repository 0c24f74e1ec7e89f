"""Building the plan of a model: its layers in order, BatchNorm folded into weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from ..reference.attention import AttentionBlock
from ..reference.lgnet import STAGE_MODULES, LGNet, LocalGlobalRefinement
from ..reference.networks import LEVELS, ConvBlock, Down, LocalNet, ResidualBlock, UNet, Up
from .geometry import Geometry
from .plan import LEAKY_SLOPE, PICTURE, Activation, AttentionStep, Buffer, ConvStep, Plan, Step, Store, View

_FOLDED_ROWS = 32


def fold(conv: nn.Module, norm: nn.BatchNorm2d | None) -> tuple[Tensor, Tensor]:
    """Weight and bias of a (transposed) convolution followed by a BatchNorm in evaluation mode, in conv's dtype.

    The folding is done in float64, so that it loses no accuracy.
    """
    assert isinstance(conv, (nn.Conv2d, nn.ConvTranspose2d))
    # Weights in 16 bit are folded, and rounded once, by the executor.
    dtype = torch.promote_types(conv.weight.dtype, torch.float32)
    weight = conv.weight.detach()
    bias = weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias.detach()
    # Without values there is nothing to fold, and arithmetic on the meta device loads PyTorch's compiler, which takes
    # longer than all the rest of `load_engine`.
    if norm is None or weight.is_meta:
        return weight.to(dtype, copy=True), bias.to(dtype, copy=True)
    bias = _wide(bias)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = _wide(norm.weight) / (_wide(norm.running_var) + norm.eps).sqrt()
    bias = (bias - _wide(norm.running_mean)) * scale + _wide(norm.bias)
    # A few rows at a time: page faults of large temporaries would take longer than the arithmetic.
    folded = torch.empty_like(weight, dtype=dtype, device=scale.device)
    scale = scale.view((-1, 1, 1, 1) if isinstance(conv, nn.Conv2d) else (1, -1, 1, 1)).expand(
        *weight.shape[:2], 1, 1
    )
    for target, rows, factor in zip(
        folded.split(_FOLDED_ROWS), weight.split(_FOLDED_ROWS), scale.split(_FOLDED_ROWS)
    ):
        target.copy_(_wide(rows) * factor)
    return folded, bias.to(dtype)


def _wide(values: Tensor) -> Tensor:
    """`values` in float64; of Apple's GPUs, which lack it, on the CPU."""
    values = values.detach()
    return (values.cpu() if values.device.type == "mps" else values).double()


def activation_of(module: nn.Module | None) -> Activation:
    """The name of a layer's activation in plans; of None "none".

    Raises:
        TypeError: plans have no such activation.
    """
    if module is None:
        return "none"
    if isinstance(module, nn.ReLU):
        return "relu"
    if isinstance(module, nn.LeakyReLU) and module.negative_slope == LEAKY_SLOPE:
        return "leaky_relu"
    raise TypeError(f"activation: plans have ReLU and LeakyReLU({LEAKY_SLOPE}), got {module}")


class _Folded(NamedTuple):
    owner: str
    weight: Tensor
    bias: Tensor


class _Builder:
    def __init__(self, batch: int, height: int, width: int) -> None:
        self.batch, self.height, self.width = batch, height, width
        self.buffers: dict[str, Buffer] = {}
        self.steps: list[Step] = []
        self.folded: dict[tuple[nn.Module, nn.Module | None], _Folded] = {}
        self.buffer(PICTURE, 4, 1)

    def buffer(self, name: str, channels: int, reduction: int) -> View:
        """A new buffer of 1/reduction of the picture's height and width, as a view of all its channels."""
        self.buffers[name] = Buffer(name, channels, self.height // reduction, self.width // reduction)
        return View(name, 0, channels)

    def fold(self, name: str, conv: nn.Module, norm: nn.BatchNorm2d | None) -> _Folded:
        """The weights of a step; an earlier step with the same modules shares them."""
        if (conv, norm) not in self.folded:
            self.folded[conv, norm] = _Folded(name, *fold(conv, norm))
        return self.folded[conv, norm]

    def add(self, step: Step) -> None:
        everywhere = self.buffers[step.stores[0].view.buffer].everywhere
        self.steps.append(replace(step, regions=(everywhere,)))

    def conv(
        self,
        name: str,
        module: nn.Module,
        norm: nn.BatchNorm2d | None,
        source: View,
        *stores: Store,
        reflected: int = 0,
        residual: View | None = None,
        merges: bool = False,
    ) -> None:
        """A step of a (transposed) convolution; `reflected`: reflection padding instead of the module's padding."""
        assert isinstance(module, (nn.Conv2d, nn.ConvTranspose2d))
        geometry = Geometry(
            module.kernel_size[0],
            module.stride[0],
            reflected or int(module.padding[0]),
            transposed=isinstance(module, nn.ConvTranspose2d),
            reflect=reflected > 0,
            output_padding=int(module.output_padding[0]),
        )
        folded = self.fold(name, module, norm)
        self.add(
            ConvStep(
                name=name,
                source=source,
                stores=stores,
                weight=folded.weight,
                bias=folded.bias,
                weights_of=folded.owner,
                geometry=geometry,
                residual=residual,
                merges=merges,
            )
        )

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
            reader = encoder[f"e{i + 1}"] if i < LEVELS else decoder[f"d{i}"]
            stores = [Store(out, activation_of(reader.activation))]
            if i < LEVELS:
                skip = View(joined[i].buffer, 0, widths[i - 1])
                stores.append(Store(skip, activation_of(decoder[f"d{i}"].activation)))
            self.conv(f"{name}.e{i}", down.conv, down.norm, source, *stores)
            source = out
        for i in range(LEVELS, 0, -1):
            up = decoder[f"d{i}"]
            if i == 1:
                raw = self.buffer(f"{name}.raw", 3, 1)
                self.conv(f"{name}.d1", up.deconv, None, source, Store(raw, "tanh"), merges=True)
                return
            view = View(joined[i - 1].buffer, widths[i - 2], ups[i - 1])
            target = Store(view, activation_of(decoder[f"d{i - 1}"].activation))
            if use_attention and f"d{i}" in net.attention:
                features = self.buffer(f"{name}.d{i}", ups[i - 1], 2 ** (i - 1))
                self.conv(f"{name}.d{i}", up.deconv, up.norm, source, Store(features))
                self.attend(f"{name}.attention_d{i}", net.attention[f"d{i}"], features, target)
            else:
                self.conv(f"{name}.d{i}", up.deconv, up.norm, source, target)
            source = joined[i - 1]

    def attend(self, name: str, block: nn.Module, source: View, store: Store) -> None:
        assert isinstance(block, AttentionBlock)
        folded = self.fold(name, block.combiner, None)
        self.add(
            AttentionStep(
                name=name,
                source=source,
                stores=(store,),
                weight=folded.weight,
                bias=folded.bias,
                weights_of=folded.owner,
                variant=block.variant,
            )
        )

    def local(self, name: str, net: LocalNet) -> None:
        """Steps of NetL."""

        def layer(part: str, block: ConvBlock, source: View, reduction: int, residual: View | None = None) -> View:
            pad = block.pad.padding[0] if block.pad is not None else 0
            out = self.buffer(f"{name}.{part}", block.norm.num_features, reduction)
            store = Store(out, activation_of(block.activation))
            self.conv(f"{name}.{part}", block.conv, block.norm, source, store, reflected=pad, residual=residual)
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
        self.conv(f"{name}.out", net.out, None, x, Store(raw, "tanh"), reflected=pad, merges=True)


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


def plan_stages(model: LGNet | LocalGlobalRefinement) -> list[tuple[str, nn.Module, bool]]:
    """The stages of a model as :func:`build_plan` takes them; for an X_LG, those after the first."""
    if isinstance(model, LocalGlobalRefinement):
        return [("net_l", model.net_l, False), ("net_g", model.net_g, _attends(model.net_g, True))]
    stages = []
    for stage in model.stages.split("+"):
        name = STAGE_MODULES[stage]
        shared = stage == "C" and model.share_coarse
        net = getattr(model, STAGE_MODULES["G_att"] if shared else name)
        stages.append((name, net, not shared and _attends(net, stage == "G_att")))
    return stages


def _attends(net: nn.Module, made: bool) -> bool:
    """Whether a call of a network runs attention blocks; `made`: whether LGNet has made the stage with some."""
    return len(net.attention) > 0 if isinstance(net, UNet) else made
