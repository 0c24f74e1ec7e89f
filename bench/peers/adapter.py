"""One way to call all compared networks: (image, mask) -> result, as LGNet is called.

    run = adapt("PEN")                                        # random weights
    run = adapt("PEN", PEN.from_checkpoint("gen_00460.pth"))  # its authors'
    result = run(image, mask)

`image` is [B, 3, H, W] in [-1, 1], red first; `mask` [B, 1, H, W], 1 = hole; `result` as `image`, known pixels kept.
The content of `image` in the hole does not matter. Each adapter converts to its network's convention and back.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from lgnet_fast.reference import LocalGlobalRefinement
from lgnet_fast.reference.cascade import check_inputs
from lgnet_fast.reference.merge import merge, merge_concat

from . import PEERS
from .madf import IMAGENET_MEAN, IMAGENET_STD

REFINED = {"PEN_LG": "PEN", "MEDFE_LG": "MEDFE"}
"""LGNet's local and global network behind another first stage (paper, Section IV-E): name -> first stage."""


class Adapter(nn.Module, ABC):
    """Base class: checks, :meth:`fill`, then merging. Runs under any grad mode; time it in inference mode.

    Args:
        network: the network to call.
        size_multiple: what its height and width must be multiples of.
        merged: keep the known pixels; False gives the raw picture, which is what LocalGlobalRefinement takes.
    """

    def __init__(self, network: nn.Module, size_multiple: int, merged: bool = True) -> None:
        super().__init__()
        self.network = network
        self.size_multiple = size_multiple
        self.merged = merged

    @abstractmethod
    def fill(self, image: Tensor, mask: Tensor) -> Tensor:
        """The network's raw picture, converted to [-1, 1] and RGB order."""

    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        """[B, 3, H, W] and [B, 1, H, W] -> [B, 3, H, W]; see the docstring of this module.

        Raises:
            TypeError, ValueError: not a floating tensor; a shape, device or dtype that does not fit.
        """
        check_inputs(image, mask, self.size_multiple)
        picture = self.fill(image, mask)
        return merge(image, picture, mask) if self.merged else picture


class PENAdapter(Adapter):
    """Input: the hole white; the mask as fourth channel and as a separate argument."""

    def fill(self, image: Tensor, mask: Tensor) -> Tensor:
        return self.network(merge_concat(image, torch.ones_like(image), mask), mask)[1]


class GConvAdapter(Adapter):
    """Input: BGR order, 0 in the hole. One picture at a time, because its attention uses the first mask for all."""

    def fill(self, image: Tensor, mask: Tensor) -> Tensor:
        known = image.flip(1) * (1 - mask)
        return torch.cat([self.network(x, m)[1] for x, m in zip(known.split(1), mask.split(1))]).flip(1)


class MEDFEAdapter(Adapter):
    """Input: unchanged; the network paints the hole itself. One picture at a time, because it takes only one."""

    def fill(self, image: Tensor, mask: Tensor) -> Tensor:
        return torch.cat([self.network(x, m) for x, m in zip(image.split(1), mask.split(1))])


class RFRAdapter(Adapter):
    """Input: [0, 1], 0 in the hole; a mask of three channels with 1 = known. The linear output is clamped."""

    def fill(self, image: Tensor, mask: Tensor) -> Tensor:
        known = (1 - mask).expand_as(image)
        return (2 * self.network((image + 1) / 2 * known, known) - 1).clamp(-1, 1)


class MADFAdapter(Adapter):
    """Input: normalised as ImageNet, then 0 in the hole; a mask of three channels with 1 = known. The linear output
    is
    clamped."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, size_multiple: int, merged: bool = True) -> None:
        super().__init__(network, size_multiple, merged)
        # For pictures in [-1, 1] instead of [0, 1].
        self.register_buffer("mean", 2 * torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1) - 1, persistent=False)
        self.register_buffer("std", 2 * torch.tensor(IMAGENET_STD).view(1, 3, 1, 1), persistent=False)

    def fill(self, image: Tensor, mask: Tensor) -> Tensor:
        known = (1 - mask).expand_as(image)
        picture = self.network((image - self.mean) / self.std * known, known)[-1]
        return (picture * self.std + self.mean).clamp(-1, 1)


_ADAPTERS: dict[str, type[Adapter]] = {
    "PEN": PENAdapter,
    "GConv": GConvAdapter,
    "MEDFE": MEDFEAdapter,
    "RFR": RFRAdapter,
    "MADF": MADFAdapter,
}


def adapt(name: str, network: nn.Module | None = None, *, merged: bool = True) -> nn.Module:
    """A compared network that is called as LGNet is.

    Args:
        name: of :data:`bench.peers.PEERS` or :data:`REFINED`.
        network: the network to use; None: a new one. For the names of REFINED: the first stage.
        merged: keep the known pixels; False for the raw picture (not for the names of REFINED).

    Returns:
        Module, in eval mode: (image, mask) -> result.

    Raises:
        ValueError: unknown name.
    """
    if name in REFINED:
        if not merged:
            raise ValueError(f"merged: expected True for {name}, whose result is merged, got False")
        return LocalGlobalRefinement(adapt(REFINED[name], network, merged=False), backend="eager").eval()
    if name not in PEERS:
        raise ValueError(f"name: expected one of {(*PEERS, *REFINED)}, got {name!r}")
    peer = PEERS[name]
    return _ADAPTERS[name](peer.constructor() if network is None else network, peer.size_multiple, merged).eval()
