"""`evaluate`: scores models and baselines on pictures and masks; uses several processes, and can be resumed."""

from __future__ import annotations

import io
import os
import platform
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data.masks import SUITE_KINDS
from ..data.metrics import LPIPS_VARIABLE, Metrics
from ..errors import BackendError, JobError, LGNetError, MissingExtraError, UsageError, WeightsError
from ..jobs.journal import FOLDER, Journal, fingerprint, model_stamp, stamp
from ..jobs.world import World
from ..pipeline import Inpainter
from ..pipeline.writing import write_atomically
from ..version import __version__
from .baselines import BASELINES
from .frechet import frechet_distance
from .options import SHEET, SMALLEST, SMALLEST_WITH_LPIPS, EvaluationOptions, Model
from .protocol import (
    FolderMasks,
    GeneratedMasks,
    NamedMasks,
    PictureFile,
    class_label,
    fit_picture,
    mask_source,
    parse_classes,
    pictures_in,
    stored_in,
)
from .report import ALL, COLUMNS, Evaluation, Score, contact_sheet, finite, loss, strip
from .suite import SuiteMasks, SuiteMetrics, parse_kinds, summary

Holes = GeneratedMasks | FolderMasks | NamedMasks | SuiteMasks
Tell = Callable[[int, int, str | None], None]


def evaluate(options: EvaluationOptions, world: World | None = None, tell: Tell | None = None) -> Evaluation | None:
    """Score models and baselines on whole merged 8-bit pictures, per class of hole ratios (the paper's protocol) or,
    with `suite`, per kind of hole.

    Args:
        options: of the evaluation.
        world: rank of this process among several, which share the pictures; default: read from the environment.
        tell: called with (finished pictures of this process, all its pictures, the first error of a picture or None).

    Returns:
        The merged evaluation. Of several processes (`out` must be given, on a disk that they share) the first one
        waits for the others and returns it; the others return None. A picture or mask that cannot be read, or is too
        small, is listed in `failures` and left out of the scores.

    Raises:
        UsageError: options that do not fit the existing files, or a folder without pictures or masks.
        InvalidMaskError: a file in the folder of masks cannot be read, where masks are assigned by class.
        WeightsError: the weights of a model are missing or malformed.
        BackendError: a device, dtype or backend that cannot run; or the launcher's variables contradict each other.
        JobError: another process runs the same evaluation, or its journal cannot be written.
        MissingExtraError: a package of the extra `[eval]` is not installed.
        OSError: the results cannot be written to `out`.
    """
    world = world or World.from_environment()
    plan = _plan(options)
    if options.folder is None and world.size > 1:
        raise UsageError("out: several processes need a folder that they share")
    settings = _settings(options, plan.holes)
    identity = None if options.folder is None else _identity(options, settings)
    # A single process writes nothing before its models are loaded; several show one another first that they run.
    methods = _methods(options, world) if world.size == 1 else None
    journal = None if options.folder is None else Journal(options.folder / FOLDER / f"eval-{identity}", world)
    try:
        job = _Job(plan, options, methods or _methods(options, world), journal)
        settings |= job.computed
        records = _run(job, world, tell or (lambda done, total, error: None))
        died: list[int] = []
        if journal is not None:
            journal.finish()
            if world.rank > 0:
                return None
            records, died = journal.collect()
        result = _merged(job, records, died, settings)
        if options.folder is not None and journal is not None:
            result.write(options.folder)
            job.write_sheet(options.folder, records)
            if not died:
                journal.close()
                shutil.rmtree(journal.folder, ignore_errors=True)
                _remove_if_empty(journal.folder.parent)
    finally:
        if journal is not None:
            journal.close()
    return result


@dataclass(frozen=True)
class _Plan:
    """The pictures, what in their folder cannot be read, and the masks."""

    pictures: list[PictureFile]
    not_read: list[dict[str, str]]
    holes: Holes


def _plan(options: EvaluationOptions) -> _Plan:
    kinds = parse_kinds(options.classes) if options.suite else ()
    classes = None if options.suite else parse_classes(options.classes)
    besides = [path for path in (options.mask_folder, options.folder) if path is not None]
    found = pictures_in(options.source, besides)
    holes: Holes
    if options.suite:
        holes = SuiteMasks(
            found.files,
            options.base,
            options.mask_folder,
            kinds,
            size=options.size,
            seed=options.seed,
            invert=options.invert_mask,
        )
    else:
        holes = mask_source(
            options.mask_folder,
            found.files,
            options.base,
            classes,
            kind=options.mask_kind,
            seed=options.seed,
            invert=options.invert_mask,
            by_name=options.pair_by_name,
        )
    not_read = [{"picture": str(path), "error": reason} for path, reason in found.left_out]
    return _Plan(found.files, not_read, holes)


def _label(options: EvaluationOptions, hole_class: int) -> str:
    return SUITE_KINDS[hole_class] if options.suite else class_label(hole_class)


def _settings(options: EvaluationOptions, holes: Holes) -> dict[str, Any]:
    """The settings, for the report."""
    drawn = options.masks is None and not options.suite
    return {
        "pictures": str(options.source),
        "masks": None if options.masks is None else str(options.masks),
        "suite": options.suite,
        "mask_kind": options.mask_kind if drawn else None,
        "pair_by_name": options.pair_by_name,
        "invert_mask": options.invert_mask,
        "classes": None if options.pair_by_name else [_label(options, one) for one in holes.classes],
        "size": options.size,
        "seed": options.seed,
        "models": {title: "bundled" if model is None else str(model) for title, model in options.named.items()},
        "baselines": list(options.baseline_names),
        "paper_compat": options.paper_compat,
        "metrics": list(options.metric_names),
        "device": options.device,
        "dtype": options.dtype,
        "backend": options.backend,
    }


Method = Callable[[np.ndarray, np.ndarray], np.ndarray]


Methods = tuple[dict[str, Method], Metrics | SuiteMetrics, dict[str, str]]
"""Networks and baselines by title, the metrics, and the device and dtype of the first network, for the report."""


def _methods(options: EvaluationOptions, world: World) -> Methods:
    device = world.device(options.device)
    pipes = {title: _inpainter(model, options, device) for title, model in options.named.items()}
    first = next(iter(pipes.values()), None)
    where = "cpu" if first is None else first.device
    measure: Metrics | SuiteMetrics
    if options.suite:
        measure = SuiteMetrics(options.metric_names, options.lpips, where)
    else:
        measure = Metrics(options.metric_names, options.lpips, options.fid, where)
    methods = {title: _network(pipe, options.paper_compat) for title, pipe in pipes.items()}
    methods |= {BASELINES[name][0]: BASELINES[name][1] for name in options.baseline_names}
    computed: dict[str, str] = {}
    if first is not None:
        computed = {"device": str(first.device), "dtype": str(first.dtype).removeprefix("torch.")}
    return methods, measure, computed


def _run(job: _Job, world: World, tell: Tell) -> list[dict[str, Any]]:
    """The records of this process's share."""
    own, classes = world.part(range(len(job.pictures))), job.holes.classes
    records = []
    broken: set[str] = set()
    total = len(own) * len(classes)
    if world.rank == 0:
        for left in job.plan.not_read:
            tell(0, total, f"{left['picture']}: {left['error']}")
    for done, (index, one) in enumerate((i, c) for i in own for c in classes):
        record = job.run(index, one)
        records.append(record)
        error = None
        if record.get("error") is not None and record["picture"] not in broken:
            broken.add(record["picture"])
            error = f"{record['picture']}: {record['error']}"
        tell(done + 1, total, error)
    return records


class _Job:
    """Evaluate pictures one after the other with all methods, each with one mask per class."""

    def __init__(
        self,
        plan: _Plan,
        options: EvaluationOptions,
        methods: Methods,
        journal: Journal | None,
    ) -> None:
        self.plan, self.options, self.journal = plan, options, journal
        self.pictures, self.holes = plan.pictures, plan.holes
        self.methods, self.measure, self.computed = methods
        self.size, self.sheet_rows = options.size, options.rows
        self._index = -1
        self._truth: np.ndarray | None = None
        self._truth_features: np.ndarray | None = None
        self._features: dict[str, np.ndarray] = {}

    def run(self, index: int, hole_class: int) -> dict[str, Any]:
        """The record of one picture with one mask, if possible from an earlier launch; see `_measure`."""
        path = self.pictures[index]
        key = fingerprint(
            str(path), stamp(stored_in(path)), index, hole_class, self.holes.identity(index, hole_class)
        )
        record = None if self.journal is None else self.journal.earlier(key)
        if record is None or not self._is_complete(record):
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
        try:
            features: np.ndarray = np.load(self._features_file(record["key"]))
        except (OSError, ValueError, EOFError):  # deleted or damaged
            return None
        return features

    def _is_complete(self, record: dict[str, Any]) -> bool:
        """Whether a record of an earlier launch has every metric that is available here."""
        available = set(self.measure.available)
        without_features = "fid" in available and self.features(record) is None
        return available <= set(record.get("measured", ())) and not without_features

    def write_sheet(self, out: Path, records: list[dict[str, Any]]) -> None:
        """Write ``evaluation.png``, atomically; one of an earlier evaluation never stays."""
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
            write_atomically(out / SHEET, encoded.getvalue())
        else:
            (out / SHEET).unlink(missing_ok=True)

    def _measure(self, record: dict[str, Any]) -> None:
        """Add to the record: "hole_ratio", the measured "class" of the mask, "scores" by method, and "measured"."""
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
            # One row per picture, each of another class.
            position = list(self.holes.classes).index(asked)
            shown = index < self.sheet_rows and position == index % len(self.holes.classes)
        if self.journal is not None and shown:
            masked = np.where(hole[..., None], np.uint8(255), truth)
            write_atomically(self._strip_file(record["key"]), strip([truth, masked, *filled.values()]))
        record["measured"] = list(self.measure.available)

    def _picture(self, index: int) -> np.ndarray:
        if index != self._index or self._truth is None:
            truth = fit_picture(self.pictures[index], self.size)
            with_lpips = "lpips" in self.measure.available
            least = SMALLEST_WITH_LPIPS if with_lpips else SMALLEST
            if min(truth.shape[:2]) < least:
                raise LGNetError(
                    f"picture: expected sides of at least {least}{' for LPIPS' if with_lpips else ''}, "
                    f"got {truth.shape[1]}x{truth.shape[0]}"
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
    """Rows of the contact sheet: an equal number of every kind, from best to worst of `title`, with the ranks."""
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
            chosen.append((f"{rank}: {COLUMNS[name].title} {value:.{COLUMNS[name].digits}f}", ranked[place]))
    return chosen


# For every 8-bit level, the level after the released test script, which scales to [-1, 1] and back in float32 and
# then truncates.
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


def _inpainter(model: Model, options: EvaluationOptions, device: str) -> Inpainter:
    if isinstance(model, Inpainter):
        return model
    return Inpainter.from_pretrained(model, device=device, dtype=options.dtype, backend=options.backend)


def _identity(options: EvaluationOptions, settings: dict[str, Any]) -> str:
    """Identifies this evaluation among others that write to the same folder."""
    named = options.named
    models = {f"models {title!r}": model for title, model in named.items()}
    for name, value in {**models, "lpips": options.lpips, "fid": options.fid}.items():
        if value is not None and not isinstance(value, (str, os.PathLike)):
            raise UsageError(f"{name}: expected a path where `out` is given, got {type(value).__name__}")
    weights = {title: model_stamp(model) for title, model in named.items() if not isinstance(model, Inpainter)}
    lpips = os.environ.get(LPIPS_VARIABLE) or None if options.lpips is None else options.lpips
    files = (lpips, options.fid)
    backbones = [None if file is None else [str(file), stamp(Path(str(file)))] for file in files]
    return fingerprint(settings, weights, backbones, options.rows, __version__)


def _merged(job: _Job, records: list[dict[str, Any]], died: list[int], settings: dict[str, Any]) -> Evaluation:
    """The evaluation of the records of all processes."""
    # Sums have a fixed order, so that the results do not depend on the number of processes.
    records = sorted(records, key=lambda record: (record["index"], record["class"]))
    good = [record for record in records if record.get("error") is None]
    metrics, missing = job.options.metric_names, dict(job.measure.missing)
    for name in metrics:
        without = sum(name not in record["measured"] for record in good)
        if without and name not in missing:
            missing[name] = f"another process could not measure it on {without} pictures"
    groups = _groups(good, lambda one: _label(job.options, one))
    scores = []
    for hole_class, group in groups.items():
        means = _means(group, job, [name for name in metrics if name not in missing])
        scores += [Score(title, hole_class, len(group), **means[title]) for title in job.options.titles]
    if "fid" in metrics and "fid" not in missing and any(len(group) < 2 for group in groups.values()):
        missing["fid"] = "classes of a single picture have none"
    for name in metrics:  # a PSNR of None is infinite
        if name != "psnr" and name not in missing and any(getattr(one, name) is None for one in scores):
            missing[name] = "not a number on some pictures"
    failures: dict[str, str] = {}
    for record in records:
        if record.get("error") is not None:
            failures.setdefault(record["picture"], record["error"])
    versions = {
        "lgnet_fast": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }
    listed = [{"picture": picture, "error": error} for picture, error in failures.items()] + job.plan.not_read
    holes = job.holes.legend if isinstance(job.holes, SuiteMasks) else ""
    legend = " ".join(filter(None, (holes, job.measure.legend)))
    return Evaluation(scores, metrics, missing, listed, died, settings, versions, legend)


def _groups(good: list[dict[str, Any]], label: Callable[[int], str]) -> dict[str, list[dict[str, Any]]]:
    """Records by class; "other" is the last class, followed by all records if there are several classes."""
    groups = {label(one): [r for r in good if r["class"] == one] for one in sorted({r["class"] for r in good})}
    if "other" in groups:
        groups["other"] = groups.pop("other")
    if len(groups) > 1:
        groups[ALL] = good
    return groups


def _means(group: list[dict[str, Any]], job: _Job, measured: list[str]) -> dict[str, dict[str, float | None]]:
    """Means of the measured metrics of each method over a group of records."""
    names = [name for name in measured if name != "fid"]
    means: dict[str, dict[str, float | None]] = {}
    for title in job.options.titles:
        own = [record["scores"][title] for record in group]
        if job.options.suite:
            values = summary(own, names)
        else:
            values = {name: float(np.mean([one[name] for one in own])) for name in names}
        means[title] = {name: finite(value) for name, value in values.items()}
    if "fid" in measured and len(group) > 1:
        stacked = np.stack([one for record in group if (one := job.features(record)) is not None])
        true, *filled = torch.from_numpy(stacked).unbind(dim=1)
        for title, features in zip(job.options.titles, filled, strict=True):
            means[title]["fid"] = finite(frechet_distance(true, features))
    return means


def _remove_if_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:  # the folder holds the journal of another job
        return
