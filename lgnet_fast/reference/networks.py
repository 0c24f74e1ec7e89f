"""NetC, NetL and NetG of LGNet (paper, Section III; layer by layer in docs/model.md).

NetC and NetG are one U-Net, without and with attention blocks in the decoder; NetL is a small-receptive-field
residual network. Inputs are cat(picture, mask), [B, 4, H, W]; outputs are pictures in [-1, 1], [B, 3, H, W].
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from .attention import AttentionBlock

LEVELS = 8
"""Stride-2 steps of the U-Net: H and W must be multiples of 2**8 = 256."""

# Channel multiples of e1..e8; d<i> mirrors e<i-1>.
_WIDTHS = (1, 2, 4, 8, 8, 8, 8, 8)
# Decoder levels whose output is attended: 16x16, 32x32 and 64x64 for a 256x256 picture.
ATTENTION_LEVELS = (5, 4, 3)


class Down(nn.Module):
    """[LeakyReLU(0.2)] -> Conv 4x4 stride 2 -> [BatchNorm], e1..e8 of the U-Net."""

    def __init__(self, in_channels: int, out_channels: int, *, activation: bool, norm: bool) -> None:
        super().__init__()
        self.activation = nn.LeakyReLU(0.2) if activation else None
        self.conv = nn.Conv2d(in_channels, out_channels, 4, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(out_channels) if norm else None

    def forward(self, x: Tensor) -> Tensor:
        if self.activation is not None:
            x = self.activation(x)
        x = self.conv(x)
        return x if self.norm is None else self.norm(x)


class Up(nn.Module):
    """ReLU -> Deconv 4x4 stride 2 -> BatchNorm, d8..d2; d1 has a bias and tanh instead of the norm."""

    def __init__(self, in_channels: int, out_channels: int, *, last: bool = False) -> None:
        super().__init__()
        self.activation = nn.ReLU()
        self.deconv = nn.ConvTranspose2d(in_channels, out_channels, 4, stride=2, padding=1, bias=last)
        self.norm = None if last else nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.deconv(self.activation(x))
        return torch.tanh(x) if self.norm is None else self.norm(x)


class UNet(nn.Module):
    """NetC (``attention=None``) or NetG (``attention="released" | "paper"``).

    Args:
        base_channels: n, the width of the first level; 64 in the paper, 48 in LGNet_light.
        attention: formulation of the attention blocks after d5, d4 and d3, or None for none.
        max_channels: no level is wider; None: the paper's widths, up to 8n. The deep levels hold most of the weights
            and work on grids of 8x8 and smaller: under a cap the same memory gives wider fine levels.
    """

    def __init__(
        self, base_channels: int = 64, attention: str | None = None, max_channels: int | None = None
    ) -> None:
        super().__init__()
        n = base_channels
        widths = [n * m if max_channels is None else min(n * m, max_channels) for m in _WIDTHS]
        self.encoder = nn.ModuleDict()
        self.decoder = nn.ModuleDict()
        for i in range(1, LEVELS + 1):
            self.encoder[f"e{i}"] = Down(
                4 if i == 1 else widths[i - 2], widths[i - 1], activation=i > 1, norm=1 < i < LEVELS
            )
        for i in range(LEVELS, 0, -1):
            skip_and_up = widths[i - 1] * (1 if i == LEVELS else 2)
            self.decoder[f"d{i}"] = Up(skip_and_up, 3 if i == 1 else widths[i - 2], last=i == 1)
        self.attention = nn.ModuleDict()
        if attention is not None:
            for i in ATTENTION_LEVELS:
                self.attention[f"d{i}"] = AttentionBlock(widths[i - 2], attention)

    def arguments(self) -> tuple[int | str | None, ...]:
        """The arguments that make these layers. Raises AttributeError or KeyError: layers were replaced."""
        first, last = (cast(Down, self.encoder[level]).conv.out_channels for level in ("e1", f"e{LEVELS}"))
        variants = [cast(AttentionBlock, block).variant for block in self.attention.values()]
        return first, variants[0] if variants else None, last

    def forward(self, x: Tensor, use_attention: bool = True) -> Tensor:
        """[B, 4, H, W] -> [B, 3, H, W]; ``use_attention=False`` runs NetG as NetC (LGNet_share)."""
        skips: list[Tensor] = []
        for down in self.encoder.values():
            x = down(x)
            skips.append(x)
        x = skips.pop()
        for name, up in self.decoder.items():
            if name != f"d{LEVELS}":
                x = torch.cat((skips.pop(), x), dim=1)
            x = up(x)
            if use_attention and name in self.attention:
                x = self.attention[name](x)
        return x


class ConvBlock(nn.Module):
    """[ReflectionPad] -> Conv or Deconv without bias -> BatchNorm -> [ReLU]."""

    def __init__(self, conv: nn.Module, channels: int, *, pad: int = 0, relu: bool = True) -> None:
        super().__init__()
        self.pad = nn.ReflectionPad2d(pad) if pad else None
        self.conv = conv
        self.norm = nn.BatchNorm2d(channels)
        self.activation = nn.ReLU() if relu else None

    def forward(self, x: Tensor) -> Tensor:
        if self.pad is not None:
            x = self.pad(x)
        x = self.norm(self.conv(x))
        return x if self.activation is None else self.activation(x)


class ResidualBlock(nn.Module):
    """x + [reflect-padded Conv 3x3, BatchNorm, ReLU, reflect-padded Conv 3x3, BatchNorm]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = ConvBlock(nn.Conv2d(channels, channels, 3, bias=False), channels, pad=1)
        self.second = ConvBlock(nn.Conv2d(channels, channels, 3, bias=False), channels, pad=1, relu=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.second(self.first(x))
        return out


class LocalNet(nn.Module):
    """NetL: two stride-2 convolutions, four residual blocks, two deconvolutions.

    Its receptive field is 89x89 at the widest output phase (the paper prints 109x109), so it corrects local
    structure and texture only.

    Args:
        base_channels: n; 64 in every variant of the paper.
    """

    BLOCKS = 4

    def __init__(self, base_channels: int = 64) -> None:
        super().__init__()
        n = base_channels
        self.stem = ConvBlock(nn.Conv2d(4, n, 7, bias=False), n, pad=3)
        self.down1 = ConvBlock(nn.Conv2d(n, 2 * n, 3, stride=2, padding=1, bias=False), 2 * n)
        self.down2 = ConvBlock(nn.Conv2d(2 * n, 4 * n, 3, stride=2, padding=1, bias=False), 4 * n)
        self.blocks = nn.Sequential(*(ResidualBlock(4 * n) for _ in range(self.BLOCKS)))
        self.up1 = ConvBlock(self._deconv(4 * n, 2 * n), 2 * n)
        self.up2 = ConvBlock(self._deconv(2 * n, n), n)
        self.out_pad = nn.ReflectionPad2d(3)
        self.out = nn.Conv2d(n, 3, 7)

    def arguments(self) -> tuple[int | str | None, ...]:
        """See :meth:`UNet.arguments`."""
        return (cast(nn.Conv2d, self.stem.conv).out_channels,)

    @staticmethod
    def _deconv(in_channels: int, out_channels: int) -> nn.ConvTranspose2d:
        return nn.ConvTranspose2d(in_channels, out_channels, 3, stride=2, padding=1, output_padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 4, H, W] -> [B, 3, H, W]."""
        x = self.blocks(self.down2(self.down1(self.stem(x))))
        return torch.tanh(self.out(self.out_pad(self.up2(self.up1(x)))))


NETWORKS = (UNet, LocalNet)
"""The classes of the stages' networks."""
