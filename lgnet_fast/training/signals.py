"""Ending a long run cleanly, in all processes alike: on SIGINT or SIGTERM, after a time, or where a process that
reads pictures has died."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..jobs.world import STOP_SIGNALS


@contextlib.contextmanager
def until_signal(ask: Callable[[int], None]) -> Iterator[None]:
    """In this context, the first SIGINT or SIGTERM only calls `ask` with its number; a second one acts as usual.

    Signals that are ignored, as in background jobs of a shell, or handled by a program that embeds Python, are left.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # Python handles signals in the main thread only
        return
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    before = {number: handler for number, handler in handlers.items() if handler not in (signal.SIG_IGN, None)}

    def handle(number: int, frame: Any) -> None:
        ask(number)
        for each, handler in before.items():
            signal.signal(each, handler)

    for number in before:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class LateDeaths:
    """Holds back the handler of SIGCHLD by which PyTorch's loader raises the death of a worker process.

    It would raise within a step too, after which there can be no checkpoint. To be made after the loader has set it.
    """

    def __init__(self) -> None:
        self._number: int = getattr(signal, "SIGCHLD", 0)  # Windows has none
        own: Any = signal.getsignal(self._number) if self._number else None
        self._own: Any = own if str(getattr(own, "__module__", None)).startswith("torch.") else None
        self._raising = self._missed = False
        if self._own is not None and threading.current_thread() is threading.main_thread():
            signal.signal(self._number, self._note)

    def _note(self, number: int, frame: Any) -> None:
        if self._raising:
            self._own(number, frame)
        else:
            self._missed = True

    @contextlib.contextmanager
    def raised(self) -> Iterator[None]:
        """In this context, a death is raised, as RuntimeError; at its start, one of the time before."""
        self._raising = True
        try:
            if self._missed:
                self._missed = False
                self._own(self._number, None)
            yield
        finally:
            self._raising = False

    def close(self) -> None:
        """Give the handler back."""
        if self._own is not None and threading.current_thread() is threading.main_thread():
            signal.signal(self._number, self._own)


class Stop:
    """Whether a signal asks the run to stop. It counts from the next :meth:`agree` on, in all processes alike: one
    that stopped alone would leave the others waiting.

    `asked`: the signal that this process got; `agreed`: the one that counts; 0: none.
    """

    def __init__(self, accelerator: Any) -> None:
        self.accelerator = accelerator
        self.asked = self.agreed = 0

    def ask(self, number: int) -> None:
        """Ask to stop, for :func:`until_signal`."""
        self.asked = number

    def agree(self, minutes: float) -> float:
        """Agree whether to stop, and on the clock: returns the minutes of the first process. All processes must call
        it together."""
        if self.accelerator.num_processes == 1:
            self.agreed = self.asked
            return minutes
        asked = self.asked  # a signal may come now
        own = [minutes if self.accelerator.is_main_process else 0.0, *(float(asked == n) for n in STOP_SIGNALS)]
        first, *counts = self.accelerator.reduce(torch.tensor(own, device=self.accelerator.device), "sum").tolist()
        # All agree on one signal, because the first process reports it whichever process got it.
        self.agreed = next((int(n) for n, count in zip(STOP_SIGNALS, counts) if count), 0)
        return float(first)
