"""Pipes, and the standard input and output, in the place of one picture, mask or result."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..pipeline.sources import Encoded
from ..pipeline.writing import STANDARD_STREAM, is_any_stream


def check_standard(name: str, stream: Any, expected: str) -> None:
    """Raise UsageError where the process has no such standard stream, or it is a terminal."""
    if stream is None or stream.isatty():
        what = "a closed one" if stream is None else "a terminal"
        raise UsageError(f"{name}: expected {expected}, got {what}")


def read_stream(name: str, path: Path) -> Encoded:
    """The bytes of a pipe. Raises UsageError: a terminal or another device."""
    if path == STANDARD_STREAM:
        check_standard(name, sys.stdin, "a picture on the standard input")
        return Encoded("stdin", sys.stdin.buffer.read())
    if path.is_char_device() or path.is_block_device():
        raise UsageError(f"{name}: expected a file, a folder or a pipe, got the device {str(path)!r}")
    return Encoded(str(path), path.read_bytes())


def opened_mask(mask: Path) -> Path | Encoded:
    """The mask; of a pipe its bytes, because several pictures need them."""
    return read_stream("mask", mask) if is_any_stream(mask) else mask
