"""`Engine`: a callable with the results of its model that runs faster."""

from __future__ import annotations

import copy
import logging
import operator
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from .. import forks
from ..errors import LGNetError, OutOfMemoryError
from ..ops.torch_state import is_capturing, is_out_of_memory
from ..reference.cascade import Cascade, Stages, check_inputs
from ..reference.lgnet import LGNet, LocalGlobalRefinement
from . import torch_compile
from .cover import hole_boxes
from .cuda.device_holes import DeviceHoles
from .cuda.graphs import error_text, free_cached
from .describe import describe
from .devices import available_memory, same_device, without_autocast
from .executor import Executor, Regions
from .holes import check_holes
from .model_watch import ModelWatch
from .plan import PICTURE, Plan
from .recent import Recent
from .regions import Rect
from .saved import write_engine

if TYPE_CHECKING:
    from rich.table import Table

logger = logging.getLogger("lgnet_fast")

SHAPES_KEPT = 8
"""Number of shapes whose plans and buffers are kept; the least recently used is dropped first."""
KEPT_SHARE = 0.5
"""Largest share of memory that the buffers of all shapes keep, of what the device would have left without them."""
HOLES_KEPT = 128
"""Restricted plans kept per shape."""

T = TypeVar("T")

# A restricted run must save this share of a dense run's cost (Executor.cost); otherwise the run is dense.
_WORTHWHILE = 0.05


def positive(name: str, value: Any) -> int:
    """An argument as a positive integer; ValueError where it is none."""
    try:
        number = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise ValueError(f"{name}: expected a positive integer, got {value!r}")
    return number


class _Shape:
    """One (batch, height, width): its plan, its executor, and the regions of recent holes."""

    def __init__(self, plan: Plan, executor: Executor) -> None:
        self.plan, self.executor = plan, executor
        self.dense_cost = executor.cost(plan)
        self.regions: Recent[Regions | None] = Recent(HOLES_KEPT)

    def restricted(self, holes: Sequence[Rect]) -> Plan:
        """The plan restricted to these holes, in regions that suit the executor."""
        return self.executor.restricted(self.plan, holes)

    def regions_for(self, holes: Sequence[Rect]) -> Regions | None:
        """The rectangles of every step for these holes; None where the run is dense, because that costs no more."""
        if not self.executor.restricts:
            return None

        def make() -> Regions | None:
            plan = self.restricted(holes)
            if self.executor.cost(plan) > (1 - _WORTHWHILE) * self.dense_cost:
                return None
            return [step.regions for step in plan.steps]

        return self.regions.get(tuple(holes), make)


class _Holes(NamedTuple):
    """Rectangles that contain the holes: of all samples together, and those of each sample where they are known."""

    together: Sequence[Rect]
    each: Sequence[Sequence[Rect]] = ()


def _drop_buffers(shape: _Shape) -> None:
    """Also of a shape that something refers to: the engine to its first one, a launch to its executor."""
    shape.executor.drop_buffers()


def _copied(first_stage: nn.Module, device: torch.device, dtype: torch.dtype) -> Callable[[Tensor, Tensor], Tensor]:
    """The first stage of an X_LG in evaluation mode, on a device and in a dtype of its own."""
    with torch.inference_mode(False):
        try:
            stage = copy.deepcopy(first_stage)
        except Exception as error:  # a module may hold anything, such as a lock
            raise TypeError(f"first_stage: expected a module that can be copied ({error_text(error)})") from error
        stage = stage.eval().to(device, dtype)

    def run(image: Tensor, mask: Tensor) -> Tensor:
        out = stage(image.to(dtype), mask.to(dtype))
        if not isinstance(out, Tensor) or out.shape != image.shape:
            got = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(f"first_stage: expected a picture {list(image.shape)} as its result, got {got}")
        return out

    return run


class Engine:
    """The optimised form of a model; made by :func:`.making.optimize`.

    Calling it is thread-safe. It holds packed copies of the weights (of an X_LG's first stage a plain one) and no
    strong reference to the model. If the weights of the model or the eps of a BatchNorm change, weights move, or a
    layer is replaced, while the model exists, the next call raises LGNetError. (Writes that PyTorch does not count
    are not noticed, only a replacement or a move of the tensor: by optimisers with ``fused=True``, through ``.data``
    and NumPy, by another process through shared memory, and to weights created under ``torch.inference_mode``.)
    Engines cannot be pickled, exported or transformed by ``torch.func``. They work under any default dtype, default
    device and inference mode; in code that ``torch.compile`` compiles, a call is one operator.

    Where NaN or infinity in the weights or the input makes a hole sample of the model NaN or infinite, the engine's
    is too, also in a run restricted to holes. (An overflow that occurs only in the model, in a feature that its
    BatchNorm would scale down, need not occur here, because that scale is folded into the weights.)
    """

    size_multiple = Cascade.size_multiple

    def __init__(
        self,
        model: LGNet | LocalGlobalRefinement,
        plan: Plan,
        executor: Executor,
        device: torch.device,
        hole_aware: bool,
    ) -> None:
        self.hole_aware = hole_aware
        self.device = device
        self._first_stage = (
            _copied(model.first_stage, device, torch.promote_types(executor.dtype, torch.float32))
            if isinstance(model, LocalGlobalRefinement)
            else None
        )
        self._stages = model.stage_names if isinstance(model, LocalGlobalRefinement) else tuple(model.networks())
        self._config = model.config if isinstance(model, LGNet) else None
        # An engine read from a file has no model that could change.
        on_meta = any(p.is_meta for p in model.parameters())
        self._watch = None if on_meta else ModelWatch(model)
        self._number = torch_compile.number_of(self)
        self._lock = forks.Lock()
        self._device_holes = DeviceHoles()
        self._shapes: Recent[_Shape] = Recent(SHAPES_KEPT, _drop_buffers)
        self._first = _Shape(plan, executor)
        self._make_room(executor.buffer_bytes, "size, batch_size")
        self._shapes.put(self._key(plan), self._first)

    @staticmethod
    def _key(plan: Plan) -> tuple[int, int, int]:
        return plan.batch, plan.height, plan.width

    def __reduce__(self) -> str:
        raise LGNetError(
            "an engine cannot be pickled or copied: it holds memory of this process; pickle or copy the model"
        )

    def __call__(
        self, image: Tensor, mask: Tensor, return_stages: bool = False, holes: Sequence[Rect] | None = None
    ) -> Tensor | Stages:
        """Fill the hole, as :meth:`LGNet.forward` does.

        Args:
            image: [B, 3, H, W] in [-1, 1]; H and W multiples of 256; any float dtype.
            mask: [B, 1, H, W], 1 = hole; dtype and device of `image`.
            return_stages: also return the pictures of all stages; there are no raw ones in a run restricted to holes.
            holes: rectangles (top, bottom, left, right), ends excluded, that contain every hole pixel of all samples.
                None: found in the mask; on the CPU for each sample, on a GPU for all samples together in cells of
                32x32 pixels, where that needs no wait for queued work (:mod:`.cuda.device_holes`). For a mask on the
                CPU it is checked that they contain every hole pixel. On other devices the caller is responsible: a
                hole pixel outside them may be returned white. A mask on a GPU that changes must be written by
                PyTorch, or its holes be given: writes through ``.data``, DLPack or a graph's replay are not noticed.

        Returns:
            The merged result [B, 3, H, W] in [-1, 1], in the dtype of `image`, or :class:`Stages`.

        Raises:
            TypeError, ValueError: an argument that does not fit; the message names it. Rectangles outside the picture
                are ValueErrors, on the CPU also those that leave hole pixels out.
            LGNetError: the weights or an eps of the model have changed since the engine was made; an export or a
                transform.
            OutOfMemoryError: on a CPU, the buffers for this batch and size exceed the free memory.
            torch.OutOfMemoryError: a GPU's memory does not suffice, also without the buffers of other sizes.
        """
        if torch.compiler.is_compiling() and not return_stages:
            return torch_compile.call(self._number, image, mask, holes)
        torch_compile.refuse_transforms(image, mask)
        forks.prepare()
        check_inputs(image, mask, self.size_multiple)
        if not same_device(image.device, self.device):
            raise ValueError(f"image: expected device {self.device} as the engine, got {image.device}")
        self._notice_model()
        found = self._holes_of(mask, holes)
        if image.shape[0] == 0 or (found is not None and not found.together):
            return self._unchanged(image, return_stages)
        with torch.no_grad(), without_autocast(self.device):
            shape = self._shape(image.shape[0], image.shape[2], image.shape[3])

            def run() -> tuple[Tensor | None, bool, Tensor, list[Tensor]]:
                start = None if self._first_stage is None else self._first_stage(image, mask)
                return start, *self._run(shape, image, mask, start, found, return_stages)

            start, restricted, result, raw = self._with_room(shape, run)
            if not return_stages:
                if image.dtype == torch.float64 and result.dtype != image.dtype:
                    return torch.where(mask != 0, result.to(image.dtype), image)  # known pixels are exact
                return result.to(image.dtype)
            raw = [r.to(image.dtype) for r in raw]
            if start is not None:
                raw.insert(0, start.to(image.dtype))
            # Outside the hole, the raw pictures of a restricted run are undefined.
            hole = mask != 0
            merged = tuple(torch.where(hole, image * (1 - mask) + r * mask, image) for r in raw)
            if restricted:
                return Stages(None, None, None, (), merged)
            return Stages.of(self._stages, raw, merged)

    def _holes_of(self, mask: Tensor, given: Sequence[Rect] | None) -> _Holes | None:
        """The holes that a caller gave or that are found in the mask; None: not known here, so all is computed."""
        if given is not None:
            return _Holes(check_holes(given, mask))
        if not self.hole_aware:
            return None
        executor = self._first.executor
        if mask.device.type == "cpu":
            if not executor.per_sample:
                return _Holes(hole_boxes(mask))
            each = [hole_boxes(sample) for sample in mask.split(1)]
            return _Holes(tuple(hole for own in dict.fromkeys(each) for hole in own), each)
        if mask.is_cuda and executor.restricts and mask.shape[0]:
            found = self._device_holes.find(mask)
            return None if found is None else _Holes(found)
        return None

    def _run(
        self,
        shape: _Shape,
        image: Tensor,
        mask: Tensor,
        start: Tensor | None,
        holes: _Holes | None,
        stages: bool,
    ) -> tuple[bool, Tensor, list[Tensor]]:
        """(whether the run was restricted to holes, merged picture, raw pictures)"""
        if holes is not None and len(set(holes.each)) > 1:
            with self._lock:
                own = [shape.regions_for(boxes) for boxes in holes.each]
            if any(regions is not None for regions in own):
                return True, *shape.executor.run_each(image, mask, start, own, stages)
            return False, *shape.executor.run(image, mask, start, None, stages)
        regions = None
        if holes is not None:
            with self._lock:
                regions = shape.regions_for(holes.together)
        return regions is not None, *shape.executor.run(image, mask, start, regions, stages)

    def _notice_model(self) -> None:
        """Raise if the model has changed. Where it no longer exists, release its memory, once."""
        watch = self._watch
        if watch is not None and not watch.check():
            self._watch = None
            self._first.executor.release()

    def _unchanged(self, image: Tensor, return_stages: bool) -> Tensor | Stages:
        if not return_stages:
            return image.detach().clone()
        return Stages(None, None, None, (), tuple(image.detach().clone() for _ in self._stages))

    def _shape(self, batch: int, height: int, width: int) -> _Shape:
        with self._lock:
            return self._shapes.get(
                (batch, height, width), lambda: self._planned(self._first.plan.resized(batch, height, width))
            )

    def _planned(self, plan: Plan) -> _Shape:
        with torch.inference_mode(False):
            shape = _Shape(plan, self._first.executor.resized(plan))
        self._make_room(shape.executor.buffer_bytes)
        return shape

    def _make_room(self, needed: int, argument: str = "image") -> None:
        """Drop the least recently used shapes whose buffers, with `needed` bytes more, exceed :data:`KEPT_SHARE`.

        `argument`: what asks for them, for the error. Raises OutOfMemoryError: on a CPU, `needed` exceeds the free
        memory.
        """
        room = None if needed == 0 or is_capturing(self.device) else available_memory(self.device)
        if room is None:
            return
        kept = sum(shape.executor.buffer_bytes for shape in self._shapes.values())
        # a shape that has not run yet has taken nothing of what the system says is left
        free = room + sum(shape.executor.held_bytes for shape in self._shapes.values())
        if self.device.type == "cpu" and needed > free:
            # Linux grants memory that it does not have, and ends the process when the memory is used.
            raise OutOfMemoryError(
                f"{argument}: its buffers take {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free; "
                "pass fewer or smaller pictures at once"
            )
        most = KEPT_SHARE * free
        for shape in self._shapes.values():
            if kept + needed <= most:
                break
            kept -= shape.executor.buffer_bytes
            self._shapes.drop_oldest()

    def _with_room(self, shape: _Shape, run: Callable[[], T]) -> T:
        """What `run` returns; where memory does not suffice, it is repeated without the buffers of other shapes."""
        try:
            return run()
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error) or is_capturing(self.device):
                raise
            with self._lock:
                others = [s for s in self._shapes.values() if s is not shape and s.executor.buffer_bytes]
            if not others:
                raise
            logger.info("the buffers of %d other shapes are freed: %s", len(others), error_text(error))
        # Here, because an exception that is being handled keeps the tensors of the frames that it has left.
        with self._lock:
            self._shapes.clear(keep=shape)
        free_cached(self.device)
        self._first.executor.release()
        return run()

    def warmup(self) -> None:
        """Run once on a grey picture that is all hole, so that the first real call needs no set-up.

        The run has the batch and size that the engine was made for.

        Raises:
            LGNetError: the model has changed, as for a call.
            torch.OutOfMemoryError: a GPU's memory does not suffice.
        """
        image, mask = self._example()
        self(image, mask, holes=[self._first.plan.buffers[PICTURE].everywhere])

    def _example(self) -> tuple[Tensor, Tensor]:
        plan = self._first.plan
        image = torch.zeros(plan.batch, 3, plan.height, plan.width, dtype=torch.float32, device=self.device)
        return image, torch.ones_like(image[:, :1])

    @property
    def plan(self) -> Plan:
        """The dense plan of the size and batch that the engine was made for, without weights."""
        return self._first.plan

    def describe(self, holes: Sequence[Rect] | None = None, rounds: int = 5) -> Table:
        """The plan as a table for ``rich``: step, shapes, GFLOP, MB, kernel, measured ms, GFLOP/s, and the least time
        at this machine's peak rates as a share of the measured time (Winograd can exceed 100 %).

        GFLOP are 1e9 operations, two for each multiply-accumulate of direct arithmetic. MB are the 1e6 bytes that a
        step must move at least, counted in float32. Where steps cannot be timed, the times are left out.

        Args:
            holes: describe the run restricted to these rectangles, as for a call; None: the dense run.
            rounds: number of timed runs, at least 1; the least times are shown.

        Raises:
            TypeError, ValueError: `holes` are no rectangles inside the picture, or `rounds` is no positive integer.
        """
        rounds = positive("rounds", rounds)
        plan = self.plan
        if holes is not None:
            hole = torch.empty(plan.batch, 1, plan.height, plan.width, device="meta")  # without values to cover
            plan = self._first.restricted(check_holes(holes, hole))
        return describe(self._first.executor, plan, rounds)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the plan and the packed weights, for :func:`load_engine` on this kind of machine.

        Raises:
            TypeError: `directory` is no path.
            LGNetError: the engine is of an X_LG, whose first stage is not in the plan, or not of the CPU executor, or
                layers of its model were replaced by others or shared after LGNet had made it; or the folder cannot be
                written (an engine that was in it stays).
        """
        if not isinstance(directory, (str, os.PathLike)):
            raise TypeError(f"directory: expected a path, got {directory!r}")
        state = None if self._config is None else self._first.executor.state()
        if self._config is None or state is None:
            raise LGNetError("save: expected an engine of an LGNet on the C++ executor")
        write_engine(Path(directory), self._config, self.plan, state, self.hole_aware)
