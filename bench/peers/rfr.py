"""RFR: Recurrent Feature Reasoning (Li et al., "Recurrent Feature Reasoning for Image Inpainting", CVPR 2020).

Two partial convolutions compute features at half size. In six iterations with the same weights, two more partial
convolutions shrink the hole, and a U-Net with attention fills the positions that have become known. The seven feature
maps are averaged over known positions, and a few more layers compute the picture.

It is timed as a baseline, so it computes as the original does: the window sums of a mask are convolutions with an
all-ones kernel of full width, half of a partial convolution's arithmetic.

The original's layer names are kept, so its checkpoints load.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checkpoint import load_strictly, read_checkpoint
from .shapes import check_shapes

ITERATIONS = 6
SIZE_MULTIPLE = 16


class PartialConv2d(nn.Conv2d):
    """Convolution over the known positions, scaled by the share of them (Liu et al., ECCV 2018); mask per channel.

    A sub-class of ``nn.Conv2d`` as in the original; therefore the paper's counting tool does not count it.
    """

    ones: Tensor

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False)
        self.register_buffer(
            "ones", torch.ones(out_channels, in_channels, kernel_size, kernel_size), persistent=False
        )
        self.window, self.border = in_channels * kernel_size**2, kernel_size // 2

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Features and mask (1 = known), [B, in, H, W] each -> the same of the output, [B, out, H', W']."""
        known = F.conv2d(mask, self.ones, stride=self.stride, padding=self.border)
        updated = known.clamp(0, 1)
        ratio = self.window / (known + 1e-8) * updated
        return super().forward(x * mask) * ratio, updated


class Memory(NamedTuple):
    """The result of one iteration's attention that the next one uses."""

    weights: Tensor
    """[B, L, H, W]: for every position, softmax weights over the L = H*W keys."""
    known: Tensor
    """[B, 1, H, W], 1 = known."""


class KnowledgeConsistentAttention(nn.Module):
    """Attention whose weights are averaged with the previous iteration's where the position was known then."""

    def __init__(self) -> None:
        super().__init__()
        self.ratio = nn.Parameter(torch.ones(1))

    def forward(self, features: Tensor, mask: Tensor, memory: Memory | None) -> tuple[Tensor, Memory]:
        """Features [B, C, H, W] and a mask [B, 1, h, w] -> attended features [B, C, H, W] and the new memory."""
        known = F.interpolate(mask, size=features.shape[2:], mode="nearest")
        keys = features.flatten(2).transpose(1, 2) + 1e-7  # [B, L, C]
        keys = (keys / torch.linalg.vector_norm(keys, dim=2, keepdim=True))[..., None, None]
        # The positions of a picture are the kernels of a convolution with that picture.
        scores = torch.cat([F.conv2d(x[None], kernels) for x, kernels in zip(features, keys)])
        scores = 9 * F.avg_pool2d(scores, 3, stride=1, padding=1)
        weights = torch.softmax(scores, dim=1)
        if memory is not None:
            ratio = self.ratio.abs() + 1e-7
            weights = (memory.weights * memory.known + weights * ratio) / (memory.known + ratio)
        attended = torch.cat([F.conv_transpose2d(w[None], kernels) for w, kernels in zip(weights, keys)])
        return attended, Memory(weights, known)


class AttentionModule(nn.Module):
    """Knowledge-consistent attention and the 1x1 convolution that combines its result with its input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.att = KnowledgeConsistentAttention()
        self.combiner = nn.Conv2d(2 * channels, channels, 1)

    def forward(self, features: Tensor, mask: Tensor, memory: Memory | None) -> tuple[Tensor, Memory]:
        attended, memory = self.att(features, mask, memory)
        return self.combiner(torch.cat((attended, features), dim=1)), memory


def _encoder(in_channels: int, out_channels: int, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, 3, stride, padding=dilation, dilation=dilation, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU())


def _decoder(in_channels: int, out_channels: int, up: bool = True) -> nn.Sequential:
    conv = (
        nn.ConvTranspose2d(in_channels, out_channels, 4, stride=2, padding=1, bias=False)
        if up
        else nn.Conv2d(in_channels, out_channels, 3, padding=2, dilation=2, bias=False)
    )
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.LeakyReLU(0.2))


class RFRModule(nn.Module):
    """The U-Net of the recurrence: [B, 64, H, W] and a mask [B, 1, H, W] -> [B, 64, H, W]; H, W multiples of 8."""

    def __init__(self) -> None:
        super().__init__()
        self.enc_1 = _encoder(64, 128, stride=2)
        self.enc_2 = _encoder(128, 256, stride=2)
        self.enc_3 = _encoder(256, 512, stride=2)
        self.enc_4 = _encoder(512, 512, dilation=2)
        self.enc_5 = _encoder(512, 512, dilation=2)
        self.enc_6 = _encoder(512, 512, dilation=2)
        self.att = AttentionModule(512)
        self.dec_5 = _decoder(1024, 512, up=False)
        self.dec_4 = _decoder(1024, 512, up=False)
        self.dec_3 = _decoder(1024, 512)
        self.dec_2 = _decoder(768, 256)
        self.dec_1 = _decoder(384, 64)

    def forward(self, x: Tensor, mask: Tensor, memory: Memory | None) -> tuple[Tensor, Memory]:
        skips = []
        for encode in (self.enc_1, self.enc_2, self.enc_3, self.enc_4, self.enc_5, self.enc_6):
            x = encode(x)
            skips.append(x)
        x = skips.pop()
        for decode in (self.dec_5, self.dec_4, self.dec_3):
            x = decode(torch.cat((x, skips.pop()), dim=1))
        x, memory = self.att(x, mask, memory)
        for decode in (self.dec_2, self.dec_1):
            x = decode(torch.cat((x, skips.pop()), dim=1))
        return x, memory


class Bottleneck(nn.Module):
    """Residual block 1x1, 3x3, 1x1 at a quarter of the width."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        narrow = channels // 4
        self.conv1 = nn.Conv2d(channels, narrow, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(narrow)
        self.conv2 = nn.Conv2d(narrow, narrow, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(narrow)
        self.conv3 = nn.Conv2d(narrow, channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + x)


class RFR(nn.Module):
    """The generator, 31,224,065 parameters. A new one has PyTorch's random initialisation, in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.Pconv1 = PartialConv2d(3, 64, 7, stride=2)
        self.bn1 = nn.BatchNorm2d(64)
        self.Pconv2 = PartialConv2d(64, 64, 7)
        self.bn20 = nn.BatchNorm2d(64)
        self.Pconv21 = PartialConv2d(64, 64, 7)
        self.Pconv22 = PartialConv2d(64, 64, 7)
        self.bn2 = nn.BatchNorm2d(64)
        self.RFRModule = RFRModule()
        self.Tconv = nn.ConvTranspose2d(64, 64, 4, stride=2, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(64)
        self.tail1 = PartialConv2d(67, 32, 3)
        self.tail2 = Bottleneck(32)
        self.out = nn.Conv2d(64, 3, 3, padding=1, bias=False)

    @classmethod
    def from_checkpoint(cls, file: str | Path) -> RFR:
        """The network in eval mode with its authors' weights: a checkpoint with the key "generator".

        Raises:
            WeightsError: it cannot be read, or names or shapes do not fit; they are listed.
        """
        model = cls()
        load_strictly(model, read_checkpoint(file, "generator"), str(file))
        return model.eval()

    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        """Fill the hole.

        Args:
            image: [B, 3, H, W] in [0, 1], 0 in the hole; H and W multiples of 16.
            mask: [B, 3, H, W], 1 = known, 0 = hole.

        Returns:
            The raw picture [B, 3, H, W] on the scale of [0, 1]; it is not clamped, so values can lie outside.

        Raises:
            ValueError: a shape that does not fit.
        """
        check_shapes("image", image, 3, mask, 3, SIZE_MULTIPLE)

        x, known = self.Pconv1(image, mask)
        x, known = self.Pconv2(F.relu(self.bn1(x)), known)
        x = F.relu(self.bn20(x))
        features, masks = [x], [known]
        memory = None  # the memory lasts for one call
        for _ in range(ITERATIONS):
            x, known = self.Pconv21(x, known)
            x, known = self.Pconv22(x, known)
            x = F.leaky_relu(self.bn2(x))
            x, memory = self.RFRModule(x, known[:, :1], memory)
            x = x * known
            features.append(x)
            masks.append(known)

        share = torch.stack(masks).mean(0)
        x = (torch.stack(features) * torch.stack(masks)).mean(0) / (share + 1e-7)
        x = F.leaky_relu(self.bn3(self.Tconv(x)))
        known = F.interpolate(known, scale_factor=2, mode="nearest")
        x, _ = self.tail1(torch.cat((image, x), dim=1), torch.cat((mask, known), dim=1))
        x = F.leaky_relu(x)
        return self.out(torch.cat((x, self.tail2(x)), dim=1))
