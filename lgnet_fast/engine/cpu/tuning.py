"""Measured choices on a CPU: every step's kernels timed in place, checked against the plain ones, and kept.

"In place" means within runs of the whole plan: the caches are then in the state that the previous step leaves. One
run times one candidate of many steps at once. Results are kept in the user's cache folder after every run, for the
processor, instruction set, threads, dtype and version, so an interrupted tuning keeps its measurements.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import cache, forks
from ...native import isa_name
from ..plan import ConvStep, Plan, Step
from .choice import (
    Cost,
    choice_of,
    choose_kernels,
    kernels_for,
    modelled_costs,
    plain_choice,
    products_for,
    weight_bytes,
)
from .executor import CpuExecutor
from .kernels import CHUNKS, TILES, Choice, Products
from .weights import CpuWeights

logger = logging.getLogger("lgnet_fast")

SECONDS = 60.0
"""Default duration of a tuning."""
_BESIDE_BYTES = 384 << 20
"""Largest size of the packed weights of the candidates of one run."""
_ROUNDS = 3
_GAIN = 0.01
"""A measured chunk size is used if it is faster than the rule's by at least this share of the step's time."""
_LIMITS = {torch.float32: 2e-3, torch.bfloat16: 5e-2}
"""Largest RMS difference from the pictures of the plain kernels, relative to their RMS."""


class Timing(NamedTuple):
    """One run: milliseconds of every step, and its pictures."""

    steps: Sequence[float]
    pictures: Sequence[Tensor]


Measure = Callable[[CpuExecutor], Timing]


@dataclass
class Measured:
    """Measurements of one plan, and the choices that follow from them.

    Attributes:
        times: step's name -> choice -> milliseconds. For a choice with a chunk: of that step. For other choices: of
            the first of the steps that share weights, the mean over these steps.
        wrong: (step, choice) whose result differs from that of the plain kernel.
        choices: for every step; None while kernels are still being measured.
        total_ms: milliseconds of a run with `choices`; None where there was none yet.
        model_ms: milliseconds of a run with the choices of the cost model.
    """

    times: dict[str, dict[str, float]] = field(default_factory=lambda: defaultdict(dict))
    wrong: list[tuple[str, str]] = field(default_factory=list)
    choices: dict[str, str] | None = None
    total_ms: float | None = None
    model_ms: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """As the cache keeps it."""
        return {
            "times": {name: dict(times) for name, times in self.times.items()},
            "wrong": [list(pair) for pair in self.wrong],
            "choices": self.choices,
            "total_ms": self.total_ms,
            "model_ms": self.model_ms,
        }

    @classmethod
    def from_dict(cls, value: Any) -> Measured | None:
        """The inverse of :meth:`as_dict`; None where `value` has another form."""
        try:
            times = {str(n): {str(c): float(ms) for c, ms in own.items()} for n, own in value["times"].items()}
            found = cls(defaultdict(dict, times), [(str(name), str(choice)) for name, choice in value["wrong"]])
            if value["choices"] is not None:
                found.choices = {str(name): str(choice) for name, choice in value["choices"].items()}
            if value["total_ms"] is not None:
                found.total_ms, found.model_ms = float(value["total_ms"]), float(value["model_ms"])
        except (TypeError, KeyError, ValueError, AttributeError):
            return None
        return found

    def __str__(self) -> str:
        if self.total_ms is None or self.model_ms is None:
            return f"kernels of {len(self.times)} steps measured, not to the end"
        return f"measured: {self.total_ms:.1f} ms a run, by the model {self.model_ms:.1f} ms"


def key(dtype: torch.dtype) -> cache.Key:
    """The cache's key for this CPU with the instruction set and number of threads in use."""
    return cache.cpu_key(dtype, isa_name(), forks.kernel_threads())


def kept(plan: Plan, dtype: torch.dtype) -> dict[str, str] | None:
    """The measured choices of a plan on this machine; None where none are kept or they do not fit the plan."""
    found = Measured.from_dict(cache.get(key(dtype), cache.CHOICES, plan.name))
    if found is None:
        return None
    choices = measured_choices(plan, dtype, found) if found.choices is None else found.choices
    return choices if _fit(plan, choices, dtype) else None


def _fit(plan: Plan, choices: Mapping[str, Any], dtype: torch.dtype) -> bool:
    if list(choices) != [step.name for step in plan.steps]:
        return False
    products = products_for(dtype)
    for step in plan.steps:
        try:
            choice = Choice.parse(choices[step.name])
            owner = Choice.parse(choices[step.weights_of])
        except (ValueError, AttributeError):
            return False
        if choice.packed != owner.packed or str(choice.packed) not in options(step, products):
            return False
    return True


def options(step: Step, products: Products) -> list[str]:
    """Every choice that can run a step, the plainest first; with products of bf16 also those in float32."""
    found = [plain_choice(step, products)]
    kinds: tuple[Products, ...] = ("float32",) if products == "float32" else (products, "float32")
    for kind in kinds:
        for kernel in kernels_for(step, kind):
            choice = choice_of(step, kernel, kind)
            if choice not in found:
                found.append(choice)
    return found


def measured_choices(plan: Plan, dtype: torch.dtype, found: Measured) -> dict[str, str]:
    """A choice for every step: by its measured times if all its kernels were measured, else by the cost model.

    None whose result was wrong.
    """
    products = products_for(dtype)
    costs: dict[str, Mapping[str, Cost]] = {
        name: {choice: cost for choice, cost in own.items() if (name, choice) not in found.wrong}
        for name, own in modelled_costs(plan, dtype).items()
    }
    for step in plan.steps:
        wanted = [c for c in options(step, products) if (step.name, c) not in found.wrong]
        times = found.times.get(step.name, {})
        if step.weights_of != step.name or len(options(step, products)) < 2 or any(c not in times for c in wanted):
            continue
        costs[step.name] = {c: Cost(1e-3 * times[c], _bytes(step, Choice.parse(c))) for c in wanted}
    chosen = choose_kernels(plan, dtype, costs)
    for step in plan.steps:
        times = found.times.get(step.name, {})
        rule = times.get(f"{chosen[step.name]} by rule")
        chunked = {
            str(Choice.parse(chosen[step.name])._replace(chunk=chunk)): None for chunk in CHUNKS if rule is not None
        }
        right = [c for c in chunked if c in times and (step.name, c) not in found.wrong]
        if rule is not None and right:
            best = min(right, key=lambda c: times[c])
            if times[best] < (1 - _GAIN) * rule:
                chosen[step.name] = best
    return chosen


def _bytes(step: Step, choice: Choice) -> int:
    return weight_bytes(step, choice.kernel, choice.products) if isinstance(step, ConvStep) else 0


def tune(
    plan: Plan,
    dtype: torch.dtype,
    seconds: float = SECONDS,
    progress: Callable[[str], None] = lambda text: None,
    measure: Measure | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Measured:
    """Measure the kernels of every step of a plan, and keep what was found for later processes.

    Args:
        plan: dense, with float32 weights on the CPU.
        dtype: float32 or bfloat16.
        seconds: no new measurement begins after this time.
        progress: called with one line per round of measurements.
        measure: runs an executor once; None: on a fixed picture that is all hole.
        clock: returns seconds.
    """
    contest = _Contest(plan, dtype, measure or _on_a_picture(plan), progress, clock() + seconds, clock)
    return contest.run()


def _on_a_picture(plan: Plan) -> Measure:
    generator = torch.Generator("cpu").manual_seed(20)
    size = (plan.batch, 3, plan.height, plan.width)
    image = torch.rand(size, generator=generator, device="cpu", dtype=torch.float32) * 2 - 1
    mask = torch.ones_like(image[:, :1])

    def measure(executor: CpuExecutor) -> Timing:
        result, raw, times = executor.timed(image, mask)
        return Timing(times, (result, *raw))

    return measure


class _Contest:
    def __init__(
        self,
        plan: Plan,
        dtype: torch.dtype,
        measure: Measure,
        progress: Callable[[str], None],
        deadline: float,
        clock: Callable[[], float],
    ) -> None:
        self.plan, self.dtype, self.products = plan, dtype, products_for(dtype)
        self.measure, self.progress, self.deadline, self.clock = measure, progress, deadline, clock
        self.found = Measured()
        self.users: dict[str, list[Step]] = defaultdict(list)
        for step in plan.steps:
            self.users[step.weights_of].append(step)
        self.owners = [step for step in plan.steps if step.weights_of == step.name]
        self.number = {step.name: number for number, step in enumerate(plan.steps)}
        self.reference: Sequence[Tensor] = ()

    def run(self) -> Measured:
        plain = {step.name: plain_choice(step, self.products) for step in self.plan.steps}
        base = CpuExecutor.of(self.plan, self.dtype, plain)
        self.reference = [picture.clone() for picture in self.measure(base).pictures]
        self._take(base, {step.name: plain[step.name] for step in self.owners})
        for trial in self._trials():
            if self.clock() > self.deadline:
                break
            self._try(base.weights, trial)
            self._keep()
        choices = measured_choices(self.plan, self.dtype, self.found)
        del base
        self._chunks(CpuExecutor.of(self.plan, self.dtype, choices))
        self.found.choices = measured_choices(self.plan, self.dtype, self.found)
        self._final()
        self._keep()
        return self.found

    def _trials(self) -> Iterator[dict[str, str]]:
        """Step's name -> candidate: at most one of every step, for as many steps as `_BESIDE_BYTES` allows."""
        left = {step.name: options(step, self.products)[1:] for step in self.owners}
        while any(left.values()):
            trial: dict[str, str] = {}
            room = _BESIDE_BYTES
            for step in self.owners:
                if left[step.name]:
                    need = _bytes(step, Choice.parse(left[step.name][0]))
                    if need <= room or not trial:
                        room -= need
                        trial[step.name] = left[step.name].pop(0)
            yield trial

    def _try(self, weights: CpuWeights, trial: Mapping[str, str]) -> None:
        """Time one candidate of each step named; candidates with a wrong result are left out."""
        everyone = {user.name: choice for name, choice in trial.items() for user in self.users[name]}
        executor = CpuExecutor(self.plan, weights.with_choices(self.plan, everyone))
        if not self._right(self.measure(executor).pictures):
            if len(trial) > 1:
                for name, choice in trial.items():  # to find the wrong one
                    self._try(weights, {name: choice})
            else:
                (wrong,) = trial.items()
                self.found.wrong.append(wrong)
                logger.warning("%s: %s differs from the plain kernel and is left out", *wrong)
            return
        self._take(executor, trial)

    def _right(self, pictures: Sequence[Tensor]) -> bool:
        limit = _LIMITS[self.dtype]
        for picture, exact in zip(pictures, self.reference, strict=True):
            scale = exact.double().square().mean().sqrt()
            if not (picture - exact).double().square().mean().sqrt() <= limit * scale:  # so that NaN fails
                return False
        return True

    def _least(self, executor: CpuExecutor) -> list[float]:
        """Milliseconds of every step, the least of `_ROUNDS` runs."""
        runs = [self.measure(executor).steps for _ in range(_ROUNDS)]
        return [min(times) for times in zip(*runs, strict=True)]

    def _take(self, executor: CpuExecutor, trial: Mapping[str, str]) -> None:
        times = self._least(executor)
        for name, choice in trial.items():
            own = [times[self.number[user.name]] for user in self.users[name]]
            self.found.times[name][choice] = sum(own) / len(own)
        self.progress(f"{len(trial)} kernels, a run of {sum(times):.1f} ms")

    def _chunks(self, executor: CpuExecutor) -> None:
        """Time every chunk size, each for all convolutions at once."""
        if self.clock() > self.deadline:
            return
        convolutions = {n: c for n, c in executor.weights.choices.items() if c.kernel in TILES}
        times = self._least(executor)
        for name, choice in convolutions.items():
            self.found.times[name][f"{choice} by rule"] = times[self.number[name]]
        for chunk in CHUNKS:
            if self.clock() > self.deadline:
                return
            trial = {name: str(choice._replace(chunk=chunk)) for name, choice in convolutions.items()}
            other = CpuExecutor(self.plan, executor.weights.with_choices(self.plan, trial))
            if not self._right(self.measure(other).pictures):
                self.found.wrong += trial.items()
                logger.warning("chunks of %d tiles differ from the plain kernels and are left out", chunk)
                continue
            times = self._least(other)
            for name, text in trial.items():
                self.found.times[name][text] = times[self.number[name]]
            self.progress(f"chunks of {chunk}: a run of {sum(times):.1f} ms")
            self._keep()

    def _final(self) -> None:
        """Time whole runs with the measured choices and with the model's, in turn; keep the faster ones."""
        assert self.found.choices is not None
        by_model = measured_choices(self.plan, self.dtype, Measured(wrong=self.found.wrong))
        different = [by_model] if by_model == self.found.choices else [by_model, self.found.choices]
        executors = [CpuExecutor.of(self.plan, self.dtype, choices) for choices in different]
        totals: list[list[float]] = [[] for _ in executors]
        for _ in range(1 + _ROUNDS):
            for own, executor in zip(totals, executors, strict=True):
                own.append(sum(self.measure(executor).steps))
        self.found.model_ms, self.found.total_ms = min(totals[0][1:]), min(totals[-1][1:])
        if self.found.total_ms > self.found.model_ms:
            self.found.choices, self.found.total_ms = by_model, self.found.model_ms

    def _keep(self) -> None:
        cache.put(key(self.dtype), cache.CHOICES, self.plan.name, self.found.as_dict())


def gains(plan: Plan, dtype: torch.dtype, found: Measured) -> list[tuple[str, str, float, str, float]]:
    """For every step: its name, the model's choice and its milliseconds, the measured choice and its milliseconds.

    NaN: not measured.
    """
    by_model, chosen = choose_kernels(plan, dtype), found.choices or choose_kernels(plan, dtype)
    rows = []
    for step in plan.steps:
        own, shared = found.times.get(step.name, {}), found.times.get(step.weights_of, {})

        def ms(choice: str, own: Mapping[str, float] = own, shared: Mapping[str, float] = shared) -> float:
            return own.get(choice, own.get(f"{choice} by rule", shared.get(choice, float("nan"))))

        rows.append(
            (step.name, by_model[step.name], ms(by_model[step.name]), chosen[step.name], ms(chosen[step.name]))
        )
    return rows
