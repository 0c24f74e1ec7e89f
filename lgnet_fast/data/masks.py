"""Holes for training and evaluation: generated strokes and boxes, and the folders of masks that the field uses.

A mask is a bool array [H, W], True = hole. The hole ratio is the share of hole pixels; the paper groups its tests by
the six classes of Liu et al. ("Image Inpainting for Irregular Holes Using Partial Convolutions", ECCV 2018),
:data:`HOLE_CLASSES`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import DataError, InvalidMaskError
from ..pipeline.reading import open_upright

HOLE_CLASSES: tuple[tuple[float, float], ...] = (
    (0.01, 0.1),
    (0.1, 0.2),
    (0.2, 0.3),
    (0.3, 0.4),
    (0.4, 0.5),
    (0.5, 0.6),
)
"""Bounds of the hole ratio of each class: above the first, up to and including the second."""

KINDS = ("strokes", "boxes", "mixed")
VARIED = "varied"
"""The kind of :func:`varied_mask`, which has no hole classes."""
FINE = "fine"
"""The kind of :func:`fine_mask`, which has none either."""
POLARITIES = ("white", "black")

Seed = int | Sequence[int]

# Directions of a brush as integers: the last bit of a cosine may differ between math libraries, a rounded one not.
_TURN = 256
_SCALE = 1 << 12
_DIRECTIONS = np.array(
    [
        (round(_SCALE * math.cos(2 * math.pi * k / _TURN)), round(_SCALE * math.sin(2 * math.pi * k / _TURN)))
        for k in range(_TURN)
    ],
    dtype=np.int64,
)


# -- ratios ------------------------------------------------------------------------------------------------------


def hole_ratio(mask: np.ndarray) -> float:
    """Share of hole pixels of a bool mask [H, W], in [0, 1]."""
    return int(np.count_nonzero(mask)) / mask.size


def hole_class(mask: np.ndarray) -> int | None:
    """Index in :data:`HOLE_CLASSES` of a bool mask [H, W]; None for ratios up to 0.01 and above 0.6."""
    return _class_of(hole_ratio(mask))


def _class_of(ratio: float) -> int | None:
    return next((i for i, (low, high) in enumerate(HOLE_CLASSES) if low < ratio <= high), None)


def _pixel_bounds(height: int, width: int, hole_class: int | None) -> tuple[int, int]:
    """Smallest and largest count of hole pixels whose ratio lies in the class; None: from the first to the last."""
    if hole_class is None:
        low, high = HOLE_CLASSES[0][0], HOLE_CLASSES[-1][1]
    elif isinstance(hole_class, (int, np.integer)) and 0 <= hole_class < len(HOLE_CLASSES):
        low, high = HOLE_CLASSES[hole_class]
    else:
        raise ValueError(f"hole_class: expected None or 0 to {len(HOLE_CLASSES) - 1}, got {hole_class!r}")
    pixels = height * width
    fewest, most = math.floor(low * pixels), math.ceil(high * pixels)
    while fewest / pixels <= low:
        fewest += 1
    while most / pixels > high:
        most -= 1
    if fewest > most:
        raise ValueError(f"height, width: {height}x{width} has no pixel count with a hole ratio in ({low}, {high}]")
    return fewest, most


# -- generated masks ---------------------------------------------------------------------------------------------


def generate_mask(height: int, width: int, *, hole_class: int | None, kind: str, seed: Seed) -> np.ndarray:
    """Draw a hole of brush strokes, of boxes, or of both.

    The same arguments give the same mask on every platform: integer arithmetic, and numpy's PCG64 seeded by
    ``SeedSequence(seed)``.

    Args:
        height, width: of the mask, in pixels.
        hole_class: index in :data:`HOLE_CLASSES`; the hole ratio is within its bounds; None: anywhere in (0.01, 0.6].
        kind: "strokes" (random walks of a thick round brush), "boxes" (rectangles) or "mixed" (strokes, boxes or
            both, chosen at random).
        seed: a non-negative integer or several, e.g. (seed, epoch, index).

    Returns:
        bool [height, width], True = hole.

    Raises:
        ValueError: an argument outside the above, or a picture too small for the class.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {KINDS}, got {kind!r}")
    if height < 1 or width < 1:
        raise ValueError(f"height, width: expected positive sizes, got {height}x{width}")
    fewest, most = _pixel_bounds(height, width, hole_class)
    rng = _generator(seed)
    target = int(rng.integers(fewest, most + 1))
    if kind == "mixed":
        kind = ("strokes", "boxes", "both")[int(rng.integers(3))]
    hole = np.zeros((height, width), dtype=bool)

    def draw(missing: int, size: float) -> None:
        if kind == "boxes" or (kind == "both" and rng.integers(2)):
            _draw_box(hole, rng, missing, size)
        else:
            _draw_stroke(hole, rng, size)

    _fill(hole, rng, draw, target, fewest, most)
    return hole


def _generator(seed: Seed) -> np.random.Generator:
    words = [int(seed)] if isinstance(seed, (int, np.integer)) else [int(word) for word in seed]
    if any(word < 0 for word in words):
        raise ValueError(f"seed: expected non-negative integers, got {seed!r}")
    return np.random.default_rng(np.random.SeedSequence(words))


def _fill(
    hole: np.ndarray,
    rng: np.random.Generator,
    draw: Callable[[int, float], None],
    target: int,
    fewest: int,
    most: int,
) -> None:
    """Call draw(missing pixels, size <= 1), which marks pixels of `hole`, until it has about `target` of them."""
    count, attempts, size = 0, 0, 1.0
    # Stop within 1 % of the picture of the target: the rest would be tiny specks.
    while (count < fewest or target - count > hole.size // 100) and attempts < 200:
        attempts += 1
        before = hole.copy()
        draw(target - count, size)
        drawn = int(np.count_nonzero(hole))
        if drawn > most:
            # Too much: undo it and continue with a smaller brush.
            hole[:] = before
            size *= 0.7
        else:
            count = drawn
    if count < fewest:
        _grow(hole, rng, fewest - count)


def _draw_stroke(hole: np.ndarray, rng: np.random.Generator, size: float) -> None:
    """One free-form stroke: a walk of straight pieces that turns by up to 60 degrees, with a round brush."""
    height, width = hole.shape
    side = min(height, width)
    thickest = max(1, round(0.075 * side * size))
    radius = int(rng.integers(max(1, thickest // 4), thickest + 1))
    _walk(hole, rng, radius, max(2, round(0.25 * side * size)))


def _walk(hole: np.ndarray, rng: np.random.Generator, radius: int, longest: int) -> None:
    """A walk of 2 to 8 straight pieces, each of a quarter to the whole of `longest`, with a brush of that radius."""
    height, width = hole.shape
    x, y = int(rng.integers(width)), int(rng.integers(height))
    angle = int(rng.integers(_TURN))
    pieces = int(rng.integers(2, 9))
    turns = rng.integers(-_TURN // 6, _TURN // 6 + 1, size=pieces)
    lengths = rng.integers(max(1, longest // 4), longest + 1, size=pieces)
    _stamp(hole, x, y, radius)
    for turn, length in zip(turns.tolist(), lengths.tolist()):
        angle = (angle + turn) % _TURN
        dx, dy = (_DIRECTIONS[angle] * length // _SCALE).tolist()
        # The walk reflects at the border, so that a stroke stays in the picture.
        if not 0 <= x + dx < width:
            dx, angle = -dx, (_TURN // 2 - angle) % _TURN
        if not 0 <= y + dy < height:
            dy, angle = -dy, -angle % _TURN
        _capsule(hole, x, y, dx, dy, radius)
        x, y = min(max(x + dx, 0), width - 1), min(max(y + dy, 0), height - 1)
        _stamp(hole, x, y, radius)


@cache
def _disc(radius: int) -> np.ndarray:
    line = np.arange(-radius, radius + 1) ** 2
    return line[:, None] + line[None, :] <= radius * radius


def _stamp(hole: np.ndarray, x: int, y: int, radius: int) -> None:
    """Mark the disc around (x, y), cut at the borders."""
    height, width = hole.shape
    left, top = max(0, x - radius), max(0, y - radius)
    right, bottom = min(width, x + radius + 1), min(height, y + radius + 1)
    part = _disc(radius)[top - y + radius : bottom - y + radius, left - x + radius : right - x + radius]
    hole[top:bottom, left:right] |= part


def _capsule(hole: np.ndarray, x: int, y: int, dx: int, dy: int, radius: int) -> None:
    """Mark what is within `radius` of the piece from (x, y) to (x + dx, y + dy), without its round ends."""
    height, width = hole.shape
    left, right = max(0, min(x, x + dx) - radius), min(width, max(x, x + dx) + radius + 1)
    top, bottom = max(0, min(y, y + dy) - radius), min(height, max(y, y + dy) + radius + 1)
    if left >= right or top >= bottom:
        return
    columns, rows = np.arange(left - x, right - x), np.arange(top - y, bottom - y)[:, None]
    length2 = dx * dx + dy * dy
    along = columns * dx + rows * dy
    across = np.abs(columns * dy - rows * dx)
    reach = math.isqrt(radius * radius * length2)
    hole[top:bottom, left:right] |= (across <= reach) & (along >= 0) & (along <= length2)


def _draw_box(hole: np.ndarray, rng: np.random.Generator, missing: int, size: float) -> None:
    """One rectangle with sides in a ratio of up to 1:3, of between a quarter and all of the `missing` pixels."""
    height, width = hole.shape
    area = max(1, height * width // 500, round(missing * size))
    area = int(rng.integers(max(1, area // 4), area + 1))
    # Aspect as a fraction of integers: h/w from 1/3 to 3.
    a, b = int(rng.integers(4, 13)), int(rng.integers(4, 13))
    h = min(height, max(1, math.isqrt(area * a // b)))
    w = min(width, max(1, area // h))
    top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
    hole[top : top + h, left : left + w] = True


def _grow(hole: np.ndarray, rng: np.random.Generator, missing: int) -> None:
    """Add exactly `missing` pixels at the hole's rim, where no stroke fits the class's bounds."""
    if not hole.any():
        hole[int(rng.integers(hole.shape[0])), int(rng.integers(hole.shape[1]))] = True
        missing -= 1
    while missing > 0:
        rim = np.zeros_like(hole)
        rim[1:] |= hole[:-1]
        rim[:-1] |= hole[1:]
        rim[:, 1:] |= hole[:, :-1]
        rim[:, :-1] |= hole[:, 1:]
        places = np.flatnonzero(rim & ~hole)[:missing]
        hole.flat[places] = True
        missing -= len(places)


# -- the evaluation suite's holes ----------------------------------------------------------------------------------

SUITE_KINDS = ("thin", "thick", "box", "blob")


def suite_mask(height: int, width: int, *, kind: str, seed: Seed) -> np.ndarray:
    """Draw a hole of one of the kinds that `lgnet-fast eval --suite` measures.

    Sizes follow the picture's shorter side s; in brackets at 256. The same arguments give the same mask on every
    platform, as with :func:`generate_mask`.

    Args:
        height, width: of the mask, in pixels, each at least 16.
        kind: "thin": strokes of s/85 to s/28 (3 to 9 pixels) over 10-20 % of the picture. "thick": strokes of s/15 to
            s/8 (17 to 31 pixels) over 20-30 %. "box": a square of s/4 (64x64), s/8 or more from the border. "blob":
            one smooth shape of 15 %, round about the middle.
        seed: a non-negative integer or several.

    Returns:
        bool [height, width], True = hole.

    Raises:
        ValueError: an argument outside the above.
    """
    if kind not in SUITE_KINDS:
        raise ValueError(f"kind: expected one of {SUITE_KINDS}, got {kind!r}")
    if min(height, width) < 16:
        raise ValueError(f"height, width: expected at least 16 each, got {height}x{width}")
    rng, side = _generator(seed), min(height, width)
    hole = np.zeros((height, width), dtype=bool)
    if kind == "box":
        box, rim = side // 4, side // 8
        top = int(rng.integers(rim, height - box - rim + 1))
        left = int(rng.integers(rim, width - box - rim + 1))
        hole[top : top + box, left : left + box] = True
    elif kind == "blob":
        _draw_blob(hole, rng, round(0.15 * hole.size))
    else:
        thin = kind == "thin"
        thinnest, thickest = (side // 256, side // 64) if thin else (side // 32, side // 17)
        fewest, most = _pixel_bounds(height, width, 1 if thin else 2)

        def draw(missing: int, size: float) -> None:
            radius = int(rng.integers(max(1, thinnest), max(1, thickest) + 1))
            _walk(hole, rng, radius, max(2, round(0.3 * side * size)))

        _fill(hole, rng, draw, int(rng.integers(fewest, most + 1)), fewest, most)
    return hole


def _draw_blob(hole: np.ndarray, rng: np.random.Generator, pixels: int) -> None:
    """Mark the `pixels` with the highest sum of inverse squared distances to a few points along a walk.

    Steps of up to 0.18 of the shorter side keep it in one piece: between two points that far apart the sum is above
    the level that encloses a seventh of the picture.
    """
    height, width = hole.shape
    side = min(height, width)
    x, y = (int(rng.integers(length // 3, length - length // 3)) for length in (width, height))
    angle = int(rng.integers(_TURN))
    columns, rows = np.arange(width, dtype=np.int64), np.arange(height, dtype=np.int64)[:, None]
    level = np.zeros(hole.shape, dtype=np.int64)
    for _ in range(int(rng.integers(4, 7))):
        weight = int(rng.integers(7, 14))
        level += (weight << 32) // ((columns - x) ** 2 + (rows - y) ** 2 + 1)
        angle = (angle + int(rng.integers(-_TURN // 4, _TURN // 4 + 1))) % _TURN
        step = int(rng.integers(side // 12, round(0.18 * side) + 1))
        dx, dy = (_DIRECTIONS[angle] * step // _SCALE).tolist()
        # Turned back at the border, so that most of the shape's rim lies in the picture.
        if not side // 6 <= x + dx < width - side // 6:
            dx, angle = -dx, (_TURN // 2 - angle) % _TURN
        if not side // 6 <= y + dy < height - side // 6:
            dy, angle = -dy, -angle % _TURN
        x, y = x + dx, y + dy
    hole.flat[np.argsort(-level, axis=None, kind="stable")[:pixels]] = True


def varied_mask(height: int, width: int, *, seed: Seed) -> np.ndarray:
    """Draw a hole of a random kind: thin or thick strokes, boxes, blobs or shapes like objects.

    Args:
        height, width: of the mask, in pixels, each at least 24.
        seed: a non-negative integer or several.

    Returns:
        bool [height, width], True = hole.
    """
    rng = _generator(seed)
    kind = str(rng.choice(list(_VARIED), p=list(_VARIED.values())))
    inner = int(rng.integers(1 << 62))
    if kind in SUITE_KINDS and kind != "box":
        return suite_mask(height, width, kind=kind, seed=inner)
    if kind in KINDS:
        return generate_mask(
            height, width, hole_class=int(rng.integers(4 if kind == "strokes" else 2)), kind=kind, seed=inner
        )
    hole = np.zeros((height, width), dtype=bool)
    if kind == "box":
        side = min(height, width)
        for _ in range(int(rng.integers(1, 3))):
            h, w = (int(rng.integers(side // 6, side // 3)) for _ in range(2))
            top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
            hole[top : top + h, left : left + w] = True
    else:
        _draw_object(hole, rng)
    return hole


def fine_mask(height: int, width: int, *, seed: Seed) -> np.ndarray:
    """Draw a hole for training on details: half are one to three :func:`suite_mask` of thin strokes together, over 10
    to 48 % of the picture, so that a picture teaches more of them; half are :func:`varied_mask`.

    Args:
        height, width: of the mask, in pixels, each at least 24.
        seed: a non-negative integer or several.

    Returns:
        bool [height, width], True = hole.
    """
    rng = _generator(seed)
    if rng.integers(2):
        return varied_mask(height, width, seed=int(rng.integers(1 << 62)))
    hole = np.zeros((height, width), dtype=bool)
    for _ in range(int(rng.integers(1, 4))):
        hole |= suite_mask(height, width, kind="thin", seed=int(rng.integers(1 << 62)))
    return hole


# Shares of the kinds: those of the suite, :func:`generate_mask`'s, and "object".
_VARIED = {"thin": 0.25, "thick": 0.25, "box": 0.12, "blob": 0.13, "strokes": 0.1, "boxes": 0.03, "object": 0.12}


def _draw_object(hole: np.ndarray, rng: np.random.Generator) -> None:
    """A body of two to five overlapping tilted ellipses, with up to three limbs, like a person's or an animal's."""
    height, width = hole.shape
    side = min(height, width)
    x, y = (int(rng.integers(length // 4, length - length // 4)) for length in (width, height))
    columns, rows = np.arange(width, dtype=np.int64), np.arange(height, dtype=np.int64)[:, None]
    angle = int(rng.integers(_TURN))
    for _ in range(int(rng.integers(2, 6))):
        a, b = int(rng.integers(side // 12, side // 6 + 1)), int(rng.integers(side // 20, side // 9 + 1))
        ux, uy = _DIRECTIONS[angle].tolist()
        along = ((columns - x) * ux + (rows - y) * uy) // _SCALE
        across = ((rows - y) * ux - (columns - x) * uy) // _SCALE
        hole |= along**2 * b**2 + across**2 * a**2 <= a**2 * b**2
        # The next one begins inside this one.
        x, y = (min(max(v + d * a // _SCALE, 0), n - 1) for v, d, n in ((x, ux, width), (y, uy, height)))
        angle = (angle + int(rng.integers(-_TURN // 5, _TURN // 5 + 1))) % _TURN
    inside = np.argwhere(hole)
    for _ in range(int(rng.integers(4))):
        row, column = inside[int(rng.integers(len(inside)))].tolist()
        radius = int(rng.integers(max(1, side // 64), side // 24 + 1))
        dx, dy = (_DIRECTIONS[int(rng.integers(_TURN))] * int(rng.integers(side // 8, side // 4)) // _SCALE).tolist()
        _capsule(hole, column, row, dx, dy, radius)


# -- folders of masks --------------------------------------------------------------------------------------------

_LIU_COUNT, _LIU_PER_CLASS = 12_000, 2_000


def pictures_below(folder: str | Path, expected: str) -> list[Path]:
    """The picture files (of every format that Pillow reads) of a folder and its sub-folders, unordered.

    Raises DataError, which begins with `expected`: no such folder, or no picture in it.
    """
    if not Path(folder).is_dir():
        raise DataError(f"{expected}, got {str(folder)!r}, which is not a folder")
    known = set(Image.registered_extensions())
    files = [p for p in Path(folder).rglob("*") if p.suffix.lower() in known and p.is_file()]
    if not files:
        raise DataError(f"{expected}, got {str(folder)!r}, which has none")
    return files


class MaskFolder:
    """Masks from picture files, in the order of their numbers.

    Layouts that are recognised by themselves:

    * Liu et al.'s 12,000 test masks (``00000.png`` to ``11999.png``): 2,000 for each of :data:`HOLE_CLASSES` in
      order, half of them with holes that reach the border, half with none near it; see :meth:`liu_group`.
    * QD-IMD (Iskakov's Quick Draw irregular masks: ``train/``, ``test/`` of numbered files) and any other folder of
      pictures, searched with its sub-folders.

    Classes follow the measured hole ratio, not the file's name.

    Args:
        folder: where the masks are.
        polarity: "white" = levels above a half are hole; "black" = the others.

    Raises:
        DataError: no such folder, or no picture in it.
        InvalidMaskError: at access, a file that cannot be read; it names the file.
    """

    def __init__(self, folder: str | Path, *, polarity: str = "white") -> None:
        if polarity not in POLARITIES:
            raise ValueError(f"polarity: expected one of {POLARITIES}, got {polarity!r}")
        self.folder, self.polarity = Path(folder), polarity
        files = pictures_below(folder, "masks: expected a folder of mask pictures")
        self.files = sorted(files, key=lambda p: (p.parent.as_posix(), _number(p.stem), p.name))
        self._ratios: list[float] | None = None

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> np.ndarray:
        """Mask `index` at its own size: bool [h, w], True = hole."""
        return read_mask(self.files[index], self.polarity)

    def mask(self, index: int, height: int, width: int) -> np.ndarray:
        """Mask `index` scaled to bool [height, width] (nearest neighbour, as the field's evaluations do)."""
        return resize_mask(self[index], height, width)

    @property
    def is_liu(self) -> bool:
        """Whether this is the numbered set of 12,000."""
        return len(self) == _LIU_COUNT and all(_number(f.stem) == i for i, f in enumerate(self.files))

    def liu_group(self, index: int) -> tuple[int, bool]:
        """(class by Liu et al.'s numbering, whether the hole reaches the border, as measured) of mask `index`."""
        if not self.is_liu:
            raise ValueError(f"folder: expected 12,000 files numbered from 0, got {len(self)} files in {self.folder}")
        return index // _LIU_PER_CLASS, reaches_border(self[index])

    def ratios(self) -> list[float]:
        """The measured hole ratio of every mask; read once, with threads."""
        if self._ratios is None:
            with ThreadPoolExecutor() as pool:
                self._ratios = list(pool.map(lambda i: hole_ratio(self[i]), range(len(self))))
        return self._ratios

    def indices(self, hole_class: int | None) -> list[int]:
        """The masks whose measured ratio lies in the class; None: those that lie in none."""
        return [i for i, ratio in enumerate(self.ratios()) if _class_of(ratio) == hole_class]


def reaches_border(mask: np.ndarray) -> bool:
    """Whether any pixel of the outermost rows and columns is hole."""
    return bool(mask[0].any() or mask[-1].any() or mask[:, 0].any() or mask[:, -1].any())


def read_mask(path: str | Path, polarity: str = "white") -> np.ndarray:
    """A mask file as bool [h, w], True = hole; levels are compared with half of the scale."""
    return hole_levels(open_upright(Path(path), InvalidMaskError, "mask")[0], polarity)


def hole_levels(picture: Image.Image, polarity: str = "white") -> np.ndarray:
    """A mask picture as bool [h, w], True = hole."""
    if picture.mode.startswith("I"):
        levels = np.asarray(picture).astype(np.int64) > 32767
    else:
        levels = np.asarray(picture.convert("L")) > 127
    return levels if polarity == "white" else ~levels


def resize_mask(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """`mask` sampled at the centres of height x width cells (nearest neighbour)."""
    if mask.shape == (height, width):
        return mask
    rows = (2 * np.arange(height) + 1) * mask.shape[0] // (2 * height)
    columns = (2 * np.arange(width) + 1) * mask.shape[1] // (2 * width)
    resized: np.ndarray = mask[rows[:, None], columns]
    return resized


def _number(stem: str) -> int:
    """The last number in a name, so that 2.png comes before 10.png; names without one come first."""
    found = re.findall(r"\d+", stem)
    return int(found[-1]) if found else -1
