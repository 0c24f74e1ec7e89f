"""The spectral-norm patch discriminator that judges NetC's merged picture (paper, Section III).

Four spectral-norm Conv 5x5, 3 -> 64 -> 128 -> 256 (stride 2) -> 512 (stride 1), each without bias and followed by
LeakyReLU(0.2), then a plain Conv 5x5, 512 -> 1, with bias. State-dict names are those of the released network's
``<epoch>_net_D.pth``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import spectral_norm

from .attention import check_variant
from .pretrained import check_names_and_shapes
from .released import read_net

# The paper's 32x32 map for a 256x256 picture needs padding 2; the released network has 1.
_PADDING = {"released": 1, "paper": 2}
_STRIDES = (2, 2, 2, 1, 1)  # the last belongs to the classifier
_KERNEL = 5


def _spectral_conv(in_channels: int, out_channels: int, stride: int, padding: int) -> nn.Conv2d:
    conv = nn.Conv2d(in_channels, out_channels, _KERNEL, stride=stride, padding=padding, bias=False)
    nn.init.normal_(conv.weight, 0.0, 0.02)
    # Hook-based spectral norm: the released files have its names weight_orig, weight_u and weight_v.
    return spectral_norm(conv)


class Discriminator(nn.Module):
    """Patch discriminator; 4.318 M parameters at its default width.

    Each forward pass in training mode does one power iteration, which changes the buffers ``weight_u`` and
    ``weight_v``; in eval mode they stay.

    Args:
        variant: "released" (padding 1, 256x256 -> 27x27) or "paper" (padding 2, 256x256 -> 32x32).
        channels: width of the first layer; the next ones have twice, four and eight times that. 64 in the paper.

    Raises:
        ValueError: unknown variant, or no positive width.
    """

    def __init__(self, variant: str = "released", channels: int = 64) -> None:
        super().__init__()
        self.variant = check_variant(variant)
        if channels < 1:
            raise ValueError(f"channels: expected a positive integer, got {channels!r}")
        self.padding = _PADDING[variant]
        widths = (3, channels, 2 * channels, 4 * channels, 8 * channels)
        layers: list[nn.Module] = []
        for width_in, width_out, stride in zip(widths, widths[1:], _STRIDES, strict=False):
            layers += [_spectral_conv(width_in, width_out, stride, self.padding), nn.LeakyReLU(0.2, inplace=True)]
        self.encoder = nn.Sequential(*layers)
        self.classifier = nn.Conv2d(widths[-1], 1, _KERNEL, padding=self.padding)
        nn.init.normal_(self.classifier.weight, 0.0, 0.02)
        assert self.classifier.bias is not None
        nn.init.zeros_(self.classifier.bias)

    def map_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the score map of a picture; not positive where the picture is too small."""
        sides = [height, width]
        for stride in _STRIDES:
            sides = [(side + 2 * self.padding - _KERNEL) // stride + 1 for side in sides]
        return sides[0], sides[1]

    def forward(self, picture: Tensor) -> Tensor:
        """Score every patch: towards 1 where it looks real, towards 0 where it looks filled in.

        Args:
            picture: [B, 3, H, W] in [-1, 1].

        Returns:
            [B, 1, h, w], unbounded; (h, w) is :meth:`map_size`.
        """
        if not isinstance(picture, Tensor):
            raise TypeError(f"picture: expected a torch.Tensor, got {type(picture).__name__}")
        if not picture.is_floating_point():
            raise TypeError(f"picture: expected a floating dtype, got {picture.dtype}")
        if picture.dim() != 4 or picture.shape[1] != 3:
            raise ValueError(f"picture: expected [B, 3, H, W], got {list(picture.shape)}")
        if min(self.map_size(*picture.shape[2:])) < 1:
            raise ValueError(
                f"picture: expected H and W large enough for a score, got {list(picture.shape[2:])}; "
                f"variant={self.variant!r} needs {self._smallest_side()}"
            )
        scores: Tensor = self.classifier(self.encoder(picture))
        return scores

    def _smallest_side(self) -> int:
        side = 1
        for stride in reversed(_STRIDES):
            side = max(1, (side - 1) * stride + _KERNEL - 2 * self.padding)
        return side

    @classmethod
    def from_released(
        cls, source: str | os.PathLike[str] | Mapping[str, Tensor], *, variant: str = "released"
    ) -> Discriminator:
        """Load the authors' ``<epoch>_net_D.pth``.

        Args:
            source: the file, or its state dict; names may have a ``module.`` prefix.
            variant: as in the constructor.

        Returns:
            The discriminator in eval mode. Float64 tensors stay float64; float16 and bfloat16 become float32.

        Raises:
            TypeError: `source` is neither.
            WeightsError: the file is missing, unreadable or unsafe, or names or shapes do not fit; it lists them.
        """
        if not isinstance(source, (str, os.PathLike, Mapping)):
            raise TypeError(f"source: expected a path or a state dict, got {type(source).__name__}")
        state = read_net("D", source)
        with torch.device("meta"):
            net = cls(variant)
        check_names_and_shapes(state, {k: tuple(v.shape) for k, v in net.state_dict().items()}, "D")
        if any(v.dtype == torch.float64 for v in state.values()):
            state = {k: v.double() for k, v in state.items()}
        net.load_state_dict(state, strict=True, assign=True)
        return net.eval()
