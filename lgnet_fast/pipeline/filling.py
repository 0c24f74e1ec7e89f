"""The work on one picture: its hole, the plans to try, the passes of the windows, and the fills that they give."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..engine.holes import CELL, HoleGroups, group_holes
from ..engine.regions import Rect
from ..errors import InvalidMaskError, OutOfMemoryError
from . import memory, strategies
from .arguments import MaskOptions
from .masks import read_hole, soft_edge
from .network import Network
from .notices import warn
from .pictures import Picture
from .strategies import Window

MOSTLY_HOLE = 0.95
"""A larger share of hole pixels is probably an inverted mask."""
_MOST_STAGES = 3
_LEAST_WINDOW = 256
"""Pixels of a side; smaller windows, which networks of a small multiple take, show too little beside the hole."""

Fills = list[tuple[Rect, np.ndarray]]
"""Fills of disjoint boxes of a picture: each float32 [h, w, 3] in [-1, 1]."""


@dataclass(frozen=True)
class Job:
    """One picture and mask. `alpha`: bool, equal to the hole, for a hard edge; else float32. `region` bool [H, W]:
    the pixels that the network must fill, including the feathered rim; `groups`: its groups."""

    picture: Picture
    hole: np.ndarray
    alpha: np.ndarray
    region: np.ndarray
    groups: HoleGroups


@dataclass(frozen=True)
class Plan:
    """Windows that fill a picture, in batches of one network size each. `patches` and `owner`, for the boxes of the
    fills, are those of `strategies.patches`."""

    strategy: str
    windows: list[Window]
    batches: list[list[Window]]
    patches: list[Rect]
    owner: np.ndarray


def job_of(picture: Picture, mask: Any, options: MaskOptions) -> Job:
    """The job of a picture and a mask of any accepted kind.

    Raises InvalidMaskError, and without `allow_any_mask` also where nothing or more than 95 % is hole.
    """
    hole = read_hole(
        mask,
        *picture.size,
        threshold=options.mask_threshold,
        invert=options.invert_mask,
        channel=options.mask_channel,
        picture=picture,
        note=picture.note,
    )
    alpha = region = hole
    if options.dilate != 0 or options.feather != 0:
        alpha = soft_edge(hole, options.dilate, options.feather)
        region = alpha > 0
    share = np.count_nonzero(region) / region.size
    if share == 0 or share > MOSTLY_HOLE:
        problem = f"mask: {share:.1%} of the picture is hole; is the mask inverted (invert_mask, --invert-mask)?"
        if share == 0:
            problem = "mask: no hole pixel; the picture is returned unchanged"
        if not options.allow_any_mask:
            problem = problem.removesuffix("; the picture is returned unchanged")
            raise InvalidMaskError(f"{problem} (allow_any_mask, --allow-any-mask, lets it pass)")
        warn(problem)
    return Job(picture, hole, alpha, region, group_holes(region))


@dataclass(frozen=True)
class Filler:
    """Fills jobs with a network. `window`, `memory_limit`: as of :class:`Inpainter`."""

    network: Network
    window: int
    memory_limit: int | None

    def fill(self, job: Job, strategy: str, stages: bool) -> tuple[list[Fills], str, int]:
        """Fills of the result, or of every stage, with the strategy that ran and its passes."""
        plans = self._plans(job, strategy)
        plan = first = next(plans)
        while True:
            try:
                self._check_memory(job, plan, stages)
                with memory.OutOfMemoryErrors(f"strategy {plan.strategy}"):
                    fills = self._run_plan(job, plan, stages)
                break
            except OutOfMemoryError:
                smaller = next(plans, None)
                if smaller is None:
                    raise
                plan = smaller
        scale, wanted = strategies.least_scale(plan.windows), strategies.least_scale(first.windows)
        if scale < wanted:
            warn(
                f"memory: too little for strategy {first.strategy}; filled by {plan.strategy}, at {scale:.0%} of the "
                f"picture's scale in place of {wanted:.0%}, which is blurrier"
            )
        return fills, plan.strategy, len(plan.windows)

    def _plans(self, job: Job, strategy: str) -> Iterator[Plan]:
        """The plans to try, in the order of decreasing memory; each is made when it is asked for."""
        multiple = self.network.multiple
        ladder = [("auto", self.window), ("crop", self.window)]
        least = min(self.window, strategies.padded(_LEAST_WINDOW, multiple))
        ladder += [(name, least) for name in ("auto", "crop", "resize")]
        made: set[tuple[str, int]] = set()
        for asked, largest in ladder if strategy == "auto" else [(strategy, self.window)]:
            if asked == "auto":
                name, windows = strategies.choose(job.region, multiple, largest, job.groups)
            elif asked == "crop" and made == {("tile", self.window)} and largest > least:
                continue  # tiles become smaller first, because crops of thin holes reduce the scale
            else:
                name = asked
                windows = strategies.windows_for(name, job.region, multiple, largest, job.groups)
            if (name, largest) in made:
                continue
            made.add((name, largest))
            patches, owner = strategies.patches([strategies.needed(w, job.region) for w in windows], job.picture.size)
            batches = strategies.batches(windows, multiple, largest)
            yield Plan(name, windows, batches, patches, owner)
            if len(batches) < len(windows):
                yield Plan(name, windows, [[window] for window in windows], patches, owner)

    def _check_memory(self, job: Job, plan: Plan, stages: bool) -> None:
        """Raise OutOfMemoryError where a plan needs more than there is, beside the picture and the mask."""
        own = self.network
        results = _MOST_STAGES if stages else 1
        fills = memory.fill_bytes(sum(box.area for box in plan.patches), results)
        made = results * job.picture.result_bytes
        passes = {(len(batch), *strategies.network_size(batch[0], own.multiple)) for batch in plan.batches}
        room = memory.available_memory(own.device) if self.memory_limit is None else None
        limit = room if self.memory_limit is None else self.memory_limit
        network = memory.network_bytes(
            [math.prod(one) for one in passes], own.base_channels, own.dtype, own.engine_on_cpu, room
        )
        if self.memory_limit is not None or own.device.type != "cuda":
            demands = [(fills + network + made, own.device, limit)]
        else:
            host = torch.device("cpu")
            demands = [(fills + made, host, memory.available_memory(host)), (network, own.device, limit)]
        for needed, device, available in demands:
            if available is not None and needed > available:
                better = (
                    "a smaller window" if plan.strategy != "full" else "strategy 'crop', 'tile', 'resize' or 'auto'"
                )
                height, width = job.picture.size
                raise OutOfMemoryError(
                    f"strategy {plan.strategy}: a picture of {width}x{height} needs about {memory.human(needed)}, "
                    f"{memory.human(available)} are available on {device}; try {better}, or a smaller picture"
                )

    def _run_plan(self, job: Job, plan: Plan, stages: bool) -> list[Fills]:
        """The fills of the result, or of every stage: weighted means where windows overlap."""
        sums: list[list[np.ndarray]] = [[] for _ in plan.patches]
        totals = [np.zeros(job.region[box.slices].shape, dtype=np.float32) for box in plan.patches]
        for batch in plan.batches:
            for window, fills in zip(batch, self._run_batch(job.picture, job.region, batch, stages), strict=True):
                needed = strategies.needed(window, job.region)
                number = int(plan.owner[needed.top // CELL, needed.left // CELL])
                total, patch = totals[number], plan.patches[number]
                if not sums[number]:
                    sums[number] = [np.zeros((*total.shape, 3), dtype=np.float32) for _ in fills]
                parts = zip(*(strategies.enlarged(fill, window, needed) for fill in fills), strict=True)
                for part in parts:
                    box = part[0][0]
                    there = box.moved(-patch.top, -patch.left).slices
                    weight = np.float32(1) if window.weight is None else window.weight(box)
                    total[there] += weight
                    for accumulated, (_, fill) in zip(sums[number], part, strict=True):
                        accumulated[there] += fill * weight[..., None]
        for own, total in zip(sums, totals, strict=True):
            total[total == 0] = 1
            for accumulated in own:
                accumulated /= total[..., None]
        return [list(zip(plan.patches, fills, strict=True)) for fills in zip(*sums, strict=True)]

    def _run_batch(
        self, picture: Picture, region: np.ndarray, windows: list[Window], stages: bool
    ) -> list[list[np.ndarray]]:
        """The fills of each window, all of one network size: one, or one per stage, at the scale of the network."""
        size = strategies.network_size(windows[0], self.network.multiple)
        images, holes = np.empty((len(windows), *size, 3), np.float32), np.empty((len(windows), *size), bool)
        for sample, window in enumerate(windows):
            images[sample], holes[sample] = self._network_input(picture, region, window)
        outputs = self.network.run(images, holes, stages)
        return [
            [output[sample, : window.reduced[0], : window.reduced[1]] for output in outputs]
            for sample, window in enumerate(windows)
        ]

    def _network_input(self, picture: Picture, region: np.ndarray, window: Window) -> tuple[np.ndarray, np.ndarray]:
        """Image float32 [h, w, 3] and hole bool [h, w] of a window, reduced and padded."""
        hole = region[window.rows, window.columns]
        if window.reduced == window.size:
            # Pixels under the mask must not reach the network: NaN times zero is NaN.
            content = picture.network_range(window.rows, window.columns)
            image, small_hole = np.where(hole[..., None], np.float32(0), content), hole
        else:
            top = window.rows.start
            image, small_hole = strategies.reduce_region(
                lambda rows: picture.network_range(slice(top + rows.start, top + rows.stop), window.columns),
                hole,
                window.reduced,
            )
        target = strategies.network_size(window, self.network.multiple)
        rows, columns = (strategies.reflection(*pair) for pair in zip(window.reduced, target, strict=True))
        return image[rows][:, columns], small_hole[rows][:, columns]
