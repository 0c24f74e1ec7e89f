"""Block shapes of attention in training, as measured on this GPU by ``lgnet-fast tune --training``.

They are kept in the user's cache folder (:mod:`lgnet_fast.cache`), one entry for each block, and replace those of
`tables.py`. They are read once per process, device and dtype. Needs no triton.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lgnet_fast import cache

Shape = tuple[int, int, int, int]
"""The fields of `configs.Config`."""


class Block(NamedTuple):
    """An attention block in training. kind: of the dtype, as in the tables. positions: height x width."""

    kind: str
    variant: str
    channels: int
    positions: int
    batch: int

    @property
    def name(self) -> str:
        """Its name in the cache and in `lgnet-fast info`."""
        return (
            f"attention in training, {self.variant}, {self.channels} channels, {self.positions} positions, "
            f"batch {self.batch}, {self.kind}"
        )


class Measured(NamedTuple):
    """The fastest shape of an operation and its microseconds, and both for the shipped shape."""

    shape: Shape
    us: float
    default: Shape
    default_us: float


@dataclass
class Training:
    """Measurements of a block.

    operations: key of the tables ("forward", "backward_dq", ...) -> its result. now_us, before_us: forward and
    backward together, with these shapes and with the shipped ones; None where not measured to the end.
    """

    block: Block
    operations: dict[str, Measured] = field(default_factory=dict)
    now_us: float | None = None
    before_us: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """As the cache keeps it."""
        return {
            "training": list(self.block),
            "operations": {
                op: [list(m.shape), m.us, list(m.default), m.default_us] for op, m in self.operations.items()
            },
            "now_us": self.now_us,
            "before_us": self.before_us,
        }

    @classmethod
    def from_dict(cls, value: Any) -> Training | None:
        """The inverse of :meth:`as_dict`; None where `value` has another form."""
        try:
            kind, variant, *sizes = value["training"]
            channels, positions, batch = map(int, sizes)
            operations = {
                str(op): Measured(_shape(shape), float(us), _shape(default), float(default_us))
                for op, (shape, us, default, default_us) in value["operations"].items()
            }
            block = Block(str(kind), str(variant), channels, positions, batch)
            return cls(block, operations, value["now_us"], value["before_us"])
        except (AttributeError, TypeError, KeyError, ValueError):
            return None

    def __str__(self) -> str:
        changed = [op for op, result in self.operations.items() if result.shape != result.default]
        shapes = f"other shapes of {', '.join(changed)}" if changed else "the shipped shapes"
        if self.now_us is None or self.before_us is None:
            return f"{shapes}, not measured to the end"
        return f"{shapes}: {self.now_us:.1f} us forward and backward, without {self.before_us:.1f} us"


def _shape(value: Any) -> Shape:
    m, n, warps, stages = map(int, value)
    return m, n, warps, stages


def shapes(device: torch.device, dtype: torch.dtype, block: Block) -> Mapping[str, Shape]:
    """Operation -> the shape measured for a block on a device; none for tensors without values (`aot`)."""
    if device.type == "meta":
        return {}
    return _kept(device, dtype, cache.folder()).get(block, {})


@functools.lru_cache(maxsize=64)
def _kept(device: torch.device, dtype: torch.dtype, folder: Path | None) -> Mapping[Block, Mapping[str, Shape]]:
    key = cache.key_for(device, dtype)
    found = {}
    for entry in cache.entries(cache.CHOICES):
        measured = Training.from_dict(entry.value) if entry.key == key else None
        if measured is not None:
            found[measured.block] = {op: result.shape for op, result in measured.operations.items()}
    return found


def keep(device: torch.device, dtype: torch.dtype, measured: Training) -> None:
    """Keep measurements of a block on a device; the next launches use them."""
    cache.put(cache.key_for(device, dtype), cache.CHOICES, measured.block.name, measured.as_dict())
    _kept.cache_clear()
