"""The trainer: a run from its first picture to its model, with logs, validation, checkpoints and limits of time."""

from __future__ import annotations

import contextlib
import json
import math
import multiprocessing
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, DataError, TrainingError
from ..pipeline.writing import write_atomically
from ..reference.cascade import Cascade
from ..reference.discriminator import Discriminator
from ..reference.features import FeaturesFn
from .batches import Batches
from .checkpoints import BEST, CheckpointFolder, held, save_checkpoint
from .config import TrainConfig
from .held_out import warn_of_trained
from .learner import Learner
from .memory import MemoryBatches
from .nonfinite import NotFiniteError
from .optimisers import learning_rates
from .processes import all_equal, any_process, failed_together, failing_together, first_tells, texts_of_all
from .progress import Means, Report, say
from .resuming import best_score, refuse_other_runs, settings_of, warm_from
from .samples import InpaintingDataset
from .schedule import learning_rate_factor
from .setup import usual_modes
from .signals import Stop, until_signal
from .sources import PLACES
from .validation import make_validation


class Trainer:
    """Trains a cascade; :meth:`fit` runs to the end, starting from an earlier run of the same folder if asked to.

    Sets the seeds of Python, NumPy and PyTorch, PyTorch's number of threads if the configuration has one, and on an
    NVIDIA GPU ``torch.backends.cudnn.benchmark``. Gradient and inference mode of the caller do not matter.

    Args:
        config: of the run.
        model, discriminator: replace the configured ones, e.g. an X_LG; on the CPU.
        features: any module or function from a picture [B, 3, H, W] in [-1, 1] to a list of feature maps
            [B, C, h, w], one for each level, of any C, h and w, instead of the configured network.

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
        if getattr(multiprocessing.current_process(), "_inheriting", False):
            raise TrainingError(
                "data.workers: expected a program that starts the training under `if __name__ == '__main__':`, "
                "because the processes that read pictures import it again"
            )
        if not isinstance(config, TrainConfig):
            raise ConfigError(f"config: expected a TrainConfig, as load_config returns, got {type(config).__name__}")
        if not isinstance(model, (Cascade, type(None))):
            raise ConfigError(f"model: expected an LGNet or LocalGlobalRefinement, got {type(model).__name__}")
        if not isinstance(discriminator, (nn.Module, type(None))):
            raise ConfigError(f"discriminator: expected a Discriminator, got {type(discriminator).__name__}")
        if not (features is None or callable(features)):
            raise ConfigError(f"features: expected a module or a function, got {type(features).__name__}")
        self.config = config
        data, run = config.data, config.run
        if run.threads is not None:
            torch.set_num_threads(run.threads)
        with first_tells():
            self.dataset = InpaintingDataset(data, run.seed) if data.pictures else None
            self.memory = MemoryBatches(self.dataset) if data.in_memory and self.dataset is not None else None
            self.validation = make_validation(config)
            if self.dataset is not None:
                warn_of_trained(data, self.dataset.source)
        self.learner = Learner(config, model, discriminator, features)
        self.accelerator = self.learner.accelerator
        self.network, self.discriminator = self.learner.network, self.learner.discriminator
        self.average, self.optimisers = self.learner.average, self.learner.optimisers
        if self.memory is not None:
            self.memory.to(self.accelerator.device)
        self.folder = Path(run.directory)
        self.checkpoints = CheckpointFolder(self.folder / "checkpoints", run.keep)
        self.step = 0
        self.skipped = 0
        self.broken: list[str] = []
        self.best: float | None = None
        self.minutes = 0.0
        self._warm_from = 0
        self._saved, self._saved_at = 0, 0.0
        self._stop = Stop(self.accelerator)
        self._report: Report | None = None

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
        if not self.config.loss.adversarial:
            return False
        start = self.config.discriminator.start
        return start == 0 or self.progress >= start

    def _set_learning_rates(self) -> float:
        optim = self.config.optim
        factor = 1.0
        if self.dataset is not None:
            factor = learning_rate_factor(
                optim, self.step, self.total_steps, self.progress, self.steps_an_epoch, self._warm_from
            )
        rates = learning_rates(optim)
        for optimiser, rate in zip(self.optimisers, rates, strict=True):
            for group in optimiser.param_groups:
                group["lr"] = factor * rate
        return factor * rates[0]

    # -- one step ------------------------------------------------------------------------------------------------

    def training_mode(self) -> None:
        """Set training mode, except for frozen BatchNorms."""
        self.learner.training_mode()

    def train_step(self, batches: list[dict[str, Any]]) -> dict[str, Tensor] | None:
        """One step of both optimisers, at their present learning rates; :attr:`step` is not advanced.

        All processes must call it together.

        Args:
            batches: at least one, as of :func:`.loader.collate`: "image" [B, 3, S, S] in [-1, 1] and "mask"
                [B, 1, S, S], 1 = hole. Their gradients are averaged.

        Returns:
            The terms of the loss by name, each a mean over the batches without dimensions; None where the step was
            skipped.

        Raises:
            ValueError: no batches. TrainingError: a loss is not finite, and ``run.on_nan`` is "stop".
        """
        if not batches:
            raise ValueError("batches: expected at least one, got none")
        freeze = self.config.model.freeze_batchnorm_from
        if freeze is not None and self.progress >= freeze:
            self.learner.freeze_batchnorm()
        terms = self.learner.train_step(batches, self.step, self.adversarial)
        self.skipped += terms is None
        return terms

    # -- state ---------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """The state that determines the rest of the run. All processes must call it together.

        Returns:
            Tensors and plain values by name, as checkpoints hold them. Tensors of the networks and the optimisers are
            their own, not copies.
        """
        return {
            **self.learner.state(),
            "step": self.step,
            "position": self.step * self.config.optim.accumulate,
            "processes": self.accelerator.num_processes,
            "minutes": self.minutes,
            "skipped": self.skipped,
            "broken": list(self.broken),
            "best": self.best,
            "warm_from": self._warm_from,
            "settings": settings_of(self.config),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from an earlier state.

        Args:
            state: the result of :meth:`state`, or a checkpoint's.

        Raises:
            TrainingError: the state is of another network or optimizer, or of another number of processes, batch
                size, accumulation, ``model.train_stages`` or ``model.freeze_batchnorm``.
        """
        settings = settings_of(self.config)
        refuse_other_runs(state, settings, self.config.optim.accumulate, self.accelerator.num_processes)
        self.learner.restore(state)
        self.step, self.minutes = state["step"], state["minutes"]
        self.skipped, self.broken = state["skipped"], list(state["broken"])
        self._warm_from = warm_from(state)
        self.best = best_score(state, settings)

    # -- the run -------------------------------------------------------------------------------------------------

    @usual_modes()
    def fit(self, resume: bool = False) -> Path | None:
        """Train to the end. SIGINT and SIGTERM end it after the current step, with a checkpoint.

        An error between two steps, such as unreadable pictures, and a loss that is not finite end it with a
        checkpoint of the last step. A log that cannot be written does not end it. An error of one of several
        processes between two steps is raised in all of them, in the others as a TrainingError with its text.

        Args:
            resume: continue from the newest checkpoint of the run's folder (``best.pt`` if there is no other);
                without one, start from the beginning. A finished run whose model is there is left as it is.

        Returns:
            The folder of the exported model (the moving average, if there is one); None if a signal ended the run.

        Raises:
            DataError: no pictures were configured, or none can be read.
            TrainingError: the folder holds a run and `resume` is false, or another run is at work in it; a loss is
                not finite; a checkpoint cannot be written or read.
        """
        if self.dataset is None:
            raise DataError(f"data.pictures: {PLACES}, got none")
        if self.checkpoints.files() and not resume:
            raise TrainingError(f"run.directory: {self.folder} holds a run already; resume it, or choose another")
        model = self.folder / "model"
        with failing_together(self.accelerator), first_tells():
            state = self.checkpoints.load_latest()
            if state is not None:
                self.restore(state)
                del state
                # It may be newer than the checkpoint, and no worse one is to replace it.
                kept = best_score(self.checkpoints.load_best(), settings_of(self.config))
                self.best = self.best if kept is None else kept
        if not all_equal(self.accelerator, self.step):
            raise TrainingError(
                f"resume: the checkpoint that this process found is of step {self.step}, others found one of another "
                "step; run.directory must be a folder that all processes share"
            )
        if resume and self.progress >= 1 and self.learner.is_exported(model):
            if self.accelerator.is_main_process:
                say(f"the run is finished, after step {self.step}; its model is in {model}")
            return model
        self._stop = Stop(self.accelerator)
        with until_signal(self._stop.ask), contextlib.ExitStack() as closing:
            with failing_together(self.accelerator):
                if self.accelerator.is_main_process:
                    self._open_report(closing)
            position, batch_size = self.step * self.config.optim.accumulate, self.config.optim.batch_size
            batches = Batches(self.memory or self.dataset, position, batch_size, self.accelerator)
            closing.callback(batches.close)
            self._loop(batches)
            if self._stop.agreed:
                if self._report is not None:
                    self._report.say(f"stopped by {signal.Signals(self._stop.agreed).name} after step {self.step}")
                return None
            if self.progress < 1 and self._report is not None:
                self._report.say(f"this leg ended after step {self.step}; --resume goes on")
        return self.export(model)

    def _open_report(self, closing: contextlib.ExitStack) -> None:
        text = json.dumps(self.config.as_dict(), indent=2) + "\n"
        try:
            closing.enter_context(held(self.folder))
            write_atomically(self.folder / "config.json", text.encode())
            self.checkpoints.clean()
            self._report = Report(
                self.folder, self.step, self.total_steps, self.progress, self.config.run.tensorboard
            )
        except OSError as error:
            raise TrainingError(f"run.directory: {self.folder} cannot be written ({error})") from error
        closing.callback(self._close_report)

    def _close_report(self) -> None:
        if self._report is not None:
            self._report.close(self.skipped, len(self.broken))
            self._report = None

    def _loop(self, batches: Batches) -> None:
        run = self.config.run
        self.training_mode()
        began = time.monotonic() - 60 * self.minutes
        self._saved, self._saved_at = self.step, time.monotonic()
        validated = -1
        means = Means()
        while self.progress < 1 and not self._stop.agreed and not self._leg_over():
            rate = self._set_learning_rates()
            several = self._read(batches)
            try:
                terms = self.train_step(several)
            except NotFiniteError:
                self._save_what_is_new()
                raise
            self.step += 1
            with self._checkpoint_before_an_error():
                self.minutes = self._stop.agree((time.monotonic() - began) / 60)
                means.add(terms or {})
                if self.step % run.log_every == 0 and means:
                    self._log(means, rate)
                if run.tensorboard and run.picture_every and self.step % run.picture_every == 0:
                    with failing_together(self.accelerator):
                        if self._report is not None:
                            self._report.pictures(self.step, self.learner.shown(several[-1]))
                # A signal's grace is short, and the checkpoint comes first.
                if self.validation is not None and self.step % run.validate_every == 0 and not self._stop.agreed:
                    self._validate()
                    validated = self.step
                if self.step % run.checkpoint_every == 0 or self._late():
                    self._save()
        with self._checkpoint_before_an_error():
            if means:
                self._log(means, rate)
            if self.validation is not None and validated != self.step and not self._stop.agreed:
                self._validate()
            if self._saved != self.step:
                self._save()

    def _read(self, batches: Batches) -> list[dict[str, Any]]:
        """The batches of a step."""
        with self._checkpoint_before_an_error(), failing_together(self.accelerator):
            several = batches.take(self.config.optim.accumulate)
        self._note_broken(several)
        return several

    @contextlib.contextmanager
    def _checkpoint_before_an_error(self) -> Iterator[None]:
        """Save a checkpoint before an error that is raised between two steps, where the state is that of whole steps.

        Of several processes' errors, before those that all of them raise: for another one they would wait in vain.
        """
        try:
            yield
        except Exception as error:
            if failed_together(self.accelerator, error):
                self._save_what_is_new()
            raise

    def _save_what_is_new(self) -> None:
        """Save the steps since the last checkpoint, if that is possible, before an error ends the run."""
        if self._saved == self.step:
            return
        with contextlib.suppress(Exception):  # the error that ends the run is the one to report
            self._save()
            if self._report is not None:
                self._report.say(f"the checkpoint of step {self.step} was saved before an error; --resume goes on")

    def _leg_over(self) -> bool:
        minutes = self.config.optim.leg_minutes
        return minutes is not None and any_process(self.accelerator, time.monotonic() - self._born > 60 * minutes)

    def _late(self) -> bool:
        minutes = self.config.run.checkpoint_minutes
        return minutes is not None and any_process(self.accelerator, time.monotonic() - self._saved_at > 60 * minutes)

    def _note_broken(self, batches: list[dict[str, Any]]) -> None:
        for name, reason in (one for batch in batches for one in batch["broken"]):
            if not any(message.startswith(f"{name}: ") for message in self.broken):
                self.broken.append(f"{name}: {reason}")
                tell = say if self._report is None else self._report.say
                tell(f"skipped ({len(self.broken)}): {self.broken[-1]}")

    def _log(self, means: Means, rate: float) -> None:
        terms = means.take()
        values = self.accelerator.reduce(torch.stack(list(terms.values())), "mean").tolist()
        with failing_together(self.accelerator):
            if self._report is not None:
                epoch = (self.step - 1) // self.steps_an_epoch
                named = {**dict(zip(terms, values, strict=True)), "learning_rate": rate}
                self._report.train(self.step, epoch, named, self.progress, self.pictures_a_step)

    def _save(self, best: bool = False) -> None:
        self.learner.share_statistics()
        if not self.learner.is_finite():
            raise TrainingError(
                f"after step {self.step} the weights are not finite; the checkpoint before is as it was"
            )
        # The first process reports and stores what others have met, too.
        self.broken = texts_of_all(self.accelerator, self.broken)
        state = self.state()
        with failing_together(self.accelerator):
            if self.accelerator.is_main_process:
                if best:
                    save_checkpoint(self.checkpoints.folder / BEST, state)
                else:
                    self.checkpoints.save(self.step, state)
        if not best:
            self._saved, self._saved_at = self.step, time.monotonic()

    # -- looking at it -------------------------------------------------------------------------------------------

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """In this context, the network is as it is exported: in evaluation mode, without autocast, with the weights
        of the moving average if there is one."""
        return self.learner.averaged()

    def validate(self) -> dict[str, float]:
        """Scores of the held-out pictures by the network as it is exported. All processes must call it together.

        Returns:
            The scores by name, the same in all processes: see :meth:`.validation.ClassValidation.scores` and
            :meth:`.validation.KindValidation.scores`; {} without ``data.validation``.

        Raises:
            TrainingError: another process has failed; its text has the error.
            MissingExtraError: scikit-image, of the extra `[train]`, is not installed (by classes).
        """
        if self.validation is None:
            return {}
        self.learner.share_statistics()
        with self.averaged():
            return self.validation.scores(self.network, self.learner.lpips, self.accelerator)

    def _validate(self) -> None:
        scores = self.validate()
        metric = self.config.run.metric
        sign = -1 if metric in ("l1", "lpips") else 1
        best = math.isfinite(scores[metric]) and (self.best is None or sign * scores[metric] > sign * self.best)
        with failing_together(self.accelerator):
            if self._report is not None:
                self._report.validation(self.step, scores, best)
        if best:
            before, self.best = self.best, scores[metric]
            try:
                # The model first: a run that is killed between the two goes on with the score before.
                self.export(self.folder / "best_model")
                self._save(best=True)
            except Exception:
                self.best = before  # best.pt is as it was
                raise
            self._saved = -1  # a checkpoint of this step has the score before

    def export(self, folder: Path) -> Path:
        """Write the network, with the weights of the moving average if there is one. All processes must call it
        together; the first one writes.

        Args:
            folder: for ``LGNet.from_pretrained``; of an X_LG, its state dict goes to ``network.pt`` there.

        Returns:
            `folder`.

        Raises:
            TrainingError: it cannot be written.
        """
        self.learner.export(folder)
        return folder


def train(config: TrainConfig, resume: bool = False) -> Path | None:
    """Run a configuration, see :meth:`Trainer.fit`; then end the process group that accelerate started."""
    if not config.data.pictures:  # before weights are downloaded
        raise DataError(f"data.pictures: {PLACES}, got none")
    trainer = Trainer(config)
    try:
        return trainer.fit(resume)
    finally:
        trainer.accelerator.end_training()
