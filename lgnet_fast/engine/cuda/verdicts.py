"""What a check of an NVIDIA GPU's engine found, as :mod:`lgnet_fast.cache` keeps it.

==========  ========================================================================================
"graph"     the kernels (without Triton: PyTorch's operators), replayed as one CUDA graph
"direct"    the same, launched one by one
"library"   the steps that fail (else all) by PyTorch's operators, cuDNN, channels last; dense
"model"     the model itself, channels last, in eager PyTorch
==========  ========================================================================================
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ..plan import Plan

TITLES = {
    "graph": "the engine, as one CUDA graph",
    "direct": "the engine, without a CUDA graph",
    "library": "the engine's steps by PyTorch's operators",
    "model": "the model itself in eager PyTorch",
}
"""Path -> what runs, as the subject of a sentence."""


@dataclass(frozen=True)
class Check:
    """One comparison: `error` and the `limit` it must not exceed, or `problem`: the exception or finding instead."""

    name: str
    error: float | None = None
    limit: float | None = None
    problem: str | None = None

    @property
    def passed(self) -> bool:
        return self.problem is None

    def __str__(self) -> str:
        if self.problem is not None:
            return f"{self.name}: {self.problem}"
        return f"{self.name}: error {self.error:.1e}, allowed {self.limit:.1e}"


@dataclass(frozen=True)
class Verdict:
    """The path that runs, why no better one does, and the checks."""

    runs: str
    reason: str | None = None
    steps: tuple[str, ...] = ()
    """Steps that "library" runs by PyTorch's operators; none: all."""
    again: bool = False
    """Whether the next process repeats the check, because the failure may have been transient."""
    checks: tuple[Check, ...] = field(default=(), compare=False)
    seconds: float = field(default=0.0, compare=False)

    def as_dict(self) -> dict[str, Any]:
        """As the cache keeps it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, value: Any) -> Verdict | None:
        """The inverse of :meth:`as_dict`; None where `value` has another form."""
        try:
            checks = tuple(Check(**check) for check in value["checks"])
            verdict = cls(
                str(value["runs"]),
                value["reason"],
                tuple(value["steps"]),
                bool(value["again"]),
                checks,
                float(value["seconds"]),
            )
        except (TypeError, KeyError, ValueError):
            return None
        return verdict if verdict.runs in TITLES else None

    def __str__(self) -> str:
        title = TITLES[self.runs]
        if self.runs == "library" and self.steps:
            title = f"the engine with {', '.join(self.steps)} by PyTorch's operators"
        return title if self.reason is None else f"{title} ({self.reason})"


def verdict_name(plan: Plan, choices: Mapping[str, str]) -> str:
    """Name of a verdict within its key: layers of the network, sizes, and the chosen kernels."""
    digest = hashlib.sha256(repr((plan.digest, sorted(choices.items()))).encode()).hexdigest()[:12]
    return f"engine {digest}, {len(plan.steps)} steps, {plan.batch}x{plan.height}x{plan.width}"
