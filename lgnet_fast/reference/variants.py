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
    """The names that :func:`create_model` takes.

    Returns:
        The paper's variants, the sizes of the bundled and the demo's model, and the ablations of Table VI.
    """
    return list(_CONFIGS)


def create_model(name: str, **overrides: Any) -> LGNet:
    """A newly initialised model.

    Parameters in millions (docs/model.md): lgnet 115.00, lgnet_share 60.59, lgnet_light 67.10, lgnet_demo 7.20,
    lgnet_small 9.79; the ablations of Table VI: C 54.41, C+L 59.90, C+G_att 109.52, C+G+G_att 163.93, C+L+G 114.31,
    C+L+G_att 115.00 (the same network as lgnet).

    Args:
        name: one of :func:`list_models`.
        overrides: any argument of :class:`LGNet`, e.g. ``variant="paper"``.

    Returns:
        The model in training mode, with the paper's random initialisation.

    Raises:
        ValueError: no such name, or an argument of another type or value.
        TypeError: LGNet has no such argument.
    """
    if not isinstance(name, str) or name not in _CONFIGS:
        raise ValueError(f"name: expected one of {list_models()}, got {name!r}")
    return LGNet(**{**_CONFIGS[name], **overrides})
