"""The model itself behind the executors' interface: where no executor of the plan is faster, or none is right."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..reference.lgnet import LGNet, LocalGlobalRefinement
from ..reference.merge import merge
from .executor import Executor, Regions, Result
from .plan import Plan


class ModelExecutor(Executor):
    """Runs a copy of a model in eager PyTorch, always densely, at any size; pictures come and go as float32.

    Args:
        model: of an X_LG, the stages after the first.
        device: where to run.
        dtype: to compute in.
        backend: of the fused operators, see :meth:`.Cascade.set_backend`; None: the model's.
    """

    restricts = False

    def __init__(
        self,
        model: LGNet | LocalGlobalRefinement,
        device: torch.device,
        dtype: torch.dtype,
        backend: str | None = None,
    ) -> None:
        # the first stage of an X_LG is the engine's matter
        memo: dict[int, Any] = {id(model.first_stage): None} if isinstance(model, LocalGlobalRefinement) else {}
        self._model = copy.deepcopy(model, memo).eval()
        # cuDNN's and oneDNN's GPU convolutions want channels last; Metal's gain nothing by it
        self._layout = torch.channels_last if device.type in ("cuda", "xpu") else torch.contiguous_format
        self._model.to(device, dtype).to(memory_format=self._layout)  # type: ignore[call-overload]
        if backend is not None:
            self._model.set_backend(backend)
        self._device, self._dtype = device, dtype

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @property
    def networks(self) -> list[Callable[[Tensor], Tensor]]:
        """The stages' networks, [B, 4, H, W] to [B, 3, H, W] in :attr:`dtype`; of an X_LG, those after the first."""
        model = self._model
        return list(model.networks().values()) if isinstance(model, LGNet) else [model.net_l, model.net_g]

    def resized(self, plan: Plan) -> ModelExecutor:
        """Itself: the model takes any size."""
        return self

    def run(self, image: Tensor, mask: Tensor, start: Tensor | None = None, regions: Regions | None = None) -> Result:
        model = self._model
        with torch.no_grad():
            known, hole = image.to(self._dtype), mask.to(self._dtype)
            raw = [torch.ones_like(known) if start is None else start.to(self._dtype)]
            for net in self.networks:
                picture = model._merge_concat(known, raw[-1], hole)
                raw.append(net(picture.contiguous(memory_format=self._layout)))
            pictures = [r.float() for r in raw[1:]] if self._dtype != torch.float64 else raw[1:]
            # in the precision of the input: known pixels are its own
            exact = torch.promote_types(image.dtype, torch.float32)
            return merge(image.to(exact), pictures[-1].to(exact), mask.to(exact)), pictures
