"""Feature networks of losses and metrics: VGG-16 and AlexNet up to their last convolution, and LPIPS v0.1 on either.

Weights come from a file by its path; torchvision is not needed. Two layouts are read, from ``.npz``, ``.safetensors``
and PyTorch's own files alike:

=============  ======================================================================================================
numbered       ``w0``, ``b0``, ``w1``, ``b1``, ...: weight [out, in, k, k] and bias [out] of the convolutions in their
               order. ``lin0`` to ``lin4``, [1, out, 1, 1]: LPIPS's heads, where the file has them.
torchvision's  ``features.0.weight``, ``features.0.bias``, ...: by the place in torchvision's ``features``, with or
               without that word; the classifier is left out.
=============  ======================================================================================================

16-bit tensors become float32. A file name such as ``vgg16-397923af.npz`` contains the start of the file's SHA-256, as
torchvision's names do, which is checked; so is a hash that the caller gives.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import WeightsError
from .pretrained import check_names_and_shapes, upcast
from .released import load_state_dict_file

FeaturesFn = Callable[[Tensor], Sequence[Tensor]]

# ImageNet's mean and deviation of RGB, for pictures in [-1, 1].
_MEAN = (-0.030, -0.088, -0.188)
_DEVIATION = (0.458, 0.448, 0.450)

# (output channels, kernel, stride, padding) of every convolution, each followed by a ReLU; a number is the kernel of
# a max pool with stride 2. `taps` are the convolutions whose ReLU outputs are the levels of the features.
_Layer = int | tuple[int, int, int, int]
_VGG: tuple[_Layer, ...] = tuple(
    layer
    for pool, (width, count) in enumerate([(64, 2), (128, 2), (256, 3), (512, 3), (512, 3)])
    for layer in (*((2,) if pool else ()), *[(width, 3, 1, 1)] * count)
)
_ALEXNET: tuple[_Layer, ...] = (
    (64, 11, 4, 2), 3, (192, 5, 1, 2), 3, (384, 3, 1, 1), (256, 3, 1, 1), (256, 3, 1, 1),
)  # fmt: skip
_LAYERS: dict[str, tuple[_Layer, ...]] = {"vgg16": _VGG, "alexnet": _ALEXNET}
_TAPS = {"vgg16": (1, 3, 6, 9, 12), "alexnet": (0, 1, 2, 3, 4)}
NETWORKS = tuple(_LAYERS)


def normalise(picture: Tensor) -> Tensor:
    """A picture [B, 3, H, W] in [-1, 1] by ImageNet's mean and deviation."""
    mean, deviation = _imagenet(picture.device, picture.dtype)
    return (picture - mean) / deviation


@cache
def _imagenet(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    # Cached, because making a tensor from numbers waits for the GPU. Not in inference mode, whose tensors cannot take
    # part in gradients.
    with torch.inference_mode(False):
        mean, deviation = (torch.tensor(v, device=device, dtype=dtype).view(1, 3, 1, 1) for v in (_MEAN, _DEVIATION))
    return mean, deviation


# -- files -------------------------------------------------------------------------------------------------------


def read_weights(path: str | os.PathLike[str], sha256: str | None = None) -> dict[str, Tensor]:
    """The tensors of a weights file in either layout, by the names of the numbered one.

    Arguments, dtypes and errors are those of :func:`read_tensors`.
    """
    return _numbered(read_tensors(path, sha256))


def read_tensors(path: str | os.PathLike[str], sha256: str | None = None) -> dict[str, Tensor]:
    """The tensors of a weights file by its own names, float32 (or float64).

    Args:
        path: ``.npz``, ``.safetensors``, or a PyTorch file.
        sha256: hash of the file or its start, in hexadecimal; None: the one in the file's name, if there is one.

    Raises:
        WeightsError: no such file, another hash, damaged, or unsafe.
    """
    file = Path(path)
    if not file.is_file():
        raise WeightsError(f"weights: expected a file of VGG-16 or AlexNet, got {str(file)!r}, which does not exist")
    _check_hash(file, sha256)
    tensors: Mapping[str, Tensor]
    try:
        if file.suffix == ".npz":
            with np.load(file, allow_pickle=False) as archive:
                tensors = {name: torch.from_numpy(archive[name]) for name in archive.files}
        elif file.suffix == ".safetensors":
            tensors = load_file(file)
        else:
            tensors = load_state_dict_file(file)
    except WeightsError:
        raise
    except (OSError, ValueError, TypeError, BadZipFile, SafetensorError) as error:
        raise WeightsError(f"weights: {str(file)!r} cannot be read ({error})") from error
    return upcast(tensors)


def _check_hash(file: Path, sha256: str | None) -> None:
    """Raise WeightsError unless the SHA-256 of `file` starts with `sha256`, or with the hash in its name."""
    if sha256 is None:
        promised = re.search(r"-([0-9a-f]{8,64})$", file.stem)
        if promised is None:
            return
        sha256 = promised[1]
    with open(file, "rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(1 << 20):
            digest.update(block)
    if not sha256 or not digest.hexdigest().startswith(sha256.lower()):
        raise WeightsError(
            f"weights: expected a SHA-256 of {sha256!r} (or beginning so) of {str(file)!r}, got {digest.hexdigest()}"
        )


def _numbered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Torchvision's names as ``w<i>`` and ``b<i>``; numbered ones as they are."""
    places = {}
    for name in tensors:
        if match := re.fullmatch(r"(?:features\.)?(\d+)\.(weight|bias)", name):
            places[name] = (int(match[1]), match[2][0])
    if not places:
        return dict(tensors)
    order = sorted({place for place, _ in places.values()})
    return {f"{leaf}{order.index(place)}": tensors[name] for name, (place, leaf) in places.items()}


def _kind(weights: Mapping[str, Tensor], what: str) -> str:
    first = weights.get("w0")
    for name, layers in _LAYERS.items():
        first_layer = layers[0]
        assert isinstance(first_layer, tuple)
        width, kernel = first_layer[:2]
        if first is not None and tuple(first.shape) == (width, 3, kernel, kernel):
            return name
    found = "none" if first is None else str(list(first.shape))
    raise WeightsError(
        f"weights: expected a first convolution w0 of VGG-16 ([64, 3, 3, 3]) or AlexNet ([64, 3, 11, 11]) in {what}, "
        f"got {found}"
    )


# -- networks ----------------------------------------------------------------------------------------------------


class ConvFeatures(nn.Module):
    """The convolutions of VGG-16 or AlexNet, frozen: features as LPIPS takes them, after ReLU and before pooling.

    VGG-16 gives relu1_2, relu2_2, relu3_3, relu4_3, relu5_3, AlexNet its five ReLUs. A new one has random weights;
    see :meth:`from_file`. Gradients flow to the picture.

    Args:
        network: "vgg16" or "alexnet".
        convolutions: number of convolutions; None: all (13 or 5). Levels after the last one are left out.
    """

    def __init__(self, network: str = "vgg16", convolutions: int | None = None) -> None:
        super().__init__()
        if network not in NETWORKS:
            raise ValueError(f"network: expected one of {NETWORKS}, got {network!r}")
        self.network = network
        self.convolutions = nn.ModuleList()
        width = 3
        for layer in _LAYERS[network]:
            if isinstance(layer, tuple) and convolutions != len(self.convolutions):
                channels, kernel, stride, padding = layer
                self.convolutions.append(nn.Conv2d(width, channels, kernel, stride, padding))
                width = channels
        self.levels = sum(tap < len(self.convolutions) for tap in _TAPS[network])
        self.requires_grad_(False)
        self.eval()

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level."""
        convolutions = [c for c in self.convolutions if isinstance(c, nn.Conv2d)]
        return tuple(convolutions[tap].out_channels for tap in _TAPS[self.network][: self.levels])

    def train(self, mode: bool = True) -> ConvFeatures:
        """Stay in eval mode."""
        return super().train(False)

    def forward(self, picture: Tensor) -> list[Tensor]:
        """Features, finest first.

        Args:
            picture: [B, 3, H, W] in [-1, 1]; it is normalised by ImageNet's mean and deviation here.
        """
        _check_picture("picture", picture)
        x, number, features = normalise(picture), 0, []
        for layer in _LAYERS[self.network]:
            if not isinstance(layer, tuple):
                x = F.max_pool2d(x, layer, 2)
                continue
            x = F.relu(self.convolutions[number](x))
            if number in _TAPS[self.network]:
                features.append(x)
            number += 1
            if number == len(self.convolutions):
                break
        return features

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], sha256: str | None = None) -> ConvFeatures:
        """Load a file of either layout (see the module's docstring). Its first convolution identifies the network.

        Raises:
            WeightsError: see :func:`read_weights`; or names and shapes do not fit.
        """
        return cls._from(read_weights(path, sha256), str(path))

    @classmethod
    def _from(cls, weights: Mapping[str, Tensor], what: str) -> ConvFeatures:
        network = _kind(weights, what)
        own = {name: value for name, value in weights.items() if re.fullmatch(r"[wb]\d+", name)}
        with torch.device("meta"):
            net = cls(network, convolutions=sum(name[0] == "w" for name in own))
        names = {
            f"{leaf[0]}{i}": f"convolutions.{i}.{leaf}"
            for i in range(len(net.convolutions))
            for leaf in ("weight", "bias")
        }
        state = net.state_dict()
        check_names_and_shapes(own, {short: tuple(state[full].shape) for short, full in names.items()}, what)
        net.load_state_dict({full: own[short] for short, full in names.items()}, strict=True, assign=True)
        net.requires_grad_(False)
        return net


class LPIPS(nn.Module):
    """LPIPS v0.1 (Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", CVPR 2018).

    Features of both pictures, each position's vector scaled to length 1; squared differences, weighed channel by
    channel by the heads, averaged over positions, summed over the five levels. Frozen; gradients flow to the
    pictures. A new one has random weights; see :meth:`from_file`.

    Args:
        network: "alexnet", the usual metric, or "vgg16", the usual loss.
    """

    def __init__(self, network: str = "alexnet") -> None:
        super().__init__()
        self._set(ConvFeatures(network), None)

    def _set(self, features: ConvFeatures, heads: Sequence[Tensor] | None) -> None:
        self.features = features
        for level, width in enumerate(features.widths):
            head = torch.rand(1, width, 1, 1) / width if heads is None else heads[level]
            self.register_buffer(f"head{level}", head)

    def train(self, mode: bool = True) -> LPIPS:
        """Stay in eval mode."""
        return super().train(False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """The distance of each pair, [B], float32 at least.

        Args:
            a, b: [B, 3, H, W] in [-1, 1]; sides of at least 31 (AlexNet) or 16 (VGG-16).
        """
        _check_picture("a", a)
        if a.shape != b.shape:
            raise ValueError(f"b: expected {list(a.shape)} as a, got {list(b.shape)}")
        return self.distance(self.directions(a), self.directions(b))

    def directions(self, picture: Tensor) -> list[Tensor]:
        """The features of pictures [B, 3, H, W], each position's vector scaled to length 1, float32 at least."""
        return [_direction(level) for level in self.features(picture)]

    def distance(self, a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
        """The distance [B] of results of :meth:`directions`, for comparing many pictures with one truth."""
        with torch.autocast(a[0].device.type, enabled=False):
            levels = [
                ((x - y).square() * getattr(self, f"head{i}")).sum(dim=1).mean(dim=(1, 2))
                for i, (x, y) in enumerate(zip(a, b, strict=True))
            ]
        return torch.stack(levels).sum(dim=0)

    @classmethod
    def from_file(
        cls,
        path: str | os.PathLike[str],
        heads: str | os.PathLike[str] | None = None,
        sha256: str | None = None,
    ) -> LPIPS:
        """Load the convolutions and heads.

        Args:
            path: of either layout (see the module's text), AlexNet or VGG-16.
            heads: file of the heads, with ``lin0`` to ``lin4`` or the original's names ``lin0.model.1.weight``; None:
                those in `path`, else those that torchmetrics brings along.
            sha256: of `path`, see :func:`read_weights`.

        Raises:
            WeightsError: see :func:`read_weights`; convolutions or heads are missing or do not fit.
        """
        weights = read_weights(path, sha256)
        features = ConvFeatures._from(weights, str(path))
        expected = sum(isinstance(layer, tuple) for layer in _LAYERS[features.network])
        if len(features.convolutions) != expected:
            raise WeightsError(
                f"weights: LPIPS expected all {expected} convolutions of {features.network} in {str(path)!r}, got "
                f"{len(features.convolutions)}"
            )
        found, where = _heads(weights), str(path)
        if heads is not None or not found:
            file = Path(heads) if heads is not None else _torchmetrics_heads(features.network)
            if file is None:
                raise WeightsError(
                    f"weights: {str(path)!r} holds no heads lin0 to lin4 of LPIPS, and torchmetrics, which brings "
                    "them along, is not installed"
                )
            found, where = _heads(read_weights(file)), str(file)
        shapes = {f"lin{i}": (1, width, 1, 1) for i, width in enumerate(features.widths)}
        check_names_and_shapes(found, shapes, where)
        with torch.device("meta"):
            net = cls(features.network)
        net._set(features, [found[f"lin{i}"] for i in range(features.levels)])
        return net.eval()


def _heads(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    matches = {name: re.fullmatch(r"(lin\d+)(?:\.model\.1\.weight)?", name) for name in weights}
    return {match[1]: weights[name] for name, match in matches.items() if match}


def _torchmetrics_heads(network: str) -> Path | None:
    found = find_spec("torchmetrics")
    if found is None or found.origin is None:
        return None
    name = {"alexnet": "alex.pth", "vgg16": "vgg.pth"}[network]
    file = Path(found.origin).parent / "functional" / "image" / "lpips_models" / name
    return file if file.is_file() else None


def _direction(features: Tensor) -> Tensor:
    wide = features.to(torch.promote_types(features.dtype, torch.float32))
    # The small number under the root keeps the gradient finite where all channels are 0.
    return wide / ((wide.square().sum(dim=1, keepdim=True) + 1e-20).sqrt() + 1e-10)


def _check_picture(name: str, picture: Tensor) -> None:
    if not isinstance(picture, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(picture).__name__}")
    if picture.dim() != 4 or picture.shape[1] != 3:
        raise ValueError(f"{name}: expected [B, 3, H, W], got {list(picture.shape)}")


# -- registered networks -----------------------------------------------------------------------------------------

_registered: dict[str, Callable[[], FeaturesFn]] = {}


def register_features(name: str, make: Callable[[], FeaturesFn]) -> None:
    """Register ``make`` for ``loss.features: NAME`` of training runs.

    Args:
        name: any name that is not the path of a file. Registering a name again replaces its function.
        make: called once per run; returns a module or function, picture [B, 3, H, W] in [-1, 1] -> features level by
            level, each [B, C, H', W'].
    """
    _registered[name] = make


def registered_features(name: str) -> FeaturesFn | None:
    """The result of the function registered as `name`, or of "package.module:function"; None: there is neither."""
    if name in _registered:
        return _registered[name]()
    module, colon, function = name.partition(":")
    if not colon or not re.fullmatch(r"[\w.]+", module) or not function.isidentifier():  # a drive of Windows
        return None
    try:
        features: FeaturesFn = getattr(import_module(module), function)()
        return features
    except (ImportError, AttributeError) as error:
        raise ValueError(f"features: expected package.module:function, got {name!r} ({error})") from error
