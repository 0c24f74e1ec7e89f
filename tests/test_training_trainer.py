"""The trainer: whole runs, their logs and checkpoints, time limits, errors."""

from __future__ import annotations

import errno
import itertools
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from lgnet_fast import LGNet, LocalGlobalRefinement, create_model
from lgnet_fast.cli import app
from lgnet_fast.reference import list_models
from lgnet_fast.reference.networks import UNet
from lgnet_fast.training import DataError, Trainer, TrainingError, load_config
from lgnet_fast.training.config import config_of
from lgnet_fast.training.export import write_model
from lgnet_fast.training.processes import all_equal
from lgnet_fast.training.samples import InpaintingDataset
from tests.training_support import (
    TINY,
    batch,
    lines,
    own_threads,  # noqa: F401
    tiny_config,
    tiny_settings,
    write_pictures,
)


@pytest.fixture
def pictures(tmp_path):
    return write_pictures(tmp_path / "pictures")


def test_steps_after_the_last_whole_interval_are_logged(pictures, tmp_path):
    every, each = tmp_path / "every", tmp_path / "each"
    for run, interval in ((every, 2), (each, 1)):
        Trainer(tiny_config(pictures, run, optim={"steps": 3}, run={"log_every": interval})).fit()
    means, steps = ([line for line in lines(run) if line["kind"] == "train"] for run in (every, each))
    assert [line["step"] for line in means] == [2, 3]
    assert means[0]["G"] == pytest.approx((steps[0]["G"] + steps[1]["G"]) / 2, rel=1e-5)
    assert means[1]["G"] == steps[2]["G"]


def test_a_run_leaves_a_model_checkpoints_logs_and_its_configuration(pictures, tmp_path):
    held_out = write_pictures(tmp_path / "held_out", 2)
    (pictures / "1.png").write_bytes(b"broken")
    run = tmp_path / "run"
    config = tiny_config(
        pictures,
        run,
        data={"validation": str(held_out), "workers": 1},
        optim={"steps": 5, "ema": 0.9},
        run={"checkpoint_every": 2, "keep": 2, "validate_every": 4, "picture_every": 3, "tensorboard": True},
    )
    trainer = Trainer(config)
    assert trainer.fit() == run / "model"
    assert sorted(f.name for f in (run / "checkpoints").iterdir()) == [
        "best.pt",
        "step_000000004.pt",
        "step_000000005.pt",
    ]
    assert load_config(run / "config.json") == config
    log = lines(run)
    train = [line for line in log if line["kind"] == "train"]
    assert [line["step"] for line in train] == [1, 2, 3, 4, 5]
    assert all(math.isfinite(value) for line in train for value in line.values() if isinstance(value, float))
    scores = {line["step"]: line for line in log if line["kind"] == "validation"}
    assert list(scores) == [4, 5]
    assert trainer.broken == [trainer.broken[0]]
    assert "1.png" in trainer.broken[0]

    model = LGNet.from_pretrained(run / "model")
    average = trainer.average.state
    assert all(torch.equal(value, average[name]) for name, value in model.state_dict().items())
    psnr = []
    for image, mask in trainer.validation.pairs:
        with torch.no_grad():
            levels = ((model(image, mask) + 1) * 127.5).round() - ((image + 1) * 127.5).round()
        psnr.append(10 * math.log10(255**2 / levels.square().mean().item()))
    assert scores[5]["psnr"] == pytest.approx(sum(psnr) / len(psnr), abs=1e-3)
    assert trainer.best == max(s["psnr"] for s in scores.values())
    assert (run / "best_model" / "model.safetensors").is_file()

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert [e.value for e in events.Scalars("train/G")] == pytest.approx([line["G"] for line in train])
    assert [e.step for e in events.Images("train/pictures")] == [3]


@pytest.mark.parametrize("name", [*list_models(), "X_LG"])
def test_every_variant_trains(pictures, tmp_path, name):
    torch.manual_seed(0)
    if name == "X_LG":

        class First(nn.Module):
            def __init__(self):
                super().__init__()
                self.net = UNet(2)

            def forward(self, image, mask):
                return self.net(torch.cat((image * (1 - mask), mask), dim=1))

        model = LocalGlobalRefinement(First(), local_channels=2, global_channels=2, backend="eager")
    else:
        model = create_model(name, **TINY, backend="eager")
    trainer = Trainer(tiny_config(pictures, tmp_path), model)
    trainer.training_mode()
    before = {k: p.detach().clone() for k, p in model.named_parameters()}
    terms = trainer.train_step([batch()])
    assert all(torch.isfinite(term) for term in terms.values())
    unchanged = [k for k, p in model.named_parameters() if torch.equal(p, before[k])]
    assert unchanged == []
    exported = trainer.export(tmp_path / "model")
    if name == "X_LG":
        state = torch.load(exported / "network.pt", weights_only=True)
        assert state.keys() == model.state_dict().keys()
    else:
        assert LGNet.from_pretrained(exported).config == model.config


def test_a_leg_ends_with_a_checkpoint_and_the_next_goes_on(pictures, tmp_path, monkeypatch, capsys):
    config = tiny_config(pictures, tmp_path / "run", optim={"steps": 5, "leg_minutes": 60})
    trainer = Trainer(config)
    step = trainer.train_step

    def slow(batches):
        trainer._born -= 1801
        return step(batches)

    monkeypatch.setattr(trainer, "train_step", slow)
    assert trainer.fit() == tmp_path / "run" / "model"
    assert "this leg ended after step 2; --resume goes on" in capsys.readouterr().err
    assert trainer.step == 2
    assert trainer.checkpoints.steps() == [2]
    again = Trainer(config)
    again.fit(resume=True)
    assert again.step == 5
    assert "this leg ended" not in capsys.readouterr().err


def test_time_ends_a_run_with_a_checkpoint(pictures, tmp_path, monkeypatch):
    clock = itertools.count()  # every reading of the clock adds a second
    monkeypatch.setattr("lgnet_fast.training.trainer.time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    config = tiny_config(
        pictures, tmp_path / "run", optim={"steps": 100_000, "max_minutes": 0.2, "schedule": "linear"}
    )
    trainer = Trainer(config)
    trainer.fit()
    assert 2 < trainer.step <= 12
    assert trainer.checkpoints.steps() == [trainer.step]
    rates = [line["learning_rate"] for line in lines(tmp_path / "run")]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 2e-4 * (1 - trainer.step / 100_000) - 1e-6  # by the clock, not by the steps


@pytest.mark.parametrize("where", ["network", "discriminator", "average"])
def test_weights_that_are_not_finite_are_not_kept(pictures, tmp_path, monkeypatch, where):
    """A gradient may be NaN where the loss is finite."""
    config = tiny_config(pictures, tmp_path / "run", optim={"ema": 0.9}, run={"checkpoint_every": 1, "keep": 1})
    trainer = Trainer(config)
    step = trainer.train_step

    def poisoned_in_the_second(batches):
        terms = step(batches)
        if trainer.step == 1:
            next(iter(trainer.state()[where].values())).fill_(math.nan)
        return terms

    monkeypatch.setattr(trainer, "train_step", poisoned_in_the_second)
    with pytest.raises(TrainingError, match="after step 2 the weights are not finite"):
        trainer.fit()
    assert trainer.checkpoints.steps() == [1]
    assert not (tmp_path / "run" / "model").exists()
    assert all(torch.isfinite(t).all() for t in trainer.checkpoints.load_latest()["network"].values())


def test_a_picture_that_is_met_often_counts_once(pictures, tmp_path, capsys):
    """For every text of the reason."""
    trainer = Trainer(tiny_config(pictures, tmp_path / "run"))
    for number in range(3):
        trainer._note_broken([{"broken": [("a.png", f"reason {number}"), ("b: c.png", f"at 0x{number}")]}])
    assert trainer.broken == ["a.png: reason 0", "b: c.png: at 0x0"]


def test_command_line(pictures, tmp_path):
    runner = CliRunner()
    file = tmp_path / "c.yaml"
    file.write_text(json.dumps(tiny_settings(pictures, tmp_path / "run")))
    result = runner.invoke(app, ["train", str(file), "--set", "optim.steps=1"])
    assert result.exit_code == 0, result.output
    assert result.stdout == f"model: {tmp_path / 'run' / 'model'}\n"
    result = runner.invoke(app, ["train", str(file)])
    assert result.exit_code == 2
    assert "holds a run already; resume it, or choose another" in result.stderr
    assert result.stderr.count("\n") == 1
    result = runner.invoke(app, ["train", str(file), "--resume", "--set", "optim.steps=2"])
    assert result.exit_code == 0, result.output
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2]
    result = runner.invoke(app, ["train", str(tmp_path / "none.yaml")])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: config: expected a readable YAML or JSON file")


def test_modules_of_the_present_folder_are_found(pictures, tmp_path, monkeypatch):
    """The script that an installation makes has not the present folder on Python's path."""
    settings = tiny_settings(pictures, tmp_path / "run")
    settings["model"] = {"factory": "a_module_of_mine:make"}
    (tmp_path / "c.yaml").write_text(json.dumps(settings))
    (tmp_path / "a_module_of_mine.py").write_text("from tests.training_support import lively_model as make\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    result = CliRunner().invoke(app, ["train", "c.yaml", "--set", "optim.steps=1"])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_but_broken_pictures_is_one_line(pictures, tmp_path, workers):
    for file in pictures.iterdir():
        file.write_bytes(b"nothing")
    with pytest.raises(DataError, match="^data.pictures: none of 5 in a row can be read; the first: [^\\n]*$"):
        Trainer(tiny_config(pictures, tmp_path / "run", data={"workers": workers})).fit()


def test_no_pictures_configured(tmp_path):
    settings = tiny_settings(tmp_path, tmp_path / "run")
    settings["data"]["pictures"] = []
    with pytest.raises(DataError, match="data.pictures: expected folders"):
        Trainer(config_of(settings)).fit()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("stream", [None, SimpleNamespace(isatty=lambda: False, write=open)])
def test_a_standard_error_that_is_gone_does_not_end_a_run(pictures, tmp_path, monkeypatch, stream):
    """None: closed, as for a service. The other raises FileNotFoundError for every text."""
    monkeypatch.setattr("sys.stderr", stream)
    assert Trainer(tiny_config(pictures, tmp_path / "run", optim={"steps": 1})).fit() == tmp_path / "run" / "model"


# -- errors and ends ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "workers",
    [
        0,
        pytest.param(
            1,
            marks=pytest.mark.skipif(
                multiprocessing.get_all_start_methods()[0] != "fork",
                reason="workers that are not forked lack the patch",
            ),
        ),
    ],
)
def test_pictures_that_end_in_the_middle_of_a_run_leave_a_checkpoint(pictures, tmp_path, monkeypatch, workers):
    """The steps since the last checkpoint are kept, the workers end."""
    sample = InpaintingDataset.__getitem__

    def broken_from_the_third(dataset, position):
        if position >= 2:
            raise DataError("data: none of 5 pictures in a row can be read")
        return sample(dataset, position)

    monkeypatch.setattr(InpaintingDataset, "__getitem__", broken_from_the_third)
    config = tiny_config(pictures, tmp_path / "run", data={"workers": workers} | ({"prefetch": 1} if workers else {}))
    with pytest.raises(DataError, match="^data: none of 5 pictures in a row can be read$") as raised:
        Trainer(config).fit()
    assert multiprocessing.active_children() == [], raised  # although the error's traceback still has the loader
    monkeypatch.undo()
    rest = Trainer(config)
    assert rest.checkpoints.steps() == [2]
    rest.fit(resume=True)
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2, 3, 4]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGCHLD")
def test_a_worker_that_dies_within_a_step_leaves_a_checkpoint(pictures, tmp_path):
    """As one that has met a limit of memory. PyTorch's loader raises it at once, in the middle of the step."""
    config = tiny_config(pictures, tmp_path / "run", data={"workers": 1})
    trainer = Trainer(config)
    train_step = trainer.train_step

    def killing_in_the_third(batches):
        if trainer.step == 2:
            (worker,) = multiprocessing.active_children()
            os.kill(worker.pid, signal.SIGKILL)
            time.sleep(0.5)
        return train_step(batches)

    trainer.train_step = killing_in_the_third
    with pytest.raises(TrainingError, match=r"^data.workers: a process that reads pictures has died \(DataLoader "):
        trainer.fit()
    assert trainer.checkpoints.steps() == [3]
    assert "torch" in signal.getsignal(signal.SIGCHLD).__module__  # given back
    rest = Trainer(config)
    rest.fit(resume=True)
    assert rest.step == 4


def test_an_error_between_two_steps_leaves_a_checkpoint(pictures, tmp_path, capsys):
    trainer = Trainer(tiny_config(pictures, tmp_path / "run", data={"validation": str(pictures)}))
    trainer.config = tiny_config(pictures, tmp_path / "run", run={"validate_every": 2})
    trainer.validate = lambda: {}[0]
    with pytest.raises(KeyError):
        trainer.fit()
    assert trainer.checkpoints.steps() == [2]
    assert "the checkpoint of step 2 was saved before an error; --resume goes on" in capsys.readouterr().err


def test_an_error_within_a_step_leaves_none(pictures, tmp_path):
    """The discriminator may have made its step, the generators not."""
    trainer = Trainer(tiny_config(pictures, tmp_path / "run"))
    step = trainer.train_step
    trainer.train_step = lambda batches: {}[0] if trainer.step == 2 else step(batches)
    with pytest.raises(KeyError):
        trainer.fit()
    assert trainer.checkpoints.steps() == []


def test_a_log_that_cannot_be_written_does_not_end_a_run(pictures, tmp_path, monkeypatch):
    def full(stream, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("lgnet_fast.training.progress.write_stream", full)
    trainer = Trainer(tiny_config(pictures, tmp_path / "run", optim={"steps": 2}))
    assert trainer.fit() == tmp_path / "run" / "model"
    assert trainer.checkpoints.steps() == [2]
    assert lines(tmp_path / "run") == []


def test_a_folder_that_cannot_be_written_is_one_error(pictures, tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(TrainingError, match="^run.directory: .*run cannot be written"):
        Trainer(tiny_config(pictures, tmp_path / "run")).fit()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such locks")
def test_a_second_run_in_the_same_folder_is_refused(pictures, tmp_path):
    """Each would replace the other's checkpoints and lines of the log."""
    config = tiny_config(pictures, tmp_path / "run", optim={"steps": 2})
    Trainer(tiny_config(pictures, tmp_path / "run", optim={"steps": 1})).fit()
    before = {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}
    script = "import sys; from lgnet_fast.training.checkpoints import held; from pathlib import Path\n"
    script += "with held(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", script, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(TrainingError, match="^run.directory: expected a folder in which no other run is at work"):
            Trainer(config).fit(resume=True)
        assert {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()} == before
        other.kill()
    rest = Trainer(config)
    rest.fit(resume=True)
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2]


@pytest.mark.parametrize("ema", [None, 0.9])
def test_a_finished_run_is_left_as_it_is(pictures, tmp_path, capsys, ema):
    run = tmp_path / "run"
    optim = {"steps": 2, "ema": ema}
    config = tiny_config(
        pictures, run, data={"validation": str(pictures)}, optim=optim, run={"validation_pictures": 1}
    )
    Trainer(config).fit()
    before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in run.rglob("*") if file.is_file()}
    again = Trainer(config)
    again.validate = None
    assert again.fit(resume=True) == run / "model"
    assert {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in run.rglob("*") if file.is_file()} == before
    assert f"the run is finished, after step 2; its model is in {run / 'model'}" in capsys.readouterr().err
    # A model of an earlier leg, as a kill before the export leaves it, is replaced.
    write_model(create_model("lgnet_demo", **TINY), run / "model")
    Trainer(config).fit(resume=True)
    assert (run / "model" / "model.safetensors").read_bytes() == before[run / "model" / "model.safetensors"][1]


def test_the_last_checkpoint_has_the_best_score(pictures, tmp_path):
    """Also where the run is validated after its last checkpoint; a longer run would take a worse one for better."""
    data, run = {"validation": str(pictures)}, {"validation_pictures": 1, "validate_every": 2, "checkpoint_every": 3}
    trainer = Trainer(tiny_config(pictures, tmp_path / "run", data=data, run=run, optim={"steps": 3}))
    trainer.validate = lambda: {"psnr": 20.0 + trainer.step}
    trainer.fit()
    assert trainer.best == 23.0
    assert trainer.checkpoints.load_latest()["best"] == 23.0


@pytest.mark.parametrize(("metric", "best"), [("psnr", 3.0), ("ssim", 3.0), ("l1", 1.0), ("lpips", 1.0)])
def test_the_best_score_is_the_highest_or_the_lowest(pictures, tmp_path, monkeypatch, metric, best):
    trainer = Trainer(tiny_config(pictures, tmp_path / "run"))
    monkeypatch.setattr(trainer, "config", SimpleNamespace(run=SimpleNamespace(metric=metric)))
    scores = iter([2.0, 3.0, 1.0, 2.5])
    monkeypatch.setattr(trainer, "validate", lambda: {metric: next(scores)})
    monkeypatch.setattr(trainer, "export", lambda folder: folder)
    monkeypatch.setattr(trainer, "_save", lambda best: None)
    for _ in range(4):
        trainer._validate()
    assert trainer.best == best


def test_an_epoch_has_a_step_for_its_last_pictures_too(pictures, tmp_path):
    trainer = Trainer(tiny_config(pictures, tmp_path / "run", optim={"batch_size": 2}))
    assert (len(trainer.dataset), trainer.steps_an_epoch) == (5, 3)


def test_minutes_of_earlier_legs_count(pictures, tmp_path):
    trainer = Trainer(tiny_config(pictures, tmp_path / "run", optim={"steps": 1}))
    trainer.minutes = 5.0
    trainer.fit()
    assert 5 < trainer.minutes < 10


def test_a_best_checkpoint_that_cannot_be_written_is_not_the_best(pictures, tmp_path, monkeypatch):
    data, run = {"validation": str(pictures)}, {"validation_pictures": 1, "validate_every": 2}
    trainer = Trainer(tiny_config(pictures, tmp_path / "run", data=data, run=run))
    trainer.validate = lambda: {"psnr": 20.0}

    def full(path, state):
        raise TrainingError(f"checkpoint: {path} cannot be written")

    monkeypatch.setattr("lgnet_fast.training.trainer.save_checkpoint", full)
    with pytest.raises(TrainingError, match="best.pt cannot be written"):
        trainer.fit()
    assert trainer.checkpoints.load_latest()["best"] is None


def test_processes_that_see_other_checkpoints_do_not_start(pictures, tmp_path, monkeypatch):
    config = tiny_config(pictures, tmp_path / "run", optim={"steps": 1})
    Trainer(config).fit()
    monkeypatch.setattr("lgnet_fast.training.trainer.all_equal", lambda accelerator, step: step == 0)
    with pytest.raises(TrainingError, match="^resume: the checkpoint that this process found is of step 1, others"):
        Trainer(config).fit(resume=True)
    monkeypatch.setattr("accelerate.utils.gather_object", lambda own: [*own, 2])
    assert [all_equal(SimpleNamespace(num_processes=n), 1) for n in (1, 2)] == [True, False]


def test_a_score_that_is_no_number_is_never_the_best(pictures, tmp_path):
    trainer = Trainer(tiny_config(pictures, tmp_path / "run"))
    scores = iter([math.nan, math.inf, 12.0, math.inf, 11.0, 13.0])
    trainer.validate = lambda: {"psnr": next(scores)}
    best = []
    for _ in range(6):
        trainer._validate()
        best.append(trainer.best)
    assert best == [None, None, 12.0, 12.0, 12.0, 13.0]
