"""Low-latency inference: a model becomes a plan, an executor runs the plan where pixels are needed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import attach

if TYPE_CHECKING:
    from .engine import Engine
    from .making import fast_executor_reason, load_engine, optimize

__getattr__, __dir__ = attach(
    __name__, {"Engine": "engine"} | dict.fromkeys(("fast_executor_reason", "load_engine", "optimize"), "making")
)

__all__ = ["Engine", "fast_executor_reason", "load_engine", "optimize"]
