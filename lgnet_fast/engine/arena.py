"""Memory layout of a plan's buffers in one block (arena): buffers that are never alive together share addresses."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from .plan import PICTURE, Plan

ALIGNMENT = 64
"""Elements that offsets are multiples of: 256 bytes in float32, 128 in 16 bit."""


@dataclass(frozen=True)
class Arena:
    """Offset of each buffer, and size of the arena, in elements: in pairs of those of half the size."""

    offsets: dict[str, int]
    size: int


def lifetimes(plan: Plan) -> dict[str, tuple[int, int]]:
    """First and last step that uses each buffer; the picture is alive throughout. Steps copy raw pictures out."""
    spans: dict[str, tuple[int, int]] = {}
    for number, step in enumerate(plan.steps):
        views = [step.source, *(s.view for s in step.stores)]
        if step.residual is not None:
            views.append(step.residual)
        for view in views:
            first, _ = spans.get(view.buffer, (number, number))
            spans[view.buffer] = (first, number)
    spans[PICTURE] = (0, len(plan.steps) - 1)
    return spans


def plan_arena(plan: Plan, halves: Collection[str] = ()) -> Arena:
    """Offsets of every buffer [batch, height, width, channels] of `plan`.

    Greedy: the largest buffer first, each at the lowest offset that is free during its lifetime.

    Args:
        halves: names of buffers whose elements take half as many bytes as those of the others.
    """
    spans = lifetimes(plan)
    sizes = {}
    for name, b in plan.buffers.items():
        elements = -(-plan.batch * b.height * b.width * b.channels // (2 if name in halves else 1))
        sizes[name] = -(-elements // ALIGNMENT) * ALIGNMENT
    offsets: dict[str, int] = {}
    for name in sorted(spans, key=lambda n: (-sizes[n], n)):
        first, last = spans[name]
        taken = sorted(
            (offsets[other], offsets[other] + sizes[other])
            for other in offsets
            if spans[other][0] <= last and first <= spans[other][1]
        )
        offset = 0
        for begin, end in taken:
            if offset + sizes[name] <= begin:
                break
            offset = max(offset, end)
        offsets[name] = offset
    return Arena(offsets, max(offsets[n] + sizes[n] for n in offsets))
