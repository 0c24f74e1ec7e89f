"""Results of an evaluation as a table, Markdown, JSON and a contact sheet."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from rich.table import Table

from ..data.metrics import METRICS
from ..pipeline.writing import json_bytes, write_atomically

ALL = "all"
"""The class label of the row over all classes."""


class Column(NamedTuple):
    """How a metric is shown: title, digits after the point, and which values are better ("↓", "↑" or "→ 1")."""

    title: str
    digits: int
    better: str


COLUMNS = {
    "l1": Column("l1 %", 2, "↓"),
    "psnr": Column("PSNR", 2, "↑"),
    "ssim": Column("SSIM", 4, "↑"),
    "lpips": Column("LPIPS", 4, "↓"),
    "fid": Column("FID", 2, "↓"),
    "sharp": Column("sharpness", 3, "→ 1"),
}
"""One for each metric, which is also a field of :class:`Score`."""

_MARGIN, _CAPTION, _CELL = 6, 22, 192


@dataclass(frozen=True)
class Score:
    """Scores of one method on one hole-ratio class: means over `pictures` filled pictures (FID: of their sets). In
    the row "all" a picture counts once for each class in which it has a mask.

    `method`: the title of a model or baseline. `hole_class`: a class of hole ratios ("10-20%"), "other" for ratios in
    none, a kind of the suite ("thin"), or "all", the row over all classes, where there are several.

    `l1`: percent, 0 to 100. `psnr`: dB, 0 or more. `ssim`: in [-1, 1], 1 for equal pictures; with Gaussian windows
    11x11 of sigma 1.5, but with the suite uniform ones 7x7, so that the two do not compare. `lpips`, `fid`: 0 or
    more, lower for pictures that are more alike. None: not measured, not a number, or (PSNR without the suite)
    infinite, where a picture has no difference.

    Only with the suite: `sharp`, the median of the fill's gradient energy in the hole relative to the truth, 0 or
    more, 1 = as sharp; `sharp_all`, the ratio of the sums; `hole_l1`, `hole_psnr`, of the hole instead of the whole
    picture. The suite's PSNR is at most 78 dB.
    """

    method: str
    hole_class: str
    pictures: int
    l1: float | None = None
    psnr: float | None = None
    ssim: float | None = None
    lpips: float | None = None
    fid: float | None = None
    sharp: float | None = None
    sharp_all: float | None = None
    hole_l1: float | None = None
    hole_psnr: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """Results of `lgnet_fast.evaluation.evaluate`.

    `scores`: by class, then by method. `metrics`: the requested ones. `missing`: those that could not be measured,
    with reasons. `failures`: pictures that could not be evaluated ("picture", "error"). `died`: ranks of processes
    that ended before they were done. `settings`, `versions`: of the evaluation; `device` and `dtype` are those of the
    first network. `legend`: the meaning of the columns.
    """

    scores: list[Score]
    metrics: tuple[str, ...] = METRICS
    missing: dict[str, str] = field(default_factory=dict)
    failures: list[dict[str, str]] = field(default_factory=list)
    died: list[int] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    legend: str = ""

    def score(self, method: str, hole_class: str = ALL) -> Score:
        """The score of a method on a class ("10-20%", "thin", or "all"). Raises KeyError: there is none."""
        for score in self.scores:
            if (score.method, score.hole_class) == (method, hole_class):
                return score
        raise KeyError((method, hole_class))

    def as_dict(self) -> dict[str, Any]:
        """The evaluation as JSON values: the fields by their names, a score that is not measured or infinite as null.

        Returns:
            Dicts, lists, texts, numbers and None; this is the content of ``evaluation.json``.
        """
        return asdict(self)

    def markdown(self) -> str:
        """A table in Markdown, the best of each class in bold, with notes below it."""
        heads = [
            "holes",
            "method",
            "pictures",
            *(f"{COLUMNS[name].title} {COLUMNS[name].better}" for name in self.metrics),
        ]
        lines = ["| " + " | ".join(heads) + " |", "|" + "|".join(["---", "---", *["---:"] * (len(heads) - 2)]) + "|"]
        for label, rows in self._classes():
            for row, cells in rows:
                shown = [f"**{text}**" if best else text for text, best in cells]
                method = " ".join(row.method.replace("|", r"\|").split())
                lines.append("| " + " | ".join([label, method, str(row.pictures), *shown]) + " |")
        legend = [self.legend] if self.legend else []
        notes = "".join(f"\n- {note}" for note in legend + self.notes())
        return "\n".join(lines) + "\n" + (notes + "\n" if notes else "")

    def table(self) -> Table:
        """The evaluation as a rich table."""
        table = Table(title="inpainting by hole", caption=self.legend or None, caption_justify="left")
        for head in ("holes", "method"):
            table.add_column(head, no_wrap=True)
        for head in ("pictures", *(f"{COLUMNS[name].title} {COLUMNS[name].better}" for name in self.metrics)):
            table.add_column(head, justify="right", overflow="fold")  # figures stay whole in a narrow terminal
        for label, rows in self._classes():
            for position, (row, cells) in enumerate(rows):
                shown = [f"[bold]{text}[/bold]" if best else text for text, best in cells]
                # Names of model folders may contain rich's markup.
                method = row.method.replace("[", r"\[")
                table.add_row(label if position == 0 else "", method, str(row.pictures), *shown)
            table.add_section()
        return table

    def notes(self) -> list[str]:
        """Notes below the table."""
        notes = [f"{COLUMNS[name].title}: n/a ({reason})" for name, reason in self.missing.items()]
        if self.failures:
            notes.append(f"{len(self.failures)} pictures could not be evaluated and are left out")
        if self.died:
            ranks = ", ".join(map(str, self.died))
            notes.append(f"incomplete: processes {ranks} ended before their part; run the same command again")
        return notes

    def write(self, out: Path) -> None:
        """Write ``evaluation.json`` (see :meth:`as_dict`) and ``evaluation.md`` to a folder, each atomically.

        Args:
            out: the folder; made if needed.

        Raises:
            OSError: a file cannot be written.
        """
        write_atomically(out / "evaluation.json", json_bytes(self.as_dict()))
        write_atomically(out / "evaluation.md", self.markdown().encode("utf-8", "backslashreplace"))

    def _classes(self) -> Iterable[tuple[str, list[tuple[Score, list[tuple[str, bool]]]]]]:
        """Each class with its rows: the score and, of every metric, the text and whether it is the best."""
        for label in dict.fromkeys(score.hole_class for score in self.scores):
            rows = [score for score in self.scores if score.hole_class == label]
            shown = []
            for row in rows:
                cells = []
                for name in self.metrics:
                    value = self._value(row, name)
                    others = [other for one in rows if (other := self._value(one, name)) is not None]
                    best = (
                        len(rows) > 1
                        and value is not None
                        and loss(name, value) == min(loss(name, one) for one in others)
                    )
                    cells.append(("n/a" if value is None else _shown(name, value), best))
                shown.append((row, cells))
            yield label, shown

    def _value(self, score: Score, name: str) -> float | None:
        """A metric of a score, an infinite PSNR too, which is None in the score."""
        value: float | None = getattr(score, name)
        return math.inf if name == "psnr" and value is None and name not in self.missing else value


def finite(value: float | None) -> float | None:
    """`value`; None for infinity and NaN, which JSON cannot hold."""
    return value if value is not None and math.isfinite(value) else None


def strip(panels: Sequence[np.ndarray]) -> bytes:
    """One row of a contact sheet: pictures uint8 [H, W, 3] of one size side by side, as PNG."""
    height, width = panels[0].shape[:2]
    scale = _CELL / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    row = Image.new("RGB", ((_CELL + _MARGIN) * len(panels) - _MARGIN, _CELL), "white")
    for position, panel in enumerate(panels):
        cell = Image.fromarray(panel).resize(size, Image.Resampling.LANCZOS)
        left, top = (_CELL - size[0]) // 2, (_CELL - size[1]) // 2
        row.paste(cell, (position * (_CELL + _MARGIN) + left, top))
    encoded = io.BytesIO()
    row.save(encoded, format="PNG")
    return encoded.getvalue()


def contact_sheet(columns: Sequence[str], rows: Sequence[tuple[str, bytes]]) -> Image.Image:
    """A contact sheet of rows made by :func:`strip`, each below its caption, with names of columns at the top."""
    font = ImageFont.load_default(14)
    width = (_CELL + _MARGIN) * len(columns) + _MARGIN
    sheet = Image.new("RGB", (width, _CAPTION + len(rows) * (_CELL + _CAPTION) + _MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    for position, name in enumerate(columns):
        draw.text((_MARGIN + position * (_CELL + _MARGIN), 3), name, fill="black", font=font)
    for position, (caption, encoded) in enumerate(rows):
        top = _CAPTION + position * (_CELL + _CAPTION)
        shown = caption.encode("utf-8", "replace").decode()  # names need not be UTF-8
        draw.text((_MARGIN, top + 3), shown, fill="dimgray", font=font)
        with Image.open(io.BytesIO(encoded)) as row:
            sheet.paste(row, (_MARGIN, top + _CAPTION))
    return sheet


def loss(name: str, value: float) -> float:
    """A key that is smaller for better values: the value, its negative, or its distance from 1."""
    return {"↓": value, "↑": -value, "→ 1": abs(value - 1)}[COLUMNS[name].better]


def _shown(name: str, value: float) -> str:
    return "∞" if math.isinf(value) else f"{value:.{COLUMNS[name].digits}f}"
