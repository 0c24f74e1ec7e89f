"""MEDFE: Mutual Encoder-Decoder with Feature Equalizations (Liu et al., "Rethinking Image Inpainting via a Mutual
Encoder-Decoder with Feature Equalizations", ECCV 2020).

An encoder computes six feature maps. The three shallow maps (texture) and the three deep ones (structure) are filled
at 32x32 by chains of partial convolutions at three scales. The results are fused, equalised over channels and
positions, and added to all six maps. A decoder computes the picture.

It is timed as a baseline, so it computes as the original does: the window sums of a mask are convolutions with
all-ones weights of full width (44 % of the arithmetic), and the Gaussian's products are all in memory at once
(2.1 GB).

The original's layer names are kept, so its checkpoints load. Its three networks are `EN`, `MEDFE` and `DE`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lgnet_fast.errors import WeightsError

from .checkpoint import load_strictly, read_checkpoint

SIZE = 256
MASK_MODES = ("all_valid", "nearest")
# Colour of the hole: R, G, B of 8-bit levels, converted to [-1, 1].
HOLE_COLOUR = tuple(2 * level / 255 - 1 for level in (123, 104, 117))
_GRID = 32  # the side at which features are filled
_SIGMA = 1.5


def _leaky(inplace: bool = False) -> nn.LeakyReLU:
    return nn.LeakyReLU(0.2, inplace)


def _convs(*steps: tuple[int, int, int, int], last_activation: bool = True) -> nn.Sequential:
    """[Conv without bias, InstanceNorm, LeakyReLU] for each (in, out, kernel size, stride)."""
    layers: list[nn.Module] = []
    for in_channels, out_channels, kernel, stride in steps:
        conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding=(kernel - 1) // 2, bias=False)
        layers += [conv, nn.InstanceNorm2d(out_channels), _leaky()]
    return nn.Sequential(*(layers if last_activation else layers[:-1]))


class Convs(nn.Module):
    """:func:`_convs` under the original's name for it."""

    def __init__(self, *steps: tuple[int, int, int, int], last_activation: bool = True) -> None:
        super().__init__()
        self.model = _convs(*steps, last_activation=last_activation)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class ResizedConv(nn.Module):
    """Bilinear resize to a square, then Conv 1x1, InstanceNorm, LeakyReLU."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.norm = nn.InstanceNorm2d(out_channels)
        self.activation = _leaky()

    def forward(self, x: Tensor, side: int) -> Tensor:
        x = F.interpolate(x, size=(side, side), mode="bilinear", align_corners=False)
        return self.activation(self.norm(self.conv(x)))


# -- encoder and decoder -------------------------------------------------------------------------------------------


class EncoderStep(nn.Module):
    """[LeakyReLU] -> Conv 4x4 stride 2 with bias -> [affine InstanceNorm]."""

    def __init__(self, in_channels: int, out_channels: int, *, activation: bool = True, norm: bool = True) -> None:
        super().__init__()
        conv = nn.Conv2d(in_channels, out_channels, 4, stride=2, padding=1)
        layers: list[nn.Module] = [_leaky(inplace=True)] if activation else []
        layers += [conv, nn.InstanceNorm2d(out_channels, affine=True)] if norm else [conv]
        self.model = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class ResidualBlock(nn.Module):
    """x + [dilated Conv 3x3, InstanceNorm, ReLU, Conv 3x3, InstanceNorm], padded by reflection."""

    def __init__(self, channels: int, dilation: int = 2) -> None:
        super().__init__()
        self.conv_block = nn.Sequential(
            nn.ReflectionPad2d(dilation),
            nn.Conv2d(channels, channels, 3, dilation=dilation, bias=False),
            nn.InstanceNorm2d(channels),
            nn.ReLU(),
            nn.ReflectionPad2d(1),
            nn.Conv2d(channels, channels, 3, bias=False),
            nn.InstanceNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv_block(x)


class Encoder(nn.Module):
    """[B, 6, 256, 256] -> six feature maps, sides 128 to 4."""

    def __init__(self) -> None:
        super().__init__()
        self.middle = nn.Sequential(*(ResidualBlock(512) for _ in range(4)))
        self.Encoder_1 = EncoderStep(6, 64, activation=False, norm=False)
        self.Encoder_2 = EncoderStep(64, 128)
        self.Encoder_3 = EncoderStep(128, 256)
        self.Encoder_4 = EncoderStep(256, 512)
        self.Encoder_5 = EncoderStep(512, 512)
        self.Encoder_6 = EncoderStep(512, 512, norm=False)

    def forward(self, x: Tensor) -> list[Tensor]:
        features = []
        # The activation of each step changes the previous map in place, so the returned maps are activated.
        for i in range(1, 7):
            x = getattr(self, f"Encoder_{i}")(x)
            features.append(x)
        features[-1] = self.middle(x)
        return features


class DecoderStep(nn.Module):
    """ReLU -> Deconv 4x4 stride 2 with bias -> affine InstanceNorm, or tanh in the last layer."""

    def __init__(self, in_channels: int, out_channels: int, *, last: bool = False) -> None:
        super().__init__()
        self.model = nn.Sequential(
            nn.ReLU(),
            nn.ConvTranspose2d(in_channels, out_channels, 4, stride=2, padding=1),
            nn.Tanh() if last else nn.InstanceNorm2d(out_channels, affine=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class Decoder(nn.Module):
    """Six feature maps, sides 128 to 4 -> picture [B, 3, 256, 256] in (-1, 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.Decoder_1 = DecoderStep(512, 512)
        self.Decoder_2 = DecoderStep(1024, 512)
        self.Decoder_3 = DecoderStep(1024, 256)
        self.Decoder_4 = DecoderStep(512, 128)
        self.Decoder_5 = DecoderStep(256, 64)
        self.Decoder_6 = DecoderStep(128, 3, last=True)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        skips = list(features)
        x = self.Decoder_1(skips.pop())
        for i in range(2, 7):
            x = getattr(self, f"Decoder_{i}")(torch.cat((x, skips.pop()), dim=1))
        return x


# -- filling at 32x32 ----------------------------------------------------------------------------------------------


class PartialConv(nn.Module):
    """Convolution over the known positions, divided by the mask's sum over window and channels."""

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__()
        border = kernel_size // 2
        self.input_conv = nn.Conv2d(channels, channels, kernel_size, padding=border, bias=False)
        self.mask_conv = nn.Conv2d(channels, channels, kernel_size, padding=border, bias=False)
        nn.init.ones_(self.mask_conv.weight).requires_grad_(False)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Features and mask (1 = known), [B, C, H, W] each -> the same after one step of filling."""
        known = self.mask_conv(mask)
        empty = known == 0
        filled = self.input_conv(x * mask) / known.masked_fill(empty, 1)
        return filled.masked_fill(empty, 0), torch.ones_like(mask).masked_fill(empty, 0)


class FillingStep(nn.Module):
    """Partial convolution, affine InstanceNorm, LeakyReLU."""

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__()
        self.conv = PartialConv(channels, kernel_size)
        self.bn = nn.InstanceNorm2d(channels, affine=True)
        self.activation = _leaky()

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        x, mask = self.conv(x, mask)
        return self.activation(self.bn(x)), mask


class ChannelEqualization(nn.Module):
    """Squeeze-and-excitation: channels weighted by a function of their means."""

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(
            nn.Conv2d(channels, channels // reduction, 1),
            nn.ReLU(),
            nn.Conv2d(channels // reduction, channels, 1),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc(self.pool(x))


def gaussian_weights(side: int, sigma: float) -> Tensor:
    """[side**2, side, side]: for every position of a square, a Gaussian around it with sum 1."""
    line = torch.arange(side, dtype=torch.float64)
    y, x = (axis.flatten() for axis in torch.meshgrid(line, line, indexing="ij"))
    squared = (y[:, None] - y) ** 2 + (x[:, None] - x) ** 2
    weights = torch.exp(-squared / (2 * sigma**2))
    return (weights / weights.sum(1, keepdim=True)).float().view(side**2, side, side)


class Equalization(nn.Module):
    """Channel equalisation, then spatial: Gaussian means over the map, and attention over the 3x3 neighbours."""

    gaussian: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.model = nn.Sequential(ChannelEqualization(channels))
        self.down = _convs((2 * channels, channels, 1, 1))
        self.register_buffer("gaussian", gaussian_weights(_GRID, _SIGMA), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[1, C, 32, 32] -> the same shape."""
        x = self.model(x)
        channels, positions = x.shape[1], _GRID**2
        means = (self.gaussian[:, None] * x).sum((2, 3))  # [positions, C]

        queries = torch.sigmoid(x)
        neighbours = F.unfold(queries, 3, padding=1).view(channels, 9, positions)
        weights = (neighbours * queries.view(channels, 1, positions)).mean(0).softmax(0)
        attended = (F.unfold(x, 3, padding=1).view(channels, 9, positions) * weights).sum(1).t()

        # The original reads both (position, channel) arrays as (channel, y, x) without a transpose, and its
        # weights were trained that way.
        both = torch.cat([rows.reshape(x.shape) for rows in (means, attended)], dim=1)
        return self.down(both)


class Filling(nn.Module):
    """The original's `pc_block`: six feature maps and the hole -> six maps with the hole filled."""

    mean_4x4: Tensor

    def __init__(self, mask_mode: str) -> None:
        super().__init__()
        self.mask_mode = mask_mode
        self.activation = _leaky()
        self.down_128 = Convs((64, 128, 4, 2), (128, 256, 4, 2))
        self.down_64 = Convs((128, 256, 4, 2))
        self.down_32 = Convs((256, 256, 1, 1))
        self.down_16 = Convs((512, 512, 4, 2), last_activation=False)
        self.down_8 = Convs(*[(512, 512, 4, 2)] * 2, last_activation=False)
        self.down_4 = Convs(*[(512, 512, 4, 2)] * 3, last_activation=False)
        self.down = Convs((768, 256, 1, 1))
        self.fuse = Convs((512, 512, 1, 1))
        self.up = ResizedConv(512, 256)
        self.up_128 = ResizedConv(512, 64)
        self.up_64 = ResizedConv(512, 128)
        self.up_32 = ResizedConv(512, 256)
        self.base = Equalization(512)
        self.cov_3 = nn.ModuleList(FillingStep(256, 3) for _ in range(5))
        self.cov_5 = nn.ModuleList(FillingStep(256, 5) for _ in range(5))
        self.cov_7 = nn.ModuleList(FillingStep(256, 7) for _ in range(5))
        self.register_buffer("mean_4x4", torch.full((1, 1, 4, 4), 1 / 16), persistent=False)

    def known(self, hole: Tensor) -> Tensor:
        """Hole [1, 1, 256, 256] -> known positions of the features, [1, 256, 32, 32]."""
        if self.mask_mode == "nearest":
            hole = F.interpolate(hole, size=(_GRID, _GRID), mode="nearest")
        else:
            for _ in range(3):
                hole = F.conv2d(hole, self.mean_4x4, stride=2, padding=1)
            # No mean of a mask exceeds 1, so all positions count as known, as in the original.
            hole = (hole > 1).to(hole.dtype)
        return (1 - hole).expand(-1, 256, -1, -1)

    def fill(self, features: Tensor, mask: Tensor) -> Tensor:
        """[1, 256, 32, 32] filled at three scales and merged."""
        scales = []
        for chain in (self.cov_3, self.cov_5, self.cov_7):
            x, known = features, mask
            for step in chain:
                x, known = step(x, known)
            scales.append(x)
        return self.down(torch.cat(scales, dim=1))

    def forward(self, features: Sequence[Tensor], hole: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """The six maps, and the filled structure and texture [1, 256, 32, 32] each."""
        y1, y2, y3, y4, y5, y6 = features
        t1, t2, t3, t4, t5, t6 = (self.activation(y) for y in features)
        mask = self.known(hole)
        structure = self.down(torch.cat([self.up(t, _GRID) for t in (t4, t5, t6)], dim=1))
        texture = self.down(torch.cat((self.down_128(t1), self.down_64(t2), self.down_32(t3)), dim=1))
        structure, texture = self.fill(structure, mask), self.fill(texture, mask)
        x = self.base(self.fuse(torch.cat((structure, texture), dim=1)))
        added = [
            self.up_128(x, 128) + y1,
            self.up_64(x, 64) + y2,
            self.up_32(x, 32) + y3,
            self.down_16(x) + y4,
            self.down_8(x) + y5,
            self.down_4(x) + y6,
        ]
        return added, structure, texture


class FeaturePictures(nn.Module):
    """Small pictures of structure and texture, for the training loss only; the original always computes them."""

    def __init__(self) -> None:
        super().__init__()
        self.down_model = nn.Sequential(nn.Conv2d(256, 3, 1), nn.Tanh())

    def forward(self, structure: Tensor, texture: Tensor) -> tuple[Tensor, Tensor]:
        return self.down_model(structure), self.down_model(texture)


class Equalizer(nn.Module):
    """The network between encoder and decoder: :class:`Filling` and the pictures for the loss."""

    def __init__(self, mask_mode: str) -> None:
        super().__init__()
        self.pc_block = Filling(mask_mode)
        self.loss = nn.ModuleList([FeaturePictures()])

    def forward(self, features: Sequence[Tensor], hole: Tensor) -> list[Tensor]:
        added, structure, texture = self.pc_block(features, hole)
        self.loss[0](structure, texture)
        return added


class MEDFE(nn.Module):
    """The generator, 130,316,070 parameters. A new one has PyTorch's random initialisation.

    Args:
        mask_mode: which positions count as known in the partial convolutions. "all_valid": all, as in the current
            original, which averages the mask; "nearest": by the mask sampled at 32x32, as in its earlier version.
    """

    colour: Tensor

    def __init__(self, mask_mode: str = "all_valid") -> None:
        super().__init__()
        if mask_mode not in MASK_MODES:
            raise ValueError(f"mask_mode: expected one of {MASK_MODES}, got {mask_mode!r}")
        self.EN = Encoder()
        self.DE = Decoder()
        self.MEDFE = Equalizer(mask_mode)
        self.register_buffer("colour", torch.tensor(HOLE_COLOUR).view(1, 3, 1, 1), persistent=False)

    @classmethod
    def from_checkpoint(cls, folder: str | Path, mask_mode: str = "all_valid") -> MEDFE:
        """The network in eval mode with its authors' weights.

        Args:
            folder: holds EN.pkl, DE.pkl and MEDEF.pkl (the original's spelling), or one epoch's
                <epoch>_net_EN.pth, _DE.pth and _MEDFE.pth.
            mask_mode: as in the constructor.

        Raises:
            WeightsError: not one file for each network; one cannot be read; names or shapes do not fit; they are
                listed.
        """
        model = cls(mask_mode)
        for network, released in (("EN", "EN"), ("DE", "DE"), ("MEDFE", "MEDEF")):
            files = [*Path(folder).glob(f"{released}.pkl"), *Path(folder).glob(f"*_net_{network}.pth")]
            if len(files) != 1:
                expected = f"{released}.pkl or one <epoch>_net_{network}.pth"
                raise WeightsError(f"folder: expected {expected} in {folder}, found {len(files)}")
            load_strictly(getattr(model, network), read_checkpoint(files[0], "net"), str(files[0]))
        return model.eval()

    def forward(self, image: Tensor, hole: Tensor) -> Tensor:
        """Fill the hole.

        Args:
            image: [1, 3, 256, 256] in [-1, 1]; the content of the hole does not matter.
            hole: [1, 1, 256, 256], 1 = hole; fractions count as known.

        Returns:
            The raw picture [1, 3, 256, 256] in (-1, 1).

        Raises:
            ValueError: another shape; the original takes one picture of 256x256.
        """
        for name, tensor, channels in (("image", image, 3), ("hole", hole, 1)):
            if list(tensor.shape) != [1, channels, SIZE, SIZE]:
                raise ValueError(f"{name}: expected [1, {channels}, {SIZE}, {SIZE}], got {list(tensor.shape)}")
        hole = hole.floor()
        image = torch.where(hole > 0, self.colour, image)
        features = self.EN(torch.cat((image, (1 - hole).expand(-1, 3, -1, -1)), dim=1))
        return self.DE(self.MEDFE(features, hole))
