"""GConv, or DeepFill v2 (Yu et al., "Free-Form Image Inpainting with Gated Convolution", ICCV 2019).

A coarse network, then a refining network with two branches, one of them with contextual attention. All convolutions
but the last two are gated.

Written from a description of the original TensorFlow graph; no code is taken from the original, whose code and
weights are CC BY-NC 4.0. It is timed as a baseline, so it computes as the original does: attention by convolutions
with the picture's patches, and the fusion of neighbouring scores by convolutions with an identity matrix. The layer
names follow the original's, so its checkpoints load.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checkpoint import load_strictly, read_checkpoint
from .contextual import attention_weights, known_patches, paste, scores
from .shapes import check_shapes

SIZE_MULTIPLE = 8
_UP = "_upsample"
_SCOPE = "inpaint_net/"
"""Prefix of the generator's variables in the original's checkpoints."""


class Conv(nn.Module):
    """Convolution with TensorFlow's padding "SAME" for even sizes, then ``act(first half) * sigmoid(second half)``.

    Args:
        in_channels: of the input.
        out_channels: after gating; the convolution has twice as many.
        size, stride, dilation: of the kernel; stride 1 or 2.
        activation: of the first half.
        gated: False for a plain convolution without activation.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        size: int = 3,
        *,
        stride: int = 1,
        dilation: int = 1,
        activation: type[nn.Module] = nn.ELU,
        gated: bool = True,
    ) -> None:
        super().__init__()
        # With stride 2, "SAME" adds one row of zeros at the bottom and one column at the right.
        self.pad = nn.ZeroPad2d((0, 1, 0, 1)) if stride == 2 else None
        padding = 0 if stride == 2 else dilation * (size - 1) // 2
        channels = 2 * out_channels if gated else out_channels
        self.conv = nn.Conv2d(in_channels, channels, size, stride, padding, dilation)
        self.activation = activation() if gated else None

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] -> [B, out, H/stride, W/stride]."""
        if self.pad is not None:
            x = self.pad(x)
        x = self.conv(x)
        if self.activation is None:
            return x
        features, gate = x.chunk(2, dim=1)
        return self.activation(features) * torch.sigmoid(gate)


class UpConv(nn.Module):
    """Nearest-neighbour doubling, then a gated convolution."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = Conv(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


def subsample(x: Tensor, height: int, width: int) -> Tensor:
    """[B, C, H, W] -> [B, C, height, width]: the nearest pixels where corners are aligned, halves rounded up."""
    for dim, size in ((2, height), (3, width)):
        # floor(i * (n - 1) / (size - 1) + 1/2) in whole numbers.
        steps = max(size - 1, 1)
        index = (2 * torch.arange(size, device=x.device) * (x.shape[dim] - 1) + steps) // (2 * steps)
        x = x.index_select(dim, index)
    return x


def _fuse(x: Tensor, height: int, width: int) -> Tensor:
    """Scores [1, L, H, W] plus those of the next and previous pair (patch, position), by rows, then by columns.

    The pair after the end of a line is the start of the next line.
    """
    length = height * width
    eye = torch.eye(3, dtype=x.dtype, device=x.device)[None, None]
    for _ in range(2):
        x = F.conv2d(x.reshape(1, 1, length, length), eye, padding=1)
        # Swap the order of both axes; the second pass restores it.
        x = x.reshape(height, width, height, width).permute(1, 0, 3, 2)
        height, width = width, height
    return x.reshape(1, length, height, width)


def contextual_attention(x: Tensor, mask: Tensor) -> Tensor:
    """Features rebuilt from their patches outside the hole.

    Args:
        x: [B, C, H, W], even H and W.
        mask: [1, 1, H, W], 1 = hole.

    Returns:
        [B, C, H, W].
    """
    height, width = x.shape[2] // 2, x.shape[3] // 2
    known = known_patches(subsample(mask, height, width), 3)
    small = subsample(x, height, width)
    filled = []
    for source, features in zip(x.split(1), small.split(1)):
        similar = _fuse(scores(features, 3), height, width)
        filled.append(paste(attention_weights(similar, known), source))
    return torch.cat(filled)


def _stem(prefix: str, in_channels: int, widths: tuple[int, int, int, int, int]) -> dict[str, nn.Module]:
    """Six layers from the picture's size to a quarter of it; `widths`: channels of the first five."""
    a, b, c, d, e = widths
    return {
        f"{prefix}conv1": Conv(in_channels, a, 5),
        f"{prefix}conv2_downsample": Conv(a, b, stride=2),
        f"{prefix}conv3": Conv(b, c),
        f"{prefix}conv4_downsample": Conv(c, d, stride=2),
        f"{prefix}conv5": Conv(d, e),
        f"{prefix}conv6": Conv(e, e, activation=nn.ReLU if prefix == "pm" else nn.ELU),
    }


def _atrous(prefix: str) -> dict[str, nn.Module]:
    return {f"{prefix}conv{i}_atrous": Conv(96, 96, dilation=2 ** (i - 6)) for i in range(7, 11)}


def _tail(prefix: str, in_channels: int) -> dict[str, nn.Module]:
    """Seven layers from a quarter of the picture's size to the picture before its tanh."""
    return {
        f"{prefix}conv11": Conv(in_channels, 96),
        f"{prefix}conv12": Conv(96, 96),
        f"{prefix}conv13{_UP}": UpConv(96, 48),
        f"{prefix}conv14": Conv(48, 48),
        f"{prefix}conv15{_UP}": UpConv(48, 24),
        f"{prefix}conv16": Conv(24, 12),
        f"{prefix}conv17": Conv(12, 3, gated=False),
    }


class GConv(nn.Module):
    """The generator, 4,052,478 parameters. A new one has PyTorch's random initialisation."""

    def __init__(self) -> None:
        super().__init__()
        coarse = {**_stem("", 5, (24, 48, 48, 96, 96)), **_atrous(""), **_tail("", 96)}
        plain = {**_stem("x", 3, (24, 24, 48, 48, 96)), **_atrous("x")}
        attended = _stem("pm", 3, (24, 24, 48, 96, 96))
        after = {f"pmconv{i}": Conv(96, 96) for i in (9, 10)}
        merged = _tail("all", 192)
        self._paths = [list(path) for path in (coarse, plain, attended, after, merged)]
        for path in (coarse, plain, attended, after, merged):
            for name, layer in path.items():
                self.add_module(name, layer)

    @classmethod
    def from_checkpoint(cls, file: str | Path) -> GConv:
        """The network in eval mode with the authors' weights as converted to PyTorch: a state dict under these names
        (``states_tf_places2.pth`` or ``states_tf_celebahq.pth`` as they circulate, with the key "G").

        Raises:
            WeightsError: it cannot be read, or names or shapes do not fit; they are listed.
        """
        model = cls()
        load_strictly(model, read_checkpoint(file, "G"), str(file))
        return model.eval()

    @classmethod
    def from_tensorflow(cls, variables: Mapping[str, Any]) -> GConv:
        """The network in eval mode with the weights of the authors' own checkpoint (``snap-0``).

        Args:
            variables: name -> array. In TensorFlow::

                reader = tf.train.load_checkpoint(folder)
                variables = {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}

                Variables of the discriminator and the optimiser are ignored.

        Raises:
            WeightsError: names or shapes do not fit; they are listed.
        """
        model = cls()
        wanted = {model.tensorflow_name(key): key for key in model.state_dict()}
        state = {wanted[name]: torch.as_tensor(array) for name, array in variables.items() if name in wanted}
        # TensorFlow's kernels are [height, width, in, out].
        state = {key: x.permute(3, 2, 0, 1).contiguous() if x.dim() == 4 else x for key, x in state.items()}
        load_strictly(model, state, "variables")
        return model.eval()

    @staticmethod
    def tensorflow_name(key: str) -> str:
        """The original's variable for a name of the state dict, such as ``inpaint_net/conv1/kernel``."""
        layer = key.split(".")[0]
        inner = f"{layer}/{layer}_conv" if layer.endswith(_UP) else layer
        return f"{_SCOPE}{inner}/{'kernel' if key.endswith('weight') else 'bias'}"

    def _run(self, names: list[str], x: Tensor) -> Tensor:
        for name in names:
            x = getattr(self, name)(x)
        return x

    def forward(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Fill the hole.

        Args:
            image: [B, 3, H, W] in [-1, 1] with 0 in the hole, H and W multiples of 8. The released weights take the
                channels in the order blue, green, red.
            mask: [B, 1, H, W], 1 = hole. The attention uses that of the first picture for all.

        Returns:
            The coarse and the final raw picture, [B, 3, H, W] each in (-1, 1), channels as in `image`.

        Raises:
            ValueError: a shape that does not fit.
        """
        check_shapes("image", image, 3, mask, 1, SIZE_MULTIPLE)

        coarse, plain, attended, after, merged = self._paths
        ones = torch.ones_like(mask)
        first = torch.tanh(self._run(coarse, torch.cat((image, ones, ones * mask), dim=1)))

        x = first * mask + image * (1 - mask)
        left, right = self._run(plain, x), self._run(attended, x)
        # The mask is subsampled twice, here and in contextual_attention: one step would select other pixels.
        right = contextual_attention(right, subsample(mask[:1], *right.shape[2:]))
        x = torch.cat((left, self._run(after, right)), dim=1)
        return first, torch.tanh(self._run(merged, x))
