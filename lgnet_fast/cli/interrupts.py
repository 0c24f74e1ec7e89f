"""Ctrl-C: a command ends quietly with exit code 130, whatever becomes of the interruption on its way.

Modules in C that are interrupted while they load raise ImportError in place of KeyboardInterrupt, or nothing.
"""

from __future__ import annotations

import signal
from typing import Any

CODE = 130
"""The exit code after Ctrl-C, as in shells: 128 + SIGINT."""

_came: list[int] = []


def listen() -> None:
    """Note each Ctrl-C, which still raises KeyboardInterrupt; not where it is ignored, as in a shell's background."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _note)


def interrupted() -> bool:
    """Whether Ctrl-C was pressed since `listen`, and not taken by the command's own handler."""
    return bool(_came)


def _note(number: int, frame: Any) -> None:
    _came.append(number)
    raise KeyboardInterrupt
