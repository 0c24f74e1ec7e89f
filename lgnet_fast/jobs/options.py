"""The options of `lgnet-fast run`; they check themselves."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..pipeline import strategies
from ..pipeline.arguments import MASK_OPTIONS
from ..pipeline.encoding import checked_quality
from ..pipeline.formats import ADDRESS, EXTENSIONS, FORMATS, reason_against_writing
from ..pipeline.masks import check_reading, checked_edge
from ..pipeline.writing import is_any_stream

_WITH_QUALITY = ("JPEG", "WEBP", "AVIF", "HEIF")
_NOT_IN_RESULTS = ("source", "mask", "out", "resume", "report", "device")
_PER_PICTURE = ("strategy", *MASK_OPTIONS)
_KINDS: dict[str, tuple[type, ...]] = {
    "source": (Path,),
    "out": (Path, str),
    **dict.fromkeys(("mask", "report"), (Path, type(None))),
    **dict.fromkeys(("mask_suffix", "format", "model"), (str, type(None))),
    **dict.fromkeys(("device", "dtype", "backend"), (str,)),
    **dict.fromkeys(("skip_existing", "resume", "allow_any_mask"), (bool,)),
}
"""Types of the fields whose values the checks below take for granted."""


@dataclass(frozen=True)
class FillOptions:
    """Input, output and settings of `lgnet-fast run`.

    Args:
        source: a picture, a folder with its sub-folders, a tar shard or a folder of them, a pipe; "-": the standard
            input.
        mask: a mask (white = fill) or a folder of masks paired by name; None: the masks are in the tar shards, or are
            found by `mask_suffix`.
        out: the file of the result, or the folder of the results; "-": standard output. A slash at the end marks a
            folder.
        mask_suffix: the name of a mask is that of its picture with this suffix.
        format: of the results, a key of FORMATS; None: each picture's.
        quality: 1 to 100, for JPEG, WebP, AVIF and HEIC.
        skip_existing: skip pictures with an existing result.
        resume: keep a journal and skip what an earlier launch finished; always on under a launcher.
        report: a file for the JSON report.
        model: a model folder or hub id; None: the bundled model.
        device, dtype, backend: as for :class:`lgnet_fast.Inpainter`.
        strategy, mask_threshold, invert_mask, mask_channel, allow_any_mask, dilate, feather: as for its call.

    Raises:
        UsageError: invalid values, or missing files.
    """

    source: Path
    mask: Path | None
    out: Path | str
    mask_suffix: str | None = None
    format: str | None = None
    quality: int | None = None
    skip_existing: bool = False
    resume: bool = False
    report: Path | None = None
    model: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    backend: str = "auto"
    strategy: str = "auto"
    mask_threshold: float = 0.5
    invert_mask: bool = False
    mask_channel: str = "auto"
    allow_any_mask: bool = False
    dilate: int = 0
    feather: int = 0

    def __post_init__(self) -> None:
        for name, kinds in _KINDS.items():
            value = getattr(self, name)
            if not isinstance(value, kinds):
                words = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
                raise UsageError(f"{name}: expected {words}, got {value!r}")
        if self.format is not None and self.format not in FORMATS:
            raise UsageError(f"format: expected one of {', '.join(FORMATS)}, got {self.format!r}")
        if self.format is not None and (reason := reason_against_writing(FORMATS[self.format])) is not None:
            raise UsageError(f"format: {reason}")
        if self.mask_suffix is not None and (not self.mask_suffix or "/" in self.mask_suffix):
            raise UsageError(
                f"mask_suffix: expected the end of the masks' names, such as _mask, got {self.mask_suffix!r}"
            )
        try:
            checked_quality(self.quality)
            strategies.check(self.strategy)
            check_reading(self.mask_threshold, self.invert_mask, self.mask_channel)
            checked_edge(self.dilate, self.feather)
        except ValueError as error:  # of the pipeline's own kinds; the text names the field
            raise UsageError(str(error)) from error
        self._check_quality()
        if ADDRESS.match(str(self.out)):
            raise UsageError(f"out: expected a file or a folder, got the address {str(self.out)!r}")

    def _check_quality(self) -> None:
        """A format without quality is an error where all results have it; folders may mix formats."""
        if self.quality is None:
            return
        folder = self.names_folder or self.result.is_dir() or self.source.is_dir()
        one = None if folder else EXTENSIONS.get(self.result.suffix.lower())
        format = one if self.format is None else FORMATS[self.format]
        if format is not None and format not in _WITH_QUALITY:
            raise UsageError(f"quality: expected results in JPEG, WebP, AVIF or HEIC, got {format}")

    @property
    def result(self) -> Path:
        """`out` as a path."""
        return Path(self.out)

    @property
    def names_folder(self) -> bool:
        """Whether `out` is named as a folder, with a slash at the end."""
        return str(self.out).endswith(("/", os.sep))

    @property
    def call(self) -> Mapping[str, Any]:
        """Arguments of the Inpainter's call."""
        return {name: getattr(self, name) for name in _PER_PICTURE}

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that identify this job, for the report: all that results depend on, without the files."""
        found = {one.name: getattr(self, one.name) for one in fields(self) if one.name not in _NOT_IN_RESULTS}
        return found | {"model": self.model or "bundled"}

    @property
    def journal_folder(self) -> Path:
        """The folder whose hidden part holds the journals: that of the results.

        Raises:
            UsageError: the result goes to a stream.
        """
        out = self.result
        if is_any_stream(out):
            raise UsageError("resume: expected a file or a folder as `out`, got a stream")
        # A single result may be a file; its journal lies beside it.
        names_file = out.suffix.lower() in EXTENSIONS and not out.is_dir() and not self.names_folder
        return out.parent if names_file else out
