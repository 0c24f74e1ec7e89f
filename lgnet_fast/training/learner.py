"""What is trained: networks, losses and optimisers on one device, one step of theirs, and their state."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TrainingError
from ..reference.cascade import Cascade
from ..reference.discriminator import Discriminator
from ..reference.features import FeaturesFn
from .checkpoints import random_states, restore_random_states
from .config import TrainConfig
from .export import is_written, write_model
from .networks import (
    MovingAverage,
    as_exported,
    make_discriminator,
    make_features,
    make_lpips,
    make_network,
)
from .nonfinite import FiniteLosses
from .processes import any_process, average_buffers, failing_together
from .setup import (
    make_accelerator,
    make_objective,
    place_features,
    place_lpips,
    place_networks,
    prepare,
    reaches_later_stages,
    seed_everything,
    step_class,
    untrained_modules,
    warn_of_slow_bfloat16,
)

_PICTURES_SHOWN = 4


class Learner:
    """The networks of a run with their optimisers and losses. It knows neither pictures nor the length of the run.

    Args:
        config, model, discriminator, features: see :class:`.trainer.Trainer`.

    Raises:
        ConfigError, WeightsError: a network cannot be made.
        MissingExtraError: accelerate is not installed.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: Cascade | None = None,
        discriminator: Discriminator | None = None,
        features: FeaturesFn | None = None,
    ) -> None:
        self.config = config
        optim = config.optim
        seed_everything(config.run.seed)
        network = make_network(config.model) if model is None else model
        if discriminator is None:
            discriminator = make_discriminator(config.discriminator)
        if features is None and reaches_later_stages(config, network):
            features = make_features(config.loss)
        lpips = make_lpips(config.loss)

        self.accelerator = make_accelerator(optim.precision, config.run.device)
        warn_of_slow_bfloat16(config, self.accelerator)
        device, dtype = self.accelerator.device, getattr(torch, optim.dtype)
        if device.type == "cuda":
            torch.backends.cudnn.benchmark = True  # every step has the same shapes
        self.network, self.discriminator = place_networks(
            config, network.to(device, dtype), discriminator.to(device, dtype)
        )
        self.features = place_features(config.loss, features, device, dtype)
        self.lpips = place_lpips(lpips, device, dtype)
        self.average = None if optim.ema is None else MovingAverage(self.network, optim.ema)
        self.nets, self.optimisers = prepare(config, self.accelerator, self.network, self.discriminator)
        objective = make_objective(config, self.features, self.lpips)
        self._losses = FiniteLosses(
            config.run, self.accelerator, self.network, self.discriminator, self.optimisers[1]
        )
        kind = step_class(config, self.accelerator)
        self._optimise = kind(self.nets, self.optimisers, objective, self.accelerator, optim.clip, self._losses)
        self._frozen = config.model.freeze_batchnorm

    # -- one step ------------------------------------------------------------------------------------------------

    def training_mode(self) -> None:
        """Set training mode, except for frozen BatchNorms."""
        self.nets.wrapped.train()
        self.nets.wrapped_discriminator.train()
        for module in untrained_modules(self.config, self.network):
            module.eval()
        if self._frozen:
            for module in self.network.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()

    def freeze_batchnorm(self) -> None:
        """Normalise by the running statistics from now on. All processes must call it together."""
        if not self._frozen:
            self.share_statistics()
            self._frozen = True
            self.training_mode()

    def train_step(
        self, batches: Sequence[Mapping[str, Any]], step: int, adversarial: bool
    ) -> dict[str, Tensor] | None:
        """Step number `step` (from 0) of both optimisers, with or without the discriminator; see
        :meth:`.trainer.Trainer.train_step`."""
        self._losses.begin(step, batches)
        terms = self._optimise(
            [self._on_device(batch) for batch in batches],
            adversarial=adversarial,
            features=step % self.config.loss.feature_every == 0,
        )
        if terms is None:
            self._losses.undo()
        elif self.average is not None:
            self.average.update(self.network, step)
        return terms

    def _on_device(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        device, dtype = self.accelerator.device, getattr(torch, self.config.optim.dtype)
        image, mask = (batch[key].to(device, dtype, non_blocking=True) for key in ("image", "mask"))
        if self.config.optim.channels_last:
            image = image.contiguous(memory_format=torch.channels_last)
        return image, mask

    # -- state ---------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Networks, optimisers and random numbers. All processes must call it together."""
        from accelerate.utils import gather_object

        scaler = self.accelerator.scaler
        return {
            "network": self.network.state_dict(),
            "discriminator": self.discriminator.state_dict(),  # with its power iteration
            "average": None if self.average is None else self.average.state,
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "scaler": None if scaler is None else scaler.state_dict(),
            "random": gather_object([random_states()]),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore the result of :meth:`state`; the configuration's ``optim.betas`` replace the stored ones.

        Raises:
            TrainingError: the state is of another network or optimizer.
        """
        try:
            self.network.load_state_dict(state["network"])
            self.discriminator.load_state_dict(state["discriminator"])
            for optimiser, stored in zip(self.optimisers, state["optimisers"], strict=True):
                optimiser.load_state_dict(stored)
        except (RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise TrainingError(f"resume: the checkpoint is of another network or optimizer ({reason})") from error
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                if "betas" in group:
                    group["betas"] = self.config.optim.betas
        if self.average is not None:
            # A run without a moving average starts it here.
            average = state["network"] if state["average"] is None else state["average"]
            # The run may have another dtype than the one that left the checkpoint.
            own = self.network.state_dict()
            self.average.state = {name: value.to(own[name], copy=True) for name, value in average.items()}
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if state["random"]:  # an unpacked checkpoint has none
            restore_random_states(state["random"][self.accelerator.process_index])

    def share_statistics(self) -> None:
        """Average the running statistics of the processes, each of which has seen other pictures."""
        own = dict(self.network.named_buffers())
        average_buffers(self.accelerator, own.values())
        if self.average is not None:
            average_buffers(self.accelerator, (self.average.state[name] for name in own))

    def is_finite(self) -> bool:
        """Whether all weights and statistics are finite: a loss may be where a gradient is not."""
        states = [self.network.state_dict(), self.discriminator.state_dict()]
        states += [] if self.average is None else [self.average.state]
        tensors = [tensor for state in states for tensor in state.values() if tensor.is_floating_point()]
        return bool(torch.isfinite(torch.stack(torch._foreach_norm(tensors))).all())

    # -- the model -----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The network as it is exported: in evaluation mode, without autocast, with the weights of the moving average
        if there is one."""
        try:
            with as_exported(self.network, self.average):
                yield
        finally:
            self.training_mode()

    @torch.no_grad()
    def shown(self, batch: Mapping[str, Any]) -> Tensor:
        """Picture, picture with white hole, and every stage side by side, one row per sample: [3, rows * S, columns *
        S] in [0, 1].
        """
        parameter = next(self.network.parameters())
        image, mask = (batch[key][:_PICTURES_SHOWN].to(parameter) for key in ("image", "mask"))
        with self.averaged():
            stages = self.network(image, mask, return_stages=True)
        columns = torch.cat((image, image * (1 - mask) + mask, *stages.merged), dim=3)
        return torch.cat(list(columns.float().cpu()), dim=1).add(1).div(2).clamp(0, 1)

    def export(self, folder: Path) -> None:
        """Write the model, in the first process; the others wait. Raises TrainingError: it cannot be written."""
        with failing_together(self.accelerator):
            if self.accelerator.is_main_process:
                with self.averaged():
                    write_model(self.network, folder)

    def is_exported(self, folder: Path) -> bool:
        """Whether `folder` holds the model as :meth:`export` would write it; the same in all processes."""
        tensors = self.network.state_dict() if self.average is None else self.average.state
        here = self.accelerator.is_main_process and is_written(self.network, tensors, folder)
        return any_process(self.accelerator, here)
