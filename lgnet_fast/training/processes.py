"""What the processes of a run decide together and exchange. With one process, nothing is exchanged."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def any_process(accelerator: Any, here: bool) -> bool:
    """Whether `here` is true in any process. All processes must call it together, and get the same answer."""
    if accelerator.num_processes == 1:
        return here
    return float(accelerator.reduce(torch.tensor(float(here), device=accelerator.device), "sum")) > 0


def all_equal(accelerator: Any, number: int) -> bool:
    """Whether `number` is the same in all processes, which must call it together."""
    if accelerator.num_processes == 1:
        return True
    from accelerate.utils import gather_object

    return len(set(gather_object([number]))) == 1


def sum_of_processes(accelerator: Any, tensor: Tensor) -> Tensor:
    """The sum of the processes' tensors on the CPU, the same in all of them."""
    if accelerator.num_processes == 1:
        return tensor.cpu()
    total: Tensor = accelerator.reduce(tensor.to(accelerator.device), "sum")
    return total.cpu()


def own_share(accelerator: Any, count: int) -> range:
    """The numbers below `count` that this process takes; together the processes take each of them once."""
    return range(accelerator.process_index, count, accelerator.num_processes)


def average_buffers(accelerator: Any, buffers: Iterable[Tensor]) -> None:
    """Replace floating buffers by their means over the processes, each of which has seen other pictures."""
    if accelerator.num_processes == 1:
        return
    for buffer in buffers:
        if buffer.is_floating_point():
            buffer.copy_(accelerator.reduce(buffer, "mean"))
