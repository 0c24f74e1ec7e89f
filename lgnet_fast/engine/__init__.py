"""Low-latency inference: a model becomes a plan, an executor runs the plan where pixels are needed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import attach

if TYPE_CHECKING:
    from .engine import Engine, fast_executor_reason, load_engine, optimize

__getattr__, __dir__ = attach(
    __name__, dict.fromkeys(("Engine", "fast_executor_reason", "load_engine", "optimize"), "engine")
)

__all__ = ["Engine", "fast_executor_reason", "load_engine", "optimize"]
