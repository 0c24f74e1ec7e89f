"""What the tests of contexts, transforms and processes share: tiny saved models, a picture, operators."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from lgnet_fast import LGNet, optimize
from lgnet_fast.engine.cpu.executor import CpuExecutor

TINY = {"coarse_channels": 1, "local_channels": 1, "global_channels": 1}


def saved(path: Path, stages: str) -> Path:
    """A saved model and, where there is an extension, its engine."""
    torch.manual_seed(0)
    model = LGNet(stages, **TINY).eval()
    model.save_pretrained(path)
    if CpuExecutor.unavailable_reason() is None:
        optimize(model).save(path / "engine")
    return path


def image_and_mask() -> tuple[Tensor, Tensor]:
    """A picture of noise with a hole, [1, 3, 256, 256] and [1, 1, 256, 256]."""
    image = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(3)) * 2 - 1
    mask = torch.zeros(1, 1, 256, 256)
    mask[..., 60:110, 140:200] = 1
    return image, mask


def operator_and_arguments(
    name: str, dtype: torch.dtype = torch.float32
) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """An operator of `torch.ops.lgnet`, and tensors for it."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    tensors = {
        "cosine_attention": lambda: [normal(2, 6, 5, 7)],
        "attention_block": lambda: [normal(2, 6, 5, 7), normal(6, 12, 1, 1), normal(6)],
        "merge": lambda: [normal(2, 3, 5, 7), normal(2, 3, 5, 7), normal(2, 1, 5, 7)],
        "merge_concat": lambda: [normal(2, 3, 5, 7), normal(2, 3, 5, 7), normal(2, 1, 5, 7)],
    }
    return getattr(torch.ops.lgnet, name), tensors[name]()
