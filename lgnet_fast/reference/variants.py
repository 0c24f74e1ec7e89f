"""Models by name (docs/model.md)."""

from __future__ import annotations

from typing import Any

from .lgnet import CASCADES, LGNet

_CONFIGS: dict[str, dict[str, Any]] = {
    "lgnet": {},
    "lgnet_share": {"share_coarse": True},
    "lgnet_light": {"coarse_channels": 48, "global_channels": 48},
    "lgnet_demo": {"coarse_channels": 16, "local_channels": 16, "global_channels": 16},
    "lgnet_small": {"coarse_channels": 32, "local_channels": 32, "global_channels": 32, "max_channels": 128},
    **{stages: {"stages": stages} for stages in CASCADES},
}


def list_models() -> list[str]:
    """Names that :func:`create_model` takes: the paper's variants, the demo's sizes, the ablations of Table VI."""
    return list(_CONFIGS)


def create_model(name: str, **overrides: Any) -> LGNet:
    """A newly initialised model.

    Args:
        name: one of :func:`list_models`, e.g. "lgnet", "lgnet_light", "C+L".
        overrides: any argument of :class:`LGNet`, e.g. ``variant="paper"``.

    Returns:
        The model in training mode, with the paper's random initialisation.
    """
    if name not in _CONFIGS:
        raise ValueError(f"name: expected one of {list_models()}, got {name!r}")
    return LGNet(**{**_CONFIGS[name], **overrides})
