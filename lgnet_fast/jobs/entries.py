"""Running items one after the other. Each gives an entry: filled and written, or the reason why not."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from ..data.shards import Member
from ..errors import BackendError, InvalidImageError, InvalidMaskError, JobError, LGNetError, WeightsError
from ..pipeline.encoding import save_picture
from ..pipeline.inpainter import Inpainter
from ..pipeline.pictures import picture_of
from ..pipeline.sources import Encoded
from ..pipeline.writing import STANDARD_STREAM
from .items import Item
from .journal import Journal


@dataclass
class Entry:
    """One line of the report. `status`: "ok", "failed", "skipped" or "left_out"; `size`: [height, width] in pixels;
    `earlier`: done by an earlier launch of the same job."""

    input: str
    mask: str | None
    output: str
    status: str
    seconds: float = 0.0
    size: list[int] | None = None
    strategy: str | None = None
    passes: int = 0
    hole_ratio: float | None = None
    warnings: list[str] = field(default_factory=list)
    error: str | None = None
    earlier: bool = False


def run_items(
    items: list[Item],
    inpainter: Inpainter,
    *,
    quality: int | None = None,
    skip_existing: bool = False,
    call: Mapping[str, Any] | None = None,
    journal: Journal | None = None,
    tell: Callable[[Entry], None] = lambda entry: None,
) -> list[Entry]:
    """Fill and write every item; continue after a failure. `call`: arguments of the Inpainter's call.

    `tell` is called with each finished entry. With a `journal`, items that an earlier launch finished are skipped.
    Raises BackendError, WeightsError and JobError, because every item would fail.
    """

    def run(item: Item, entry: Entry, key: str) -> None:
        if skip_existing and item.output.is_file():
            entry.status = "skipped"
        else:
            _run_item(item, inpainter, entry, quality, call or {}, journal, key)

    entries = []
    for item in items:
        key = "" if journal is None else item.key()
        record = None if journal is None else journal.earlier(key, item.output)
        entry = _earlier(record) or _guarded(item, key, run)
        if journal is not None:
            journal.done(key, asdict(entry), item.output)
        entries.append(entry)
        tell(entry)
    return entries


def _earlier(record: dict[str, Any] | None) -> Entry | None:
    """The entry of an item that an earlier launch did; None where a record has not the fields of an entry."""
    if record is None:
        return None
    try:
        return Entry(**{**record, "earlier": True})
    except TypeError:
        return None


def _guarded(item: Item, key: str, run: Callable[[Item, Entry, str], None]) -> Entry:
    """Run an item; returns its entry, with the error if there was one."""
    entry = Entry(str(item.picture), None if item.mask is None else str(item.mask), str(item.output), "ok")
    start = time.perf_counter()
    if item.left_out:
        entry.status, entry.error = "left_out", item.problem
        return entry
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            run(item, entry, key)
        except (BackendError, WeightsError, JobError):
            raise
        except (LGNetError, OSError) as error:
            entry.status, entry.error = "failed", str(error)
        except Exception as error:  # an unexpected error of one picture must not stop the others
            entry.status, entry.error = "failed", f"{type(error).__name__}: {error}"
    entry.warnings = [str(one.message) for one in caught]
    entry.seconds = round(time.perf_counter() - start, 4)
    return entry


def _run_item(
    item: Item,
    inpainter: Inpainter,
    entry: Entry,
    quality: int | None,
    call: Mapping[str, Any],
    journal: Journal | None,
    key: str,
) -> None:
    if item.problem is not None:
        raise InvalidImageError(item.problem)
    if item.output != STANDARD_STREAM and item.output.is_dir():
        raise IsADirectoryError(f"out: expected a file, got the folder {str(item.output)!r}")
    source = item.picture.read() if isinstance(item.picture, Member) else item.picture
    picture = picture_of(source)
    # Checked before the network runs: a result that the format cannot hold would be lost.
    picture.check_format(item.format)
    mask = item.mask if isinstance(item.mask, Path) or item.mask is None else item.mask.open(InvalidMaskError, "mask")
    like = None
    if item.format == "JPEG":  # its tables are read before the network runs, because a file may be moved meanwhile
        with source.open() if isinstance(source, Encoded) else Image.open(source) as like:
            pass
    done = inpainter.inpaint(picture, mask, **call)
    entry.size, entry.strategy, entry.passes = list(done.size), done.strategy, done.passes
    entry.hole_ratio = round(done.hole_ratio, 6)
    if journal is not None:
        journal.writing(key, asdict(entry), item.output)
    save_picture(done.picture, item.output, like=like, format=item.format, quality=quality)
