"""`Session`: one picture that is decoded once and filled hole by hole, with undo."""

from __future__ import annotations

import contextlib
import math
import operator
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
from PIL import Image

from .. import forks
from ..engine.holes import CELL, bounding_box
from ..engine.regions import Rect
from ..errors import InvalidImageError, InvalidMaskError
from ..pipeline.arguments import MaskOptions
from ..pipeline.arrays import channels_last
from ..pipeline.deep_colour import DeepImage
from ..pipeline.encoding import check_side, checked_quality, encode
from ..pipeline.filling import MOSTLY_HOLE
from ..pipeline.formats import MODES
from ..pipeline.inpainter import Inpainter
from ..pipeline.masks import checked_edge, read_hole, soft_edge
from ..pipeline.pictures import Picture, picture_of
from ..pipeline.sources import Encoded, file_of, open_image
from ..pipeline.strategies import CONTEXT, STRATEGIES, choose
from .colours import as_held, becomes_rgb
from .errors import OptionError

if TYPE_CHECKING:
    from typing_extensions import Unpack


class FillArguments(TypedDict, total=False):
    """Options of a fill, see a call of `Inpainter`; `dilate` and `feather` in whole pixels.

    `allow_any_mask` (False): more than 95 % may be hole.
    """

    strategy: str
    dilate: int
    feather: int
    mask_threshold: float
    invert_mask: bool
    mask_channel: str
    allow_any_mask: bool


_MASK_DEFAULTS = MaskOptions(allow_any_mask=False)


@dataclass(frozen=True)
class Part:
    """A box of a picture after a fill; :class:`Patch` explains its fields."""

    box: Rect
    samples: np.ndarray
    touched: np.ndarray


@dataclass(frozen=True)
class Patch:
    """The changes of one fill, and how it was made.

    `parts`: one or more disjoint boxes. Each has `box`, (top, bottom, left, right) in pixels of the picture, ends
    excluded; `samples` [h, w, C], C = 1 (grey) or 3 (RGB), without alpha, in the depth of the picture: uint8 (levels
    0 to 255), uint16 or, for PIL's mode I, int32 (0 to 65535), or floats in [0, 1]; and `touched` bool [h, w]: pixels
    that the fill may have changed.

    `box`: the box around all of them. `strategy`, `passes`: as in `Inpainted`. `seconds`: duration of the call.
    `hole`: bool [h, w], the mask before dilation inside its bounding box, which begins at `at` (top, left).
    `options`: of the call, by the keys "strategy" (as asked), "dilate" and "feather". `inpainter`: of the call.
    `painted`: the parts before their colours became those that the picture's mode holds; the result is made of them,
    because some modes round a colour again each time that it is converted.
    """

    parts: tuple[Part, ...]
    strategy: str
    passes: int
    seconds: float
    hole: np.ndarray
    at: tuple[int, int]
    options: dict[str, Any]
    inpainter: Inpainter = field(repr=False)
    painted: tuple[Part, ...] = field(repr=False)

    @property
    def box(self) -> Rect:
        """The box around all parts, (top, bottom, left, right) in pixels of the picture, ends excluded."""
        boxes = [part.box for part in self.parts]
        return Rect(
            min(box.top for box in boxes),
            max(box.bottom for box in boxes),
            min(box.left for box in boxes),
            max(box.right for box in boxes),
        )

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it takes."""
        arrays = [part.touched for part in self.parts] + [part.samples for part in self.parts]
        if self.painted is not self.parts:
            arrays += [part.samples for part in self.painted]
        return self.hole.nbytes + sum(array.nbytes for array in arrays)


class _Region(Picture):
    """A picture whose result is the list of changed boxes: (box, samples, touched), not a whole picture."""

    def painted(self, fills: Any) -> Any:
        """See `Picture.painted`; each box by itself."""
        done = []
        for box, fill, alpha in fills:
            own = Picture(self.samples[box.slices], self.white, self.rebuild)
            height, width = own.size
            done.append((box, own.painted([(Rect(0, height, 0, width), fill, alpha)]), alpha > 0))
        return done


class Session:
    """One picture, filled hole by hole: what the page works with. Thread-safe.

    The picture is decoded once. A fill reads and returns only the boxes that its hole depends on, and equals
    ``inpainter(picture, mask)`` on the picture at that time. Memory: the samples of the picture, and the boxes of
    every fill. Of a palette, a 1-bit picture, YCbCr, HSV and one with a transparent colour, each fill makes the
    result once, for the colours that it holds.

    Args:
        picture: one PIL picture, file, DeepImage or array, as for :meth:`Inpainter.inpaint`, or an `Encoded`; lists
            and tensors are not taken. A PIL picture or a file is turned upright by its EXIF orientation.
        inpainter: fills the holes; None loads the bundled model.

    Raises:
        InvalidImageError: the picture cannot be read, or is of another kind, shape or range.
    """

    def __init__(self, picture: Any, inpainter: Inpainter | None = None) -> None:
        self._inpainter = Inpainter.from_pretrained(None) if inpainter is None else inpainter
        self._source = file_of(picture, InvalidImageError, "picture")
        self._picture = picture_of(self._source)
        self._patches: list[Patch] = []
        self._position = 0
        self._lock = forks.Lock()  # held only to read or replace the fields, never while the network runs
        self._turn = forks.Lock()  # held by calls that change the history, from start to end

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self._picture.size

    @property
    def picture(self) -> Picture:
        """The original picture."""
        return self._picture

    @property
    def position(self) -> int:
        """Number of fills that the picture has now; `undo` lowers it, `redo` raises it."""
        return self._position

    @property
    def fills(self) -> int:
        """Number of fills, including undone ones."""
        return len(self._patches)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the session keeps, approximately."""
        source = len(self._source.data) if isinstance(self._source, Encoded) else 0
        return source + self._picture.samples.nbytes + sum(patch.nbytes for patch in list(self._patches))

    def fill(
        self,
        mask: Any,
        at: tuple[int, int] | None = None,
        *,
        position: int | None = None,
        inpainter: Inpainter | None = None,
        confirm: Callable[[], None] | None = None,
        **options: Unpack[FillArguments],
    ) -> Patch:
        """Fill a hole of the current picture and keep the fill. Undone fills are dropped.

        Args:
            mask: of the whole picture, as for `Inpainter`; with `at`, of a box of the picture: a PIL picture, or an
                array or tensor [h, w] or [h, w, C].
            at: (top, left) in whole pixels of that box, which must lie inside the picture.
            position: number of fills that the caller sees; later ones are undone first. None: the current ones.
            inpainter: used for this fill instead of the session's.
            confirm: called when the fill is computed; if it raises, the session does not change.
            options: strategy, dilate and feather (whole pixels), mask_threshold, invert_mask, mask_channel, as for a
                call of `Inpainter`; allow_any_mask (False).

        Returns:
            The changed boxes of the picture, and how they were made.

        Raises:
            InvalidMaskError: unreadable, empty, outside the picture, more than 95 % without `allow_any_mask`, or an
                option of the mask out of its range.
            OptionError: strategy, at, position.
            TypeError: no such option.
            OutOfMemoryError, LGNetError: as of a call of `Inpainter`.
        """
        known = FillArguments.__annotations__
        if unknown := options.keys() - known.keys():
            raise TypeError(f"options: expected {', '.join(known)}, got {', '.join(sorted(unknown))}")
        given: dict[str, Any] = {**options}
        strategy = given.pop("strategy", "auto")
        how = replace(_MASK_DEFAULTS, **given)
        if strategy not in STRATEGIES:
            raise OptionError(f"strategy: expected one of {', '.join(STRATEGIES)}, got {strategy!r}")
        start = time.perf_counter()
        hole, corner = self._hole(mask, at, how)
        share = np.count_nonzero(hole) / math.prod(self.size)
        if share > MOSTLY_HOLE and not how.allow_any_mask:
            raise InvalidMaskError(
                f"mask: {share:.1%} of the picture is hole; is the mask inverted (invert_mask)? "
                "(allow_any_mask lets it pass)"
            )
        dilate, feather = checked_edge(how.dilate, how.feather)
        kept: dict[str, Any] = {"strategy": strategy, "dilate": dilate, "feather": feather}
        pipe = self._inpainter if inpainter is None else inpainter
        with self._turn:
            before = self._fills(position)
            region, offset, inside = self._region(pipe, hole, corner, kept, before)
            made = pipe.inpaint(region, inside, **kept)
            painted = tuple(_trimmed(box, samples, touched, offset) for box, samples, touched in made.picture)
            parts = painted if self._picture.exact else self._held(painted, before)
            seconds = time.perf_counter() - start
            patch = Patch(parts, str(made.strategy), made.passes, seconds, hole, corner, kept, pipe, painted)
            if confirm is not None:
                confirm()
            with self._lock:
                self._patches = [*before, patch]
                self._position = len(self._patches)
        return patch

    def undo(self) -> bool:
        """Undo the last fill; False where there is none."""
        with self._turn, self._lock:
            self._position, before = max(0, self._position - 1), self._position
            return self._position != before

    def redo(self) -> bool:
        """Restore the fill that was undone last; False where there is none."""
        with self._turn, self._lock:
            self._position, before = min(len(self._patches), self._position + 1), self._position
            return self._position != before

    def go_to(self, position: int) -> None:
        """Undoes or redoes until the picture has `position` fills. Raises OptionError: not that many."""
        with self._turn, self._lock:
            self._position = self._checked(position)

    def result(self, position: int | None = None) -> Any:
        """The picture with its fills.

        Args:
            position: number of fills to include; None: the current ones.

        Returns:
            A picture of the same kind, size and depth as the original, with its alpha; for a file a PIL picture, or a
            DeepImage for 16-bit colour.

        Raises:
            OptionError: there are not that many fills.
        """
        return self._rebuilt(part for patch in self._fills(position) for part in patch.painted)

    def encoded(
        self,
        format: str | None = None,
        quality: int | None = None,
        position: int | None = None,
        *,
        convert: bool = False,
    ) -> tuple[bytes, str]:
        """The result as a file with its metadata, and the Pillow format that it has.

        Args:
            format: a Pillow format name, in any case; None: the picture's format, or PNG where it has none or it
                cannot be written.
            quality: 1 to 100, as in `lgnet_fast.pipeline.encoding.save_picture`.
            position: as in :meth:`result`.
            convert: a CMYK, YCbCr or HSV picture becomes RGB for a format that does not hold it, CMYK by its profile.

        Returns:
            (the bytes of the file, the Pillow format's name in capitals).

        Raises:
            InvalidImageError: an unknown format, one that cannot hold the picture (none holds floats), or another
                quality.
            OptionError: there are not that many fills.
        """
        quality = checked_quality(quality)  # before the attempt below, which would take another format instead
        if isinstance(format, str) and format.upper() in MODES:
            format = format.upper()
        result = self.result(position)
        if not isinstance(result, (Image.Image, DeepImage)):
            result = _as_image(result)
        wanted = format or result.format or "PNG"
        if convert and wanted in MODES:
            result = as_held(result, wanted)
        try:
            with self._opened() as like:
                return encode(result, wanted, like, quality), wanted
        except InvalidImageError:
            if format is not None or wanted == "PNG":
                raise
            return encode(result, "PNG"), "PNG"

    def check_format(self, format: str, *, convert: bool = False) -> None:
        """Raise InvalidImageError where :meth:`encoded` would refuse the picture, for its mode, alpha or size;
        for an array, for its dtype and channels too.

        Args:
            format: a Pillow format name in capitals, one that can be written.
            convert: as of :meth:`encoded`.
        """
        picture = self._picture
        if isinstance(self._source, np.ndarray):  # `encoded` makes a picture of it, which has a mode
            picture = picture_of(_as_image(self._source))
        if convert and becomes_rgb(picture.mode, format):
            check_side(picture.size, format)
        else:
            picture.check_format(format)

    def region(self, box: Rect, position: int | None = None) -> np.ndarray:
        """A copy of the samples in a box, with the first `position` fills.

        Args:
            box: a :class:`lgnet_fast.engine.regions.Rect` (top, bottom, left, right) inside the picture, in pixels,
                ends excluded.
            position: as in :meth:`result`.

        Returns:
            [h, w, C], C = 1 (grey) or 3 (RGB), without alpha, in the depth of the picture, as in :class:`Patch`.

        Raises:
            OptionError: the box is empty or not inside the picture, or there are not that many fills.
        """
        height, width = self.size
        if not (0 <= box.top < box.bottom <= height and 0 <= box.left < box.right <= width):
            raise OptionError(f"box: expected pixels inside the picture [{height}, {width}], got {tuple(box)}")
        return self._read(box, self._fills(position))

    def stages(self, context: int = 32, position: int | None = None) -> tuple[Rect, list[np.ndarray]]:
        """The surroundings of the last fill after each stage of the network, which runs again.

        Args:
            context: pixels, 0 or more, on each side of the fill's box, as far as the picture goes.
            position: as in :meth:`result`.

        Returns:
            (box, samples [h, w, C] of it: with the hole white, then after each stage, as in :class:`Patch`).

        Raises:
            OptionError: no fill, or not that many; `context` is no whole number of 0 or more.
        """
        if isinstance(context, bool) or not isinstance(context, (int, np.integer)) or context < 0:
            raise OptionError(f"context: expected a whole number of pixels >= 0, got {context!r}")
        fills = self._fills(position)
        if not fills:
            raise OptionError("stages: expected a session with a fill, got one without")
        *earlier, patch = fills
        region, offset, inside = self._region(patch.inpainter, patch.hole, patch.at, patch.options, earlier)
        found = patch.inpainter.stages(region, inside, **patch.options)
        box = patch.box.grown(context, self.size)
        before = self._read(box, earlier)
        shown = []
        for changed in (found.masked, *found.merged):
            samples = before.copy()
            for own, painted, touched in changed:
                _lay(samples, box, Part(own.moved(*offset), painted, touched))
            shown.append(samples)
        return box, shown

    # -- parts -------------------------------------------------------------------------------------------------

    def _rebuilt(self, parts: Iterable[Part]) -> Any:
        """The picture with some parts, one after the other."""
        samples = self._picture.samples.copy()
        touched = np.zeros(self.size, dtype=bool)
        whole = Rect(0, self.size[0], 0, self.size[1])
        for part in parts:
            _lay(samples, whole, part)
            touched[part.box.slices] |= part.touched
        return self._picture.rebuild(samples, touched)

    def _held(self, painted: tuple[Part, ...], fills: list[Patch]) -> tuple[Part, ...]:
        """The parts of a fill after others, in colours that the picture's mode holds: later fills read these, and a
        user sees what the file will have."""
        earlier = (part for fill in fills for part in fill.painted)
        samples = picture_of(self._rebuilt([*earlier, *painted])).samples
        return tuple(replace(part, samples=samples[part.box.slices].copy()) for part in painted)

    def _fills(self, position: int | None) -> list[Patch]:
        """The first `position` fills, None: the current ones."""
        with self._lock:
            return self._patches[: self._position if position is None else self._checked(position)]

    def _checked(self, position: int) -> int:
        whole = isinstance(position, (int, np.integer)) and not isinstance(position, bool)
        if not whole or not 0 <= position <= len(self._patches):
            raise OptionError(f"position: expected 0 to {len(self._patches)} fills, got {position!r}")
        return int(position)

    def _hole(
        self, mask: Any, at: tuple[int, int] | None, options: MaskOptions
    ) -> tuple[np.ndarray, tuple[int, int]]:
        """The hole bool inside its bounding box, and (top, left) of that."""
        height, width = self.size
        top = left = 0
        picture: Picture | None = self._picture
        if at is not None:
            top, left = _corner(at)
            shape = _shape_of(mask)
            if not (top >= 0 and left >= 0 and top + shape[0] <= height and left + shape[1] <= width):
                raise InvalidMaskError(
                    f"mask: expected a box inside the picture of {width}x{height}, got {shape[1]}x{shape[0]} "
                    f"at x = {left}, y = {top}"
                )
            height, width = shape
            box = Rect(top, top + height, left, left + width)
            picture = replace(self._picture, samples=self._picture.samples[box.slices])
        hole = read_hole(
            mask,
            height,
            width,
            threshold=options.mask_threshold,
            invert=options.invert_mask,
            channel=options.mask_channel,
            picture=picture,
            note=self._picture.note,
        )
        if not hole.any():
            raise InvalidMaskError("mask: no hole pixel; is the mask inverted (invert_mask)?")
        inner = bounding_box(hole)
        return np.ascontiguousarray(hole[inner.slices]), (top + inner.top, left + inner.left)

    def _region(
        self, pipe: Inpainter, hole: np.ndarray, at: tuple[int, int], options: dict[str, Any], fills: list[Patch]
    ) -> tuple[_Region, tuple[int, int], np.ndarray]:
        """The input of a fill after `fills`: a region of the picture, its (top, left), and the hole in it."""
        box = Rect(at[0], at[0] + hole.shape[0], at[1], at[1] + hole.shape[1])
        whole = Rect(0, self.size[0], 0, self.size[1])
        around = whole
        if options["strategy"] in ("auto", "crop"):
            around = self._surroundings(box, hole, options["dilate"] + options["feather"], pipe)
        inside = _laid(hole, box, around)
        if around != whole and options["strategy"] == "auto":
            soft = soft_edge(inside, options["dilate"], options["feather"]) > 0
            if choose(soft, pipe.multiple, pipe.window)[0] == "tile":  # the whole picture fixes the places of tiles
                around, inside = whole, _laid(hole, box, whole)
        samples = self._picture.samples if around == whole and not fills else self._read(around, fills)
        region = _Region(samples, self._picture.white, lambda done, touched: done)
        return region, (around.top, around.left), inside

    def _surroundings(self, box: Rect, hole: np.ndarray, reach: int, pipe: Inpainter) -> Rect:
        """A box of the picture in which the strategy crop finds the same windows as in the whole picture.

        At native scale, a window around a hole is less than `wanted` plus one multiple of the network wide; at a
        reduced scale, that much divided by the scale.
        """
        grown = box.grown(min(reach, sum(self.size)), self.size)
        area = grown.area if reach else np.count_nonzero(hole)
        wanted = max(grown.bottom - grown.top, grown.right - grown.left) + 2 * max(CONTEXT, math.isqrt(area) // 2)
        margin = max(pipe.window, wanted + math.ceil(pipe.multiple * max(1, wanted / pipe.window)))
        around = grown.grown(margin, self.size)
        # Holes are grouped on the grid of cells of the whole picture.
        return around._replace(top=around.top // CELL * CELL, left=around.left // CELL * CELL)

    def _read(self, box: Rect, fills: list[Patch]) -> np.ndarray:
        samples: np.ndarray = self._picture.samples[box.slices].copy()
        for patch in fills:
            for part in patch.parts:
                _lay(samples, box, part)
        return samples

    @contextlib.contextmanager
    def _opened(self) -> Iterator[Image.Image | None]:
        """The file of the picture, not decoded; the result uses its JPEG tables."""
        try:
            data = self._source.data if isinstance(self._source, Encoded) else None
            if isinstance(self._source, Path):
                data = self._source.read_bytes()
            opened = None if data is None else open_image(data)
        except Exception:  # files that Pillow cannot read, such as BigTIFF, have no such tables
            opened = None
        with opened or contextlib.nullcontext():
            yield opened


def _as_image(array: np.ndarray) -> Image.Image | DeepImage:
    """An array [H, W], [H, W, C] or [C, H, W] as a picture that can be encoded."""
    if array.dtype.kind != "u":
        raise InvalidImageError(f"format: a file holds samples of 8 or 16 bits, got {array.dtype}; convert the array")
    samples = np.ascontiguousarray(channels_last(array, InvalidImageError, "picture", tensor=False)[0])
    if samples.shape[2] == 1:
        return Image.fromarray(samples[..., 0])
    return DeepImage(samples, "PNG") if samples.dtype.itemsize == 2 else Image.fromarray(samples)


def _lay(samples: np.ndarray, box: Rect, part: Part) -> None:
    """Copy the changes of a part into the samples [h, w, C] of a box."""
    top, bottom = max(box.top, part.box.top), min(box.bottom, part.box.bottom)
    left, right = max(box.left, part.box.left), min(box.right, part.box.right)
    if top < bottom and left < right:
        both = Rect(top, bottom, left, right)
        here = both.moved(-part.box.top, -part.box.left).slices
        chosen = part.touched[here]
        samples[both.moved(-box.top, -box.left).slices][chosen] = part.samples[here][chosen]


def _laid(hole: np.ndarray, box: Rect, around: Rect) -> np.ndarray:
    """The hole of a box as a mask of a larger box."""
    inside = np.zeros((around.bottom - around.top, around.right - around.left), dtype=bool)
    inside[box.moved(-around.top, -around.left).slices] = hole
    return inside


def _trimmed(box: Rect, samples: np.ndarray, touched: np.ndarray, offset: tuple[int, int]) -> Part:
    """The part of a region's box that a fill changed, at its place in the picture."""
    inner = bounding_box(touched)
    place = inner.moved(box.top + offset[0], box.left + offset[1])
    return Part(place, samples[inner.slices].copy(), touched[inner.slices].copy())


def _corner(at: Any) -> tuple[int, int]:
    """The place (top, left) of a box. Raises OptionError: not two whole numbers."""
    try:
        if not isinstance(at, (tuple, list, np.ndarray)) or any(isinstance(one, (bool, np.bool_)) for one in at):
            raise TypeError
        top, left = map(operator.index, at)
    except (TypeError, ValueError):
        raise OptionError(f"at: expected (top, left) in whole pixels, got {at!r}") from None
    return top, left


def _shape_of(mask: Any) -> tuple[int, int]:
    """(height, width) of a mask that is a PIL picture, or an array or tensor [h, w] or [h, w, C]."""
    if isinstance(mask, Image.Image):
        return mask.height, mask.width
    shape: tuple[int, ...] = tuple(getattr(mask, "shape", ()))
    if len(shape) not in (2, 3):
        raise InvalidMaskError(
            f"mask: expected a PIL picture, or an array [h, w] or [h, w, C], for a box, got {type(mask).__name__}"
        )
    return int(shape[0]), int(shape[1])
