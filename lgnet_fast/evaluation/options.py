"""The options of an evaluation; they check themselves."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ..data.masks import KINDS
from ..data.metrics import METRICS, Distance
from ..errors import UsageError
from ..files import real_path
from ..pipeline import Inpainter
from .baselines import BASELINES
from .suite import SUITE_METRICS

SHEET = "evaluation.png"
"""Name of the contact sheet in `out`."""

SMALLEST, SMALLEST_WITH_LPIPS = 16, 32
"""Smallest side of a picture in pixels: SSIM's window needs 11, LPIPS's AlexNet 31."""

Model = str | os.PathLike[str] | Inpainter | None


@dataclass(frozen=True)
class EvaluationOptions:
    """Methods, pictures, masks and metrics of an evaluation.

    Args:
        pictures: a folder (with its sub-folders), or one picture; a tar shard (webdataset), or a folder of shards.
        masks: a folder of masks (Liu et al.'s 12,000, or any), white = hole; the masks of each class are assigned to
            the pictures in an order drawn from (seed, class). With `suite`: ``<picture>_<kind>.png``. None: masks
            drawn from (seed, index, class or kind). A picture of the evaluation is no mask, and refused as one.
        models: model folders or hub ids, None = the bundled one; or a mapping from titles to them. Where `out` is
            None, also ready Inpainters.
        classes: indices in HOLE_CLASSES or names such as "10-20%"; with `suite`, names in SUITE_KINDS; None: all
            (that the folder of masks has).
        size: pixels, 0 or at least 16: the shorter edge is scaled to it, then the centre is cropped to size x size;
            0: pictures as they are. LPIPS needs sides of at least 32.
        seed: of the masks and of their assignment to pictures, 0 or more.
        mask_kind: "strokes", "boxes" or "mixed", for masks that are drawn.
        suite: thin and thick strokes, a box and a blob (:func:`lgnet_fast.data.masks.suite_mask`), and the measures
            of :class:`lgnet_fast.evaluation.suite.SuiteMetrics`.
        baselines: names in BASELINES; None: "telea", "ns" and, with `suite`, "biharmonic".
        metrics: names in METRICS or, with `suite`, SUITE_METRICS; None: all. LPIPS and FID are left out, with the
            reason, where no file is given and their networks are missing.
        paper_compat: convert the networks' merged pictures to 8 bits as the released test script does, by
            truncation, which lowers 63 of 256 levels by one, also of known pixels. Default: round.
        pair_by_name: pair masks and pictures by name, as `lgnet-fast run` does.
        invert_mask: black is hole.
        lpips, fid: files of the networks' weights, or networks; see :class:`lgnet_fast.data.metrics.Metrics` and
            :class:`lgnet_fast.evaluation.suite.SuiteMetrics`.
        out: folder for evaluation.json, evaluation.md and evaluation.png (original, masked, and every method's
            result). An interrupted evaluation with the same options is continued. None: nothing is written.
        sheet_rows: rows of evaluation.png, 0 or more; None: 6, with `suite` 12. They show the first pictures, each
            with a mask of another class; with `suite`, an equal number of every kind (rounded down, at least one),
            evenly from the first method's best to its worst by LPIPS (else SSIM, else l1).
        device, dtype, backend: as for Inpainter.

    Raises:
        UsageError: invalid values, or values that contradict each other. What depends on the files, such as names of
            `classes`, is checked by :func:`lgnet_fast.evaluation.evaluate`.
    """

    pictures: str | Path
    masks: str | Path | None = None
    models: Mapping[str, Model] | Sequence[str | os.PathLike[str] | None] = (None,)
    classes: str | Sequence[int | str] | None = None
    size: int = 256
    seed: int = 0
    mask_kind: str = "strokes"
    suite: bool = False
    baselines: Sequence[str] | None = None
    metrics: Sequence[str] | None = None
    paper_compat: bool = False
    pair_by_name: bool = False
    invert_mask: bool = False
    lpips: str | Path | Distance | None = None
    fid: str | Path | nn.Module | None = None
    out: str | Path | None = None
    sheet_rows: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    backend: str = "auto"

    def __post_init__(self) -> None:
        self._check_kinds()
        self._check_ranges()
        self._check_names()
        self._check_out()
        self._check_files()
        self._check_masks()

    def _check_kinds(self) -> None:
        for name in ("models", "baselines", "metrics"):
            if isinstance(getattr(self, name), (str, os.PathLike)):
                raise UsageError(f"{name}: expected a list, got the single {str(getattr(self, name))!r}")
        rows = 0 if self.sheet_rows is None else self.sheet_rows
        for name, value in (("size", self.size), ("seed", self.seed), ("sheet_rows", rows)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise UsageError(f"{name}: expected a whole number, got {value!r}")
        for name in ("suite", "paper_compat", "pair_by_name", "invert_mask"):
            if not isinstance(getattr(self, name), bool):
                raise UsageError(f"{name}: expected True or False, got {getattr(self, name)!r}")
        for name in ("device", "dtype", "backend"):
            if not isinstance(getattr(self, name), str):
                raise UsageError(f"{name}: expected a text, got {getattr(self, name)!r}")

    def _check_ranges(self) -> None:
        if self.size != 0 and self.size < SMALLEST:
            raise UsageError(f"size: expected 0 or at least {SMALLEST} pixels, got {self.size}")
        for name, value in (("seed", self.seed), ("sheet_rows", self.sheet_rows)):
            if value is not None and value < 0:
                raise UsageError(f"{name}: expected 0 or more, got {value}")
        if self.mask_kind not in KINDS:
            raise UsageError(f"mask_kind: expected one of {', '.join(KINDS)}, got {self.mask_kind!r}")

    def _check_names(self) -> None:
        metrics = SUITE_METRICS if self.suite else METRICS
        if not self.metric_names:
            raise UsageError(f"metrics: expected names of {', '.join(metrics)}, got none")
        for name, given, known in (
            ("baselines", self.baseline_names, tuple(BASELINES)),
            ("metrics", self.metric_names, metrics),
        ):
            unknown = [one for one in given if one not in known]
            if unknown:
                raise UsageError(f"{name}: expected names of {', '.join(known)}, got {', '.join(unknown)}")
            if len(set(given)) < len(given):
                raise UsageError(f"{name}: expected each name once, got {', '.join(given)}")
        titles = self.titles
        if not titles or len(set(titles)) != len(titles):
            raise UsageError(
                "models: expected each method once, or models with titles of their own, got "
                + (", ".join(titles) or "none")
            )

    def _check_out(self) -> None:
        """The next evaluation must not read what this one writes."""
        if self.folder is None:
            return
        if self.folder.exists() and not self.folder.is_dir():
            raise UsageError(f"out: expected a folder, got the file {str(self.folder)!r}")
        read = [real_path(path) for path in (self.source, self.mask_folder) if path is not None]
        dealt = self.masks is not None and not (self.suite or self.pair_by_name)  # any file in and below the folder
        if real_path(self.folder) in read or (dealt and read[-1] in real_path(self.folder).parents):
            raise UsageError(
                "out: expected another folder than that of the pictures or masks, where the next evaluation would "
                f"read {SHEET}, got {str(self.folder)!r}"
            )
        if real_path(self.source) == real_path(self.folder / SHEET):
            raise UsageError(
                f"out: expected another folder than that of the picture, which {SHEET} would replace, got "
                f"{str(self.folder)!r}"
            )

    def _check_files(self) -> None:
        for name, file in (("lpips", self.lpips), ("fid", self.fid)):
            if isinstance(file, (str, os.PathLike)) and not Path(file).is_file():
                raise UsageError(f"{name}: expected a file of weights, got {os.fspath(file)!r}, which is none")
            if file is not None and name not in self.metric_names:
                raise UsageError(f"{name}: expected {name} among the `metrics`, got {', '.join(self.metric_names)}")

    def _check_masks(self) -> None:
        """Options that would have no effect are mistakes."""
        if self.suite and self.pair_by_name:
            raise UsageError("suite: expected no `pair_by_name` (with `masks` it pairs PICTURE with PICTURE_KIND)")
        if self.invert_mask and self.masks is None:
            raise UsageError("invert_mask: expected `masks`; masks that are drawn are not inverted")
        if self.mask_kind != "strokes" and (self.suite or self.masks is not None):
            other = "suite" if self.suite else "masks"
            raise UsageError(f"mask_kind: expected none with `{other}`, got {self.mask_kind!r}")

    @property
    def source(self) -> Path:
        """`pictures` as a path."""
        return Path(self.pictures)

    @property
    def base(self) -> Path:
        """The folder of the pictures."""
        return self.source if self.source.is_dir() else self.source.parent

    @property
    def folder(self) -> Path | None:
        """`out` as a path."""
        return None if self.out is None else Path(self.out)

    @property
    def mask_folder(self) -> Path | None:
        """`masks` as a path."""
        return None if self.masks is None else Path(self.masks)

    @property
    def baseline_names(self) -> tuple[str, ...]:
        """The baselines, defaults resolved."""
        if self.baselines is None:
            return tuple(BASELINES) if self.suite else ("telea", "ns")
        return tuple(self.baselines)

    @property
    def metric_names(self) -> tuple[str, ...]:
        """The metrics, defaults resolved."""
        if self.metrics is None:
            return SUITE_METRICS if self.suite else METRICS
        return tuple(self.metrics)

    @property
    def rows(self) -> int:
        """Rows of the contact sheet; 0 where nothing is written."""
        if self.out is None:
            return 0
        return (12 if self.suite else 6) if self.sheet_rows is None else self.sheet_rows

    @property
    def named(self) -> dict[str, Model]:
        """Models by title: their folders' names, or what was given where two have the same."""
        return dict(self._with_titles)

    @property
    def _with_titles(self) -> list[tuple[str, Model]]:
        if isinstance(self.models, Mapping):
            return list(self.models.items())
        short = ["bundled" if model is None else Path(model).name or str(model) for model in self.models]
        return [
            (name if short.count(name) == 1 or model is None else os.fspath(model), model)
            for name, model in zip(short, self.models)
        ]

    @property
    def titles(self) -> list[str]:
        """Titles of all methods, networks first."""
        models = [title for title, _ in self._with_titles]
        return models + [BASELINES[name][0] for name in self.baseline_names]
