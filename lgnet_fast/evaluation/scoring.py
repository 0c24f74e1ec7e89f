"""`evaluate`: models and baselines on one set of pictures and masks, split among processes, resumed after a kill."""

from __future__ import annotations

import io
import os
import platform
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..errors import BackendError, LGNetError, WeightsError
from ..pipeline import Inpainter
from ..pipeline.batch import UsageError
from ..pipeline.distributed import FOLDER, JobError, Journal, World, fingerprint, model_stamp, stamp
from ..pipeline.files import write_atomically
from ..training.errors import MissingExtraError
from ..training.masks import SUITE_KINDS
from .baselines import BASELINES
from .metrics import METRICS, Distance, Metrics, fid_score
from .protocol import (
    FolderMasks,
    GeneratedMasks,
    NamedMasks,
    class_label,
    fit_picture,
    left_out_in,
    mask_source,
    parse_classes,
    pictures_in,
)
from .report import ALL, DIGITS, TITLES, Evaluation, Score, contact_sheet, finite, loss, strip
from .suite import SUITE_METRICS, SuiteMasks, SuiteMetrics, parse_kinds, summary

SMALLEST = 16
"""Smallest side that is evaluated: SSIM's window needs 11."""

Holes = GeneratedMasks | FolderMasks | NamedMasks | SuiteMasks
Model = str | os.PathLike[str] | Inpainter | None


def evaluate(
    pictures: str | Path,
    *,
    masks: str | Path | None = None,
    models: Mapping[str, Model] | Sequence[str | os.PathLike[str] | None] = (None,),
    classes: str | Sequence[int | str] | None = None,
    size: int = 256,
    seed: int = 0,
    mask_kind: str = "strokes",
    suite: bool = False,
    baselines: Sequence[str] | None = None,
    metrics: Sequence[str] | None = None,
    paper_compat: bool = False,
    pair_by_name: bool = False,
    invert_mask: bool = False,
    lpips: str | Path | Distance | None = None,
    fid: str | Path | nn.Module | None = None,
    out: str | Path | None = None,
    sheet_rows: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    backend: str = "auto",
    world: World | None = None,
    tell: Callable[[int, int, str | None], None] = lambda done, total, error: None,
) -> Evaluation | None:
    """Score models and baselines on whole merged 8-bit pictures, per class of hole ratios (the paper's protocol) or,
    with `suite`, per kind of hole.

    Args:
        pictures: a folder (with its sub-folders), or one picture.
        masks: a folder of masks (Liu et al.'s 12,000, or any), white = hole; each class's masks are dealt to the
            pictures in an order drawn from (seed, class). With `suite`: ``<picture>_<kind>.png``. None: masks drawn
            from (seed, index, class or kind).
        models: model folders or hub ids, None = the bundled one; or a mapping from titles to them. Where `out` is
            None, also ready Inpainters.
        classes: indices in HOLE_CLASSES or names such as "10-20%"; with `suite`, names in SUITE_KINDS; None: all
            (that the folder of masks has).
        size: the shorter edge is scaled to it, then the centre is cropped to size x size; 0: pictures as they are.
        seed: of the masks and of their dealing.
        mask_kind: "strokes", "boxes" or "mixed", for masks that are drawn.
        suite: thin and thick strokes, a box and a blob (:func:`lgnet_fast.training.masks.suite_mask`), and the
            measures of :class:`lgnet_fast.evaluation.suite.SuiteMetrics`.
        baselines: names in BASELINES; None: "telea", "ns" and, with `suite`, "biharmonic".
        metrics: names in METRICS or, with `suite`, SUITE_METRICS; None: all. LPIPS and FID are left out, with the
            reason, where their networks are missing.
        paper_compat: convert the networks' merged pictures to 8 bits as the released test script does, by
            truncation: 63 of 256 levels come back one lower, known pixels included. Default: round.
        pair_by_name: the mask of each picture is the one of its name, as `lgnet-fast run` pairs them.
        invert_mask: black is hole.
        lpips, fid: files of the networks' weights, or networks; see :class:`lgnet_fast.evaluation.metrics.Metrics`
            and :class:`lgnet_fast.evaluation.suite.SuiteMetrics`.
        out: folder for evaluation.json, evaluation.md and evaluation.png (original, masked, and every method's
            result). An interrupted evaluation with the same arguments goes on where it was. None: nothing is written.
        sheet_rows: rows of evaluation.png; None: 6, with `suite` 12. They show the first pictures, each with a mask
            of another class; with `suite`, of every kind as many, evenly from the first method's best to its worst by
            LPIPS (SSIM without that, l1 without either).
        device, dtype, backend: as for Inpainter.
        world: this process's place among several, which share the pictures; default: read from the environment.
        tell: called with (finished pictures of this process, all of them, a picture's first error or None).

    Returns:
        The merged evaluation. Of several processes (`out` must be given, on a disk that they share) the first one
        waits for the others and returns it; the others return None.

    Raises:
        UsageError: arguments that contradict each other or the files that are there.
        WeightsError, BackendError: a model cannot be read; a device or backend cannot run.
        JobError: another run is active in `out`, or its journal cannot be written.
        MissingExtraError: a package is missing; the text names the extra.
    """
    source, folder = Path(pictures), None if out is None else Path(out)
    if size != 0 and size < SMALLEST:
        raise UsageError(f"--size: expected 0 or at least {SMALLEST} pixels, got {size}")
    if baselines is None:
        baselines = tuple(BASELINES) if suite else ("telea", "ns")
    names = SUITE_METRICS if suite else METRICS
    metrics = names if metrics is None else metrics
    if sheet_rows is None:
        sheet_rows = 12 if suite else 6
    if suite and pair_by_name:
        raise UsageError("--suite: expected no --pair-by-name (with --masks it pairs PICTURE with PICTURE_KIND)")
    unknown = [name for name in baselines if name not in BASELINES]
    if unknown:
        raise UsageError(f"--baselines: expected names of {', '.join(BASELINES)}, got {', '.join(unknown)}")
    bad = [name for name in metrics if name not in names]
    if bad or not metrics:
        raise UsageError(f"--metrics: expected names of {', '.join(names)}, got {', '.join(bad) or 'none'}")
    if seed < 0:
        raise UsageError(f"--seed: expected 0 or more, got {seed}")
    named = dict(models) if isinstance(models, Mapping) else _titles(models)
    kinds = parse_kinds(classes) if suite else ()
    chosen = None if suite else parse_classes(classes)
    titles = [*named, *(BASELINES[name][0] for name in baselines)]
    if not titles or len(set(titles)) != len(titles):
        raise UsageError(f"--model: expected methods with titles of their own, got {', '.join(titles) or 'none'}")
    excluded = [Path(one) for one in (masks, out) if one is not None]
    found = pictures_in(source, excluded)
    base = source if source.is_dir() else source.parent
    not_read = left_out_in(source, excluded)
    mask_folder = None if masks is None else Path(masks)
    holes: Holes
    if suite:
        holes = SuiteMasks(found, base, mask_folder, kinds, size=size, seed=seed, invert=invert_mask)
    else:
        holes = mask_source(
            mask_folder, found, base, chosen, kind=mask_kind, seed=seed, invert=invert_mask, by_name=pair_by_name
        )
    label = SUITE_KINDS.__getitem__ if suite else class_label
    world = world or World.from_environment()
    if folder is None and world.size > 1:
        raise UsageError("--output: several processes need a folder that they share")
    if folder is not None and folder.exists() and not folder.is_dir():
        raise UsageError(f"--output: expected a folder, got the file {str(folder)!r}")

    settings = {
        "pictures": str(source),
        "masks": None if masks is None else str(masks),
        "suite": suite,
        "mask_kind": mask_kind if masks is None and not suite else None,
        "pair_by_name": pair_by_name,
        "invert_mask": invert_mask,
        "classes": None if pair_by_name else [label(one) for one in holes.classes],
        "size": size,
        "seed": seed,
        "models": {title: "bundled" if model is None else str(model) for title, model in named.items()},
        "baselines": list(baselines),
        "paper_compat": paper_compat,
        "metrics": list(metrics),
        "dtype": dtype,
        "backend": backend,
    }
    journal = None
    if folder is not None:
        journal = Journal(folder / FOLDER / f"eval-{_identity(settings, named, lpips, fid, sheet_rows)}", world)
    try:
        target = world.device(device)
        pipes = {title: _inpainter(model, target, dtype, backend) for title, model in named.items()}
        where = next(iter(pipes.values())).device if pipes else "cpu"
        measure = SuiteMetrics(metrics, lpips, where) if suite else Metrics(metrics, lpips, fid, where)
        methods: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
            title: _network(pipe, paper_compat) for title, pipe in pipes.items()
        }
        for name in baselines:
            title, method = BASELINES[name]
            methods[title] = method
        job = _Job(found, holes, methods, measure, size, journal, sheet_rows if folder is not None else 0)
        records = []
        own = world.part(range(len(found)))
        broken: set[str] = set()
        for done, (index, one) in enumerate((i, c) for i in own for c in holes.classes):
            record = job.run(index, one)
            records.append(record)
            error = None
            if record.get("error") is not None and record["picture"] not in broken:
                broken.add(record["picture"])
                error = f"{record['picture']}: {record['error']}"
            tell(done + 1, len(own) * len(holes.classes), error)
        died: list[int] = []
        if journal is not None:
            journal.finish()
            if world.rank > 0:
                return None
            records, died = journal.collect()
        result = _merged(records, titles, tuple(metrics), measure, died, settings, label, job.features)
        if isinstance(holes, SuiteMasks) and isinstance(measure, SuiteMetrics):
            result = replace(result, legend=" ".join(filter(None, (holes.legend, measure.legend))))
        result = replace(result, failures=[*result.failures, *not_read])
        if folder is not None and journal is not None:
            result.write(folder)
            job.write_sheet(folder, records)
            if not died:
                journal.close()
                shutil.rmtree(journal.folder, ignore_errors=True)
                _remove_if_empty(journal.folder.parent)
    finally:
        if journal is not None:
            journal.close()
    return result


class _Job:
    """Pictures one after the other, each with one mask a class, through all methods."""

    def __init__(
        self,
        pictures: list[Path],
        holes: Holes,
        methods: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]],
        measure: Metrics | SuiteMetrics,
        size: int,
        journal: Journal | None,
        sheet_rows: int,
    ) -> None:
        self.pictures, self.holes, self.methods, self.measure = pictures, holes, methods, measure
        self.size, self.journal, self.sheet_rows = size, journal, sheet_rows
        self._index = -1
        self._truth: np.ndarray | None = None
        self._truth_features: np.ndarray | None = None
        self._features: dict[str, np.ndarray] = {}

    def run(self, index: int, hole_class: int) -> dict[str, Any]:
        """The record of one picture with one mask, from an earlier launch where that has it; see `_measure`."""
        path = self.pictures[index]
        key = fingerprint(str(path), stamp(path), index, hole_class, self.holes.identity(index, hole_class))
        record = None if self.journal is None else self.journal.earlier(key)
        if record is None or not set(self.measure.available) <= set(record["measured"]):
            record = {"key": key, "index": index, "picture": str(path), "class": hole_class, "measured": []}
            try:
                self._measure(record)
            except (BackendError, WeightsError, JobError, MissingExtraError):
                raise
            except (LGNetError, OSError) as error:
                record["error"] = str(error)
            except Exception as error:  # an unexpected error of one picture must not stop the others
                record["error"] = f"{type(error).__name__}: {error}"
        if self.journal is not None:
            self.journal.done(key, record)
        return record

    def features(self, record: dict[str, Any]) -> np.ndarray | None:
        """FID's features of a record, float32 [1 + methods, D], the true picture first; None without them."""
        if self.journal is None:
            return self._features.get(record["key"])
        file = self._features_file(record["key"])
        return np.load(file) if file.is_file() else None

    def write_sheet(self, out: Path, records: list[dict[str, Any]]) -> None:
        """Writes ``evaluation.png``, atomically."""
        good = [
            record
            for record in sorted(records, key=lambda record: (record["index"], record["class"]))
            if record.get("error") is None and self._strip_file(record["key"]).is_file()
        ]
        if isinstance(self.holes, SuiteMasks):
            chosen = _best_to_worst(good, next(iter(self.methods)), self.holes.classes, self.sheet_rows)
        else:
            chosen = [(f"{record['hole_ratio']:.0%} hole", record) for record in good]
        rows = [
            (f"{Path(record['picture']).name}, {words}", self._strip_file(record["key"]).read_bytes())
            for words, record in chosen
        ]
        if rows:
            encoded = io.BytesIO()
            contact_sheet(["original", "masked", *self.methods], rows).save(encoded, format="PNG")
            write_atomically(out / "evaluation.png", encoded.getvalue())

    def _measure(self, record: dict[str, Any]) -> None:
        """Adds to the record: "hole_ratio", the mask's own "class", "scores" by method, and "measured"."""
        index, asked = record["index"], record["class"]
        truth = self._picture(index)
        if isinstance(self.holes, NamedMasks):
            hole, record["class"] = self.holes.paired(index, self.pictures[index], self.size)
        else:
            hole = self.holes.mask(index, asked, *truth.shape[:2])
        record["hole_ratio"] = round(float(hole.mean()), 6)
        filled = {title: method(truth, hole) for title, method in self.methods.items()}
        if isinstance(self.measure, SuiteMetrics):
            record["scores"] = self.measure.scores(filled, truth, hole)
        else:
            record["scores"] = {title: self.measure.scores(picture, truth) for title, picture in filled.items()}
        if isinstance(self.measure, Metrics) and "fid" in self.measure.available:
            if self._truth_features is None:
                self._truth_features = self.measure.features(truth)
            filled_features = [self.measure.features(picture) for picture in filled.values()]
            self._keep_features(record["key"], np.stack([self._truth_features, *filled_features]))
        if isinstance(self.holes, SuiteMasks):
            shown = self.sheet_rows > 0  # the best and worst are known only at the end
        else:
            # One row a picture, of another class each.
            position = list(self.holes.classes).index(asked)
            shown = index < self.sheet_rows and position == index % len(self.holes.classes)
        if self.journal is not None and shown:
            masked = np.where(hole[..., None], np.uint8(255), truth)
            write_atomically(self._strip_file(record["key"]), strip([truth, masked, *filled.values()]))
        record["measured"] = list(self.measure.available)

    def _picture(self, index: int) -> np.ndarray:
        if index != self._index or self._truth is None:
            truth = fit_picture(self.pictures[index], self.size)
            if min(truth.shape[:2]) < SMALLEST:
                raise LGNetError(
                    f"picture: expected sides of at least {SMALLEST}, got {truth.shape[1]}x{truth.shape[0]}"
                )
            self._index, self._truth, self._truth_features = index, truth, None
        return self._truth

    def _keep_features(self, key: str, features: np.ndarray) -> None:
        if self.journal is None:
            self._features[key] = features
            return
        encoded = io.BytesIO()
        np.save(encoded, features)
        write_atomically(self._features_file(key), encoded.getvalue())

    def _features_file(self, key: str) -> Path:
        assert self.journal is not None
        return self.journal.folder / "features" / f"{key}.npy"

    def _strip_file(self, key: str) -> Path:
        assert self.journal is not None
        return self.journal.folder / "sheet" / f"{key}.png"


def _best_to_worst(
    records: list[dict[str, Any]], title: str, classes: Sequence[int], rows: int
) -> list[tuple[str, dict[str, Any]]]:
    """Of every kind `rows` divided by the kinds, at least 1: from best to worst of `title`, with the ranks."""
    chosen = []
    for one in classes:
        kind = [record for record in records if record["class"] == one]
        if not kind:
            continue
        name = next(name for name in ("lpips", "ssim", "l1") if all(name in r["scores"][title] for r in kind))
        ranked = sorted(kind, key=lambda r: (loss(name, r["scores"][title][name]), r["index"]))
        count = max(1, rows // len(classes))
        places = np.linspace(0, len(ranked) - 1, count) if count > 1 else np.array([(len(ranked) - 1) / 2])
        for place in dict.fromkeys(np.rint(places).astype(int).tolist()):
            rank = f"{SUITE_KINDS[one]}, number {place + 1} of {len(ranked)} for {title}"
            value = ranked[place]["scores"][title][name]
            chosen.append((f"{rank}: {TITLES[name]} {value:.{DIGITS[name]}f}", ranked[place]))
    return chosen


# The level that every 8-bit level comes back as from the released test script, which scales to [-1, 1] and back in
# float32 and then truncates.
_TRUNCATED = (
    ((torch.arange(256, dtype=torch.float32, device="cpu") / 255 - 0.5) / 0.5 + 1)
    .div(2)
    .mul(255)
    .to(torch.uint8)
    .numpy()
)


def _network(pipe: Inpainter, paper_compat: bool) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    if not paper_compat:
        return pipe

    def truncating(picture: np.ndarray, hole: np.ndarray) -> np.ndarray:
        levels = torch.from_numpy(np.ascontiguousarray(picture.transpose(2, 0, 1))[None]).float() / 255
        filled = pipe(levels, hole)[0].permute(1, 2, 0).cpu().numpy()
        result: np.ndarray = _TRUNCATED[picture]
        result[hole] = (filled[hole] * np.float32(255)).astype(np.uint8)
        return result

    return truncating


def _inpainter(model: Model, device: str, dtype: str, backend: str) -> Inpainter:
    if isinstance(model, Inpainter):
        return model
    return Inpainter.from_pretrained(model, device=device, dtype=dtype, backend=backend)


def _titles(models: Sequence[str | os.PathLike[str] | None]) -> dict[str, Model]:
    """Models by their folders' names; by what was given where two have the same."""
    short = ["bundled" if model is None else Path(model).name for model in models]
    return {
        name if short.count(name) == 1 or model is None else os.fspath(model): model
        for name, model in zip(short, models)
    }


def _identity(settings: dict[str, Any], named: Mapping[str, Model], lpips: Any, fid: Any, sheet_rows: int) -> str:
    """Identifies this evaluation among others that write to the same folder."""
    from .. import __version__

    given = {**{f"model {title!r}": model for title, model in named.items()}, "lpips": lpips, "fid": fid}
    for name, value in given.items():
        if value is not None and not isinstance(value, (str, os.PathLike)):
            raise UsageError(f"{name}: expected a path where `out` is given, got {type(value).__name__}")
    weights = {title: model_stamp(model) for title, model in named.items() if not isinstance(model, Inpainter)}
    backbones = [None if file is None else [str(file), stamp(Path(file))] for file in (lpips, fid)]
    return fingerprint(settings, weights, backbones, sheet_rows, __version__)


def _merged(
    records: list[dict[str, Any]],
    titles: Sequence[str],
    metrics: tuple[str, ...],
    measure: Metrics | SuiteMetrics,
    died: list[int],
    settings: dict[str, Any],
    label: Callable[[int], str],
    features: Callable[[dict[str, Any]], np.ndarray | None],
) -> Evaluation:
    # Sums are taken in one fixed order, so that any number of processes gives the same numbers.
    records = sorted(records, key=lambda record: (record["index"], record["class"]))
    good = [record for record in records if record.get("error") is None]
    suite, missing = isinstance(measure, SuiteMetrics), dict(measure.missing)
    for name in metrics:
        without = sum(name not in record["measured"] for record in good)
        if without and name not in missing:
            missing[name] = f"another process could not measure it on {without} pictures"
    groups = {label(one): [r for r in good if r["class"] == one] for one in sorted({r["class"] for r in good})}
    if "other" in groups:
        groups["other"] = groups.pop("other")
    if len(groups) > 1:
        groups[ALL] = good
    scores = []
    names = [name for name in metrics if name not in missing and name != "fid"]
    for hole_class, group in groups.items():
        means: dict[str, dict[str, float | None]] = {}
        for title in titles:
            own = [record["scores"][title] for record in group]
            values = summary(own, names) if suite else {n: float(np.mean([one[n] for one in own])) for n in names}
            means[title] = {name: finite(value) for name, value in values.items()}
        if "fid" in metrics and "fid" not in missing and len(group) > 1:
            stacked = np.stack([one for record in group if (one := features(record)) is not None])
            for position, title in enumerate(titles):
                means[title]["fid"] = finite(fid_score(stacked[:, 0], stacked[:, 1 + position]))
        scores += [Score(title, hole_class, len(group), **means[title]) for title in titles]
    if "fid" in metrics and "fid" not in missing and any(len(group) < 2 for group in groups.values()):
        missing["fid"] = "classes of a single picture have none"
    failures: dict[str, str] = {}
    for record in records:
        if record.get("error") is not None:
            failures.setdefault(record["picture"], record["error"])
    from .. import __version__

    versions = {
        "lgnet_fast": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }
    listed = [{"picture": picture, "error": error} for picture, error in failures.items()]
    return Evaluation(scores, metrics, missing, listed, died, settings, versions)


def _remove_if_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:  # the journal of another job lies there
        return
