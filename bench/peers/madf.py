"""MADF: mask-aware dynamic filtering (Zhu et al., "Image Inpainting by End-to-End Cascaded Refinement with Mask
Awareness", IEEE TIP 30, 2021).

An encoder computes its filters from the mask, a different filter for every position. A decoder recovers a picture,
and two more decoders refine it, each normalised by the features of the previous one.

Written from a description of the network; no code is taken from the original (GPL-3.0). It is timed as a baseline, so
it computes as the original does: the filters of all positions are in memory at once (308 MB at the first level of a
256x256 picture) and are copied for a batched product. The original's layer names are kept, so its checkpoints load.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checkpoint import load_strictly, read_checkpoint
from .shapes import check_shapes

LEVELS = 7
SIZE_MULTIPLE = 2**LEVELS
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_PREFIX = "module.model."
_MASK_CHANNELS = 16
_NORM_CHANNELS = 128
# Of levels 1 to 7; index 0 is the input.
_KERNELS = (0, 7, 5, 3, 3, 3, 3, 3)
_ENCODER = (6, 16, 32, 64, 128, 128, 128, 128)
_SKIPS = (6, 64, 128, 256, 512, 512, 512, 512)
_OUT = (3, 64, 128, 256, 512, 512, 512)
"""Of the transposed convolutions of levels 1 to 7."""


def _deconv(level: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(_SKIPS[level], _OUT[level - 1], 4, stride=2, padding=1)


class FilterGenerator(nn.Module):
    """The mask's features of one level, and a filter for every position computed from them."""

    def __init__(self, level: int) -> None:
        super().__init__()
        kernel = _KERNELS[level]
        conv = nn.Conv2d(3 if level == 1 else _MASK_CHANNELS, _MASK_CHANNELS, kernel, stride=2, padding=kernel // 2)
        self.conv = nn.Sequential(conv, nn.ReLU())
        numbers = _ENCODER[level - 1] * kernel**2 * _ENCODER[level]
        self.conv1 = nn.Sequential(nn.Conv2d(_MASK_CHANNELS, numbers, 1))

    def forward(self, mask_features: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 3 or 16, 2H, 2W] -> [B, 16, H, W] and filters [B, in * k * k * out, H, W]."""
        x = self.conv(mask_features)
        return x, self.conv1(x)


class DynamicConv(nn.Module):
    """Convolution of stride 2 with a separate filter for every position, then ReLU."""

    def __init__(self, level: int) -> None:
        super().__init__()
        self.kernel, self.out_channels = _KERNELS[level], _ENCODER[level]
        # The original has this norm in its checkpoints, but never applies it.
        self.bn = nn.BatchNorm2d(self.out_channels)

    def forward(self, x: Tensor, filters: Tensor) -> Tensor:
        """[B, in, 2H, 2W] and filters [B, in * k * k * out, H, W], out fastest -> [B, out, H, W]."""
        batch, _, height, width = filters.shape
        columns = F.unfold(x, self.kernel, padding=self.kernel // 2, stride=2)  # [B, in * k * k, H * W]
        numbers, positions = columns.shape[1:]
        filters = filters.view(batch, numbers, self.out_channels, positions).permute(0, 3, 1, 2)
        rows = columns.transpose(1, 2).reshape(batch * positions, 1, numbers)
        out = torch.bmm(rows, filters.reshape(batch * positions, numbers, self.out_channels))
        out = out.view(batch, positions, self.out_channels).transpose(1, 2)
        return F.relu(out.reshape(batch, self.out_channels, height, width))


class Combine(nn.Module):
    """Convolution 3x3 of the skip connection and the decoder's features, then ReLU, except for the picture."""

    def __init__(self, level: int) -> None:
        super().__init__()
        skip, channels = _SKIPS[level - 1], _OUT[level - 1]
        conv = nn.Conv2d(skip + channels, channels, 3, padding=1)
        self.conv = nn.Sequential(conv) if level == 1 else nn.Sequential(conv, nn.ReLU())

    def forward(self, skip: Tensor, x: Tensor) -> Tensor:
        return self.conv(torch.cat((skip, x), dim=1))


class PointwiseNorm(nn.Module):
    """BatchNorm whose scale and bias at every position come from another map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.batch_norm = nn.BatchNorm2d(channels, affine=False)
        self.mlp_shared = nn.Sequential(nn.Conv2d(channels, _NORM_CHANNELS, 3, padding=1), nn.ReLU())
        self.mlp_scale = nn.Conv2d(_NORM_CHANNELS, channels, 3, padding=1)
        self.mlp_bias = nn.Conv2d(_NORM_CHANNELS, channels, 3, padding=1)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        """[B, C, H, W] and the other map [B, C, h, w] -> [B, C, H, W]."""
        normalized = self.batch_norm(x)
        label = F.interpolate(label, size=x.shape[2:], mode="bilinear", align_corners=False)
        shared = self.mlp_shared(label)
        return normalized * (1 + self.mlp_scale(shared)) + self.mlp_bias(shared)


class Refine(nn.Module):
    """Transposed convolution, pointwise norm, LeakyReLU."""

    def __init__(self, level: int) -> None:
        super().__init__()
        self.deconv = _deconv(level)
        self.bn = PointwiseNorm(_OUT[level - 1])
        self.activation = nn.LeakyReLU(0.2)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        return self.activation(self.bn(self.deconv(x), label))


class MADF(nn.Module):
    """The generator, 85,141,214 parameters. A new one has PyTorch's random initialisation, in training mode."""

    deconv_1: nn.Sequential
    att_conv_1: Combine
    dec_ref0_1: nn.Conv2d
    dec_ref1_1: nn.Conv2d

    def __init__(self) -> None:
        super().__init__()
        levels = range(1, LEVELS + 1)
        for i in levels:
            setattr(self, f"filter_gen_{i}", FilterGenerator(i))
        for i in levels:
            setattr(self, f"enc_conv_{i}", DynamicConv(i))
        for i in levels:
            setattr(self, f"enc_up_{i}", nn.Sequential(nn.Conv2d(_ENCODER[i], _SKIPS[i], 1), nn.ReLU()))
        for i in reversed(levels):
            norm = [nn.BatchNorm2d(_OUT[i - 1]), nn.LeakyReLU(0.2)] if i > 1 else []
            setattr(self, f"deconv_{i}", nn.Sequential(_deconv(i), *norm))
        for i in reversed(levels):
            setattr(self, f"att_conv_{i}", Combine(i))
        for stage in range(2):
            for i in range(LEVELS, 1, -1):
                setattr(self, f"dec_ref{stage}_{i}", Refine(i))
            # Features, the pictures so far, and the input.
            setattr(self, f"dec_ref{stage}_1", nn.Conv2d(_SKIPS[1] + 3 * (stage + 1) + _SKIPS[0], 3, 1))

    @classmethod
    def from_checkpoint(cls, file: str | Path) -> MADF:
        """The network in eval mode with its authors' weights: a checkpoint with the key "model", whose names begin
        with ``module.model.``. Other names are ignored; the norms that are never applied may be missing.

        Raises:
            WeightsError: it cannot be read, or names or shapes do not fit; they are listed.
        """
        model = cls()
        own = model.state_dict()
        state = {key: value for key, value in own.items() if re.match(r"enc_conv_\d\.bn\.", key)}
        for key, value in read_checkpoint(file, "model").items():
            name = key.removeprefix(_PREFIX)
            if name in own:
                state[name] = value
        load_strictly(model, state, str(file))
        return model.eval()

    def forward(self, image: Tensor, mask: Tensor) -> list[Tensor]:
        """Fill the hole.

        Args:
            image: [B, 3, H, W], normalised by :data:`IMAGENET_MEAN` and :data:`IMAGENET_STD`, then 0 in the hole;
                H and W multiples of 128.
            mask: [B, 3, H, W], 1 = known, 0 = hole.

        Returns:
            The recovered picture and its two refinements, [B, 3, H, W] each, normalised as `image`; the last one is
            the result.

        Raises:
            ValueError: a shape that does not fit.
        """
        check_shapes("image", image, 3, mask, 3, SIZE_MULTIPLE)

        x = torch.cat((image, mask), dim=1)
        mask_features, skips = mask, [x]
        for i in range(1, LEVELS + 1):
            mask_features, filters = getattr(self, f"filter_gen_{i}")(mask_features)
            x = getattr(self, f"enc_conv_{i}")(x, filters)
            skips.append(getattr(self, f"enc_up_{i}")(x))

        recovered = first = second = skips.pop()
        for i in range(LEVELS, 1, -1):
            recovered = getattr(self, f"att_conv_{i}")(skips.pop(), getattr(self, f"deconv_{i}")(recovered))
            first = getattr(self, f"dec_ref0_{i}")(first, recovered)
            second = getattr(self, f"dec_ref1_{i}")(second, first)

        source = skips.pop()
        pictures = [self.att_conv_1(source, self.deconv_1(recovered))]
        for features, last in ((first, self.dec_ref0_1), (second, self.dec_ref1_1)):
            features = F.interpolate(features, scale_factor=2, mode="bilinear", align_corners=False)
            pictures.append(last(torch.cat((features, *pictures, source), dim=1)))
        return pictures
