"""Evaluation: scores per hole-ratio class (the paper's protocol) or per kind of hole.

Needs ``pip install 'lgnet-fast[eval]'``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import attach

if TYPE_CHECKING:
    from ..data.metrics import METRICS
    from .baselines import BASELINES, biharmonic, navier_stokes, telea
    from .frechet import VGGFrechet
    from .options import EvaluationOptions
    from .protocol import class_label, parse_classes
    from .report import Evaluation, Score
    from .scoring import evaluate
    from .suite import SUITE_METRICS

__getattr__, __dir__ = attach(
    __name__,
    {
        "BASELINES": "baselines",
        "METRICS": ".data.metrics",
        "SUITE_METRICS": "suite",
        "Evaluation": "report",
        "EvaluationOptions": "options",
        "Score": "report",
        "VGGFrechet": "frechet",
        "biharmonic": "baselines",
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
    "SUITE_METRICS",
    "Evaluation",
    "EvaluationOptions",
    "Score",
    "VGGFrechet",
    "biharmonic",
    "class_label",
    "evaluate",
    "navier_stokes",
    "parse_classes",
    "telea",
]
