"""VGG-16's first three blocks: the features of the perceptual and style losses (among the paper's eqs. (1)-(9)).

The layers and names are those of torchvision's ``vgg16().features[:17]``; torchvision itself is not needed. Files of
other layouts, :mod:`.features` describes them.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import WeightsError
from .features import normalise, read_tensors
from .pretrained import TORCHVISION_URL, check_names_and_shapes, torchvision_file, upcast
from .released import load_state_dict_file

WEIGHTS_FILE = "vgg16-397923af.pth"
WEIGHTS_URL = TORCHVISION_URL + WEIGHTS_FILE

_ADVICE = (
    f"Download {WEIGHTS_URL} on a machine with network access, and pass its path "
    "(VGG16Features.from_torchvision(path)) or put it into torch's hub cache, $TORCH_HOME/hub/checkpoints"
)

# Output channels of the convolutions of each block; a max pool ends it.
_BLOCKS = ((64, 64), (128, 128), (256, 256, 256))
_LAYERS = sum(2 * len(block) + 1 for block in _BLOCKS)
_LEAVES = {"w": "weight", "b": "bias"}


class VGG16Features(nn.Sequential):
    """Conv 3x3 and ReLU layers of VGG-16 up to its third max pool, frozen.

    Parameters have ``requires_grad=False`` and the module stays in eval mode; gradients flow to the picture.
    A new one has random weights: see :meth:`from_file` and :meth:`from_torchvision`.

    Args:
        normalised: scale the picture by ImageNet's mean and deviation first, as VGG-16 was trained; the released
            network feeds it pictures in [-1, 1] as they are.
    """

    def __init__(self, normalised: bool = False) -> None:
        layers: list[nn.Module] = []
        channels = 3
        for block in _BLOCKS:
            for width in block:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
                channels = width
            layers.append(nn.MaxPool2d(2))
        super().__init__(*layers)
        self.normalised = normalised
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> VGG16Features:
        """Stay in eval mode."""
        return super().train(False)

    def forward(self, picture: Tensor) -> list[Tensor]:
        """Features after pool1, pool2 and pool3.

        Args:
            picture: [B, 3, H, W] in [-1, 1]. H and W at least 8.

        Returns:
            [B, 64, H//2, W//2], [B, 128, H//4, W//4] and [B, 256, H//8, W//8].
        """
        if not isinstance(picture, Tensor):
            raise TypeError(f"picture: expected a torch.Tensor, got {type(picture).__name__}")
        if picture.dim() != 4 or picture.shape[1] != 3:
            raise ValueError(f"picture: expected [B, 3, H, W], got {list(picture.shape)}")
        if min(picture.shape[2:]) < 2 ** len(_BLOCKS):
            raise ValueError(
                f"picture: expected H and W of at least {2 ** len(_BLOCKS)}, got {list(picture.shape[2:])}"
            )
        if self.normalised:
            picture = normalise(picture)
        features = []
        for layer in self:
            picture = layer(picture)
            if isinstance(layer, nn.MaxPool2d):
                features.append(picture)
        return features

    @classmethod
    def from_file(
        cls, path: str | os.PathLike[str], sha256: str | None = None, normalised: bool = False
    ) -> VGG16Features:
        """Load the first seven convolutions of a file: torchvision's, ``.safetensors`` or ``.npz``.

        Args:
            path, sha256: see :func:`.features.read_tensors`; :mod:`.features` describes the layouts. Further
                convolutions, the classifier and LPIPS's heads are left out.
            normalised: as in the constructor.

        Raises:
            WeightsError: the file is missing, has another hash, is damaged, unsafe, or of another network.
        """
        return cls._from(read_tensors(path, sha256), str(path), normalised)

    @classmethod
    def from_torchvision(cls, path: str | os.PathLike[str] | None = None, normalised: bool = False) -> VGG16Features:
        """Load torchvision's ImageNet weights of VGG-16.

        Args:
            path: the file ``vgg16-397923af.pth``, or any state dict file with names ``features.0.weight``... or
                ``0.weight``...; later layers and the classifier are left out. None: the file in torch's hub cache,
                where torchvision keeps it too, else it is downloaded into that cache (528 MB). A given file's hash is
                checked where its name promises one, as torchvision's does.
            normalised: as in the constructor.

        Returns:
            The frozen features, float32 (float64 where the file holds float64).

        Raises:
            WeightsError: no such file, not downloadable, damaged, unsafe, or of another network.
        """
        if path is None:
            shown = sys.stderr is not None and sys.stderr.isatty()
            file = torchvision_file(WEIGHTS_FILE, "weights: VGG-16 is", f". {_ADVICE}", progress=shown)
        else:
            file = Path(path)
        if not file.is_file():
            raise WeightsError(
                f"weights: expected torchvision's VGG-16 file, got {file}, which does not exist. {_ADVICE}"
            )
        # The cached file's hash was checked when it was downloaded.
        tensors = upcast(load_state_dict_file(file)) if path is None else read_tensors(file)
        return cls._from(tensors, str(file), normalised)

    @classmethod
    def _from(cls, tensors: Mapping[str, Tensor], what: str, normalised: bool) -> VGG16Features:
        with torch.device("meta"):
            net = cls(normalised)
        places = [place for place, layer in enumerate(net) if isinstance(layer, nn.Conv2d)]
        state = _select(tensors, places)
        check_names_and_shapes(state, {name: tuple(v.shape) for name, v in net.state_dict().items()}, what)
        net.load_state_dict(state, strict=True, assign=True)
        net.requires_grad_(False)  # assigned tensors keep their requires_grad
        return net


def _select(tensors: Mapping[str, Tensor], places: Sequence[int]) -> dict[str, Tensor]:
    """The tensors of the first three blocks by the names of the modules, ``0.weight``...

    Unknown names are kept, so that they are reported: a fourth convolution in the third block is VGG-19's.
    """
    selected = {}
    for name, tensor in tensors.items():
        if match := re.fullmatch(r"(?:features\.)?(\d+)\.(\w+)", name):  # torchvision's
            if int(match[1]) < _LAYERS:
                selected[f"{match[1]}.{match[2]}"] = tensor
        elif match := re.fullmatch(r"([wb])(\d+)", name):  # numbered
            if int(match[2]) < len(places):
                selected[f"{places[int(match[2])]}.{_LEAVES[match[1]]}"] = tensor
        elif not name.startswith(("classifier.", "lin")):
            selected[name] = tensor
    return selected
