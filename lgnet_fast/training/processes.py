"""What the processes of a run decide together and exchange. With one process, nothing is exchanged."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..errors import TrainingError
from ..jobs.world import World
from .crops import quiet


def first_tells() -> contextlib.AbstractContextManager[None]:
    """For what all processes read alike, also before accelerate knows them: the first one alone warns in this
    context."""
    return contextlib.nullcontext() if World.announced().rank == 0 else quiet()


def any_process(accelerator: Any, here: bool) -> bool:
    """Whether `here` is true in any process. All processes must call it together, and get the same answer."""
    if accelerator.num_processes == 1:
        return here
    return float(accelerator.reduce(torch.tensor(float(here), device=accelerator.device), "sum")) > 0


_TOGETHER = "_raised_in_all_processes"


@contextlib.contextmanager
def failing_together(accelerator: Any) -> Iterator[None]:
    """An error of this context in one process is an error in all of them: none waits for one that has failed.

    All processes must enter it together and exchange nothing in it. Where a process fails, its error goes on, and the
    others raise TrainingError with its text.
    """
    if accelerator.num_processes == 1:
        yield
        return
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    if not any_process(accelerator, failure is not None):
        return
    from accelerate.utils import gather_object

    own = None if failure is None else " ".join(str(failure).split()) or type(failure).__name__
    texts = gather_object([own])
    if failure is None:
        number = next(i for i, text in enumerate(texts) if text is not None)
        failure = TrainingError(f"process {number}: {texts[number]}")
    setattr(failure, _TOGETHER, True)
    raise failure


def failed_together(accelerator: Any, error: Exception) -> bool:
    """Whether all processes have raised `error` or its like, so that they can go on to exchange something."""
    return accelerator.num_processes == 1 or getattr(error, _TOGETHER, False)


def texts_of_all(accelerator: Any, texts: Iterable[str]) -> list[str]:
    """The different texts of all processes, which must call it together, those of the first process first."""
    if accelerator.num_processes > 1:
        from accelerate.utils import gather_object

        texts = gather_object(list(texts))
    return list(dict.fromkeys(texts))


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
