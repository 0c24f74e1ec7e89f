"""`Network`: a model ready to run on one device, in one dtype, on arrays."""

from __future__ import annotations

import copy
import logging
import operator
from collections.abc import Callable, Hashable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import forks
from ..engine import Engine, fast_executor_reason, optimize
from ..engine.devices import resolve_device, resolve_dtype, same_device
from ..engine.structure import reason_against_engine
from ..errors import BackendError, LGNetError
from ..ops.dispatch import require_backend
from ..reference.lgnet import LGNet, LocalGlobalRefinement
from .notices import warn

logger = logging.getLogger("lgnet_fast")

_NETWORKS = (LGNet, LocalGlobalRefinement)

Run = Callable[[np.ndarray, np.ndarray], list[np.ndarray]]
"""Images float32 [B, H, W, 3] in [-1, 1] and holes bool [B, H, W] to the results of one or all stages, each float32
[B, H, W, 3]."""
Schedule = Callable[[tuple[Hashable, ...], Run, np.ndarray, np.ndarray], list[np.ndarray]]
"""``schedule(key, run, images, holes)`` runs ``run(images, holes)``; passes of equal keys and window sizes may go
together in one batch."""


def multiple_of(model: Any) -> int:
    """The number of which a model's height and width must be multiples. Raises TypeError, ValueError."""
    stated = getattr(model, "size_multiple", 256)
    try:
        pixels = operator.index(stated)
    except TypeError:
        raise TypeError(f"model: expected a whole number of pixels as its size_multiple, got {stated!r}") from None
    if pixels < 1:
        raise ValueError(f"model: expected a size_multiple of at least 1 pixel, got {stated}")
    return pixels


class Network:
    """A model on a device in a dtype; arguments as of :class:`Inpainter`. Thread-safe; can be pickled if that can.

    `schedule` runs its passes; by default at once.
    """

    def __init__(
        self, model: Callable[..., Any], device: str | torch.device, dtype: str | torch.dtype, backend: str
    ) -> None:
        self.device = resolve_device(device)
        self.dtype = resolve_dtype(dtype, self.device)
        self.multiple = multiple_of(model)
        widths = getattr(model, "channels", None)
        # LGNet's are those of its stages; another network may have something else by this name.
        self.base_channels = max(widths) if isinstance(widths, tuple) and widths else 64
        self.schedule: Schedule = _at_once
        self.source = model
        self._backend = backend
        if self.device.type == "cpu" and self.dtype == torch.float16 and isinstance(model, _NETWORKS):
            warn("dtype: float16 on a CPU is hundreds of times slower than float32; take float32 or bfloat16")
        self._prepare()

    def _prepare(self) -> None:
        self.model = self._placed(self.dtype)
        self._exact: Callable[..., Any] | None = None
        self._exact_lock = forks.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """All attributes except those that `_prepare` makes again: engines cannot be pickled or copied."""
        made = ("model", "_exact", "_exact_lock")
        return {name: value for name, value in self.__dict__.items() if name not in made}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Prepare the model again. Raises BackendError where this machine lacks the device or the backend."""
        self.__dict__.update(state)
        resolve_device(self.device)
        self._prepare()

    @property
    def description(self) -> str:
        """What runs, where, and in which dtype, such as "engine on cpu, float32"."""
        way = "engine" if isinstance(self.model, Engine) else type(self.model).__name__
        return f"{way} on {self.device}, {str(self.dtype).removeprefix('torch.')}"

    @property
    def engine_on_cpu(self) -> bool:
        """Whether it runs as an engine on the CPU, which takes less memory."""
        return self.device.type == "cpu" and isinstance(self.model, Engine)

    def run(self, images: np.ndarray, holes: np.ndarray, stages: bool) -> list[np.ndarray]:
        """The result, or the merged pictures of all stages, for padded windows; see `Run`. If half precision
        overflows, it runs again in float32.

        Raises LGNetError: the output is not finite; TypeError: the model returns something else.
        """
        outputs = self._scheduled(self.model, self.dtype, images, holes, stages)
        if _finite(outputs):
            return outputs
        if self.dtype in (torch.float16, torch.bfloat16):
            outputs = self._scheduled(self._exact_model(), torch.float32, images, holes, stages)
            if _finite(outputs):
                return outputs
            raise LGNetError(f"model: its output is not finite, neither in {self.dtype} nor in torch.float32")
        raise LGNetError(f"model: its output is not finite in {self.dtype}; are the weights sound?")

    def warm_up(self, height: int, width: int) -> None:
        """Run once on an empty padded picture; the output is not checked."""
        images, holes = np.zeros((1, height, width, 3), np.float32), np.ones((1, height, width), bool)
        self._scheduled(self.model, self.dtype, images, holes, stages=False)

    def _scheduled(
        self, model: Callable[..., Any], dtype: torch.dtype, images: np.ndarray, holes: np.ndarray, stages: bool
    ) -> list[np.ndarray]:
        def run(images: np.ndarray, holes: np.ndarray) -> list[np.ndarray]:
            return self._run(model, dtype, images, holes, stages)

        return self.schedule((id(model), dtype, stages), run, images, holes)

    def _run(
        self, model: Callable[..., Any], dtype: torch.dtype, images: np.ndarray, holes: np.ndarray, stages: bool
    ) -> list[np.ndarray]:
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
        if may_optimize and self._backend == "auto" and isinstance(self.source, _NETWORKS):
            reason = fast_executor_reason(self.device, dtype) or reason_against_engine(self.source)
            if reason is None:
                size = (self.multiple, self.multiple)
                return optimize(self.source, size, device=self.device, dtype=dtype)
            logger.info("the network runs without the engine: %s", reason)
        model = self.source
        if isinstance(model, nn.Module):
            tensors = [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point()]
            if any(tensor.is_meta for tensor in tensors):
                raise ValueError("model: expected weights with values, got a model on the meta device")
            fits = all(same_device(tensor.device, self.device) and tensor.dtype == dtype for tensor in tensors)
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


def _at_once(key: tuple[Hashable, ...], run: Run, images: np.ndarray, holes: np.ndarray) -> list[np.ndarray]:
    return run(images, holes)


def _finite(outputs: list[np.ndarray]) -> bool:
    return all(bool(np.isfinite(output).all()) for output in outputs)
