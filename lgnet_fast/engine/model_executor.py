"""The model itself as an executor, for devices where no executor of the plan is faster or correct."""

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
    """Runs a copy of a model in eager PyTorch, always densely, at any size; pictures are passed as float32.

    Args:
        model: of an X_LG, the stages after the first.
        device: of the computation.
        dtype: of the computation.
        backend: of the fused operators, see :meth:`.Cascade.set_backend`; None: that of the model.
    """

    restricts = False

    def __init__(
        self,
        model: LGNet | LocalGlobalRefinement,
        device: torch.device,
        dtype: torch.dtype,
        backend: str | None = None,
    ) -> None:
        # the engine runs the first stage of an X_LG
        memo: dict[int, Any] = {id(model.first_stage): None} if isinstance(model, LocalGlobalRefinement) else {}
        self._model = copy.deepcopy(model, memo).eval()
        # convolutions of cuDNN and oneDNN on GPUs are faster in channels last, those of Metal are not
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
        """The networks of the stages, [B, 4, H, W] to [B, 3, H, W] in :attr:`dtype`; for an X_LG, after the first."""
        model = self._model
        return list(model.networks().values()) if isinstance(model, LGNet) else [model.net_l, model.net_g]

    def resized(self, plan: Plan) -> ModelExecutor:
        """This executor: the model takes any size."""
        return self

    def run(
        self,
        image: Tensor,
        mask: Tensor,
        start: Tensor | None = None,
        regions: Regions | None = None,
        stages: bool = True,
    ) -> Result:
        model = self._model
        with torch.no_grad():
            known, hole = image.to(self._dtype), mask.to(self._dtype)
            raw = [torch.ones_like(known) if start is None else start.to(self._dtype)]
            for net in self.networks:
                picture = model._merge_concat(known, raw[-1], hole)
                raw.append(net(picture.contiguous(memory_format=self._layout)))
            pictures = [r.float() for r in raw[1:]] if self._dtype != torch.float64 else raw[1:]
            # in the precision of the input, so that known pixels are exact
            exact = torch.promote_types(image.dtype, torch.float32)
            return merge(image.to(exact), pictures[-1].to(exact), mask.to(exact)), pictures if stages else []
