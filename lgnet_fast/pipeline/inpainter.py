"""`Inpainter`: fills pictures of any size, kind and depth with a network."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..engine.devices import resolve_device, resolve_dtype
from ..engine.holes import disjoint_boxes
from ..errors import InvalidImageError, InvalidMaskError
from ..reference.lgnet import LGNet
from . import memory, strategies
from .arguments import MaskOptions, check_memory_limit, check_sides, checked_window
from .filling import Filler, job_of
from .masks import masks_for
from .network import Network, Schedule, multiple_of
from .pictures import Picture, picture_of, pictures_of_tensor
from .results import Inpainted, Stages

_OF_ALL_PICTURES = ("mask_threshold:", "invert_mask:", "mask_channel: expected", "dilate:", "feather:")
"""Beginnings of errors about an option of the call, which no picture is to blame for."""


class Inpainter:
    """Fills the holes of pictures of any size and kind. Thread-safe; can be pickled and copied if its model can.

    Args:
        model: called as ``model(image, mask)`` with image [B, 3, H, W] in [-1, 1], mask [B, 1, H, W], 1 = hole, H and
            W multiples of ``model.size_multiple`` (256 where it has none); returns the merged picture. A model on
            another device, of another dtype, in training mode or with an explicit backend is copied, not changed; the
            copy keeps the weights of that moment.
        device: "auto" (CUDA if there is a GPU) or a torch device.
        dtype: "auto" (float16 on CUDA, float32 elsewhere), a torch.dtype or its name.
        backend: "auto" runs an LGNet by :func:`lgnet_fast.optimize` where that is faster (on a CPU in float32 or
            bfloat16, on an NVIDIA GPU from sm_80 on); others are passed to ``model.set_backend``.
        window: longest side of a network pass, in pixels, under the strategies tile and resize; a pass of crop has
            no more pixels than its square, but may be longer. Also the longest side of a padded picture that "auto"
            runs whole. At least ``model.size_multiple``; it is rounded down to a multiple of that.
        memory_limit: bytes, 0 or more, that a run may take beside the picture and the mask; None: the free memory of
            the system and of the GPU, asked before every run. With too little, "auto" takes smaller windows, of 256
            pixels or more where `window` is no smaller; it warns where a hole is then filled at a lower scale.

    Raises:
        BackendError: a device, dtype or backend that was asked for and cannot run.
        TypeError: `model` cannot be called, `window` or ``model.size_multiple`` is no whole number, or `memory_limit`
            no number.
        ValueError: `window` is below ``model.size_multiple``, that is below 1, `memory_limit` is below 0, or the
            weights are on the meta device.
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
        check_memory_limit(memory_limit)
        self.window = checked_window(window, multiple_of(model))
        self.memory_limit = memory_limit
        self._network = Network(model, device, dtype, backend)

    def __repr__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"Inpainter({type(self._network.source).__name__}, device={str(self.device)!r}, dtype={dtype!r})"

    @property
    def device(self) -> torch.device:
        """The device on which the network runs."""
        return self._network.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the network runs."""
        return self._network.dtype

    @property
    def multiple(self) -> int:
        """The network's height and width are multiples of this number of pixels."""
        return self._network.multiple

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str] | None = None,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        backend: str = "auto",
        **options: Any,
    ) -> Inpainter:
        """An Inpainter for weights in a folder, on the Hugging Face Hub, or in the package.

        Args:
            model: a model folder as :meth:`LGNet.save_pretrained` writes it, a hub id ("owner/name", or
                "owner/name@revision"), which is downloaded where it is not in the hub's cache, or None: the model
                bundled with the package.
            device, dtype, backend: as for the constructor.
            options: `window` and `memory_limit`, as for the constructor.

        Returns:
            The Inpainter; its network is not warmed up, see :meth:`warmup`.

        Raises:
            WeightsError: the weights are missing or malformed.
            TypeError: `model` is a network or of another type, or there is no such option.
            BackendError, ValueError: as of the constructor.
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
                floats in [0, 1]), C = 1 (grey), 2 (grey and alpha), 3 (RGB) or 4 (RGBA), or a list of those. Alpha
                is kept. PIL pictures and files are turned upright by their EXIF orientation.
            mask: a PIL picture, a file as for the picture, an array [H, W] or [H, W, C] (bool, uint8 0..255, integers
                whose maximum is 1, or floats in [0, 1]) or a tensor [H, W], [C, H, W] or [B, C, H, W]; one for all
                pictures or a list of one each. Larger is hole.
            strategy: "auto", "full", "crop", "resize" or "tile"; see `lgnet_fast.pipeline.strategies.choose`.
            mask_threshold: levels above this share of full scale are hole; 0 <= value < 1.
            invert_mask: dark is hole.
            dilate: whole pixels, 0 or more, by which the hole grows on every side (a disk).
            feather: width in whole pixels, 0 or more, of a soft ramp around the grown hole, where fill and picture
                are blended.
            mask_channel: the channel that marks the hole: "luma", "alpha" (opaque is hole), "inverse_alpha"
                (transparent is hole), "colour" (saturated is hole), or "auto", which raises InvalidMaskError for an
                ambiguous mask; see `lgnet_fast.pipeline.masks.read_hole` and docs/masks.md.

        Returns:
            A picture of the same kind; for a file a PIL picture, or a DeepImage for 16-bit colour. Known pixels,
            those outside the dilated hole and its feather, are identical to the input. For an empty mask the picture
            is returned unchanged, with a UserWarning; there is one too if more than 95 % is hole.

        Raises:
            InvalidImageError: a picture that cannot be read, or of another kind, shape or range.
            InvalidMaskError: the same for a mask; or mask_threshold, invert_mask, dilate, feather or mask_channel is
                of another type or out of its range. For a list or a batch, errors about one picture or its mask begin
                with its number, "picture[3]", from 0.
            ValueError: no such strategy. InvalidImageError and InvalidMaskError are ValueErrors too.
            OutOfMemoryError: the estimate exceeds the memory, before anything is allocated; or the run does.
            LGNetError: the network's output is not finite, even in float32.
            TypeError: the model returns no tensor of the image's shape.
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
            filled = []
            for index, (one, own) in enumerate(zip(picture, masks_for(mask, len(picture)), strict=True)):
                with _errors_of(index):
                    filled.append(self(one, own, **options))
            return filled
        if isinstance(picture, Tensor):
            pictures, together = _pictures_of(picture)
            results = []
            for index, (each, own) in enumerate(zip(pictures, masks_for(mask, len(pictures)), strict=True)):
                with _errors_of(index) if picture.ndim == 4 else nullcontext():
                    results.append(self._inpaint(each, own, **options).picture)
            return together(results)
        return self.inpaint(picture, mask, **options).picture

    def inpaint(self, picture: Any, mask: Any, strategy: str = "auto", **mask_options: Any) -> Inpainted:
        """Like a call, for one picture; also returns how the picture was made.

        Args:
            picture: one PIL picture, file, DeepImage or array, as for a call; lists and tensors are not taken.
            mask: one mask of any kind that a call takes, tensors too.
            strategy: as for a call.
            mask_options: mask_threshold, invert_mask, dilate, feather and mask_channel, as for a call, and
                `allow_any_mask` (True), without which a mask that selects nothing or more than 95 % raises
                InvalidMaskError.

        Returns:
            The filled picture with its strategy, number of network passes and hole ratio.

        Raises:
            InvalidImageError: also for a list or a tensor.
            TypeError: no such option of the mask; also as of a call.
            InvalidMaskError, ValueError, OutOfMemoryError, LGNetError: as of a call.
        """
        return self._inpaint(picture_of(picture), mask, strategy, **mask_options)

    def stages(self, picture: Any, mask: Any, strategy: str = "auto", **mask_options: Any) -> Stages:
        """The picture after every stage of the network, for contact sheets.

        Args:
            picture, mask, strategy, mask_options: as for :meth:`inpaint`. The model must take ``return_stages=True``,
                as LGNet, X_LG and their engines do.

        Returns:
            The picture with a white hole and the merged picture after every stage, each of the kind of the input.
            With an empty mask all of them, three merged ones, are the picture.

        Raises:
            InvalidImageError, InvalidMaskError, TypeError, ValueError, OutOfMemoryError, LGNetError: as of
                :meth:`inpaint`.
        """
        strategies.check(strategy)
        options, read = MaskOptions.of(mask_options), picture_of(picture)
        with memory.OutOfMemoryErrors("picture"):
            job = job_of(read, mask, options)
            boxes = disjoint_boxes(job.groups.boxes, read.size)
            one = np.ones(1, np.float32)
            white = [(box, np.broadcast_to(one, (*job.hole[box.slices].shape, 3))) for box in boxes]
            masked = read.with_fill(white, job.hole)
            if not job.groups.boxes:
                return Stages(masked, (masked, masked, masked))
            each, _, _ = self._filler.fill(job, strategy, stages=True)
            return Stages(masked, tuple(read.with_fill(fills, job.alpha) for fills in each))

    def warmup(self, height: int = 256, width: int = 256) -> float:
        """Run the network once on an empty picture of this size in pixels, padded; returns the seconds it took.

        Raises TypeError for a side that is no whole number, ValueError for a side below 1.
        """
        check_sides(height, width)
        start = time.perf_counter()
        self._network.warm_up(strategies.padded(height, self.multiple), strategies.padded(width, self.multiple))
        return time.perf_counter() - start

    def estimate_memory(self, height: int, width: int, strategy: str = "full") -> int:
        """Most bytes that a picture takes, besides the weights, with this network and dtype, whatever its hole.

        A small hole takes much less: a call counts with the holes that there are.

        Args:
            height, width: of the picture, in pixels.
            strategy: any of a call's. For "auto" the bound is that of windows in any number and shape.

        Returns:
            Bytes; on a GPU, the host's and the GPU's together.

        Raises:
            TypeError: a side that is no whole number.
            ValueError: a side below 1, or no such strategy.
        """
        check_sides(height, width)
        return memory.estimate_memory(
            height,
            width,
            strategy,
            base_channels=self._network.base_channels,
            dtype=self.dtype,
            size_multiple=self.multiple,
            window=self.window,
            engine=self._network.engine_on_cpu,
        )

    def schedule_passes(self, schedule: Schedule) -> None:
        """Let `schedule` run the network's passes from now on, such as in another thread, and those of several
        pictures in one batch.

        Args:
            schedule: called as ``schedule(key, run, images, holes)`` from each thread that fills a picture; returns
                what ``run(images, holes)`` returns: arrays [B, H, W, 3] for images float32 [B, H, W, 3] in [-1, 1]
                and holes bool [B, H, W]. Calls of equal keys and window sizes may be joined along the first axis.
        """
        self._network.schedule = schedule

    @property
    def _filler(self) -> Filler:
        return Filler(self._network, self.window, self.memory_limit)

    def _inpaint(self, picture: Picture, mask: Any, strategy: str = "auto", **mask_options: Any) -> Inpainted:
        strategies.check(strategy)
        options = MaskOptions.of(mask_options)
        with memory.OutOfMemoryErrors("picture"):
            job = job_of(picture, mask, options)
            ratio = np.count_nonzero(job.hole) / job.hole.size
            if not job.groups.boxes:
                unchanged = picture.rebuild(picture.samples.copy(), job.region)
                return Inpainted(unchanged, picture.size, ratio, None, 0)
            (fills,), ran, passes = self._filler.fill(job, strategy, stages=False)
            laid = [(box, fill, job.alpha[box.slices].copy()) for box, fill in fills]
            region = job.region
            del job, fills  # these have the size of the picture, and are not needed while three copies of it exist
            return Inpainted(picture.rebuild(picture.painted(laid), region), picture.size, ratio, ran, passes)


@contextmanager
def _errors_of(index: int) -> Iterator[None]:
    """Errors about the picture or the mask say which one of several it is."""
    try:
        yield
    except (InvalidImageError, InvalidMaskError) as error:
        text = str(error)
        if text.startswith(_OF_ALL_PICTURES):
            raise
        # "picture: ...", "picture 'a.png': ...", and "picture[2]: ..." of a list in the list.
        rest = text.removeprefix("picture") if text.startswith(("picture:", "picture ", "picture[")) else f": {text}"
        raise type(error)(f"picture[{index}]{rest}") from error


def _pictures_of(tensor: Tensor) -> tuple[list[Picture], Callable[[list[Tensor]], Tensor]]:
    """See `pictures_of_tensor`; errors of one picture of a batch say which one."""
    try:
        return pictures_of_tensor(tensor)
    except InvalidImageError:
        # A batch of no pictures is refused too where the shape, dtype or layout of the whole is wrong.
        if tensor.ndim == 4 and tensor.layout is torch.strided and _accepted(tensor[:0]):
            with _errors_of(next(i for i in range(len(tensor)) if not _accepted(tensor[i : i + 1]))):
                raise
        raise


def _accepted(tensor: Tensor) -> bool:
    try:
        pictures_of_tensor(tensor)
    except InvalidImageError:
        return False
    return True
