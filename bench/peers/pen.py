"""PEN: Pyramid-context Encoder Network (Zeng et al., "Learning Pyramid-Context Encoder Network for High-Quality Image
Inpainting", CVPR 2019).

A U-Net whose five skip connections are filled by attention, from deep to shallow: weights come from comparing the
positions of the deeper map, and the shallower map is the sum of its patches with these weights.

Written from a description of the network; no code is taken from the original (MIT licence). It is timed as a
baseline, so it computes as the original does: attention for one picture at a time, by convolutions with the picture's
patches, and the small pictures for the training loss also at inference. The original's layer names are kept, so its
checkpoints load.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lgnet_fast.reference.cascade import init_weights

from .checkpoint import load_strictly, read_checkpoint
from .contextual import attention_weights, known_patches, paste, scores
from .shapes import check_shapes

SIZE_MULTIPLE = 64
# Channels of the five skip connections, sides 1/2 to 1/32 of the picture's.
_WIDTHS = (32, 64, 128, 256, 512)
_DILATIONS = (1, 2, 4, 8)
_SMALLEST_WEIGHT = 1e-8


def _conv(channels: int, out_channels: int, activation: nn.Module, stride: int = 1, dilation: int = 1) -> nn.Module:
    conv = nn.Conv2d(channels, out_channels, 3, stride, padding=dilation, dilation=dilation)
    return nn.Sequential(conv, activation)


def _up(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)


class AttentionTransfer(nn.Module):
    """The paper's attention transfer network (ATN), with the original code's handling of patches that touch the hole.

    Args:
        channels: of the shallower map.
        size: side of the patches that are compared.
        combine: combine the result through four dilated convolutions; not at the deepest level.
    """

    def __init__(self, channels: int, size: int = 3, *, combine: bool = True) -> None:
        super().__init__()
        self.size = size
        if combine:
            for i, dilation in enumerate(_DILATIONS):
                conv = _conv(channels, channels // len(_DILATIONS), nn.ReLU(), dilation=dilation)
                setattr(self, f"conv0{i}", conv)
        self.combine = combine

    def forward(self, shallow: Tensor, deep: Tensor, mask: Tensor) -> Tensor:
        """[B, C, 2H, 2W], [B, D, H, W] and the whole mask [B, 1, *, *], 1 = hole -> [B, C, 2H, 2W]."""
        mask = F.interpolate(mask, size=deep.shape[2:], mode="bilinear", align_corners=True)
        filled = []
        for low, high, hole in zip(shallow.split(1), deep.split(1), mask.split(1)):
            weights = attention_weights(scores(high, self.size), known_patches(hole, self.size))
            filled.append(paste(weights.clamp_min(_SMALLEST_WEIGHT), low))
        x = torch.cat(filled)
        if not self.combine:
            return x
        return torch.cat([getattr(self, f"conv0{i}")(x) for i in range(len(_DILATIONS))], dim=1)


class PEN(nn.Module):
    """The generator, 10,231,538 parameters, initialised as in the paper: weights N(0, 0.02), biases 0."""

    def __init__(self) -> None:
        super().__init__()
        down = (4, *_WIDTHS, _WIDTHS[-1])
        for i in range(1, 7):
            activation = nn.LeakyReLU(0.2) if i < 6 else nn.ReLU()
            setattr(self, f"dw_conv0{i}", _conv(down[i - 1], down[i], activation, stride=2))
        widths = list(enumerate(_WIDTHS, 1))[::-1]
        for i, width in widths:
            # The few positions of the deepest map are compared as single positions, all others as patches.
            attention = AttentionTransfer(width) if i < 5 else AttentionTransfer(width, 1, combine=False)
            setattr(self, f"at_conv0{i}", attention)
        for i, width in widths:
            setattr(self, f"up_conv0{i}", _conv(2 * _WIDTHS[i] if i < 5 else width, width, nn.ReLU()))
        for i, width in widths:
            setattr(self, f"torgb{i}", nn.Sequential(nn.Conv2d(2 * width, 3, 1), nn.Tanh()))
        n = _WIDTHS[0]
        self.decoder = nn.Sequential(
            nn.Conv2d(2 * n, n, 3, padding=1), nn.ReLU(), nn.Conv2d(n, 3, 3, padding=1), nn.Tanh()
        )
        init_weights(self)

    @classmethod
    def from_checkpoint(cls, file: str | Path) -> PEN:
        """The network in eval mode with its authors' weights: ``gen_<epoch>.pth``, a dict with the key "netG".

        Raises:
            WeightsError: it cannot be read, or names or shapes do not fit; they are listed.
        """
        model = cls()
        load_strictly(model, read_checkpoint(file, "netG"), str(file))
        return model.eval()

    def forward(self, x: Tensor, mask: Tensor) -> tuple[list[Tensor], Tensor]:
        """Fill the hole.

        Args:
            x: [B, 4, H, W], the picture in [-1, 1] with +1 in the hole, and the mask; H, W multiples of 64.
            mask: [B, 1, H, W], 1 = hole.

        Returns:
            Pictures of the five decoder levels, sides 1/2 to 1/32, for the training loss only, and the raw picture
            [B, 3, H, W]; all in (-1, 1).

        Raises:
            ValueError: a shape that does not fit.
        """
        check_shapes("x", x, 4, mask, 1, SIZE_MULTIPLE)

        skips = []
        for i in range(1, 7):
            x = getattr(self, f"dw_conv0{i}")(x)
            skips.append(x)
        deep = skips.pop()
        filled = deep
        for i in range(5, 0, -1):
            skips[i - 1] = filled = getattr(self, f"at_conv0{i}")(skips[i - 1], filled, mask)

        x, levels = deep, []
        for i in range(5, 0, -1):
            x = torch.cat((getattr(self, f"up_conv0{i}")(_up(x)), skips[i - 1]), dim=1)
            levels.append(x)
        pyramid = [getattr(self, f"torgb{i}")(level) for i, level in enumerate(reversed(levels), 1)]
        return pyramid, self.decoder(_up(x))
