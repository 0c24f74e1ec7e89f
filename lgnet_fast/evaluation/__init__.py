"""Evaluation by the paper's protocol: scores per hole-ratio class. Needs ``pip install "lgnet_fast[eval]"``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import attach

if TYPE_CHECKING:
    from .baselines import BASELINES, navier_stokes, telea
    from .metrics import METRICS
    from .protocol import class_label, parse_classes
    from .report import Evaluation, Score
    from .scoring import evaluate

__getattr__, __dir__ = attach(
    __name__,
    {
        "BASELINES": "baselines",
        "METRICS": "metrics",
        "Evaluation": "report",
        "Score": "report",
        "class_label": "protocol",
        "evaluate": "scoring",
        "navier_stokes": "baselines",
        "parse_classes": "protocol",
        "telea": "baselines",
    },
)

__all__ = [
    "BASELINES",
    "METRICS",
    "Evaluation",
    "Score",
    "class_label",
    "evaluate",
    "navier_stokes",
    "parse_classes",
    "telea",
]
