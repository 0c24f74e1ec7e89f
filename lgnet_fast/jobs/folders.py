"""The pairing of the masks and pictures of folders by name."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from ..files import composed
from ..pipeline.formats import EXTENSIONS


def beside(picture: Path) -> list[Path]:
    """The pictures in the folder of a picture, sorted."""
    return sorted(path for path in picture.parent.iterdir() if path.suffix.lower() in EXTENSIONS)


def of_mask(stem: str, suffix: str) -> str | None:
    """The stem of the picture to which a mask of this stem belongs; None where the stem is not that of a mask."""
    # macOS may write the accents of the suffix in another way than they were typed.
    for spelling in dict.fromkeys((suffix, *(unicodedata.normalize(form, suffix) for form in ("NFC", "NFD")))):
        if (found := re.fullmatch(rf"(.+){re.escape(spelling)}\d*", stem, re.DOTALL)) is not None:
            return found[1]
    return None


def _spelt_alike(places: dict[Path, list[Path]], owned: set[Path]) -> dict[str, list[Path]]:
    """The files of `places` by the composed spelling of their place, without those at the place of a picture."""
    alike: dict[str, list[Path]] = {}
    for place, found in places.items():
        if place not in owned:
            alike.setdefault(composed(place), []).extend(found)
    return alike


class MasksByName:
    """The masks of a folder by the names of their pictures; see `plan_items` for the rule.

    Listed once: to go through all masks for each picture takes minutes where there are thousands. `pictures`: the
    relative paths of all pictures of the run; the mask at the place of one of them is that picture's alone.
    """

    def __init__(self, folder: Path, masks: Iterable[Path], pictures: Iterable[Path] = ()) -> None:
        self._folder = folder
        owned = {picture.with_suffix("") for picture in pictures}
        self._owned = {folder / place for place in owned}
        self._at: dict[Path, list[Path]] = {}
        self._named: dict[str, list[Path]] = {}
        for mask in masks:
            self._at.setdefault(mask.relative_to(folder).with_suffix(""), []).append(mask)
            self._named.setdefault(mask.stem, []).append(mask)
        self._alike = _spelt_alike(self._at, owned)

    def of_picture(self, relative: Path, suffix: bool = True) -> tuple[Path | None, str | None]:
        """(mask, None) or (None, problem) of the picture at `relative`, whose name has an extension if `suffix`."""
        place = relative.with_suffix("") if suffix else relative
        candidates = self._at.get(place) or self._named.get(place.name, [])
        if not candidates:  # with the accents in another spelling
            candidates = self._alike.get(composed(place), [])
        if len(candidates) > 1:
            candidates = [mask for mask in candidates if mask.name == relative.name] or candidates
        if len(candidates) == 1:
            if place in self._at or candidates[0].with_suffix("") not in self._owned:
                return candidates[0], None
            other = str(candidates[0].relative_to(self._folder))
            return None, f"mask: no file named {place.name!r} in {str(self._folder)!r} but {other}, another picture's"
        if not candidates:
            return None, f"mask: no file named {place.name!r} in {str(self._folder)!r}"
        names = ", ".join(str(mask.relative_to(self._folder)) for mask in candidates)
        return None, f"mask: expected one file named {place.name!r} in {str(self._folder)!r}, got {names}"


class MasksBySuffix:
    """The masks of a folder that are named by their picture and a suffix; see `plan_items` for the rule.

    `pictures`: as of `MasksByName`.
    """

    def __init__(self, folder: Path, masks: Iterable[Path], suffix: str, pictures: Iterable[Path] = ()) -> None:
        self._folder, self._suffix = folder, suffix
        self._owned = {folder / picture.with_suffix("") for picture in pictures}
        self._of: dict[str, list[Path]] = {}
        at: dict[Path, list[Path]] = {}
        for mask in masks:
            if (stem := of_mask(mask.stem, suffix)) is not None:
                self._of.setdefault(stem, []).append(mask)
                at.setdefault(mask.parent / stem, []).append(mask)
        self._alike = _spelt_alike(at, self._owned)

    def of_picture(self, relative: Path) -> tuple[list[Path], str | None]:
        """The masks of the picture at `relative`, or the problem with them."""
        place = relative.with_suffix("")
        named = self._of.get(place.name, [])
        own = [mask for mask in named if mask.parent == self._folder / place.parent]
        if not own and not any(mask.parent / place.name in self._owned for mask in named):
            own = named or self._alike.get(composed(self._folder / place), [])
        if not own:
            but = " but those of other pictures" if named else ""
            return [], f"mask: no file named {place.name + self._suffix!r} in {str(self._folder)!r}{but}"
        if len({mask.stem for mask in own}) < len(own):
            names = ", ".join(str(mask.relative_to(self._folder)) for mask in own)
            return [], f"mask: expected masks of names of their own, got {names}"
        return own, None
