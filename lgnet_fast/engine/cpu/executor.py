"""A plan on the CPU, by one call into ``lgnet_fast._C`` (csrc/program.cpp).

With ``dtype=torch.bfloat16`` a step multiplies pairs of bf16 and sums in float32, where the CPU has such instructions
and where that is faster. A feature map is stored as bf16 where every step that reads it multiplies such pairs, else
as float32. :mod:`.kernels` lists the kernels, :mod:`.choice` chooses one for each step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ... import forks, native
from ...native import tensor_arg, unavailable_reason
from ..arena import plan_arena
from ..executor import Executor, Regions, Result
from ..plan import PICTURE, ConvStep, Plan, Step, View
from ..recent import Recent
from ..regions import Rect
from .choice import choose_kernels
from .kernels import NARROW, TILES, Choice, jobs_of
from .weights import CpuWeights

_ACTIVATIONS = {"none": 0, "relu": 1, "leaky_relu": 2}
_NO_TENSOR = (0,) * 10
_LISTS_KEPT = 16
"""Regions of recent runs that are kept as the program takes them."""


def buffers_of_pairs(plan: Plan, choices: Mapping[str, Choice]) -> frozenset[str]:
    """Names of the buffers that are stored as bf16: every step that reads them multiplies pairs of bf16.

    A step reads its source and its residual. The picture and the stages' raw pictures stay float32.
    """
    kept = {PICTURE}
    for step in plan.steps:
        if step.merges:
            kept.update(store.view.buffer for store in step.stores)
        if choices[step.name].products != "bf16":
            kept.add(step.source.buffer)
            if step.residual is not None:
                kept.add(step.residual.buffer)
    return frozenset(plan.buffers.keys() - kept)


def _plain(picture: Tensor) -> Tensor:
    """Its samples as float32 in memory, with any strides."""
    return picture.detach().float().resolve_neg()


class CpuExecutor(Executor):
    """Runs a plan on the CPU. Thread-safe: calls share the weights and use separate buffers.

    Args:
        plan: dense; only its shapes are used.
        weights: packed for the plan's network.
    """

    per_sample = True
    # 50 us of one core: edges of tiles, and the last steps' lines that read some columns twice. Strokes, blobs and
    # scattered holes take the least time with 5e6; 0 and 2e7 are 1 % slower, 4e7 is 8 %.
    region_macs = 5e6

    def __init__(self, plan: Plan, weights: CpuWeights) -> None:
        if (reason := self.unavailable_reason()) is not None:
            raise RuntimeError(reason)
        self.weights = weights
        self.plan = plan.without_weights()
        self._lock = forks.Lock()
        self._lists: Recent[list[list[Any]]] = Recent(_LISTS_KEPT)
        self.bf16_buffers = buffers_of_pairs(plan, weights.choices)
        self._arena = plan_arena(plan, halves=self.bf16_buffers)
        self._program = self._new_program()

    def _new_program(self) -> Any:
        """The plan as the extension runs it; it keeps the workspaces of its runs."""
        plan, offsets = self.plan, self._arena.offsets
        return native.library().Program(
            plan.batch,
            plan.height,
            plan.width,
            self._arena.size,
            offsets[PICTURE],
            [self._specify(step, offsets) for step in plan.steps],
        )

    @classmethod
    def of(
        cls,
        plan: Plan,
        dtype: torch.dtype = torch.float32,
        choices: Mapping[str, str] | None = None,
        chosen_by: str = "request",
    ) -> CpuExecutor:
        """The executor of a plan with weights on the CPU. `choices` None: by :func:`.choice.choose_kernels`."""
        if (reason := cls.unavailable_reason()) is not None:
            raise RuntimeError(reason)
        if choices is None:
            weights = CpuWeights.pack(plan, dtype, choose_kernels(plan, dtype), "model")
        else:
            weights = CpuWeights.pack(plan, dtype, choices, chosen_by)
        native.library().release_free_memory()
        return cls(plan, weights)

    @staticmethod
    def unavailable_reason() -> str | None:
        """Why this executor cannot run here, in one sentence; None where it can."""
        return unavailable_reason()

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        return self.weights.dtype

    def resized(self, plan: Plan) -> CpuExecutor:
        return CpuExecutor(plan, self.weights)

    @property
    def choices(self) -> dict[str, str]:
        return {name: str(choice) for name, choice in self.weights.choices.items()}

    @property
    def chosen_by(self) -> str:
        return self.weights.chosen_by

    @property
    def packed_bytes(self) -> int:
        """Size of the packed weights."""
        return self.weights.data.numel()

    @property
    def workspace_bytes(self) -> int:
        """Bytes of buffers and scratch that finished calls left for later ones, for as many calls as ran at once."""
        return int(self._program.workspace_bytes())

    @property
    def buffer_bytes(self) -> int:
        return max(self.workspace_bytes, 4 * self._arena.size)

    @property
    def held_bytes(self) -> int:
        return self.workspace_bytes

    def drop_buffers(self) -> None:
        """See :meth:`..executor.Executor.drop_buffers`; those of runs in other threads are freed as these end."""
        self._program = self._new_program()

    def release(self) -> None:
        native.library().release_free_memory()

    def state(self) -> dict[str, Any]:
        return self.weights.state()

    # -- program -------------------------------------------------------------------------------------------------

    def _specify(self, step: Step, offsets: Mapping[str, int]) -> Any:
        library = native.library()
        plan = self.plan
        choice, placed = self.weights.choices[step.name], self.weights.placed[step.name]
        base = self.weights.address(step)

        def place(view: View) -> tuple[int, bool]:
            """Offset in elements of the buffer, and whether those are bf16."""
            half = view.buffer in self.bf16_buffers
            return (2 if half else 1) * offsets[view.buffer] + view.offset, half

        def target(view: View, activation: str) -> Any:
            offset, half = place(view)
            channels = plan.buffers[view.buffer].channels
            return library.TargetSpec(offset, channels, _ACTIVATIONS[activation], half)

        source, out = plan.source(step), plan.target(step)
        if not isinstance(step, ConvStep):
            if step.stores[0].activation not in ("none", "relu"):
                raise ValueError(f"{step.name}: expected no activation or relu, got {step.stores[0].activation}")
            spec = library.AttentionStep()
        else:
            spec = library.LastStep() if choice.kernel == NARROW else library.ConvStep()
        offset, half = place(step.source)
        spec.source = library.MapSpec(
            offset, source.height, source.width, source.channels, step.source.channels, half
        )
        spec.out_height, spec.out_width = out.height, out.width
        spec.products = library.Products.__members__[choice.products]
        # A stage's last step applies its tanh itself.
        spec.targets = [target(s.view, "none" if step.merges else s.activation) for s in step.stores]
        spec.weight, spec.bias = base + placed.weights[0], base + placed.bias
        spec.regions = self._regions(step, step.regions)
        if not isinstance(step, ConvStep):
            spec.released = native.variant_arg(step.variant)
            return spec
        geometry = step.geometry
        spec.reflect = geometry.reflect
        if choice.kernel == NARROW:
            spec.kernel, spec.stride, spec.padding = geometry.kernel, geometry.stride, geometry.padding
            spec.transposed = geometry.transposed
            return spec
        spec.out_channels = step.out_channels
        if step.residual is not None:
            spec.residual = target(step.residual, "none")
        spec.tile, spec.chunk = TILES[choice.kernel], choice.chunk
        spec.in_step, spec.out_step = geometry.in_step, geometry.out_step
        places = iter(placed.weights)
        spec.jobs = [
            library.Job(
                job.oy,
                job.ox,
                [library.Group(g.ry, g.rx, g.starts, next(places) - placed.weights[0]) for g in job.groups],
            )
            for job in jobs_of(geometry, spec.tile)
        ]
        return spec

    def _regions(self, step: Step, rects: Sequence[Rect], sample: int = -1) -> list[Any]:
        return [
            native.library().Region(tuple(r), tuple(step.reads(r, self.plan.source(step))), sample) for r in rects
        ]

    # -- running -------------------------------------------------------------------------------------------------

    def run(
        self,
        image: Tensor,
        mask: Tensor,
        start: Tensor | None = None,
        regions: Regions | None = None,
        stages: bool = True,
    ) -> Result:
        result, raw, _ = self._run(image, mask, start, self._listed(regions), stages)
        return result, raw

    def run_each(
        self,
        image: Tensor,
        mask: Tensor,
        start: Tensor | None,
        regions: Sequence[Regions | None],
        stages: bool = True,
    ) -> Result:
        lists: list[list[Any]] = [[] for _ in self.plan.steps]
        for sample, own in enumerate(regions):
            for number, step in enumerate(self.plan.steps):
                lists[number] += self._regions(step, step.regions if own is None else own[number], sample)
        result, raw, _ = self._run(image, mask, start, lists, stages)
        return result, raw

    def timed(self, image: Tensor, mask: Tensor) -> tuple[Tensor, list[Tensor], list[float]]:
        """A dense run: the merged picture, the stages' raw ones, and every step's milliseconds."""
        return self._run(image, mask, None, [])

    def step_times(self, image: Tensor, mask: Tensor, regions: Regions | None = None, rounds: int = 5) -> list[float]:
        listed = self._listed(regions)
        runs = [self._run(image, mask, None, listed)[2] for _ in range(rounds)]
        return [min(times) for times in zip(*runs, strict=True)]

    def _listed(self, regions: Regions | None) -> list[list[Any]]:
        """The same regions for all samples, in the form of the program."""
        if regions is None:
            return []

        def make() -> list[list[Any]]:
            return [self._regions(step, rects) for step, rects in zip(self.plan.steps, regions, strict=True)]

        with self._lock:
            return self._lists.get(tuple(regions), make)

    def _run(
        self,
        image: Tensor,
        mask: Tensor,
        start: Tensor | None,
        regions: Sequence[Sequence[Any]],
        stages: bool = True,
        poison: bool = False,
    ) -> tuple[Tensor, list[Tensor], list[float]]:
        """The run, and every step's milliseconds. `poison`: buffers start full of NaN, so that what is read without
        having been computed shows."""
        plan = self.plan
        image, mask = _plain(image), _plain(mask)
        start = None if start is None else _plain(start)
        out = torch.empty(plan.batch, 3, plan.height, plan.width, dtype=torch.float32, device="cpu")
        raw = [torch.empty_like(out) for step in plan.steps if step.merges and stages]
        times = self._program.run(
            tensor_arg(image),
            tensor_arg(mask),
            _NO_TENSOR if start is None else tensor_arg(start),
            tensor_arg(out),
            [tensor_arg(r) for r in raw],
            regions,
            forks.kernel_threads(),
            poison,
        )
        return out, raw, times
