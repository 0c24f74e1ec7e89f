"""Windows: the regions of a picture that the network fills, their scale, and the blending of their fills."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
from PIL import Image
from scipy import ndimage

from ..engine.holes import CELL, HoleGroups, bounding_box, disjoint_boxes, group_holes
from ..engine.regions import Rect

STRATEGIES = ("auto", "full", "crop", "resize", "tile")

# Least number of known pixels on every side of a hole group; half the square root of its area if that is more.
CONTEXT = 64
# Pixels by which neighbouring tiles overlap, and over which they are blended.
TILE_OVERLAP = 128
# A hole that contains a square of this side is too thick for tiles: some tiles would have almost no known pixels.
THICK = 128
# Pixels that are scaled at a time, because at once a large window would take several float32 copies of itself.
_STRIP_PIXELS = 2**18


@dataclass(frozen=True)
class Window:
    """A region of the picture that is one input of the network.

    `rows`, `columns`: the region; `reduced`: (height, width) to which it is scaled for the network, before padding,
    never larger than the region. `weight(box)`: blending weights float32 [h, w] of a box of the picture within the
    region, made when they are needed; None = 1 everywhere.
    """

    rows: slice
    columns: slice
    reduced: tuple[int, int]
    weight: Callable[[Rect], np.ndarray] | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the region in pixels of the picture."""
        return self.rows.stop - self.rows.start, self.columns.stop - self.columns.start


def check(strategy: str) -> None:
    """Raise ValueError unless `strategy` is one of `STRATEGIES`."""
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy: expected one of {', '.join(STRATEGIES)}, got {strategy!r}")


def least_scale(windows: list[Window]) -> float:
    """The smallest scale of the windows along an axis: 1 where all are at the scale of the picture."""
    return min(
        small / length for window in windows for small, length in zip(window.reduced, window.size, strict=True)
    )


def choose(
    hole: np.ndarray, multiple: int, largest: int, groups: HoleGroups | None = None
) -> tuple[str, list[Window]]:
    """The strategy that "auto" starts with and its windows, for a hole bool [H, W], a network multiple and a largest
    window side. `groups`: those of the hole, where they are known.

    full  if the padded picture is no larger than `largest` on both sides, unless crops at native scale take fewer
          network pixels (the network was trained on 256x256, so more context does not improve a fill);
    crop  if every hole group fits a window at native scale, or if the hole is thick (contains a 128x128 square): then
          large groups are filled at reduced scale;
    tile  otherwise: thin holes, such as scratches and text, all over a large picture.
    """
    groups = groups or group_holes(hole)
    crops = crop_windows(hole, multiple, largest, groups)
    native = all(window.reduced == window.size for window in crops)
    whole = padded(hole.shape[0], multiple), padded(hole.shape[1], multiple)
    cropped = sum(math.prod(network_size(window, multiple)) for window in crops)
    if max(whole) <= largest and not (native and cropped < math.prod(whole)):
        return "full", windows_for("full", hole, multiple, largest)
    if native or any(_is_thick(hole[box.slices]) for box in groups.boxes):
        return "crop", crops
    return "tile", windows_for("tile", hole, multiple, largest)


def windows_for(
    strategy: str, hole: np.ndarray, multiple: int, largest: int, groups: HoleGroups | None = None
) -> list[Window]:
    """The windows that fill a hole bool [H, W] with at least one pixel, in an order fixed by their position.

    `groups`: those of the hole, where they are known.
    """
    height, width = hole.shape
    if strategy == "full":
        return [Window(slice(0, height), slice(0, width), (height, width))]
    if strategy == "resize":
        scale = min(1.0, largest / max(height, width))
        reduced = (max(1, round(height * scale)), max(1, round(width * scale)))
        return [Window(slice(0, height), slice(0, width), reduced)]
    if strategy == "crop":
        return crop_windows(hole, multiple, largest, groups)
    return tile_windows(hole, largest, min(TILE_OVERLAP, largest // 2))


def network_size(window: Window, multiple: int) -> tuple[int, int]:
    """(height, width) of a window as input of the network, padded."""
    return padded(window.reduced[0], multiple), padded(window.reduced[1], multiple)


def batches(windows: list[Window], multiple: int, largest: int) -> list[list[Window]]:
    """The windows in groups of one network size, each of no more network pixels than `largest`^2, or of one window.

    A batch of small windows takes little longer than one window, because a pass mostly reads weights.
    """
    groups: dict[tuple[int, int], list[list[Window]]] = {}
    for window in windows:
        size = network_size(window, multiple)
        own = groups.setdefault(size, [[]])
        if own[-1] and (len(own[-1]) + 1) * math.prod(size) > largest**2:
            own.append([])
        own[-1].append(window)
    return [group for own in groups.values() for group in own]


def padded(length: int, multiple: int) -> int:
    """`length` rounded up to a multiple of `multiple`."""
    return -(-length // multiple) * multiple


def reflection(length: int, target: int) -> np.ndarray:
    """Indices [target] that extend 0..length-1 by repeated reflection padding (the edge is not repeated).

    From 5 to 12: 0 1 2 3 4 3 2 1 0 1 2 3. A length of 1 is replicated.
    """
    if length == 1:
        return np.zeros(target, dtype=np.intp)
    phase = np.arange(target) % (2 * length - 2)
    return np.minimum(phase, 2 * length - 2 - phase)


def reduce_region(
    rows_of: Callable[[slice], np.ndarray], hole: np.ndarray, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """A region and its hole bool [h, w] area-averaged to `size` (height, width).

    `rows_of(rows)`: rows of the region, float32 [rows, w, 3]. Averages use known pixels only, so the content under
    the mask has no influence; a reduced pixel is hole if most of its area is hole.
    """
    height, width = hole.shape
    # The two passes of Pillow's resampling, which are independent of each other; the first runs strip by strip.
    narrow = np.empty((4, height, size[1]), dtype=np.float32)
    for rows in _strips(height, width):
        known, content = (~hole[rows]).astype(np.float32), rows_of(rows)
        across = (len(known), size[1])
        for channel in range(3):
            narrow[channel, rows] = _resample(content[..., channel] * known, across, Image.Resampling.BOX)
        narrow[3, rows] = _resample(known, across, Image.Resampling.BOX)
    *colours, share = (_resample(plane, size, Image.Resampling.BOX) for plane in narrow)
    reduced = np.stack(colours, axis=2)
    reduced /= np.maximum(share, 1e-6)[..., None]
    small_hole = share < 0.5
    reduced[small_hole] = 0
    return reduced, small_hole


def enlarged(fill: np.ndarray, window: Window, box: Rect) -> Iterator[tuple[Rect, np.ndarray]]:
    """The part in `box` of a fill float32 [h, w, 3] of a window, scaled up to the window's size by Lanczos and
    clamped to [-1, 1]: disjoint boxes, and float32 [h, w, 3] for each."""
    rows, columns = box.moved(-window.rows.start, -window.columns.start).slices
    if window.reduced == window.size:
        yield box, fill[rows, columns]
        return
    # The two passes of Pillow's resampling, which are independent of each other; the second runs strip by strip.
    height, width = window.size
    wide = [_resample(fill[..., channel], (len(fill), width), Image.Resampling.LANCZOS) for channel in range(3)]
    for part in _strips(box.right - box.left, height):
        strip = np.empty((box.bottom - box.top, part.stop - part.start, 3), dtype=np.float32)
        for channel, plane in enumerate(wide):
            own = plane[:, columns][:, part]
            strip[..., channel] = _resample(own, (height, own.shape[1]), Image.Resampling.LANCZOS)[rows]
        np.clip(strip, -1, 1, out=strip)
        yield Rect(box.top, box.bottom, box.left + part.start, box.left + part.stop), strip


def needed(window: Window, hole: np.ndarray) -> Rect:
    """The box, in pixels of the picture, around the hole of a window. The window must contain hole pixels."""
    box = bounding_box(hole[window.rows, window.columns])
    top, left = window.rows.start, window.columns.start
    return Rect(top + box.top, top + box.bottom, left + box.left, left + box.right)


def patches(boxes: list[Rect], shape: tuple[int, int]) -> tuple[list[Rect], np.ndarray]:
    """Disjoint boxes of a picture of `shape`, so that each of `boxes` lies in one, and which one covers each cell of
    16x16 pixels (int [h, w]; -1 = none). So filling a few small holes needs no buffer of the picture's size."""
    apart = disjoint_boxes(boxes, shape)
    owner = np.full((padded(shape[0], CELL) // CELL, padded(shape[1], CELL) // CELL), -1, dtype=np.int32)
    for number, box in enumerate(apart):
        owner[box.top // CELL : -(-box.bottom // CELL), box.left // CELL : -(-box.right // CELL)] = number
    return apart, owner


def crop_windows(hole: np.ndarray, multiple: int, largest: int, groups: HoleGroups | None = None) -> list[Window]:
    """One window for each group of holes, with context, of at most `largest`^2 network pixels.

    Overlapping windows are merged if one pass over both costs no more than two and does not reduce the scale. Others
    may still overlap: in each, both holes are masked but only one group is filled, so their order does not matter.
    """
    groups = groups or group_holes(hole)
    frames = [_Frame.around(box.slices, {k}, hole, multiple, largest) for k, box in enumerate(groups.boxes, 1)]
    frames = _merge(frames, hole, multiple, largest)
    frames.sort(key=lambda frame: (frame.rows.start, frame.columns.start, frame.rows.stop, frame.columns.stop))
    return [
        Window(frame.rows, frame.columns, frame.reduced, partial(_ownership, groups.labels, frame.groups))
        for frame in frames
    ]


def tile_windows(hole: np.ndarray, tile: int, overlap: int) -> list[Window]:
    """The overlapping tiles of side `tile` at native scale that contain hole pixels, with smooth blending weights."""
    windows = []
    for top, bottom, row_weight in _spans(hole.shape[0], tile, overlap):
        for left, right, column_weight in _spans(hole.shape[1], tile, overlap):
            if hole[top:bottom, left:right].any():
                weight = partial(_ramps, row_weight, column_weight, (top, left))
                windows.append(Window(slice(top, bottom), slice(left, right), (bottom - top, right - left), weight))
    return windows


@dataclass(frozen=True)
class _Frame:
    box: tuple[slice, slice]
    groups: frozenset[int]
    rows: slice
    columns: slice
    reduced: tuple[int, int]
    scale: float
    cost: int

    @classmethod
    def around(
        cls,
        box: tuple[slice, slice],
        groups: set[int] | frozenset[int],
        hole: np.ndarray,
        multiple: int,
        largest: int,
    ) -> _Frame:
        context = max(CONTEXT, math.isqrt(np.count_nonzero(hole[box])) // 2)
        wanted = [
            min(extent.stop - extent.start + 2 * context, length)
            for extent, length in zip(box, hole.shape, strict=True)
        ]
        scale, down, across = _shape(wanted, multiple, max(1, (largest // multiple) ** 2))
        rows, high = _place(box[0], down * multiple, scale, hole.shape[0])
        columns, wide = _place(box[1], across * multiple, scale, hole.shape[1])
        return cls(box, frozenset(groups), rows, columns, (high, wide), scale, down * across)

    def overlaps(self, other: _Frame) -> bool:
        return bool(
            self.rows.start < other.rows.stop
            and other.rows.start < self.rows.stop
            and self.columns.start < other.columns.stop
            and other.columns.start < self.columns.stop
        )


def _shape(wanted: list[int], multiple: int, cells: int) -> tuple[float, int, int]:
    """(scale, cells down, cells across) of the smallest window of at most so many cells of `multiple`^2 pixels that
    holds a `wanted` (height, width) at the largest scale, at most 1; of equal ones the one with fewer cells down."""
    best = (0.0, 0, 0)
    for down in range(1, min(cells, -(-wanted[0] // multiple)) + 1):
        own = min(1.0, down * multiple / wanted[0])
        fitting = math.ceil(own * wanted[1] / multiple)
        for across in {min(max(1, one), cells // down) for one in (fitting - 1, fitting)}:  # ceil may be rounded up
            scale = min(own, across * multiple / wanted[1])
            best = max(best, (scale, -down * across, -down))
    return best[0], -best[2], best[1] // best[2]


def _place(extent: slice, network: int, scale: float, length: int) -> tuple[slice, int]:
    """Place of a window of `network` pixels at `scale` along an axis of `length`, and its reduced length."""
    span = round(network / scale)
    if span >= length:
        return slice(0, length), max(1, min(network, round(length * scale)))
    start = (extent.start + extent.stop - span) // 2
    start = min(max(0, start), length - span)
    return slice(start, start + span), network


def _merge(frames: list[_Frame], hole: np.ndarray, multiple: int, largest: int) -> list[_Frame]:
    merged_any = True
    while merged_any:
        merged_any = False
        kept: list[_Frame] = []
        for frame in frames:
            for position, other in enumerate(kept):
                if not frame.overlaps(other):
                    continue
                union = _union(frame.box[0], other.box[0]), _union(frame.box[1], other.box[1])
                both = _Frame.around(union, frame.groups | other.groups, hole, multiple, largest)
                if both.scale >= min(frame.scale, other.scale) and both.cost <= frame.cost + other.cost:
                    kept[position], merged_any = both, True
                    break
            else:
                kept.append(frame)
        frames = kept
    return frames


def _union(a: slice, b: slice) -> slice:
    return slice(min(a.start, b.start), max(a.stop, b.stop))


def _ownership(labels: np.ndarray, groups: frozenset[int], box: Rect) -> np.ndarray:
    """float32 [h, w]: 1 where a box of the picture belongs to the groups. `labels`: those of `HoleGroups`."""
    cells = slice(box.top // CELL, -(-box.bottom // CELL)), slice(box.left // CELL, -(-box.right // CELL))
    own = np.isin(labels[cells], list(groups)).astype(np.float32)
    own = own.repeat(CELL, axis=0).repeat(CELL, axis=1)
    top, left = box.top - cells[0].start * CELL, box.left - cells[1].start * CELL
    return own[top : top + box.bottom - box.top, left : left + box.right - box.left]


def _ramps(row_weight: np.ndarray, column_weight: np.ndarray, corner: tuple[int, int], box: Rect) -> np.ndarray:
    """float32 [h, w]: the weights of a tile, whose first pixel is `corner`, in a box of the picture."""
    rows, columns = box.moved(-corner[0], -corner[1]).slices
    weight: np.ndarray = row_weight[rows, None] * column_weight[None, columns]
    return weight


def _spans(length: int, tile: int, overlap: int) -> list[tuple[int, int, np.ndarray]]:
    """(start, stop, weight float32 [stop - start]) of evenly spread spans that cover an axis."""
    if length <= tile:
        return [(0, length, np.ones(length, dtype=np.float32))]
    count = -(-(length - overlap) // (tile - overlap))
    ramp = (np.arange(tile) + 0.5) / overlap
    rising = _smooth(np.minimum(ramp, 1))
    spans = []
    for number in range(count):
        start = round(number * (length - tile) / (count - 1))
        weight = np.ones(tile, dtype=np.float32)
        if number > 0:
            weight *= rising
        if number < count - 1:
            weight *= rising[::-1]
        spans.append((start, start + tile, weight))
    return spans


def _smooth(ramp: np.ndarray) -> np.ndarray:
    smooth: np.ndarray = (ramp * ramp * (3 - 2 * ramp)).astype(np.float32)
    return smooth


def _is_thick(hole: np.ndarray) -> bool:
    """Whether a hole bool [h, w], the box around one group, contains a square of side THICK."""
    if min(hole.shape) < THICK or np.count_nonzero(hole) < THICK**2:
        return False
    # Minimum over each square, as the minimum along rows of the minimum along columns: the cost does not depend on
    # the side, and the memory is one byte per pixel.
    least = hole.view(np.uint8)
    for axis in (0, 1):
        least = ndimage.minimum_filter1d(least, THICK, axis=axis, mode="constant", cval=0)
    return bool(least.any())


def _strips(length: int, across: int) -> Iterator[slice]:
    """Consecutive parts of an axis, each of about `_STRIP_PIXELS` pixels where the other axis has length `across`."""
    step = max(1, _STRIP_PIXELS // across)
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def _resample(channel: np.ndarray, size: tuple[int, int], filter: Image.Resampling) -> np.ndarray:
    plane = Image.fromarray(np.ascontiguousarray(channel, dtype=np.float32))
    return np.asarray(plane.resize((size[1], size[0]), filter))
