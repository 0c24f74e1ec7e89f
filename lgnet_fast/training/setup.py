"""Setting up networks, losses, optimisers and accelerate for a training run: device, dtype, memory format, random
numbers."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from ..errors import ConfigError, MissingExtraError
from ..ops.torch_state import has_fast_bfloat16
from ..pipeline.notices import warn
from ..reference.cascade import Cascade
from ..reference.discriminator import Discriminator
from ..reference.features import LPIPS, FeaturesFn
from ..reference.losses import LossWeights
from ..reference.vgg import VGG16Features
from .config import LossConfig, TrainConfig
from .graphed import GraphedStep
from .networks import keep_spectral_norm_wide
from .optimisers import discriminator_optimiser, generator_optimiser
from .steps import Objective, Step, Trained


@contextlib.contextmanager
def usual_modes() -> Iterator[None]:
    """Gradients, no inference mode, and tensors on the CPU unless a device is named, whatever the caller has set."""
    # Not torch.get_default_device(): in PyTorch 2.7 it fails after torch.set_default_device(None).
    own = contextlib.nullcontext() if torch.empty(0).device.type == "cpu" else torch.device("cpu")
    with torch.inference_mode(False), torch.enable_grad(), own:
        yield


def place_networks(
    config: TrainConfig, network: Cascade, discriminator: Discriminator
) -> tuple[Cascade, Discriminator]:
    """Set the memory format, and which parts of BatchNorm are trained."""
    on_gpu = next(network.parameters()).is_cuda
    if config.optim.channels_last:
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if config.optim.channels_last and on_gpu:
        discriminator.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for module in untrained_modules(config, network):
        module.requires_grad_(False)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = config.model.batchnorm_momentum
            if config.model.freeze_batchnorm:
                module.requires_grad_(False)
    keep_spectral_norm_wide(discriminator)
    return network, discriminator


def untrained_modules(config: TrainConfig, network: Cascade) -> list[nn.Module]:
    """The networks of the stages that ``model.train_stages`` leaves out.

    Raises:
        ConfigError: no such stage, one network runs stages of both kinds, or the discriminator judges a stage that is
            not trained.
    """
    modules, numbers = network.stage_modules(), config.model.train_stages
    if not numbers:
        return []
    if not all(1 <= number <= len(modules) for number in numbers):
        raise ConfigError(
            f"model.train_stages: expected numbers from 1 to {len(modules)}, the model's stages, got {list(numbers)}"
        )
    trained = [module for number, module in enumerate(modules, start=1) if number in numbers]
    others = [module for number, module in enumerate(modules, start=1) if number not in numbers]
    if any(module is other for module in trained for other in others):
        raise ConfigError(
            f"model.train_stages: expected all stages that one network runs, or none of them, got {list(numbers)}"
        )
    if config.loss.adversarial and config.discriminator.stage == "first" and 1 not in numbers:
        raise ConfigError(
            f"discriminator.stage: expected last (or loss.adversarial: 0) with model.train_stages {list(numbers)}, "
            "got first, which is not trained"
        )
    return others


def reaches_later_stages(config: TrainConfig, network: Cascade) -> bool:
    """Whether a step runs a stage after the first, where total variation, style, perceptual and LPIPS terms begin."""
    return max(config.model.train_stages or [len(network.stage_modules())]) > 1


def place_features(
    loss: LossConfig, features: FeaturesFn | None, device: torch.device, dtype: torch.dtype
) -> FeaturesFn | None:
    """The feature network, frozen, on the device of the training.

    Raises:
        ConfigError: ``loss.feature_dtype: bf16``, but it is no module.
    """
    if isinstance(features, nn.Module):
        features = features.to(device, dtype).requires_grad_(False)
        if isinstance(features, VGG16Features) and (device.type == "cuda" or dtype == torch.float32):
            # On a CPU this is 10 % faster, but in float64 many times slower.
            features.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if features is None or loss.feature_dtype == "same":
        return features
    if not isinstance(features, nn.Module):
        raise ConfigError(
            f"loss.feature_dtype: expected same with features that are no module, got {loss.feature_dtype!r}"
        )
    network = features.to(torch.bfloat16)
    return lambda picture: network(picture.to(torch.bfloat16))


def place_lpips(lpips: LPIPS | None, device: torch.device, dtype: torch.dtype) -> LPIPS | None:
    """LPIPS's network on the device of the training."""
    if lpips is None:
        return None
    lpips = lpips.to(device, dtype)
    if device.type == "cuda":
        lpips.features.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return lpips


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch, because other packages may draw from any of them."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.manual_seed(seed)


def make_accelerator(precision: str, device: str) -> Any:
    """Accelerate, on ``run.device``.

    Raises:
        MissingExtraError: it is not installed.
        ConfigError: it cannot use the precision here, or sees fewer processes than its launcher has started.
    """
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState, PartialState
        from accelerate.utils import DistributedDataParallelKwargs
    except ImportError as error:
        raise MissingExtraError("training needs accelerate: pip install 'lgnet-fast[train]'") from error
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    # Without a GPU, accelerate forms a group of a launcher's processes only if it is told to use the CPU.
    cpu = device == "cpu" or (launched > 1 and not torch.cuda.is_available())
    if AcceleratorState._shared_state:
        # An earlier trainer of this process may have had another precision, which accelerate refuses to change, or
        # another device, which it would keep without a word.
        before = AcceleratorState()
        wanted = "cpu" if cpu else PartialState().default_device.type
        moves = before.num_processes == 1 and before.device.type != wanted
        if moves or before.mixed_precision != precision:
            AcceleratorState._reset_state(reset_partial_state=moves)
    try:
        accelerator = Accelerator(
            mixed_precision=precision,
            cpu=cpu,
            # No buffer may be overwritten between the discriminator's two passes and their backward pass; every
            # process computes the same power iteration.
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
    except (ValueError, RuntimeError) as error:  # such as bf16 on hardware without it
        raise ConfigError(f"optim.precision: {precision!r} cannot be used here ({error})") from error
    if launched > accelerator.num_processes:
        raise ConfigError(
            f"run.device: the launcher started {launched} processes, of which accelerate sees "
            f"{accelerator.num_processes} on {accelerator.device}; each would train by itself, into the same folder"
        )
    if precision == "fp16" and accelerator.device.type == "cpu":
        raise ConfigError("optim.precision: 'fp16' cannot be used here (it needs a GPU; bf16 does not)")
    return accelerator


def step_class(config: TrainConfig, accelerator: Any) -> type[Step]:
    """The class of a run's steps. Raises ConfigError: ``optim.cuda_graphs``, but not one process on an NVIDIA GPU."""
    if not config.optim.cuda_graphs:
        return Step
    device, count = accelerator.device, accelerator.num_processes
    if device.type != "cuda" or torch.version.hip is not None or count > 1:
        what = f"{count} processes" if count > 1 else f"the device {device.type}"
        raise ConfigError(
            f"optim.cuda_graphs: expected false with {what}; graphs are for one process on an NVIDIA GPU"
        )
    return GraphedStep


def warn_of_slow_bfloat16(config: TrainConfig, accelerator: Any) -> None:
    """Name the settings that ask for bfloat16 on a CPU for which PyTorch has only slow convolutions of that dtype."""
    if accelerator.device.type != "cpu" or not accelerator.is_main_process or has_fast_bfloat16():
        return
    loss = config.loss
    slow = {
        "optim.precision: bf16": config.optim.precision == "bf16",
        "loss.feature_dtype: bf16": loss.features is not None and loss.feature_dtype == "bf16",
    }
    for name, asked in slow.items():
        if asked:
            warn(f"{name}: PyTorch computes it many times slower than float32 on this processor")


def make_objective(config: TrainConfig, features: FeaturesFn | None, lpips: LPIPS | None) -> Objective:
    """The objective of the configured losses; without feature network, without its terms."""
    weights: LossWeights = config.loss
    if features is None:
        weights = dataclasses.replace(config.loss, style=0.0, perceptual=0.0)
    return Objective(
        weights,
        features,
        lpips if config.loss.lpips else None,
        config.loss.options(),
        lean=config.loss.lean and config.optim.precision != "fp16",
        judged_stage=0 if config.discriminator.stage == "first" else -1,
        by_hole=config.discriminator.by_hole,
        judged_crop=config.discriminator.crop,
    )


def prepare(
    config: TrainConfig, accelerator: Any, network: Cascade, discriminator: Discriminator
) -> tuple[Trained, list[torch.optim.Optimizer]]:
    """The networks wrapped for distribution, and the optimisers of the generators and of the discriminator."""
    optim = config.optim
    fused = True if accelerator.device.type == "cuda" else None
    with warnings.catch_warnings():
        # Its successor exists neither in PyTorch before 2.13 nor in accelerate.
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
        wrapped, wrapped_discriminator, *optimisers = accelerator.prepare(
            network,
            discriminator,
            generator_optimiser(network, optim, fused),
            discriminator_optimiser(discriminator, optim, fused),
        )
    forward = torch.compile(wrapped) if optim.compile else wrapped
    if config.model.train_stages:
        forward = partial(forward, until=max(config.model.train_stages))
    return Trained(network, discriminator, wrapped, wrapped_discriminator, forward), optimisers
