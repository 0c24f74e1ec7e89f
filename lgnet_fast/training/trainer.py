"""The trainer: the paper's two optimiser steps on accelerate, checkpoints, validation, time limits and resuming."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, DataError, LGNetError, TrainingError
from ..pipeline.writing import write_atomically
from ..reference import LGNet
from ..reference.cascade import Cascade
from ..reference.discriminator import Discriminator
from ..reference.features import FeaturesFn
from ..reference.losses import LossWeights
from .checkpoints import BEST, CheckpointFolder, random_states, restore_random_states, save_checkpoint
from .config import TrainConfig
from .data import InpaintingDataset, PositionSampler, make_loader, validation_pairs
from .memory import MemoryBatches
from .networks import (
    MovingAverage,
    make_discriminator,
    make_features,
    make_lpips,
    make_network,
)
from .optimisers import generator_optimiser
from .progress import Report
from .schedule import learning_rate_factor
from .setup import (
    make_accelerator,
    place_features,
    place_lpips,
    place_networks,
    seed_everything,
    untrained_modules,
    usual_modes,
)
from .signals import until_signal
from .steps import Objective, Step, Trained
from .validation import KindValidation

_PICTURES_SHOWN = 4


class Trainer:
    """Trains a cascade; :meth:`fit` runs to the end, starting from an earlier run of the same folder if asked to.

    Sets the seeds of Python, NumPy and PyTorch, PyTorch's number of threads if the configuration has one, and on an
    NVIDIA GPU ``torch.backends.cudnn.benchmark``. Gradient and inference mode of the caller do not matter.

    Args:
        config: of the run.
        model, discriminator: replace the configured ones, e.g. an X_LG; on the CPU.
        features: any module or function picture -> list of features, instead of the configured network.

    Raises:
        ConfigError, DataError, WeightsError: before anything is written.
        MissingExtraError: accelerate is not installed.
    """

    @usual_modes()
    def __init__(
        self,
        config: TrainConfig,
        model: Cascade | None = None,
        discriminator: Discriminator | None = None,
        features: FeaturesFn | None = None,
    ) -> None:
        self._born = time.monotonic()
        if not isinstance(config, TrainConfig):
            raise ConfigError(f"config: expected a TrainConfig, as load_config returns, got {type(config).__name__}")
        if not isinstance(model, (Cascade, type(None))):
            raise ConfigError(f"model: expected an LGNet or LocalGlobalRefinement, got {type(model).__name__}")
        if not (features is None or callable(features)):
            raise ConfigError(f"features: expected a module or a function, got {type(features).__name__}")
        self.config = config
        run, optim = config.run, config.optim
        if run.threads is not None:
            torch.set_num_threads(run.threads)
        self._read_data()
        seed_everything(run.seed)
        network = make_network(config.model) if model is None else model
        if discriminator is None:
            discriminator = make_discriminator(config.discriminator)
        feature_network = make_features(config.loss) if features is None else features
        self.weights: LossWeights = config.loss
        if feature_network is None:
            self.weights = dataclasses.replace(config.loss, style=0.0, perceptual=0.0)
        lpips = make_lpips(config.loss)

        self.accelerator = make_accelerator(optim.precision, run.device)
        device, dtype = self.accelerator.device, getattr(torch, optim.dtype)
        if device.type == "cuda":
            torch.backends.cudnn.benchmark = True  # every step has the same shapes
        if self.memory is not None:
            self.memory.to(device)
        self.network, self.discriminator = place_networks(
            config, network.to(device, dtype), discriminator.to(device, dtype)
        )
        self.features = place_features(config.loss, feature_network, device, dtype)
        self.lpips = place_lpips(lpips, device, dtype)
        self.average = None if optim.ema is None else MovingAverage(self.network, optim.ema)
        self._prepare()
        self.folder = Path(run.directory)
        self.checkpoints = CheckpointFolder(self.folder / "checkpoints", run.keep)
        self.step = 0
        self.skipped = 0
        self.broken: list[str] = []
        self.best: float | None = None
        self.minutes = 0.0
        self._asked = 0
        self._signal = 0
        self._warm_from = 0
        self._frozen = config.model.freeze_batchnorm
        self._report: Report | None = None

    def _read_data(self) -> None:
        data, run = self.config.data, self.config.run
        self.dataset = InpaintingDataset(data, run.seed) if data.pictures else None
        self.memory = MemoryBatches(self.dataset) if data.in_memory and self.dataset is not None else None
        self.validation: list[tuple[Tensor, Tensor]] = []
        self.by_kind: KindValidation | None = None
        if data.validation is not None and run.validation_kinds:
            self.by_kind = KindValidation(
                data.validation, data.size, run.validation_kinds, run.seed, data.protocol, run.validation_pictures
            )
        elif data.validation is not None:
            self.validation = validation_pairs(
                data.validation, data.size, run.validation_classes, run.seed, data.protocol, run.validation_pictures
            )

    def _prepare(self) -> None:
        """Optimisers, wrapping for distribution, and the step."""
        config, optim = self.config, self.config.optim
        rate = optim.learning_rate
        discriminator_rate = rate if optim.discriminator_learning_rate is None else optim.discriminator_learning_rate
        self._rates = (rate, discriminator_rate)
        fused = True if self.accelerator.device.type == "cuda" else None
        with warnings.catch_warnings():
            # Its successor exists neither in PyTorch before 2.13 nor in accelerate.
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
            wrapped, wrapped_discriminator, *self.optimisers = self.accelerator.prepare(
                self.network,
                self.discriminator,
                generator_optimiser(self.network, optim, fused),
                torch.optim.Adam(
                    self.discriminator.parameters(), lr=discriminator_rate, betas=optim.betas, fused=fused
                ),
            )
        forward = torch.compile(wrapped) if optim.compile else wrapped
        if config.model.train_stages:
            forward = partial(forward, until=max(config.model.train_stages))
        objective = Objective(
            self.weights,
            self.features,
            self.lpips if config.loss.lpips else None,
            config.loss.options(),
            lean=config.loss.lean and optim.precision != "fp16",
            judged_stage=0 if config.discriminator.stage == "first" else -1,
            by_hole=config.discriminator.by_hole,
            judged_crop=config.discriminator.crop,
        )
        self.nets = Trained(self.network, self.discriminator, wrapped, wrapped_discriminator, forward)
        self._optimise = Step(
            self.nets, self.optimisers, objective, self.accelerator, optim.clip, self._refuse_nonfinite
        )
        self._batches: list[dict[str, Any]] = []

    # -- length and schedule -------------------------------------------------------------------------------------

    @property
    def pictures_a_step(self) -> int:
        """Pictures of all processes per optimiser step."""
        processes: int = self.accelerator.num_processes
        return self.config.optim.batch_size * self.config.optim.accumulate * processes

    @property
    def steps_an_epoch(self) -> int:
        """Optimiser steps per epoch."""
        return max(1, math.ceil(len(self.dataset or ()) / self.pictures_a_step))

    @property
    def total_steps(self) -> int:
        """Length of the run in optimiser steps."""
        optim = self.config.optim
        return optim.steps if optim.steps is not None else (optim.epochs or 1) * self.steps_an_epoch

    @property
    def progress(self) -> float:
        """The finished share of the run, 0 to 1: of its steps or of its time, whichever is larger."""
        shares = [self.step / self.total_steps]
        if self.config.optim.max_minutes is not None:
            shares.append(self.minutes / self.config.optim.max_minutes)
        return min(1.0, max(shares))

    @property
    def adversarial(self) -> bool:
        """Whether the discriminator is used at this point of the run."""
        if not self.weights.adversarial:
            return False
        start = self.config.discriminator.start
        return start == 0 or self.progress >= start

    def _set_learning_rates(self) -> float:
        optim = self.config.optim
        factor = 1.0
        if self.dataset is not None:
            factor = learning_rate_factor(optim, self.step, self.total_steps, self.progress, self.steps_an_epoch)
            if self._warm_from and self.step - self._warm_from < optim.warmup_steps:
                factor *= (self.step - self._warm_from + 1) / optim.warmup_steps
        for optimiser, rate in zip(self.optimisers, self._rates):
            for group in optimiser.param_groups:
                group["lr"] = factor * rate
        return factor * self._rates[0]

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

    def train_step(self, batches: list[dict[str, Any]]) -> dict[str, Tensor] | None:
        """One step of both optimisers on batches of :func:`.data.collate`; the terms, None where it was skipped.

        Raises:
            TrainingError: a loss is not finite, and ``run.on_nan`` is "stop".
        """
        freeze = self.config.model.freeze_batchnorm_from
        if not self._frozen and freeze is not None and self.progress >= freeze:
            self._frozen = True
            self.training_mode()
        skipping = self.config.run.on_nan == "skip"
        kept = [buffer.clone() for buffer in self.network.buffers()] if skipping else []
        self._batches = batches
        terms = self._optimise(
            [self._on_device(batch) for batch in batches],
            adversarial=self.adversarial,
            features=self.step % self.config.loss.feature_every == 0,
        )
        if terms is None:
            # Non-finite values have also entered the running statistics.
            for buffer, before in zip(self.network.buffers(), kept):
                buffer.copy_(before)
            self.skipped += 1
        elif self.average is not None:
            self.average.update(self.network, self.step)
        return terms

    def _on_device(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        device, dtype = self.accelerator.device, getattr(torch, self.config.optim.dtype)
        image, mask = (batch[key].to(device, dtype, non_blocking=True) for key in ("image", "mask"))
        if self.config.optim.channels_last:
            image = image.contiguous(memory_format=torch.channels_last)
        return image, mask

    def _refuse_nonfinite(self, total: str, terms: Mapping[str, Tensor], number: int) -> bool:
        """Whether the total is not finite in any process; with "stop", saves the batch and raises."""
        skipping = self.config.run.on_nan == "skip"
        if not skipping and (total == "D" or self.step % self.config.run.finite_every):
            # A bad loss of D also makes the generators' loss of the same step bad, and nothing of that step is kept,
            # so one wait for the device is enough.
            return False
        found = (~torch.isfinite(terms[total])).to(torch.float32)
        if float(self.accelerator.reduce(found, "sum")) == 0:
            return False
        if skipping:
            return True
        message = f"the loss of step {self.step + 1} is not finite"
        batch = self._batches[number]
        bad = sorted(name for name, term in terms.items() if not bool(torch.isfinite(term)))
        if bad:
            path = self.folder / f"not_finite_step_{self.step + 1}_process_{self.accelerator.process_index}.pt"
            values = {name: term.item() for name, term in terms.items()}
            save_checkpoint(path, {**{k: batch[k] for k in ("image", "mask", "name")}, "terms": values})
            message += f" ({', '.join(bad)}); its batch is in {path}"
        raise TrainingError(message + "; set run.on_nan=skip to leave such batches out")

    # -- state ---------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """The state that determines the rest of the run. All processes must call it together."""
        from accelerate.utils import gather_object

        scaler = self.accelerator.scaler
        return {
            "network": self.network.state_dict(),
            "discriminator": self.discriminator.state_dict(),  # with its power iteration
            "average": None if self.average is None else self.average.state,
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "scaler": None if scaler is None else scaler.state_dict(),
            "random": gather_object([random_states()]),
            "step": self.step,
            "position": self.step * self.config.optim.accumulate,
            "processes": self.accelerator.num_processes,
            "minutes": self.minutes,
            "skipped": self.skipped,
            "broken": list(self.broken),
            "best": self.best,
            "warm_from": self._warm_from,
            "settings": self._settings(),
        }

    def _settings(self) -> dict[str, Any]:
        """Settings that a resumed run must share, or that `best` depends on."""
        config = self.config
        return {
            "optim.batch_size": config.optim.batch_size,
            "model.train_stages": list(config.model.train_stages),
            "model.freeze_batchnorm": config.model.freeze_batchnorm,
            "run.metric": config.run.metric,
            "validation": None
            if config.data.validation is None
            else [
                config.data.validation,
                config.data.protocol,
                config.data.size,
                config.run.seed,
                list(config.run.validation_kinds or config.run.validation_classes),
                config.run.validation_pictures,
            ],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`, the result of :meth:`state`.

        Raises:
            TrainingError: the state is of another network, optimizer, batch size, number of processes, or of other
                `train_stages`.
        """
        if state["processes"] != self.accelerator.num_processes:
            raise TrainingError(
                f"resume: the checkpoint was written by {state['processes']} processes, now there are "
                f"{self.accelerator.num_processes}"
            )
        if state["position"] != state["step"] * self.config.optim.accumulate:
            raise TrainingError("resume: optim.accumulate is not what the checkpoint was written with")
        now, then = self._settings(), state.get("settings", {})  # a compact checkpoint may go on with others
        for name in ("optim.batch_size", "model.train_stages", "model.freeze_batchnorm"):
            if then.get(name, now[name]) != now[name]:
                raise TrainingError(f"resume: {name} was {then[name]} in the checkpoint, now it is {now[name]}")
        try:
            self.network.load_state_dict(state["network"])
            self.discriminator.load_state_dict(state["discriminator"])
            for optimiser, own in zip(self.optimisers, state["optimisers"], strict=True):
                optimiser.load_state_dict(own)
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
            self.average.state = {k: v.to(self.accelerator.device, copy=True) for k, v in average.items()}
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if state["random"]:  # a compact checkpoint has no moments
            restore_random_states(state["random"][self.accelerator.process_index])
        self.step, self.minutes = state["step"], state["minutes"]
        self._warm_from = state.get("warm_from", 0)
        if self.step and not any(own["state"] for own in state["optimisers"]):
            self._warm_from = self.step  # the moments of a compact checkpoint may be reset
        self.skipped, self.broken = state["skipped"], list(state["broken"])
        # The best score by one metric, or on some pictures, says nothing about another.
        pairs = [(then.get(name, now[name]), now[name]) for name in ("run.metric", "validation")]
        self.best = state["best"] if all(a == b or a is None or b is None for a, b in pairs) else None

    # -- the run -------------------------------------------------------------------------------------------------

    @usual_modes()
    def fit(self, resume: bool = False) -> Path | None:
        """Train to the end. SIGINT and SIGTERM end it after the current step, with a checkpoint.

        Args:
            resume: continue from the newest checkpoint of the run's folder; without one, start from the beginning.

        Returns:
            The folder of the exported model (the moving average, if there is one); None if a signal ended the run.

        Raises:
            DataError: no pictures were configured.
            TrainingError: the folder holds a run and `resume` is false; a loss is not finite; a checkpoint cannot
                be written or read.
        """
        if self.dataset is None:
            raise DataError("data.pictures: expected folders, tar shards or datasets, got none")
        if self.checkpoints.latest() is not None and not resume:
            raise TrainingError(f"run.directory: {self.folder} holds a run already; resume it, or choose another")
        state = self.checkpoints.load_latest()
        if state is not None:
            self.restore(state)
            del state
        if self.accelerator.is_main_process:
            try:
                text = json.dumps(self.config.as_dict(), indent=2) + "\n"
                write_atomically(self.folder / "config.json", text.encode())
                self.checkpoints.clean()
            except OSError as error:
                raise TrainingError(f"run.directory: {self.folder} cannot be written ({error})") from error
        self._asked = self._signal = 0
        with until_signal(self._ask_to_stop), contextlib.ExitStack() as closing:
            sampler = PositionSampler(
                self.step * self.config.optim.accumulate,
                self.config.optim.batch_size,
                self.accelerator.process_index,
                self.accelerator.num_processes,
            )
            if self.memory is not None:
                batches = self.memory.batches(sampler)
            else:
                batches = iter(make_loader(self.dataset, sampler, pin=self.accelerator.device.type == "cuda"))
            if self.accelerator.is_main_process:
                run = self.config.run
                self._report = Report(self.folder, self.step, self.total_steps, self.progress, run.tensorboard)
                closing.callback(self._close)
            self._loop(batches)
            if self._signal:
                if self._report is not None:
                    self._report.say(f"stopped by {signal.Signals(self._signal).name} after step {self.step}")
                return None
            if self.progress < 1 and self._report is not None:
                self._report.say(f"this leg ended after step {self.step}; --resume goes on")
        return self.export(self.folder / "model")

    def _loop(self, batches: Iterator[dict[str, Any]]) -> None:
        run, accumulate = self.config.run, self.config.optim.accumulate
        self.training_mode()
        began = time.monotonic() - 60 * self.minutes
        saved, saved_at = self.step, time.monotonic()
        validated = -1
        sums: dict[str, Tensor] = {}
        counts: dict[str, int] = {}
        while self.progress < 1 and not self._signal and not self._leg_over():
            rate = self._set_learning_rates()
            several = [_next(batches) for _ in range(accumulate)]
            self._note_broken(several)
            terms = self.train_step(several)
            self.step += 1
            self._agree((time.monotonic() - began) / 60)
            for name, term in (terms or {}).items():
                sums[name] = sums.get(name, 0) + term
                counts[name] = counts.get(name, 0) + 1
            if self.step % run.log_every == 0 and sums:
                self._log(sums, counts, rate)
                sums, counts = {}, {}
            if self._report is not None and run.picture_every and self.step % run.picture_every == 0:
                self._report.pictures(self.step, self._shown(several[-1]))
            if self._validated and self.step % run.validate_every == 0:
                self._validate()
                validated = self.step
            minutes = run.checkpoint_minutes
            late = minutes is not None and self._any(time.monotonic() - saved_at > 60 * minutes)
            if self.step % run.checkpoint_every == 0 or late:
                self._save()
                saved, saved_at = self.step, time.monotonic()
        if sums:
            self._log(sums, counts, rate)
        if self._validated and validated != self.step and not self._signal:
            self._validate()
        if saved != self.step:
            self._save()

    def _ask_to_stop(self, number: int) -> None:
        self._asked = number

    def _agree(self, minutes: float) -> None:
        """Whether to stop, equal in all processes: by the clock of the first one, or if any got a signal.

        A signal has no effect before: a process that stopped alone would leave the others waiting.
        """
        if self.accelerator.num_processes == 1:
            self.minutes, self._signal = minutes, self._asked
            return
        asked = self._asked
        own = [minutes if self.accelerator.is_main_process else 0.0, float(asked)]
        agreed = self.accelerator.reduce(torch.tensor(own, device=self.accelerator.device), "sum").tolist()
        self.minutes = agreed[0]
        if agreed[1]:
            self._signal = asked or int(signal.SIGTERM)

    def _leg_over(self) -> bool:
        minutes = self.config.optim.leg_minutes
        return minutes is not None and self._any(time.monotonic() - self._born > 60 * minutes)

    @property
    def _validated(self) -> bool:
        return bool(self.validation) or self.by_kind is not None

    def _any(self, here: bool) -> bool:
        if self.accelerator.num_processes == 1:
            return here
        return float(self.accelerator.reduce(torch.tensor(float(here), device=self.accelerator.device), "sum")) > 0

    def _note_broken(self, batches: list[dict[str, Any]]) -> None:
        for name, reason in (one for batch in batches for one in batch["broken"]):
            if not any(message.startswith(f"{name}: ") for message in self.broken):
                self.broken.append(f"{name}: {reason}")
                text = f"skipped ({len(self.broken)}): {self.broken[-1]}"
                if self._report is not None:
                    self._report.say(text)
                else:
                    print(text, file=sys.stderr)

    def _log(self, sums: Mapping[str, Tensor], counts: Mapping[str, int], rate: float) -> None:
        """The means of the steps since the last line; `counts`: how many of them had each term."""
        terms = torch.stack([total / counts[name] for name, total in sums.items()])
        means = self.accelerator.reduce(terms, "mean").tolist()
        if self._report is not None:
            values = {**dict(zip(sums, means)), "learning_rate": rate}
            epoch = (self.step - 1) // self.steps_an_epoch
            self._report.train(self.step, epoch, values, self.progress, self.pictures_a_step)

    def _share_statistics(self) -> None:
        """Average the running statistics of the processes, each of which has seen other pictures."""
        if self.accelerator.num_processes == 1:
            return
        own = dict(self.network.named_buffers())
        for buffers in (own, {} if self.average is None else {name: self.average.state[name] for name in own}):
            for buffer in buffers.values():
                if buffer.is_floating_point():
                    buffer.copy_(self.accelerator.reduce(buffer, "mean"))

    def _save(self, best: bool = False) -> None:
        self._share_statistics()
        networks = (self.network.state_dict(), self.discriminator.state_dict(), self.average and self.average.state)
        if not all(_finite(tensors) for tensors in networks if tensors):
            # The loss may be finite where a gradient is not.
            raise TrainingError(
                f"after step {self.step} the weights are not finite; the checkpoint before is as it was"
            )
        state = self.state()
        if self.accelerator.is_main_process:
            if best:
                save_checkpoint(self.checkpoints.folder / BEST, state)
            else:
                self.checkpoints.save(self.step, state)
        self.accelerator.wait_for_everyone()

    def _close(self) -> None:
        if self._report is not None:
            self._report.close(self.skipped, len(self.broken))
            self._report = None

    # -- looking at it -------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The network in evaluation mode, with the weights of the moving average if there is one."""
        own = None
        if self.average is not None:
            own = {name: value.detach().clone() for name, value in self.network.state_dict().items()}
            self.network.load_state_dict(self.average.state)
        self.network.eval()
        try:
            yield
        finally:
            if own is not None:
                self.network.load_state_dict(own)
            self.training_mode()

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Mean l1 (%), PSNR (dB) and SSIM of the 8-bit merged pictures over the validation pairs; by kinds of holes,
        see :class:`.validation.KindValidation`."""
        self._share_statistics()
        if self.by_kind is not None:
            with self.averaged(), self.accelerator.autocast():
                return self.by_kind.scores(self.network, self.lpips, next(self.network.parameters()))
        from ..data.metrics import Metrics

        names = ("l1", "psnr", "ssim")
        metrics = Metrics(names)
        parameter = next(self.network.parameters())
        sums = torch.zeros(len(names), dtype=torch.float64)
        mine = self.validation[self.accelerator.process_index :: self.accelerator.num_processes]
        with self.averaged():
            for image, mask in mine:
                filled = self.network(image.to(parameter), mask.to(parameter))
                scores = metrics.scores(_eight_bit(filled), _eight_bit(image))
                sums += torch.tensor([scores[name] for name in names], dtype=torch.float64)
        if self.accelerator.num_processes > 1:
            sums = self.accelerator.reduce(sums.to(self.accelerator.device), "sum")
        return dict(zip(names, (sums / len(self.validation)).tolist()))

    def _validate(self) -> None:
        scores = self.validate()
        metric = self.config.run.metric
        sign = -1 if metric in ("l1", "lpips") else 1
        best = self.best is None or sign * scores[metric] > sign * self.best
        if self._report is not None:
            self._report.validation(self.step, scores, best)
        if best:
            self.best = scores[metric]
            self._save(best=True)
            self.export(self.folder / "best_model")

    @torch.no_grad()
    def _shown(self, batch: dict[str, Any]) -> Tensor:
        """Picture, picture with white hole, and every stage side by side, one row per sample: [3, rows * S, columns *
        S] in [0, 1].
        """
        parameter = next(self.network.parameters())
        image, mask = (batch[key][:_PICTURES_SHOWN].to(parameter) for key in ("image", "mask"))
        with self.averaged():
            stages = self.network(image, mask, return_stages=True)
        columns = torch.cat((image, image * (1 - mask) + mask, *stages.merged), dim=3)
        return torch.cat(list(columns.float().cpu()), dim=1).add(1).div(2).clamp(0, 1)

    def export(self, folder: Path) -> Path:
        """Write the network to `folder` for ``LGNet.from_pretrained`` (an X_LG: its state dict, ``network.pt``).

        Raises:
            TrainingError: it cannot be written.
        """
        if self.accelerator.is_main_process:
            with self.averaged():
                if isinstance(self.network, LGNet):
                    try:
                        self.network.save_pretrained(folder)
                    except Exception as error:  # OSError, and safetensors' own on a full disk
                        raise TrainingError(f"model: {folder} cannot be written ({error})") from error
                else:
                    save_checkpoint(folder / "network.pt", dict(self.network.state_dict()))
        self.accelerator.wait_for_everyone()
        return folder


def _finite(tensors: Mapping[str, Tensor]) -> bool:
    norms = torch._foreach_norm([tensor for tensor in tensors.values() if tensor.is_floating_point()])
    return bool(torch.isfinite(torch.stack(norms)).all())


def _next(batches: Iterator[dict[str, Any]]) -> dict[str, Any]:
    try:
        return next(batches)
    except LGNetError as error:
        # An error of a worker contains its traceback as text; its last line has the type and the message.
        lines = str(error).strip().splitlines()
        if len(lines) > 1:
            raise type(error)(lines[-1].partition(": ")[2]) from None
        raise


def _eight_bit(picture: Tensor) -> Any:
    """[1, 3, H, W] in [-1, 1] -> uint8 [H, W, 3], rounded."""
    return ((picture[0].float() + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy()


def train(config: TrainConfig, resume: bool = False) -> Path | None:
    """Run a configuration, see :meth:`Trainer.fit`; then end the process group that accelerate started."""
    trainer = Trainer(config)
    try:
        return trainer.fit(resume)
    finally:
        trainer.accelerator.end_training()
