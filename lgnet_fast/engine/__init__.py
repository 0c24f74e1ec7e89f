"""Low-latency inference: a model becomes a plan, an executor runs the plan where pixels are needed."""

from .engine import Engine, fast_executor_reason, load_engine, optimize

__all__ = ["Engine", "fast_executor_reason", "load_engine", "optimize"]
