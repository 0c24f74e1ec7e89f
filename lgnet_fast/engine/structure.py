"""Whether a plan can express a model: its layers must be those of the reference networks.

A plan holds weights, kernel sizes, strides and paddings. What else users change in a model (hooks, other activations,
grouped convolutions, a `forward` of their own) is not in it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import cast

import torch
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from ..reference.attention import AttentionBlock, computes_as
from ..reference.backends import BACKENDS, functions
from ..reference.lgnet import LGNet, LocalGlobalRefinement
from ..reference.networks import NETWORKS
from .build import plan_stages

_OF_CONVOLUTIONS = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
_SETTINGS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Conv2d: (*_OF_CONVOLUTIONS, "padding_mode"),
    nn.ConvTranspose2d: (*_OF_CONVOLUTIONS, "output_padding"),
    nn.BatchNorm2d: ("num_features", "affine", "track_running_stats"),
    nn.LeakyReLU: ("negative_slope",),
    nn.ReflectionPad2d: ("padding",),
    AttentionBlock: ("variant",),
}
_PARTS: dict[type[nn.Module], tuple[str, ...]] = {nn.BatchNorm2d: ("weight", "bias", "running_mean", "running_var")}
"""Tensors that the plan folds, and that a module may be made without."""
_COMPUTE_WEIGHTS = (WeightNorm, SpectralNorm, prune.BasePruningMethod)
"""Hooks of torch.nn.utils that set a module's weight, which the plan reads."""
_REPLACED_FORWARD = ("_original_forward", "_old_forward")
"""Attributes of modules whose `forward` accelerate has wrapped; it computes the same."""


Kind = tuple[type[nn.Module], tuple[int | str | None, ...]]
"""A class of networks and its arguments."""


def plain_stages(model: LGNet | LocalGlobalRefinement) -> list[tuple[str, nn.Module, bool]]:
    """The model's stages as :func:`.build.plan_stages` gives them, as new reference networks without values."""
    return [(name, _made(*_kind(model, name, net)), attends) for name, net, attends in plan_stages(model)]


def _kind(model: LGNet | LocalGlobalRefinement, name: str, net: nn.Module) -> Kind:
    """The class of a stage's network and its arguments: by its layers, else those that the model was made with."""
    for kind in NETWORKS:
        if isinstance(net, kind):
            with contextlib.suppress(AttributeError, KeyError):  # layers that were replaced by others
                return kind, net.arguments()
    with torch.device("meta"):
        if isinstance(model, LGNet):
            made: LGNet | LocalGlobalRefinement = LGNet(**model.config)
        else:
            made = LocalGlobalRefinement(nn.Identity(), model.variant, *model.channels)
    net = next(other for stage, other, _ in plan_stages(made) if stage == name)
    assert isinstance(net, NETWORKS)
    return type(net), net.arguments()


def _made(kind: type[nn.Module], arguments: tuple[int | str | None, ...]) -> nn.Module:
    with torch.device("meta"):
        return kind(*arguments)


_made_once = functools.lru_cache(maxsize=16)(_made)
"""For comparisons, which only read the network: making one takes longer than comparing."""


def reason_against_engine(model: LGNet | LocalGlobalRefinement) -> str | None:
    """What no engine of the model would run, because engines call its networks and not itself; None for nothing."""
    reason = _own_code(model, LGNet if isinstance(model, LGNet) else LocalGlobalRefinement)
    return None if reason is None else f"the model {reason}"


def reason_against_plan(model: LGNet | LocalGlobalRefinement) -> str | None:
    """What a plan of the networks would not compute, in one sentence that names the module; None for nothing."""
    for name, net, _ in plan_stages(model):
        kind, arguments = _kind(model, name, net)
        plain = _made_once(kind, arguments)  # type: ignore[arg-type]  # classes can be hashed
        if (reason := _difference(name, net, plain)) is not None:
            return reason
    return None


def _difference(stage: str, net: nn.Module, plain: nn.Module) -> str | None:
    """What distinguishes a network from the one that it should be."""
    own = dict(net.named_modules(remove_duplicate=False))
    expected = dict(plain.named_modules(remove_duplicate=False))
    for name, module in expected.items():
        where = f"{stage}.{name}" if name else stage
        if name not in own:
            return f"{where} is missing"
        if (reason := _own_code(own[name], type(module))) is not None:
            return f"{where} {reason}"
        for setting in _SETTINGS.get(type(module), ()):
            found, wanted = getattr(own[name], setting), getattr(module, setting)
            if found != wanted:
                return f"{where} has {setting} = {found}, not {wanted}"
        if isinstance(module, AttentionBlock) and _own_attention(cast(AttentionBlock, own[name])):
            return f"{where} has an attention of its own"
        for part in _PARTS.get(type(module), ()):
            if getattr(own[name], part) is None:
                return f"{where} has no {part}"
    for name in own:
        if name not in expected and "parametrizations" not in name.split("."):
            return f"{stage}.{name} is no layer of LGNet"
    return None


def _own_code(module: nn.Module, kind: type[nn.Module]) -> str | None:
    """Code that runs in a module and not in one of `kind`, in words."""
    synchronised = kind is nn.BatchNorm2d and type(module) is nn.SyncBatchNorm
    if not computes_as(module, kind) and not synchronised:
        return f"is not {kind.__name__} but {type(module).__name__}, which has a forward of its own"
    if "forward" in vars(module) and not any(hasattr(module, name) for name in _REPLACED_FORWARD):
        return "has another forward"
    if module._forward_hooks:
        return "has a forward hook"
    if not all(isinstance(hook, _COMPUTE_WEIGHTS) for hook in module._forward_pre_hooks.values()):
        return "has a forward pre-hook"
    return None


def _own_attention(block: AttentionBlock) -> bool:
    """Whether a block runs other functions than :meth:`.Cascade.set_backend` injects, which all compute the same."""
    injected = [function for backend in BACKENDS for function in functions(backend)[:2]]
    return not all(function in injected for function in (block.attend, block.run))


@contextlib.contextmanager
def weights_in_evaluation(model: nn.Module) -> Iterator[None]:
    """Compute parametrized weights as in evaluation mode, whatever the mode of the model.

    In training mode, each reading of a weight with spectral normalisation would improve its singular vectors, which
    are part of the user's model.
    """
    training = [
        module for name, module in model.named_modules() if module.training and "parametrizations" in name.split(".")
    ]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def refresh_weights(model: nn.Module) -> None:
    """Compute weights that pruning, weight or spectral normalisation derives from others, as a forward would."""
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, SpectralNorm):
                # As in evaluation mode; the hook itself would improve the singular vectors in training mode.
                setattr(module, hook.name, hook.compute_weight(module, do_power_iteration=False))
            elif isinstance(hook, _COMPUTE_WEIGHTS):
                hook(module, ())
