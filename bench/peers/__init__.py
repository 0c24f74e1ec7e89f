"""The five networks that the paper compares LGNet with (Table IV), in plain PyTorch, for cost and speed.

They are written from descriptions of the published networks. Their layer names are those of the originals, so the
authors' checkpoints load (``from_checkpoint`` of each class). :func:`bench.peers.adapter.adapt` gives all of them one
calling convention.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from .gconv import GConv
from .madf import MADF
from .medfe import MEDFE
from .pen import PEN
from .rfr import RFR


@dataclass(frozen=True)
class Peer:
    """A compared network and its published figures."""

    constructor: Callable[[], nn.Module]
    """Makes the network with random weights."""
    paper: str
    parameters: int
    """Number of distinct parameters of the original."""
    published: tuple[float, float]
    """M parameters and G FLOPs at 256x256, batch 1, as Table IV prints them."""
    published_ms: tuple[float, float]
    """Milliseconds at 256x256, batch 1, as Table IV prints them: on a Xeon E5-2690 v4, on a TITAN RTX."""
    size_multiple: int
    """Height and width must be multiples of this."""
    licence: str
    """Licence of the original code and weights."""


PEERS = {
    "PEN": Peer(PEN, "Zeng et al., CVPR 2019", 10_231_538, (10.23, 48.07), (418.16, 39.78), 64, "MIT"),
    "GConv": Peer(GConv, "Yu et al., ICCV 2019", 4_052_478, (4.05, 55.57), (361.92, 13.98), 8, "CC BY-NC 4.0"),
    "MEDFE": Peer(
        MEDFE, "Liu et al., ECCV 2020", 130_316_070, (130.32, 137.93), (946.82, 113.91), 256, "CC BY-NC-SA 4.0"
    ),
    "RFR": Peer(RFR, "Li et al., CVPR 2020", 31_224_065, (30.59, 206.11), (910.33, 28.95), 16, "MIT"),
    "MADF": Peer(MADF, "Zhu et al., TIP 2021", 85_141_214, (85.14, 51.77), (925.65, 15.59), 128, "GPL-3.0"),
}
"""The networks in the paper's order."""

LGNET_MS = {"LGNet": (589.82, 13.59), "LGNet_share": (589.82, 13.59), "LGNet_light": (515.28, 12.66)}
"""As ``Peer.published_ms``, for the paper's own rows of Table IV."""

__all__ = ["LGNET_MS", "MADF", "MEDFE", "PEERS", "PEN", "RFR", "GConv", "Peer"]
