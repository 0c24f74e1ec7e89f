"""What layers of one launch of `csrc/cuda/deep.cu` read from each other.

What a layer reads and layers of the same launch have stored comes from :attr:`State.exchange`, where a
number that is not there yet is a NaN that the kernel never stores: blocks wait for the numbers themselves. Each layer
but the first reads what the layer before it stores, and its source is stored wholly within the launch. So when a
block stores results of a layer, all blocks have read the source of the layer before: a map that the arena puts in the
place of an older one does not overwrite what is still read.

"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .results import Store

# As in deep.cu.
STATE_STRIDE = 32
ABSENT = -1  # as int16
WAITS = {
    1: "for room for weights",
    2: "for weights",
    3: "for the cluster's sums",
    4: "for the layer before",
    5: "for its cluster",
}


class State:
    """What launches of a group leave to the next one.

    Args:
        size: numbers of 16 bits in an exchange.
        device: of the group.
    """

    counters: Tensor
    """[3 * STATE_STRIDE] int32: the code of an error, the blocks that have ended, which exchange is next."""
    exchange: Tensor
    """[2, size] int16. One is :data:`ABSENT` throughout between launches."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.counters = torch.zeros(3 * STATE_STRIDE, dtype=torch.int32, device=device)
        self.exchange = torch.full((2, size), ABSENT, dtype=torch.int16, device=device)

    @property
    def bytes(self) -> int:
        """Bytes on the device."""
        return self.counters.nbytes + self.exchange.nbytes

    def reset(self) -> None:
        """As at first, after a launch that failed."""
        self.counters.zero_()
        self.exchange.fill_(ABSENT)

    def error(self) -> str | None:
        """The wait that timed out, or None. Waits for the device. All launches with this state fail until it is
        :meth:`reset`."""
        code = int(self.counters[0])
        if code == 0:
            return None
        kind, layer, block = code >> 24, code >> 16 & 0xFF, (code & 0xFFFF) - 1
        return f"block {block} waited {WAITS.get(kind, kind)}, at layer {layer}"


def _bytes_of(view: Tensor) -> range:
    """Addresses from a view's first number to its last."""
    last = sum((size - 1) * stride for size, stride in zip(view.shape, view.stride()))
    return range(view.data_ptr(), view.data_ptr() + (last + 1) * view.element_size())


def _channels_of(view: Tensor, source: Tensor) -> range | None:
    """The channels of `source` that a view of the same pixels is, some of which it may lack; None: other pixels."""
    first, rest = divmod(view.data_ptr() - source.data_ptr(), view.element_size())
    if rest or abs(first) >= source.stride(2) or view.shape[:3] != source.shape[:3]:
        return None
    return range(first, first + view.shape[3]) if view.stride() == source.stride() else None


def overlap(one: Tensor, other: Tensor) -> bool:
    """Whether two views have numbers in common. Those of the same pixels may lie side by side in each pixel."""
    a, b = _bytes_of(one), _bytes_of(other)
    if a.stop <= b.start or b.stop <= a.start:
        return False
    if _channels_of(one, other) is None:
        return True
    pixel = one.stride(2)
    first = (one.data_ptr() - other.data_ptr()) // one.element_size() % pixel
    return first < other.shape[3] or first + one.shape[3] > pixel


def writers(source: Tensor, stores: Sequence[Sequence[Store]]) -> list[tuple[int, int, int]]:
    """(layer, number of its store, first channel) of the last stores of each of a source's channels; none where it is
    older than all of them.

    Raises:
        ValueError: some of its channels are older, or a store has others than these.
    """
    found: list[tuple[int, int, int]] = []
    missing = set(range(source.shape[3]))
    for layer in reversed(range(len(stores))):
        for which, store in enumerate(stores[layer]):
            channels = _channels_of(store.view, source)
            if missing and overlap(store.view, source):
                if channels is None or not missing.issuperset(channels):
                    raise ValueError("sources: expected each channel from one store of the layers before")
                missing.difference_update(channels)
                found.append((layer, which, channels.start))
    if found and missing:
        raise ValueError("sources: expected all channels, or none, from the layers before")
    return found
