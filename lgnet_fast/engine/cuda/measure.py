"""Measurements on an NVIDIA GPU: compiling and timing candidates, the results, and their form in the cache.

The user's cache folder keeps results product by product, for the GPU, driver, PyTorch, Triton, version and dtype.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor

from ... import cache
from .graphs import Pool, capture, elapsed_ms
from .launches import run_all
from .weights import Overlap, Tuned

if TYPE_CHECKING:
    from lgnet_fast.kernels.configs import Inference
    from lgnet_fast.kernels.conv_configs import Work

    from .weights import Choice

GAIN = 0.02
"""Share of the time by which a candidate must beat what runs without tuning."""
GAIN_ALONE = 0.1
"""The same where no whole runs are timed afterwards: at an engine's first use, and by estimate."""
_WRONG = {torch.float16: 5e-3, torch.bfloat16: 4e-2, torch.float32: 2e-3}
"""Smallest relative error (RMS) of a step that counts as wrong."""

_MOST_TRIED = 30
"""Most candidates of one product or operation."""
_SECONDS_A_KERNEL = 1.3
"""Seconds to compile a kernel, in one process."""

Log = Callable[..., None]
"""Called with a section's name and figures by keyword."""


def progress_of(progress: Callable[[str], None]) -> Log:
    """A log that gives `progress` one line for each product or operation that was measured."""

    def log(section: str, **figures: Any) -> None:
        if "best_us" in figures:
            before, now = figures["default_us"], figures["best_us"]
            progress(f"{figures['step']}: {before:.1f} us, now {now:.1f} us, {before / now:.2f}x")
        elif "compiled" in figures:
            what = figures.get("part", section)
            progress(f"{what}: {figures['compiled']} launches compiled in {figures['seconds']:.0f} s")
        elif "dropped" in figures:
            progress(f"{figures['step']}: forward and backward are not faster in all, nothing is changed")

    return log


def excessive_error(actual: Tensor, expected: Tensor, dtype: torch.dtype, factor: float = 1) -> float | None:
    """The relative error, |actual - expected| / |expected|, where it is NaN or over `factor` times the dtype's limit.

    None for a right result.
    """
    error = ((actual - expected).norm() / expected.norm()).item()
    return None if error < factor * _WRONG[dtype] else error


class Timer:
    """How candidates are compiled and timed on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def compile(self, launches: Sequence[Any]) -> list[str]:
        """Compile recorded launches in parallel processes; return one sentence for each failure."""
        from lgnet_fast.kernels.precompile import compile_all

        return compile_all(launches, self.device.index or 0)

    def workers(self) -> int:
        """Number of processes that compile in parallel."""
        from lgnet_fast.kernels.precompile import workers

        return workers(1000)

    def affordable(self, seconds: float, groups: int) -> int:
        """Candidates of each of `groups` products or operations, of those that can be compiled in `seconds`."""
        kernels = seconds * self.workers() / _SECONDS_A_KERNEL
        return max(3, min(_MOST_TRIED, int(kernels / max(1, groups))))

    def time(self, launches: Sequence[Callable[[], None]], spread: bool = False) -> float:
        """Microseconds per launch in a graph of all of them, the median of seven replays; `spread`: see `capture`."""
        graph = capture(functools.partial(run_all, launches), self.device, Pool(self.device), spread)
        return self.median_us(graph.replay) / len(launches)

    def median_us(self, call: Callable[[], None], repeats: int = 7) -> float:
        """Microseconds of a call, the median of `repeats`."""
        for _ in range(3):
            call()
        times = [1e3 * elapsed_ms(call, self.device) for _ in range(repeats)]
        return sorted(times)[len(times) // 2]

    def wait(self) -> None:
        """Wait for the launches; raises their errors. Waiting for all streams would end another thread's capture."""
        torch.cuda.current_stream(self.device).synchronize()


@dataclass
class Found:
    """Measurements of a plan.

    Attributes:
        tiles: product (see :func:`product_key`) -> its result.
        attention: (channels, positions, batch) of an attention block -> its result.
        now_ms: milliseconds of a whole run with these choices; None where it was not measured.
        before_ms: milliseconds of a run without tuning; None where it was not measured.
        deep_rows: name of a plan -> most rows of the layers that share a launch.
        overlap: name of a plan -> how its launches overlap.
        chains: name of a plan -> the first steps of the groups of convolutions that share a launch.
        at_first_use: whether these are the engine's own measurements at its first use, not those of a tuning.
    """

    tiles: dict[tuple[Any, ...], Result] = field(default_factory=dict)
    attention: dict[tuple[int, int, int], Result] = field(default_factory=dict)
    now_ms: float | None = None
    before_ms: float | None = None
    deep_rows: dict[str, int] = field(default_factory=dict)
    overlap: dict[str, Overlap] = field(default_factory=dict)
    chains: dict[str, tuple[str, ...]] = field(default_factory=dict)
    at_first_use: bool = False

    def tuned(self) -> Tuned:
        """The choices, for the executor."""
        from lgnet_fast.kernels.configs import Inference

        tiles = {key: choice_of(result.choice) for key, result in self.tiles.items()}
        attention = {key: Inference(*result.choice) for key, result in self.attention.items()}
        return Tuned(tiles, attention, dict(self.deep_rows), dict(self.overlap), dict(self.chains))

    def as_dict(self) -> dict[str, Any]:
        """As the cache keeps it."""
        return {
            "tiles": [[list(key), *result.as_list()] for key, result in self.tiles.items()],
            "attention": [[list(key), *result.as_list()] for key, result in self.attention.items()],
            "now_ms": self.now_ms,
            "before_ms": self.before_ms,
            "deep_rows": self.deep_rows,
            "overlap": self.overlap,
            "chains": self.chains,
            "at_first_use": self.at_first_use,
        }

    @classmethod
    def from_dict(cls, value: Any) -> Found | None:
        """The inverse of :meth:`as_dict`; None where `value` has another form."""
        try:
            found = cls(
                {_frozen(key): Result(*map(_frozen, result)) for key, *result in value["tiles"]},
                {_frozen(key): Result(*map(_frozen, result)) for key, *result in value["attention"]},
                value["now_ms"],
                value["before_ms"],
                {str(name): int(rows) for name, rows in value.get("deep_rows", {}).items()},
                {name: how for name, how in value.get("overlap", {}).items() if how in get_args(Overlap)},
                {str(name): tuple(map(str, steps)) for name, steps in value.get("chains", {}).items()},
                bool(value.get("at_first_use", False)),
            )
            found.tuned()
        except (AttributeError, TypeError, KeyError, ValueError):
            return None
        return found

    def __str__(self) -> str:
        deep = ", deep layers in one launch" if self.deep_rows else ""
        overlap = ", overlapping launches" if self.overlap else ""
        chains = ", chains of convolutions in one launch" if self.chains else ""
        if self.at_first_use:
            blocks = f"{len(self.attention)} attention blocks" if self.attention else "launches of several layers"
            count = f"{len(self.tiles)} convolutions" if self.tiles else blocks
            return f"{count} measured at first use{deep}{chains}"
        count = f"{len(self.tiles)} convolutions, {len(self.attention)} attention blocks measured"
        if self.now_ms is None or self.before_ms is None:
            return f"{count}, not to the end"
        return f"{count}{deep}{chains}{overlap}: {self.now_ms:.3f} ms a run, without {self.before_ms:.3f} ms"


@dataclass(frozen=True)
class Result:
    """The fastest choice of a product, its microseconds, and both for the choice without tuning."""

    choice: Any
    us: float
    default: Any
    default_us: float

    def as_list(self) -> list[Any]:
        """As the cache keeps it."""
        return [self.choice, self.us, self.default, self.default_us]


def _frozen(value: Any) -> Any:
    """Lists, as JSON has them, converted to tuples."""
    return tuple(map(_frozen, value)) if isinstance(value, (list, tuple)) else value


def product_key(work: Work, kind: str) -> tuple[Any, ...]:
    """Key of a measured tile: (dtype kind, rows, columns, taps of every phase, input channels)."""
    return (kind, *work[:4])


def tuned_plans(key: cache.Key) -> set[str]:
    """Names of the plans of which a tuning has decided how whole runs are launched, also that nothing gains."""
    return _ended(_all_found(key))


def _all_found(key: cache.Key) -> dict[str, Found]:
    """Name in the cache -> measurements."""
    found = {entry.name: Found.from_dict(entry.value) for entry in cache.entries(cache.CHOICES) if entry.key == key}
    return {name: one for name, one in found.items() if one is not None}


def _ended(found: Mapping[str, Found]) -> set[str]:
    return {name for name, one in found.items() if not one.at_first_use and one.now_ms is not None}


def kept(device: torch.device, dtype: torch.dtype, at_first_use: bool | None = None) -> Tuned:
    """All measurements on a GPU in a dtype, for all networks and sizes; those of a tuning before those at first use.

    at_first_use: those alone; None: both.
    """
    key = cache.key_for(device, dtype)
    named = _all_found(key)
    all_found = sorted(named.values(), key=lambda one: not one.at_first_use)
    decided = _ended(named)
    tiles: dict[tuple[Any, ...], Any] = {}
    attention: dict[tuple[int, int, int], Inference] = {}
    deep_rows: dict[str, int] = {}
    overlap: dict[str, Overlap] = {}
    chains: dict[str, tuple[str, ...]] = {}
    for one in all_found:
        if at_first_use in (None, one.at_first_use):
            tuned = one.tuned()
            tiles.update(tuned.tiles)
            attention.update(tuned.attention)
            overridden = decided if one.at_first_use and at_first_use is None else set()
            deep_rows.update({name: rows for name, rows in tuned.deep_rows.items() if name not in overridden})
            overlap.update(tuned.overlap)
            chains.update({name: steps for name, steps in tuned.chains.items() if name not in overridden})
    return Tuned(tiles, attention, deep_rows, overlap, chains)


def plain(choice: Any) -> Any:
    """A choice as a plain tuple or string, as the cache keeps it."""
    from lgnet_fast.kernels import compiled

    if (tile := compiled.as_compiled(choice)) is not None:
        return compiled.plain(tile)
    return choice if choice == "cudnn" else tuple(choice)


def choice_of(stored: Any) -> Choice:
    """The inverse of :func:`plain`."""
    from lgnet_fast.kernels import compiled
    from lgnet_fast.kernels.conv_configs import Tile

    if stored == "cudnn":
        return "cudnn"
    return compiled.tile_of(stored) or Tile(*stored)
