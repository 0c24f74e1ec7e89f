"""The networks of a training run, made by its configuration."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.spectral_norm import SpectralNorm

from ..errors import ConfigError, WeightsError
from ..reference import LGNet, create_model, list_models
from ..reference.cascade import Cascade
from ..reference.discriminator import Discriminator
from ..reference.features import LPIPS, FeaturesFn, registered_features
from ..reference.vgg import VGG16Features
from ..weights import bundled_path
from .config import DiscriminatorConfig, LossConfig, ModelConfig


def make_network(config: ModelConfig) -> Cascade:
    """The generator, in float32.

    Raises:
        ConfigError: an unknown name, invalid arguments, or a factory that returns no cascade. WeightsError:
        `init_from` cannot be loaded.
    """
    network: Cascade
    if config.name not in list_models():
        raise ConfigError(f"model.name: expected one of {list_models()}, got {config.name!r}")
    if config.factory is not None:
        if config.init_from is not None or config.overrides:
            raise ConfigError("model.factory: it makes the whole model; leave init_from and overrides out")
        factory = _imported(config.factory)
        try:
            made = factory()
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"model.factory: expected a function without arguments, got {config.factory} ({error})"
            ) from error
        if not isinstance(made, Cascade):
            raise ConfigError(f"model.factory: expected an LGNet or LocalGlobalRefinement, got {type(made).__name__}")
        network = made
    elif config.init_from is not None:
        if config.overrides:
            raise ConfigError("model.overrides: init_from brings its own architecture; leave one of the two out")
        with _naming("model.init_from"):
            network = _weights_at(str(bundled_path()) if config.init_from == "bundled" else config.init_from)
    else:
        try:
            network = create_model(config.name, **config.overrides)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"model: {error}") from error
    try:
        return network.float().set_backend(config.backend)
    except ValueError as error:
        raise ConfigError(f"model.{error}") from error


def _weights_at(source: str) -> LGNet:
    """A model folder, a folder of the authors' files, or a hub id."""
    folder = Path(source)
    if source and folder.is_dir() and not (folder / "config.json").exists() and any(folder.glob("*_net_G1.pth")):
        return LGNet.from_released(folder)
    return LGNet.from_pretrained(source)


@contextlib.contextmanager
def _naming(setting: str) -> Iterator[None]:
    """Errors of weights files name the setting that gives the file."""
    try:
        yield
    except WeightsError as error:
        raise WeightsError(f"{setting}: {str(error).removeprefix('weights: ')}") from error


def _imported(where: str) -> Callable[[], Any]:
    module, colon, name = where.partition(":")
    try:
        if not colon:
            raise ImportError("no colon in it")
        found: Callable[[], Any] = getattr(import_module(module), name)
        if not callable(found):
            raise TypeError(f"it is of type {type(found).__name__}")
        return found
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"model.factory: expected package.module:function, got {where!r} ({error})") from error


def make_discriminator(config: DiscriminatorConfig) -> Discriminator:
    """The discriminator, in float32 and training mode.

    Raises:
        WeightsError: `init_from` cannot be loaded.
    """
    if config.init_from is not None:
        with _naming("discriminator.init_from"):
            discriminator = Discriminator.from_released(config.init_from, variant=config.variant).float()
    else:
        discriminator = Discriminator(config.variant, config.channels)
    return discriminator.train()


def keep_spectral_norm_wide(discriminator: nn.Module) -> None:
    """Exclude the power iteration and the norm from autocast, because in 16 bit a norm has at most three digits."""
    for module in discriminator.modules():
        for key, hook in module._forward_pre_hooks.items():
            if isinstance(hook, SpectralNorm):
                module._forward_pre_hooks[key] = _Wide(hook)


class _Wide:
    def __init__(self, hook: SpectralNorm) -> None:
        self.hook = hook

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        with torch.autocast(inputs[0].device.type, enabled=False):
            self.hook(module, inputs)


def make_features(config: LossConfig) -> FeaturesFn | None:
    """The feature network of the style and perceptual terms; None where the configuration has none.

    Raises:
        WeightsError: its file cannot be loaded. ConfigError: its function cannot be imported.
    """
    if config.features is None or not (config.style or config.perceptual):
        return None
    if config.features == "torchvision":
        try:
            return VGG16Features.from_torchvision(normalised=config.features_normalised)
        except WeightsError as error:
            reason = str(error).removeprefix("weights: ")
            raise WeightsError(
                f"loss.features: {reason}; or name the file as loss.features; null trains without these terms"
            ) from error
    try:
        registered = registered_features(config.features)
    except ValueError as error:
        raise ConfigError(f"loss.{error}") from error
    if registered is not None:
        if config.features_sha256 is not None or config.features_normalised:
            raise ConfigError(
                "loss.features_sha256, loss.features_normalised: expected neither with a function as loss.features, "
                "where they have no effect"
            )
        return registered
    with _naming("loss.features"):
        return VGG16Features.from_file(config.features, config.features_sha256, config.features_normalised)


def make_lpips(config: LossConfig) -> LPIPS | None:
    """The network of the LPIPS term and of the validation's LPIPS; None where no file is configured.

    Raises:
        WeightsError: the file cannot be loaded.
    """
    if config.lpips_weights is None:
        return None
    with _naming("loss.lpips_weights"):
        return LPIPS.from_file(config.lpips_weights)


class MovingAverage:
    """Exponential moving average of a network's floating tensors; its other tensors are copied."""

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self.state: dict[str, Tensor] = {k: v.detach().clone() for k, v in network.state_dict().items()}

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        """Update the average with the network's tensors after optimiser step `step` (from 0)."""
        # A smaller decay at the start, because the average would otherwise consist mostly of the random initial
        # weights.
        decay = min(self.decay, (1 + step) / (10 + step))
        own, theirs = [], []
        for name, value in network.state_dict().items():
            if value.is_floating_point():
                own.append(self.state[name])
                theirs.append(value)
            else:
                self.state[name].copy_(value)
        torch._foreach_lerp_(own, theirs, 1 - decay)


@contextlib.contextmanager
def as_exported(network: nn.Module, average: MovingAverage | None) -> Iterator[None]:
    """In this context, `network` computes what its exported copy will: with the weights of the moving average, if
    there is one, in evaluation mode, without autocast. The modes of its modules are not restored."""
    own = None
    if average is not None:
        own = {name: value.detach().clone() for name, value in network.state_dict().items()}
        network.load_state_dict(average.state)
    cast = vars(network).pop("forward", None)  # accelerate's, with autocast, in place of the class's
    network.eval()
    try:
        yield
    finally:
        if cast is not None:
            network.forward = cast
        if own is not None:
            network.load_state_dict(own)
