"""The protocol of an evaluation: pictures scaled and cropped, each with one mask of every hole-ratio class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import numpy as np
from PIL import Image

from ..data import folders
from ..data.masks import HOLE_CLASSES, MaskFolder, generate_mask, hole_class, read_mask, resize_mask
from ..data.shards import BESIDE_PICTURES, SHARD, Member, apart, read_shard
from ..errors import DataError, InvalidImageError, InvalidMaskError, UsageError
from ..files import real_path
from ..jobs.folders import MasksByName
from ..jobs.journal import stamp
from ..pipeline.formats import EXTENSIONS
from ..pipeline.pictures import Picture, picture_of

PictureFile: TypeAlias = Path | Member
"""A picture in a file of its own, or in a tar shard."""

OTHER = -1
"""The class of masks whose hole ratio lies in none of HOLE_CLASSES."""


def class_label(index: int) -> str:
    """The name of a class: its hole ratios in percent, e.g. "10-20%"; "other" for :data:`OTHER`."""
    if index == OTHER:
        return "other"
    low, high = HOLE_CLASSES[index]
    return f"{100 * low:.0f}-{100 * high:.0f}%"


def parse_classes(classes: str | Sequence[int | str] | None) -> tuple[int, ...] | None:
    """Indices in HOLE_CLASSES of classes given by index ("1") or by percent ("10-20", "10-20%"); None stays None.

    Raises UsageError: a name that is neither, or no name.
    """
    if classes is None:
        return None
    named = {class_label(index): index for index in range(len(HOLE_CLASSES))}
    parts = classes.split(",") if isinstance(classes, str) else [str(part) for part in classes]
    if not parts:
        raise UsageError(f"classes: expected names of {', '.join(named)}, got none")
    chosen = []
    for part in (part.strip().removesuffix("%") for part in parts):
        if part.isdecimal() and int(part) < len(HOLE_CLASSES):
            chosen.append(int(part))
        elif f"{part}%" in named:
            chosen.append(named[f"{part}%"])
        else:
            raise UsageError(
                f"classes: expected names of {', '.join(named)} or numbers of 0 to {len(named) - 1}, got {part!r}"
            )
    return tuple(dict.fromkeys(chosen))


@dataclass(frozen=True)
class Pictures:
    """The pictures of an evaluation, and what is `left_out`, with reasons."""

    files: list[PictureFile] = field(default_factory=list)
    left_out: list[tuple[PictureFile, str]] = field(default_factory=list)


def pictures_in(source: Path, excluded: Sequence[Path] = ()) -> Pictures:
    """The pictures of a folder and its sub-folders, except those in the folders `excluded`; or the one picture; or
    those of a tar shard, or of the shards of a folder without other pictures.

    Raises UsageError: no such folder or file, or no picture in it.
    """
    if not source.exists():
        raise UsageError(f"pictures: {str(source)!r} does not exist")
    if source.is_dir():
        others = [real_path(path) for path in excluded if real_path(path) != real_path(source)]
        found = folders.scan(source, others, (*EXTENSIONS, SHARD))
        all_files, left_out = found.pictures, list[tuple[PictureFile, str]](found.left_out)
    else:
        all_files, left_out = [source], []
    shards, alone = apart(all_files)
    files: list[PictureFile] = [*alone]
    if files:
        left_out += [(shard, BESIDE_PICTURES) for shard in shards]
        shards = []
    for shard in shards:
        try:
            content = read_shard(shard)
        except InvalidImageError as error:
            left_out.append((shard, str(error)))
        else:
            files += [picture for sample in content.samples for picture in sample.pictures]
            left_out += content.left_out
    if not files:
        reason = f"{left_out[0][0]}: {left_out[0][1]}" if left_out else ", ".join(EXTENSIONS)
        raise UsageError(f"pictures: no pictures in {str(source)!r} ({reason})")
    return Pictures(files, left_out)


def stored_in(picture: PictureFile) -> Path:
    """The file on the disk: the shard of a picture in one."""
    return picture.shard if isinstance(picture, Member) else picture


def name_of(picture: PictureFile, base: Path) -> Path:
    """The name by which masks are paired: relative to the folder `base`, or in the shard."""
    return Path(picture.name) if isinstance(picture, Member) else picture.relative_to(base)


def _read(picture: PictureFile) -> Picture:
    return picture_of(picture.read() if isinstance(picture, Member) else picture)


def fit_picture(picture_file: PictureFile, size: int) -> np.ndarray:
    """The picture as uint8 [size, size, 3]: shorter edge scaled to `size` (bicubic), centre crop. 0: as it is.

    Raises InvalidImageError: unreadable, or of a kind that the pipeline does not support.
    """
    read = _read(picture_file)
    levels = np.rint(read.samples.astype(np.float64) * (255 / read.white)).astype(np.uint8)
    picture = np.ascontiguousarray(np.broadcast_to(levels, (*read.size, 3)))
    if size == 0:
        return picture
    height, width = _scaled(*read.size, size)
    rows, columns = _centre(height, width, size)
    if (height, width) == read.size:
        return picture[rows, columns]
    # Only the part that stays is scaled: the whole of a long, narrow picture would take gigabytes.
    y, x = read.size[0] / height, read.size[1] / width
    box = (columns.start * x, rows.start * y, columns.stop * x, rows.stop * y)
    return np.asarray(Image.fromarray(picture).resize((size, size), Image.Resampling.BICUBIC, box=box))


def fit_mask(mask: np.ndarray, size: int) -> np.ndarray:
    """A mask bool [H, W] of a picture's size, scaled and cropped as :func:`fit_picture` does the picture."""
    if size == 0:
        return mask
    height, width = _scaled(mask.shape[0], mask.shape[1], size)
    return resize_mask(mask, height, width, _centre(height, width, size))


def mask_of(file: Path, polarity: str, picture: PictureFile, size: int) -> np.ndarray:
    """The mask in `file`, scaled and cropped as :func:`fit_picture` does its picture.

    Raises InvalidMaskError: not of the picture's size, without a hole, or without a known pixel.
    """
    mask, own = read_mask(file, polarity), _read(picture).size
    if mask.shape != own:
        raise InvalidMaskError(
            f"mask {str(file)!r}: expected the picture's size {own[1]}x{own[0]} (width x height), "
            f"got {mask.shape[1]}x{mask.shape[0]}"
        )
    mask = fit_mask(mask, size)
    if not mask.any():
        raise InvalidMaskError(f"mask {str(file)!r}: no hole pixel in the part that is evaluated")
    if mask.all():
        raise InvalidMaskError(f"mask {str(file)!r}: no known pixel in the part that is evaluated")
    return mask


def _scaled(height: int, width: int, size: int) -> tuple[int, int]:
    shorter = min(height, width)
    return int(size * height / shorter), int(size * width / shorter)


def _centre(height: int, width: int, size: int) -> tuple[slice, slice]:
    top, left = (height - size) // 2, (width - size) // 2
    return slice(top, top + size), slice(left, left + size)


class GeneratedMasks:
    """Masks drawn by `lgnet_fast.data.masks.generate_mask` from (seed, index, class)."""

    def __init__(self, classes: tuple[int, ...] | None, kind: str, seed: int) -> None:
        self.classes = classes or tuple(range(len(HOLE_CLASSES)))
        self.kind, self.seed = kind, seed

    def mask(self, index: int, hole_class: int, height: int, width: int) -> np.ndarray:
        """The drawn mask."""
        seed = (self.seed, index, hole_class)
        return generate_mask(height, width, hole_class=hole_class, kind=self.kind, seed=seed)

    def identity(self, index: int, hole_class: int) -> object:
        """The values it is drawn from."""
        return [self.kind, self.seed, index, hole_class]


class FolderMasks:
    """The masks of a folder by measured class, assigned to the pictures in an order drawn from (seed, class).

    Raises UsageError: a requested class without masks, or no mask of any class.
    """

    def __init__(self, folder: MaskFolder, classes: tuple[int, ...] | None, seed: int) -> None:
        self.folder = folder
        self._dealt: dict[int, np.ndarray] = {}
        for one in classes if classes is not None else range(len(HOLE_CLASSES)):
            found = folder.indices(one)
            if found:
                rng = np.random.default_rng(np.random.SeedSequence([seed, one]))
                self._dealt[one] = rng.permutation(found)
            elif classes is not None:
                raise UsageError(
                    f"masks: expected masks with a hole ratio of {class_label(one)}, got none in "
                    f"{str(folder.folder)!r} ({len(folder)} masks; is white the hole? `invert_mask`)"
                )
        if not self._dealt:
            raise UsageError(
                f"masks: expected masks with hole ratios of 1-60%, got none in {str(folder.folder)!r} "
                f"({len(folder)} masks; is white the hole? `invert_mask`)"
            )
        self.classes = tuple(self._dealt)

    def _index(self, index: int, hole_class: int) -> int:
        dealt = self._dealt[hole_class]
        return int(dealt[index % len(dealt)])

    def mask(self, index: int, hole_class: int, height: int, width: int) -> np.ndarray:
        """The assigned mask, scaled.

        Raises InvalidMaskError: scaling leaves no hole.
        """
        number = self._index(index, hole_class)
        mask = self.folder.mask(number, height, width)
        if not mask.any():
            raise InvalidMaskError(f"mask {str(self.folder.files[number])!r}: no hole pixel at {width}x{height}")
        return mask

    def identity(self, index: int, hole_class: int) -> object:
        """The mask's file."""
        file = self.folder.files[self._index(index, hole_class)]
        return [str(file), stamp(file)]


class NamedMasks:
    """Pairs masks and pictures by name, as `lgnet-fast run` does.

    Raises UsageError: no masks, a picture without one, or with several, or a picture that is a mask.
    """

    classes = (OTHER,)

    def __init__(self, pictures: Sequence[PictureFile], base: Path, folder: Path, invert: bool) -> None:
        found = folders.pictures_in(folder, []) if folder.is_dir() else []
        if not found:
            raise UsageError(f"masks: no pictures in {str(folder)!r} ({', '.join(EXTENSIONS)})")
        by_name = MasksByName(folder, found, (name_of(picture, base) for picture in pictures))
        self.files: list[Path] = []
        for picture in pictures:
            mask, problem = by_name.of_picture(name_of(picture, base))
            if mask is None:
                raise UsageError(f"masks: {problem} (for the picture {str(picture)!r})")
            self.files.append(mask)
        _refuse_pictures(self.files, pictures)
        self.polarity = "black" if invert else "white"

    def paired(self, index: int, picture: PictureFile, size: int) -> tuple[np.ndarray, int]:
        """The mask of picture number `index`, scaled and cropped like the picture, and its class.

        Raises InvalidMaskError: see :func:`mask_of`.
        """
        mask = mask_of(self.files[index], self.polarity, picture, size)
        found = hole_class(mask)
        return mask, OTHER if found is None else found

    def identity(self, index: int, hole_class: int) -> object:
        """The mask's file."""
        return [str(self.files[index]), stamp(self.files[index])]


def mask_source(
    masks: Path | None,
    pictures: Sequence[PictureFile],
    base: Path,
    classes: tuple[int, ...] | None,
    *,
    kind: str,
    seed: int,
    invert: bool,
    by_name: bool,
) -> GeneratedMasks | FolderMasks | NamedMasks:
    """The masks of an evaluation. Raises UsageError: options that contradict each other, masks that are missing."""
    if by_name:
        if masks is None or classes is not None:
            raise UsageError("pair_by_name: expected `masks` and no `classes` (each mask has its own class)")
        return NamedMasks(pictures, base, masks, invert)
    if masks is None:
        return GeneratedMasks(classes, kind, seed)
    try:
        folder = MaskFolder(masks, polarity="black" if invert else "white")
    except DataError as cause:
        raise UsageError(str(cause)) from cause
    _refuse_pictures(folder.files, pictures)
    return FolderMasks(folder, classes, seed)


def _refuse_pictures(masks: Sequence[Path], pictures: Sequence[PictureFile]) -> None:
    """Any picture could be read as a mask: its bright parts would be the hole."""
    own = {real_path(stored_in(picture)) for picture in pictures}
    for mask in masks:
        if real_path(mask) in own:
            raise UsageError(f"masks: expected masks, got {str(mask)!r}, which is one of the pictures")
