"""`Inpainter`: fills pictures of any size, kind and depth with a network."""

from __future__ import annotations

import copy
import logging
import math
import operator
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import forks
from ..engine import Engine, fast_executor_reason, optimize
from ..engine.devices import resolve_device, resolve_dtype
from ..engine.holes import CELL, HoleGroups, disjoint_boxes, group_holes
from ..engine.regions import Rect
from ..errors import BackendError, InvalidMaskError, LGNetError, OutOfMemoryError
from ..ops.dispatch import require_backend
from ..reference.lgnet import LGNet, LocalGlobalRefinement
from . import memory, strategies
from .masks import masks_for, read_hole, soft_edge
from .notices import warn
from .pictures import Picture, picture_of, pictures_of_tensor
from .strategies import Window

logger = logging.getLogger("lgnet_fast")

_MOSTLY_HOLE = 0.95
_MOST_STAGES = 3
_MASK_OPTIONS = ("mask_threshold", "invert_mask", "mask_channel", "dilate", "feather", "allow_any_mask")
_NETWORKS = (LGNet, LocalGlobalRefinement)


@dataclass(frozen=True)
class Inpainted:
    """One filled picture and how it was made.

    `picture`: of the kind of the input. `size`: (height, width). `hole_ratio`: share of hole pixels in the mask,
    before dilation. `strategy`: the one that ran, None for an empty mask. `passes`: number of network runs.
    """

    picture: Any
    size: tuple[int, int]
    hole_ratio: float
    strategy: str | None
    passes: int


@dataclass(frozen=True)
class Stages:
    """One picture after every stage of the network, each of the kind of the input.

    `masked`: the picture with a white hole, the input of the network. `merged`: the merged picture after every stage,
    in order (three for LGNet, fewer for ablations).
    """

    masked: Any
    merged: tuple[Any, ...]

    @property
    def coarse(self) -> Any:
        """After the first stage."""
        return self.merged[0]

    @property
    def local(self) -> Any | None:
        """After the local stage; None for networks of fewer than three stages."""
        return self.merged[1] if len(self.merged) > 2 else None

    @property
    def result(self) -> Any:
        """After the last stage: the result."""
        return self.merged[-1]


# Fills of disjoint boxes of a picture: each float32 [h, w, 3] in [-1, 1].
_Fills = list[tuple[Rect, np.ndarray]]


@dataclass(frozen=True)
class _Job:
    """One picture and mask. `alpha`: bool, equal to the hole, for a hard edge; else float32. `region` bool [H, W]:
    the pixels that the network must fill, including the feathered rim; `groups`: its groups."""

    picture: Picture
    hole: np.ndarray
    alpha: np.ndarray
    region: np.ndarray
    groups: HoleGroups


@dataclass(frozen=True)
class _Plan:
    """Windows that fill a picture, in batches of one network size each. `patches` and `owner`, for the boxes of the
    fills, are those of `strategies.patches`."""

    strategy: str
    windows: list[Window]
    batches: list[list[Window]]
    patches: list[Rect]
    owner: np.ndarray


class Inpainter:
    """Fills the holes of pictures of any size and kind. Thread-safe; can be pickled and copied if its model can.

    Args:
        model: called as ``model(image, mask)`` with image [B, 3, H, W] in [-1, 1], mask [B, 1, H, W], 1 = hole, H and
            W multiples of ``model.size_multiple`` (256 where it has none); returns the merged picture. A model on
            another device, of another dtype, in training mode or with an explicit backend is copied, not changed.
        device: "auto" (CUDA if there is a GPU) or a torch device.
        dtype: "auto" (float16 on CUDA, float32 elsewhere), a torch.dtype or its name.
        backend: "auto" runs an LGNet by :func:`lgnet_fast.optimize` where that is faster (on a CPU in float32 or
            bfloat16, on an NVIDIA GPU from sm_80 on); others are passed to ``model.set_backend``.
        window: side of the largest network pass, in pixels, under the strategies crop, tile and resize; also the
            largest padded picture that "auto" runs whole. At least ``model.size_multiple``.
        memory_limit: bytes that a run may take beside the picture and the mask; None: the free memory of the system,
            asked before every run. With too little, "auto" takes smaller windows; it warns where a hole is then
            filled at a lower scale.

    Raises:
        BackendError: a device, dtype or backend that was asked for and cannot run.
        TypeError, ValueError: an argument of another type, or out of its range.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        backend: str = "auto",
        *,
        window: int = 512,
        memory_limit: int | None = None,
    ) -> None:
        if not callable(model):
            raise TypeError(f"model: expected a callable (image, mask), got {type(model).__name__}")
        self.device = resolve_device(device)
        self.dtype = resolve_dtype(dtype, self.device)
        self.multiple = int(getattr(model, "size_multiple", 256))
        self.base_channels = max(getattr(model, "channels", None) or (64,))
        self.window = _window(window, self.multiple)
        if memory_limit is not None and (
            isinstance(memory_limit, bool) or not isinstance(memory_limit, (int, float, np.number))
        ):
            raise TypeError(f"memory_limit: expected a number of bytes or None, got {memory_limit!r}")
        if memory_limit is not None and not memory_limit >= 0:
            raise ValueError(f"memory_limit: expected at least 0 bytes, got {memory_limit}")
        self.memory_limit = memory_limit
        self._source = model
        self._backend = backend
        if self.device.type == "cpu" and self.dtype == torch.float16 and isinstance(model, _NETWORKS):
            warn("dtype: float16 on a CPU is hundreds of times slower than float32; take float32 or bfloat16")
        self._model = self._placed(self.dtype)
        self._exact: Callable[..., Any] | None = None
        self._exact_lock = forks.Lock()

    def __repr__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"Inpainter({type(self._source).__name__}, device={str(self.device)!r}, dtype={dtype!r})"

    def __getstate__(self) -> dict[str, Any]:
        """All attributes except those that :meth:`__setstate__` makes again: engines cannot be pickled or copied."""
        made = ("_model", "_exact", "_exact_lock")
        return {name: value for name, value in self.__dict__.items() if name not in made}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Prepare the network again. Raises BackendError where this machine lacks the device or the backend."""
        self.__dict__.update(state)
        resolve_device(self.device)
        self._model = self._placed(self.dtype)
        self._exact = None
        self._exact_lock = forks.Lock()

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str] | None = None,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        backend: str = "auto",
        **options: Any,
    ) -> Inpainter:
        """An Inpainter for a model directory or a Hugging Face Hub id; None is the model bundled with the package.

        Raises WeightsError if the weights are missing or malformed, and the errors of the constructor.
        """
        resolve_dtype(dtype, resolve_device(device))  # checked before hundreds of megabytes are read
        if model is None:
            from ..weights import bundled_path

            model = bundled_path()
        if isinstance(model, nn.Module):
            raise TypeError(
                f"model: expected a model folder, a hub id or None, got the network {type(model).__name__}, which "
                "Inpainter(model) takes"
            )
        if not isinstance(model, (str, os.PathLike)):
            raise TypeError(f"model: expected a model folder, a hub id or None, got {model!r}")
        return cls(LGNet.from_pretrained(os.fspath(model)), device, dtype, backend, **options)

    def __call__(
        self,
        picture: Any,
        mask: Any,
        strategy: str = "auto",
        mask_threshold: float = 0.5,
        invert_mask: bool = False,
        dilate: int = 0,
        feather: int = 0,
        mask_channel: str = "auto",
    ) -> Any:
        """The picture with its hole filled, of the same kind; known pixels are bitwise unchanged.

        Args:
            picture: a PIL picture, a path, the bytes of a file, a file opened for reading bytes, an array [H, W] or
                [H, W, C] (uint8, uint16, or floats in [0, 1]), a tensor [H, W], [C, H, W] or [B, C, H, W] (uint8, or
                floats in [0, 1]), C = 1, 3 or 4 (alpha is kept), or a list of those. PIL pictures and files are
                turned upright by their EXIF orientation.
            mask: a PIL picture, a file as for the picture, an array [H, W] or [H, W, C] (bool, uint8 0..255, integers
                whose maximum is 1, or floats in [0, 1]) or a tensor [H, W], [C, H, W] or [B, C, H, W]; one for all
                pictures or a list of one each. Larger is hole.
            strategy: "auto", "full", "crop", "resize" or "tile"; see `lgnet_fast.pipeline.strategies.choose`.
            mask_threshold: levels above this share of full scale are hole; 0 <= value < 1.
            invert_mask: dark is hole.
            dilate: pixels by which the hole grows on every side (a disk).
            feather: width in pixels of a soft ramp around the grown hole, where fill and picture are blended.
            mask_channel: the channel that marks the hole: "luma", "alpha" (opaque is hole), "inverse_alpha"
                (transparent is hole), "colour" (saturated is hole), or "auto", which raises InvalidMaskError for an
                ambiguous mask; see `lgnet_fast.pipeline.masks.read_hole` and docs/masks.md.

        Returns:
            A picture of the same kind; for a file a PIL picture, or a DeepImage for 16-bit colour. Known pixels,
            those outside the dilated hole and its feather, are identical to the input. For an empty mask the picture
            is returned unchanged, with a UserWarning; there is one too if more than 95 % is hole.

        Raises:
            InvalidImageError, InvalidMaskError, OutOfMemoryError (before anything is allocated, where the estimate
            exceeds the memory), LGNetError (output not finite even in float32), ValueError (strategy).
        """
        options: dict[str, Any] = {
            "strategy": strategy,
            "mask_threshold": mask_threshold,
            "invert_mask": invert_mask,
            "dilate": dilate,
            "feather": feather,
            "mask_channel": mask_channel,
        }
        if isinstance(picture, (list, tuple)):
            return [
                self(one, own, **options) for one, own in zip(picture, masks_for(mask, len(picture)), strict=True)
            ]
        if isinstance(picture, Tensor):
            pictures, together = pictures_of_tensor(picture)
            own_masks = masks_for(mask, len(pictures))
            return together(
                [self._inpaint(one, own, **options).picture for one, own in zip(pictures, own_masks, strict=True)]
            )
        return self.inpaint(picture, mask, **options).picture

    def inpaint(self, picture: Any, mask: Any, strategy: str = "auto", **mask_options: Any) -> Inpainted:
        """Like a call, for one PIL picture, file or array; also returns how the picture was made.

        `mask_options`: mask_threshold, invert_mask, dilate, feather and mask_channel, as for a call, and
        `allow_any_mask` (True), without which a mask that selects nothing or more than 95 % raises InvalidMaskError.
        """
        return self._inpaint(picture_of(picture), mask, strategy, **mask_options)

    def stages(self, picture: Any, mask: Any, strategy: str = "auto", **mask_options: Any) -> Stages:
        """The picture after every stage, for contact sheets; arguments as for `inpaint`. With an empty mask every
        stage is the picture."""
        strategies.check(strategy)
        _check_options(mask_options)
        read = picture_of(picture)
        with memory.out_of_memory_errors("picture"):
            job = self._job(read, mask, **mask_options)
            boxes = disjoint_boxes(job.groups.boxes, read.size)
            one = np.ones(1, np.float32)
            white = [(box, np.broadcast_to(one, (*job.hole[box.slices].shape, 3))) for box in boxes]
            masked = read.with_fill(white, job.hole)
            if not job.groups.boxes:
                return Stages(masked, (masked, masked, masked))
            each, _, _ = self._fill(job, strategy, stages=True)
            return Stages(masked, tuple(read.with_fill(fills, job.alpha) for fills in each))

    def warmup(self, height: int = 256, width: int = 256) -> float:
        """Run the network once on an empty picture of this size in pixels, padded; returns the seconds it took.

        Raises ValueError for a side below 1.
        """
        _check_sides(height, width)
        start = time.perf_counter()
        size = strategies.padded(height, self.multiple), strategies.padded(width, self.multiple)
        self._run(
            self._model, self.dtype, np.zeros((1, *size, 3), np.float32), np.ones((1, *size), bool), stages=False
        )
        return time.perf_counter() - start

    def estimate_memory(self, height: int, width: int, strategy: str = "full") -> int:
        """Most bytes that a picture of this size takes, besides the weights, with this network and dtype.

        Raises ValueError for an unknown strategy and for a side below 1.
        """
        _check_sides(height, width)
        return memory.estimate_memory(
            height,
            width,
            strategy,
            base_channels=self.base_channels,
            dtype=self.dtype,
            size_multiple=self.multiple,
            window=self.window,
            engine=self._engine_on_cpu(),
        )

    # -- one picture -------------------------------------------------------------------------------------------

    def _job(
        self,
        picture: Picture,
        mask: Any,
        mask_threshold: float = 0.5,
        invert_mask: bool = False,
        mask_channel: str = "auto",
        dilate: int = 0,
        feather: int = 0,
        allow_any_mask: bool = True,
    ) -> _Job:
        hole = read_hole(
            mask,
            *picture.size,
            threshold=mask_threshold,
            invert=invert_mask,
            channel=mask_channel,
            picture=picture,
            note=picture.note,
        )
        alpha = region = hole
        if dilate != 0 or feather != 0:
            alpha = soft_edge(hole, dilate, feather)
            region = alpha > 0
        share = np.count_nonzero(region) / region.size
        if share == 0 or share > _MOSTLY_HOLE:
            problem = f"mask: {share:.1%} of the picture is hole; is the mask inverted (invert_mask, --invert-mask)?"
            if share == 0:
                problem = "mask: no hole pixel; the picture is returned unchanged"
            if not allow_any_mask:
                problem = problem.removesuffix("; the picture is returned unchanged")
                raise InvalidMaskError(f"{problem} (allow_any_mask, --allow-any-mask, lets it pass)")
            warn(problem)
        return _Job(picture, hole, alpha, region, group_holes(region))

    def _inpaint(self, picture: Picture, mask: Any, strategy: str = "auto", **mask_options: Any) -> Inpainted:
        strategies.check(strategy)
        _check_options(mask_options)
        with memory.out_of_memory_errors("picture"):
            job = self._job(picture, mask, **mask_options)
            ratio = np.count_nonzero(job.hole) / job.hole.size
            if not job.groups.boxes:
                unchanged = picture.rebuild(picture.samples.copy(), job.region)
                return Inpainted(unchanged, picture.size, ratio, None, 0)
            (fills,), ran, passes = self._fill(job, strategy, stages=False)
            laid = [(box, fill, job.alpha[box.slices].copy()) for box, fill in fills]
            region = job.region
            del job, fills  # these have the size of the picture, and are not needed while three copies of it exist
            return Inpainted(picture.rebuild(picture.painted(laid), region), picture.size, ratio, ran, passes)

    def _fill(self, job: _Job, strategy: str, stages: bool) -> tuple[list[_Fills], str, int]:
        """Fills of the result, or of every stage, with the strategy that ran and its passes."""
        plans = self._plans(job, strategy)
        plan = first = next(plans)
        while True:
            try:
                self._check_memory(job, plan, stages)
                with memory.out_of_memory_errors(f"strategy {plan.strategy}"):
                    fills = self._run_plan(job, plan, stages)
                break
            except OutOfMemoryError:
                smaller = next(plans, None)
                if smaller is None:
                    raise
                plan = smaller
        scale, wanted = strategies.least_scale(plan.windows), strategies.least_scale(first.windows)
        if scale < wanted:
            warn(
                f"memory: too little for strategy {first.strategy}; filled by {plan.strategy}, at {scale:.0%} of the "
                f"picture's scale in place of {wanted:.0%}, which is blurrier"
            )
        return fills, plan.strategy, len(plan.windows)

    def _plans(self, job: _Job, strategy: str) -> Iterator[_Plan]:
        """The plans to try, in the order of decreasing memory; each is made when it is asked for."""
        ladder = [("auto", self.window), ("crop", self.window)]
        ladder += [(name, self.multiple) for name in ("auto", "crop", "resize")]
        made: set[tuple[str, int]] = set()
        for asked, largest in ladder if strategy == "auto" else [(strategy, self.window)]:
            if asked == "auto":
                name, windows = strategies.choose(job.region, self.multiple, largest, job.groups)
            elif asked == "crop" and made == {("tile", self.window)} and largest > self.multiple:
                continue  # tiles become smaller first, because crops of thin holes reduce the scale
            else:
                name = asked
                windows = strategies.windows_for(name, job.region, self.multiple, largest, job.groups)
            if (name, largest) in made:
                continue
            made.add((name, largest))
            patches, owner = strategies.patches([strategies.needed(w, job.region) for w in windows], job.picture.size)
            batches = strategies.batches(windows, self.multiple, largest)
            yield _Plan(name, windows, batches, patches, owner)
            if len(batches) < len(windows):
                yield _Plan(name, windows, [[window] for window in windows], patches, owner)

    def _check_memory(self, job: _Job, plan: _Plan, stages: bool) -> None:
        """Raise OutOfMemoryError where a plan needs more than there is, beside the picture and the mask."""
        results = _MOST_STAGES if stages else 1
        fills = memory.fill_bytes(sum(box.area for box in plan.patches), results)
        made = results * job.picture.result_bytes
        passes = {(len(batch), *strategies.network_size(batch[0], self.multiple)) for batch in plan.batches}
        network = memory.network_bytes(
            [math.prod(one) for one in passes], self.base_channels, self.dtype, self._engine_on_cpu()
        )
        if self.memory_limit is not None or self.device.type != "cuda":
            demands = [(fills + network + made, self.device)]
        else:
            demands = [(fills + made, torch.device("cpu")), (network, self.device)]
        for needed, device in demands:
            available = memory.available_memory(device) if self.memory_limit is None else self.memory_limit
            if available is not None and needed > available:
                better = (
                    "a smaller window" if plan.strategy != "full" else "strategy 'crop', 'tile', 'resize' or 'auto'"
                )
                height, width = job.picture.size
                raise OutOfMemoryError(
                    f"strategy {plan.strategy}: a picture of {width}x{height} needs about {memory.human(needed)}, "
                    f"{memory.human(available)} are available on {device}; try {better}, or a smaller picture"
                )

    def _engine_on_cpu(self) -> bool:
        return self.device.type == "cpu" and isinstance(self._model, Engine)

    def _run_plan(self, job: _Job, plan: _Plan, stages: bool) -> list[_Fills]:
        """The fills of the result, or of every stage: weighted means where windows overlap."""
        sums: list[list[np.ndarray]] = [[] for _ in plan.patches]
        totals = [np.zeros(job.region[box.slices].shape, dtype=np.float32) for box in plan.patches]
        for batch in plan.batches:
            for window, fills in zip(batch, self._run_batch(job.picture, job.region, batch, stages), strict=True):
                needed = strategies.needed(window, job.region)
                number = int(plan.owner[needed.top // CELL, needed.left // CELL])
                total, patch = totals[number], plan.patches[number]
                if not sums[number]:
                    sums[number] = [np.zeros((*total.shape, 3), dtype=np.float32) for _ in fills]
                parts = zip(*(strategies.enlarged(fill, window, needed) for fill in fills), strict=True)
                for part in parts:
                    box = part[0][0]
                    there = box.moved(-patch.top, -patch.left).slices
                    weight = np.float32(1) if window.weight is None else window.weight(box)
                    total[there] += weight
                    for accumulated, (_, fill) in zip(sums[number], part, strict=True):
                        accumulated[there] += fill * weight[..., None]
        for own, total in zip(sums, totals, strict=True):
            total[total == 0] = 1
            for accumulated in own:
                accumulated /= total[..., None]
        return [list(zip(plan.patches, fills, strict=True)) for fills in zip(*sums, strict=True)]

    def _run_batch(
        self, picture: Picture, region: np.ndarray, windows: list[Window], stages: bool
    ) -> list[list[np.ndarray]]:
        """The fills of each window, all of one network size: one, or one per stage, at the scale of the network."""
        size = strategies.network_size(windows[0], self.multiple)
        images, holes = np.empty((len(windows), *size, 3), np.float32), np.empty((len(windows), *size), bool)
        for sample, window in enumerate(windows):
            images[sample], holes[sample] = self._network_input(picture, region, window)
        outputs = self._run_checked(images, holes, stages)
        return [
            [output[sample, : window.reduced[0], : window.reduced[1]] for output in outputs]
            for sample, window in enumerate(windows)
        ]

    def _network_input(self, picture: Picture, region: np.ndarray, window: Window) -> tuple[np.ndarray, np.ndarray]:
        """Image float32 [h, w, 3] and hole bool [h, w] of a window, reduced and padded."""
        hole = region[window.rows, window.columns]
        if window.reduced == window.size:
            # Pixels under the mask must not reach the network: NaN times zero is NaN.
            content = picture.network_range(window.rows, window.columns)
            image, small_hole = np.where(hole[..., None], np.float32(0), content), hole
        else:
            top = window.rows.start
            image, small_hole = strategies.reduce_region(
                lambda rows: picture.network_range(slice(top + rows.start, top + rows.stop), window.columns),
                hole,
                window.reduced,
            )
        target = strategies.network_size(window, self.multiple)
        rows, columns = (strategies.reflection(*pair) for pair in zip(window.reduced, target, strict=True))
        return image[rows][:, columns], small_hole[rows][:, columns]

    # -- the network -------------------------------------------------------------------------------------------

    def _run_checked(self, images: np.ndarray, holes: np.ndarray, stages: bool) -> list[np.ndarray]:
        """Run the network on padded windows; if half precision overflows, again in float32."""
        outputs = self._run(self._model, self.dtype, images, holes, stages)
        if _finite(outputs):
            return outputs
        if self.dtype in (torch.float16, torch.bfloat16):
            outputs = self._run(self._exact_model(), torch.float32, images, holes, stages)
            if _finite(outputs):
                return outputs
            raise LGNetError(f"model: its output is not finite, neither in {self.dtype} nor in torch.float32")
        raise LGNetError(f"model: its output is not finite in {self.dtype}; are the weights sound?")

    def _run(
        self, model: Callable[..., Any], dtype: torch.dtype, images: np.ndarray, holes: np.ndarray, stages: bool
    ) -> list[np.ndarray]:
        """float32 [B, H, W, 3] in [-1, 1] of every stage, or of the result alone, for images [B, H, W, 3] and holes
        bool [B, H, W]."""
        forks.prepare()
        with torch.inference_mode():
            image = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).to(self.device, dtype)
            hole = torch.from_numpy(np.ascontiguousarray(holes)[:, None]).to(self.device, dtype)
            outputs = list(model(image, hole, return_stages=True).merged) if stages else [model(image, hole)]
            for output in outputs:
                if not isinstance(output, Tensor) or output.shape != image.shape:
                    got = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
                    raise TypeError(f"model: expected it to return a tensor {list(image.shape)}, got {got}")
            return [output.float().permute(0, 2, 3, 1).cpu().numpy() for output in outputs]

    def _exact_model(self) -> Callable[..., Any]:
        with self._exact_lock:
            if self._exact is None:
                # on a GPU, compiling the kernels of an engine for this one case takes longer than it saves
                self._exact = self._placed(torch.float32, may_optimize=self.device.type == "cpu")
            return self._exact

    @torch.inference_mode(False)  # kept tensors must also work outside inference mode
    def _placed(self, dtype: torch.dtype, may_optimize: bool = True) -> Callable[..., Any]:
        """The source model ready to run on this device in `dtype`.

        With backend "auto" an LGNet becomes an engine where there is a fast executor. Otherwise the model in
        evaluation mode: itself if it is ready, else a copy.
        """
        if may_optimize and self._backend == "auto" and isinstance(self._source, _NETWORKS):
            reason = fast_executor_reason(self.device, dtype)
            if reason is None:
                size = (self.multiple, self.multiple)
                return optimize(self._source, size, device=self.device, dtype=dtype)
            logger.info("the network runs without the engine: %s", reason)
        model = self._source
        if isinstance(model, nn.Module):
            tensors = [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point()]
            fits = all(tensor.device == self.device and tensor.dtype == dtype for tensor in tensors)
            if not fits or model.training or self._backend != "auto":
                model = copy.deepcopy(model).to(self.device, dtype).eval()
        if self._backend != "auto":
            if not hasattr(model, "set_backend"):
                raise BackendError(
                    f"backend: {self._backend!r} was asked for, but {type(model).__name__} has no choice"
                )
            try:
                model.set_backend(self._backend)
            except ValueError as cause:
                raise BackendError(str(cause)) from cause
            if self._backend != "eager" and isinstance(model, nn.Module):
                require_backend(model, self._backend, self.device, dtype)
        return model


def _check_options(options: Mapping[str, Any]) -> None:
    """Raise TypeError for names that are no option of a mask."""
    unknown = [name for name in options if name not in _MASK_OPTIONS]
    if unknown:
        raise TypeError(f"{unknown[0]}: expected one of the options {', '.join(_MASK_OPTIONS)}")


def _check_sides(height: int, width: int) -> None:
    for name, pixels in (("height", height), ("width", width)):
        if isinstance(pixels, bool) or not isinstance(pixels, (int, np.integer)):
            raise TypeError(f"{name}: expected a whole number of pixels, got {pixels!r}")
        if pixels < 1:
            raise ValueError(f"{name}: expected at least 1 pixel, got {pixels}")


def _window(window: int, multiple: int) -> int:
    """`window` rounded down to a multiple of `multiple`."""
    try:
        pixels = operator.index(window)
    except TypeError:
        raise TypeError(f"window: expected a whole number of pixels, got {window!r}") from None
    if pixels < multiple:
        raise ValueError(f"window: expected at least the network's multiple {multiple}, got {window}")
    return pixels // multiple * multiple


def _finite(outputs: list[np.ndarray]) -> bool:
    return all(bool(np.isfinite(output).all()) for output in outputs)
