"""Running a plan on an NVIDIA GPU by this package's kernels (see :mod:`.graph_executor` for buffers and graphs).

Each step is one launch of `kernels/conv.py` (two with split depth, one more for every further rectangle of a
restricted run) or the attention block. Where they were measured as faster, a step uses a compiled kernel
(`kernels/hopper.py`, `kernels/picture_conv.py`) or PyTorch's convolution (cuDNN, kernels/conv_tables.py), and some
steps share a launch: the deep layers (:mod:`.deep_layers`), and chains of convolutions (:mod:`.chains`).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...ops.torch_state import is_capturing
from ..executor import Regions
from ..plan import PICTURE, AttentionStep, ConvStep, Plan, Step, View
from ..regions import Rect
from . import chains
from .deep_layers import applies, group_launch, make_groups
from .graph_executor import GraphExecutor, GraphOptions
from .launches import Launch, attend, convolve, run_all
from .measure import GAIN_ALONE
from .memory import Memory
from .weights import CudaWeights, Tuned, card_of, conv_of, target_of, work_of

if TYPE_CHECKING:
    from typing_extensions import Self

    from lgnet_fast.kernels.cards import Card
    from lgnet_fast.kernels.compiled import CompiledTile
    from lgnet_fast.kernels.configs import Inference
    from lgnet_fast.kernels.conv_configs import Tile
    from lgnet_fast.kernels.deep import DeepGroup
    from lgnet_fast.kernels.hopper_chain import Chain
    from lgnet_fast.kernels.results import Merge

    from .weights import Choice, Overlap

logger = logging.getLogger("lgnet_fast")
waits = logging.getLogger("lgnet_fast.waits")  # which the command line shows


@dataclass(frozen=True)
class CudaOptions(GraphOptions):
    """How kernels are launched.

    Attributes:
        overlap: how launches overlap (Hopper and newer); None: as measured, else not at all.
        deep_rows: consecutive steps of at most this many outputs per phase share a launch where they can (Hopper); 0:
            none; None: as measured, else none.
        chains: whether other consecutive convolutions share a launch where they can (Hopper); None: as measured, else
            no.
    """

    overlap: Overlap | None = None
    deep_rows: int | None = None
    chains: bool | None = None


class CudaExecutor(GraphExecutor):
    """A :class:`.graph_executor.GraphExecutor` by kernels of this package (interpreted by Triton: on CPU tensors).

    Args:
        plan: dense; only its shapes are used.
        weights: of the plan's network.
        options: how launches are made.
    """

    weights: CudaWeights
    options: CudaOptions
    granularity = 32  # coarse, so that few graphs serve many holes
    # A launch in a graph takes 2.8 us on an H100, which does 3.6e14 multiply-accumulates a second (by the difference
    # between a 16x16 hole and a dense run).
    region_macs = 1e9

    def __init__(self, plan: Plan, weights: CudaWeights, options: CudaOptions = CudaOptions()) -> None:
        if (reason := self.unavailable_reason(weights.device, weights.dtype)) is not None:
            raise RuntimeError(reason)
        super().__init__(plan, weights, options)
        if options.overlap not in (None, "none") and (reason := self._overlap_reason()) is not None:
            raise RuntimeError(f"overlap: {reason}")
        self._groups: dict[int, DeepGroup] | None = None
        self._chained: list[range] | None = None

    @classmethod
    def of(
        cls,
        plan: Plan,
        dtype: torch.dtype = torch.float16,
        *,
        device: torch.device | None = None,
        choices: Mapping[str, Choice] | None = None,
        tuned: Tuned | None = None,
        by_library: frozenset[str] = frozenset(),
        **options: Any,
    ) -> Self:
        """The executor of a plan with weights.

        Args:
            plan: dense, with weights; only its shapes are kept.
            dtype: float32 (tf32 as ``torch.backends.cuda.matmul.allow_tf32`` says), float16 or bfloat16.
            device: where to run; None: where the weights are.
            choices, tuned, by_library: see :class:`.weights.CudaWeights`.
            options: of :class:`CudaOptions`.
        """
        device = plan.steps[0].weight.device if device is None else torch.device(device)
        if (reason := cls.unavailable_reason(device, dtype)) is not None:
            raise RuntimeError(reason)
        weights = CudaWeights.pack(plan, dtype, device=device, choices=choices, tuned=tuned, by_library=by_library)
        return cls(plan, weights, CudaOptions(**options))

    @staticmethod
    def unavailable_reason(device: torch.device, dtype: torch.dtype = torch.float16) -> str | None:
        """Why this executor cannot run on `device` in `dtype`, in one sentence; None where it can."""
        from lgnet_fast import kernels

        if (reason := kernels.missing()) is not None:
            return reason
        from lgnet_fast.kernels.conv import CAPABILITY
        from lgnet_fast.kernels.launch import device_reason

        return device_reason(torch.empty(0, dtype=dtype, device=device), CAPABILITY)

    def _overlap_reason(self) -> str | None:
        from lgnet_fast.kernels.conv import can_overlap

        return can_overlap(self.device)

    # -- choices -------------------------------------------------------------------------------------------------

    def tile(self, step: ConvStep, rect: Rect | None = None) -> Tile:
        """The tile for a rectangle (None: all) of a step."""
        from lgnet_fast.kernels.conv_configs import Tile, pick_tile

        target = target_of(self.device, self.dtype)
        work = work_of(self.plan, step, rect)
        for choice in (self.weights.chosen.get(step.name), self.weights.tuned.tile(work, target[0])):
            if isinstance(choice, Tile):
                return choice
        return pick_tile(work, *target)

    def _compiled_tile(self, step: ConvStep, rect: Rect | None = None) -> CompiledTile | None:
        """The tile of a compiled kernel for a rectangle of a step; None where `kernels/conv.py` runs it."""
        from lgnet_fast.kernels.compiled import as_compiled, usable
        from lgnet_fast.kernels.hopper_shapes import HopperTile

        choice = self.weights.chosen.get(step.name)
        if choice is not None:
            return as_compiled(choice)
        kind = target_of(self.device, self.dtype)[0]
        conv, work, tuned = conv_of(step), work_of(self.plan, step, rect), self.weights.tuned
        choice = tuned.tile(work, kind)
        measured = as_compiled(choice)
        if choice is None and (nearest := as_compiled(tuned.nearest_tile(work, kind))) is not None:
            measured = self._estimated_tile(step, rect, nearest)
        if measured is None or not usable(measured, conv, self.dtype, self.device):
            return None
        # a step with the same product may have a residual, which these kernels do not add
        return measured if isinstance(measured, HopperTile) or step.residual is None else None

    def _estimated_tile(self, step: ConvStep, rect: Rect | None, nearest: CompiledTile) -> CompiledTile | None:
        """The tile of least estimated time of a compiled kernel that was the fastest at the nearest size: hardly any
        hole's number of rows is measured. None where the estimate is not clearly less than Triton's."""
        from lgnet_fast.kernels import picture_conv
        from lgnet_fast.kernels.conv_configs import estimate
        from lgnet_fast.kernels.hopper_shapes import HopperTile, ranked, tile_like

        target = target_of(self.device, self.dtype)
        source, out = self.plan.source(step), self.plan.target(step)
        where = tuple(out.everywhere if rect is None else rect)
        product = conv_of(step), self.plan.batch, source.size, out.size, where, self._card
        if not isinstance(nearest, HopperTile):  # by estimate these gain at every size
            return picture_conv.pick_tile(*product)[0]
        found = tile_like(nearest, ranked(*product))
        least = estimate(work_of(self.plan, step, rect), self.tile(step, rect), *target)
        return found[0] if found is not None and found[1].seconds < (1 - GAIN_ALONE) * least else None

    def _inference(self, step: AttentionStep) -> Inference | None:
        """Measured block shapes of an attention block; None: those of the table. Where the compiled kernel was the
        fastest at the nearest size, it runs, in the tile of least estimated time."""
        from lgnet_fast.kernels import hopper_attention
        from lgnet_fast.kernels.configs import pick_inference

        source = self.plan.source(step)
        shape = step.out_channels, source.height * source.width, self.plan.batch
        tuned = self.weights.tuned
        if shape in tuned.attention or (nearest := tuned.nearest_attention(*shape)) is None or nearest.hopper is None:
            return tuned.attention.get(shape)
        if not hopper_attention.usable(step.out_channels, self.dtype, self.device):
            return None
        channels, positions, batch = shape
        size = channels, positions, positions, batch
        best = hopper_attention.best_tile(*size, self.dtype, self.device, self._card)
        kind, generation, num_sms = target_of(self.device, self.dtype)
        return pick_inference(generation, kind, *shape, num_sms)._replace(hopper=best)

    @property
    def choices(self) -> dict[str, str]:
        """Step's name -> what runs it in a dense run: "cudnn", "attention" or "attention, hopper
        QUERIESxCOLUMNS/splits", "deep" or "chain" (in one launch with others), "hopper PIXELSxCHANNELS/cluster
        xWARPGROUPS", "picture COLUMNSxROWS", or BLOCK_MxBLOCK_NxBLOCK_K/splits. "launches": how they overlap, if they
        do."""
        choices = {step.name: self._choice(step) for step in self.plan.steps}
        for first, group in self._deep_groups().items():
            choices.update((step.name, "deep") for step in self.plan.steps[first : first + len(group.layers)])
        for numbers in self.dense_chains:
            choices.update((step.name, "chain") for step in self.plan.steps[numbers.start : numbers.stop])
        if self.overlap != "none":
            choices["launches"] = f"overlap, {self.overlap}"
        return choices

    @property
    def dense_chains(self) -> list[range]:
        """The groups of :mod:`.chains` that share a launch in a dense run."""
        return [numbers for numbers in self._chains() if chains.gains(self.plan, numbers, self._card)]

    @functools.cached_property
    def overlap(self) -> Overlap:
        """How the launches overlap."""
        if self.options.overlap is not None:
            return self.options.overlap
        measured = self.weights.tuned.overlap
        return measured.get(self.plan.name, "none") if measured else "none"

    @property
    def chosen_by(self) -> str:
        tuned = self.weights.tuned
        measured = tuned.tiles or tuned.attention or tuned.deep_rows or tuned.chains or tuned.overlap
        return "measurement, else table and estimate" if measured else "table and estimate"

    def _choice(self, step: Step) -> str:
        if isinstance(step, AttentionStep):
            return "torch" if step.name in self.weights.by_library else self._attention_choice(step)
        if self.weights.steps[step.name].plain is not None:
            return "cudnn"
        if (compiled_tile := self._compiled_tile(step)) is not None:
            return compiled_tile.label
        return self.tile(step).label

    def _attention_choice(self, step: AttentionStep) -> str:
        from lgnet_fast.kernels.hopper_attention import AttentionTile, usable

        config = self._inference(step)
        if config is None or config.hopper is None or not usable(step.out_channels, self.dtype, self.device):
            return "attention"
        return f"attention, {AttentionTile(*config.hopper).label}"

    # -- programs ------------------------------------------------------------------------------------------------

    def _precision(self) -> str:
        return target_of(self.device, self.dtype)[0]

    @property
    def spread(self) -> bool:
        return self.overlap == "spread"

    def _paint(self, memory: Memory, painted: bool) -> Launch:
        from lgnet_fast.kernels.conv import paint_forward

        start = memory.start if painted else None
        operands = memory.image, memory.mask, start, memory.maps[PICTURE], memory.outputs[0]
        return functools.partial(paint_forward, *operands, self.overlap != "none")

    def _launches(self, memory: Memory, regions: Regions | None, painted: bool) -> list[Launch]:
        launches = [self._paint(memory, painted)]
        groups = self._deep_groups()
        chained = {numbers.start: numbers for numbers in self._chains()}
        number = 0
        while number < len(self.plan.steps):
            count = len(groups[number].layers) if number in groups else 0
            if count and (regions is None or applies(self.plan, range(number, number + count), regions)):
                launches.append(group_launch(self.plan, number, groups[number], memory.view, memory.states)[0])
                number += count
            elif number in chained and (chain := self._chain(chained[number], memory.view, regions)) is not None:
                launches.append(chain.launch)
                number = chained[number].stop
            else:
                launches += self.step_launches(memory, number, None if regions is None else regions[number])
                number += 1
        return launches

    def _deep_groups(self) -> dict[int, DeepGroup]:
        """First step -> the group of steps that runs in one launch from there (see :mod:`.deep_layers`)."""
        if self._groups is None and self._can_check():
            rows = self.options.deep_rows
            if rows is None:
                rows = self.weights.tuned.deep_rows.get(self.plan.name, 0)
            weights = self.weights
            with torch.inference_mode(False), torch.no_grad():
                self._groups = make_groups(self.plan, weights.steps, weights.deep, rows) if rows else {}
        return self._groups or {}

    def _can_check(self) -> bool:
        from lgnet_fast.kernels.launch import is_recording

        return self.device.type == "cuda" and not is_capturing(self.device) and not is_recording()

    def _chains(self) -> list[range]:
        """The groups of steps that share a launch where their rectangles allow it (see :mod:`.chains`)."""
        if self._chained is None and self._can_check():
            asked = self.options.chains
            measured = self.weights.tuned.chains.get(self.plan.name, ())
            own = self.plan, self.weights.steps, self._card, None if asked else measured
            with torch.inference_mode(False), torch.no_grad():
                self._chained = chains.checked_runs(*own) if asked or (asked is None and measured) else []
        return self._chained or []

    def _chain(self, numbers: range, view: Callable[[View], Tensor], regions: Regions | None) -> Chain | None:
        return chains.fitting_chain(self.plan, numbers, self.weights.steps, view, regions, self._card)

    @property
    def _card(self) -> Card:
        return card_of(self.device, self.dtype)

    def precompile(self) -> None:
        """Compile the kernels of a dense run in several processes. A failure is reported by the launch itself."""
        if self.device.type != "cuda":
            return
        from lgnet_fast.kernels.launch import record
        from lgnet_fast.kernels.precompile import compile_all

        own = self._launches(self.memory, None, False)  # first, because some kernels are run once to check them
        with record() as launches:
            run_all(own)

        def tell(done: int, total: int) -> None:
            if done in (1, total) or done % 10 == 0:
                waits.info("compiling the engine's kernels: %d of %d", done, total)

        for failure in compile_all(launches, self.device.index or 0, tell):
            logger.info("not compiled ahead: %s", failure)

    def step_launches(self, memory: Memory, number: int, rects: tuple[Rect, ...] | None = None) -> list[Launch]:
        """The launches of one step, in its rectangles (None: everywhere)."""
        step = self.plan.steps[number]
        merge = self._merge_of(memory, number)
        if isinstance(step, AttentionStep):
            return [] if rects == () else [self._attention(memory, step, rects)]
        if rects is None and self.weights.steps[step.name].plain is not None:
            return [self._by_library(memory, step, merge)]
        return [self._conv_launch(memory, step, rect, merge) for rect in (step.regions if rects is None else rects)]

    def _by_library(self, memory: Memory, step: ConvStep, merge: Merge | None) -> Launch:
        weights = self.weights.steps[step.name]
        assert weights.plain is not None
        return functools.partial(convolve, memory, step, weights.plain, weights.bias, merge)

    def _conv_launch(self, memory: Memory, step: ConvStep, rect: Rect, merge: Merge | None) -> Launch:
        from lgnet_fast.kernels import conv, hopper, picture_conv
        from lgnet_fast.kernels.conv_configs import programs
        from lgnet_fast.kernels.hopper_shapes import HopperTile
        from lgnet_fast.kernels.results import Store

        weights = self.weights.steps[step.name]
        stores = () if step.merges else tuple(Store(memory.view(s.view), s.activation) for s in step.stores)
        source = memory.view(step.source)
        where: dict[str, Any] = {
            "size": self.plan.target(step).size,
            "rect": rect,
            "overlap": self.overlap != "none",
        }
        compiled_tile = self._compiled_tile(step, rect)
        if compiled_tile is not None and not isinstance(compiled_tile, HopperTile):
            assert weights.fragments is not None
            operands = conv_of(step), source, weights.fragments, weights.bias, stores
            return functools.partial(picture_conv.picture_forward, *operands, compiled_tile, **where, merge=merge)
        where["residual"] = None if step.residual is None else memory.view(step.residual)
        operands = conv_of(step), source, weights.packed, weights.bias, stores
        if compiled_tile is not None:
            return functools.partial(hopper.hopper_forward, *operands, compiled_tile, **where)
        tile = self.tile(step, rect)
        work = work_of(self.plan, step, rect)
        return functools.partial(
            conv.conv_forward,
            *operands,
            tile,
            **where,
            merge=merge,
            partial=memory.partial(tile.splits * work.all_rows * work.columns) if tile.splits > 1 else None,
            counters=memory.counters(programs(work, tile) // tile.splits) if tile.fused else None,
        )

    def _attention(self, memory: Memory, step: AttentionStep, rects: tuple[Rect, ...] | None) -> Launch:
        """The launch of the attention block, for all rows of the map that meet the rectangles (None: all rows)."""
        weights = self.weights.steps[step.name]
        features = memory.view(step.source).permute(0, 3, 1, 2)
        stores = [(memory.view(store.view).permute(0, 3, 1, 2), store.activation) for store in step.stores]
        tuned = self._inference(step)
        band = (min(r.top for r in rects), max(r.bottom for r in rects)) if rects else None
        return functools.partial(attend, features, weights, step.variant, stores, tuned, self.overlap != "none", band)
