"""Checkpoints: complete state, atomic files; killed runs continue with bitwise equal results."""

from __future__ import annotations

import errno
import json
import math
import os
import random
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lgnet_fast import files
from lgnet_fast.training import Trainer, TrainingError, checkpoints
from lgnet_fast.training.checkpoints import (
    CheckpointFolder,
    load_checkpoint,
    random_states,
    restore_random_states,
    save_checkpoint,
)
from lgnet_fast.training.resuming import best_score, settings_of
from lgnet_fast.training.signals import Stop, until_signal
from tests.training_support import assert_same, lines, tiny_config, tiny_settings, write_pictures

# Forked, because importing PyTorch thirty times would take longer than all the training. One thread, and no backward
# pass before the fork, so that no thread is lost.
KILLER = """
import json, os, random, signal, sys, time
import torch
torch.set_num_threads(1)
from lgnet_fast.training import Trainer
from lgnet_fast.training.checkpoints import CheckpointFolder
from lgnet_fast.training.config import config_of
import safetensors.torch

def start(settings):
    child = os.fork()
    if child == 0:
        code = 9
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            Trainer(config_of(settings)).fit(resume=True)
            code = 0
        finally:
            os._exit(code)
    return child

plain, killed, kills, seed = json.loads(sys.argv[1])
Trainer(config_of(plain))  # imports what is imported late
assert os.waitpid(start(plain), 0)[1] == 0
folder = CheckpointFolder(killed["run"]["directory"] + "/checkpoints", 3)
lots, seen, done, longest = random.Random(seed), [], 0, 0.8
while done < kills:
    began = time.monotonic()
    child = start(killed)
    time.sleep(lots.uniform(0, longest))
    finished, status = os.waitpid(child, os.WNOHANG)
    if finished:
        assert status == 0, status
        break
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    done += 1
    steps = folder.steps()
    seen.append(steps[-1] if steps else 0)
    if steps:
        # Whatever moment it was, the newest one is whole.
        assert folder.load_latest()["step"] == steps[-1]
    # So that about one step is done between two kills, however fast the machine is.
    gained = seen[-1] - (seen[-2] if len(seen) > 1 else 0)
    longest *= 1.1 if gained == 0 else 0.8 if gained > 2 else 1.0
assert os.waitpid(start(killed), 0)[1] == 0
print(json.dumps({"kills": done, "seen": seen}))
"""


@pytest.fixture
def pictures(tmp_path):
    return write_pictures(tmp_path / "pictures")


def run_killer(pictures: Path, tmp_path: Path, steps: int, every: int, kills: int) -> dict:
    both = []
    for name in ("plain", "killed"):
        settings = tiny_settings(pictures, tmp_path / name)
        settings["optim"] |= {"steps": steps, "ema": 0.9, "schedule": "linear"}
        settings["run"] |= {"checkpoint_every": every, "keep": 3}
        both.append(settings)
    done = subprocess.run(
        [sys.executable, "-c", KILLER, json.dumps([*both, kills, 7])],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def final(run: Path, steps: int) -> dict:
    state = load_checkpoint(CheckpointFolder(run / "checkpoints", 3).path(steps))
    state.pop("minutes")
    return state


@pytest.mark.slow(reason="thirty processes killed and started again")
def test_thirty_kills_lose_nothing_and_change_no_bit(pictures, tmp_path):
    steps = 45
    report = run_killer(pictures, tmp_path, steps, every=1, kills=30)
    assert report["seen"] == sorted(report["seen"])  # no checkpoint was ever lost
    assert report["kills"] == 30
    assert len(set(report["seen"])) >= 4  # the run was interrupted at different places
    assert_same(final(tmp_path / "killed", steps), final(tmp_path / "plain", steps))
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("plain", "killed")]
    assert len(logs[0]) == steps
    assert logs[0] == logs[1]
    left = {f.name for f in (tmp_path / "killed" / "checkpoints").iterdir()}
    assert left == {f.name for f in (tmp_path / "plain" / "checkpoints").iterdir()}


def test_twenty_steps_equal_ten_and_ten(pictures, tmp_path):
    def trainer(name):
        changes = {"optim": {"steps": 20, "ema": 0.9}, "run": {"checkpoint_every": 10}}
        return Trainer(tiny_config(pictures, tmp_path / name, **changes))

    whole = trainer("whole")
    whole.fit()
    half = trainer("halves")
    step = half.train_step

    def stop_in_the_thirteenth(batches):
        if half.step == 12:
            raise KeyboardInterrupt
        return step(batches)

    half.train_step = stop_in_the_thirteenth
    with pytest.raises(KeyboardInterrupt):
        half.fit()
    assert half.checkpoints.steps() == [10]
    random.random(), np.random.default_rng(), torch.rand(3)  # other code draws random numbers in between
    rest = trainer("halves")
    rest.fit(resume=True)
    assert_same(final(tmp_path / "halves", 20), final(tmp_path / "whole", 20))
    logs = [(tmp_path / name / "log.jsonl").read_text() for name in ("whole", "halves")]
    assert logs[0].count("\n") == 20
    assert logs[0] == logs[1]


def test_sigterm_ends_with_a_checkpoint(pictures, tmp_path):
    trainer = Trainer(tiny_config(pictures, tmp_path / "run", optim={"steps": 50}))
    step = trainer.train_step

    def terminated_in_the_second(batches):
        if trainer.step == 1:
            signal.raise_signal(signal.SIGTERM)
        return step(batches)

    trainer.train_step = terminated_in_the_second
    before = signal.getsignal(signal.SIGTERM)
    assert trainer.fit() is None
    assert trainer.checkpoints.steps() == [2]
    assert not (tmp_path / "run" / "model").exists()
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(("every", "expected"), [(2, [4]), (3, [3, 4])])
def test_a_signal_waits_for_no_validation(pictures, tmp_path, every, expected):
    """Neither for that of its step nor for that at the end of a run; a run without signals has both."""
    config = tiny_config(
        pictures,
        tmp_path / "run",
        optim={"steps": 4},
        data={"validation": str(pictures)},
        run={"validate_every": every},
    )
    trainer = Trainer(config)
    step, validated = trainer.train_step, []

    def terminated_in_the_second(batches):
        if trainer.step == 1:
            signal.raise_signal(signal.SIGTERM)
        return step(batches)

    trainer.train_step = terminated_in_the_second
    trainer._validate = lambda: validated.append(trainer.step)
    assert trainer.fit() is None
    assert (validated, trainer.checkpoints.steps()) == ([], [2])
    rest = Trainer(config)
    rest._validate = lambda: validated.append(rest.step)
    assert rest.fit(resume=True) is not None
    assert validated == expected


@pytest.mark.parametrize("handler", [signal.SIG_IGN, None])
def test_signals_that_are_ignored_or_not_pythons_are_left(handler, monkeypatch):
    """None: a program that embeds Python had set the handler, which Python cannot set again."""
    monkeypatch.setattr(signal, "getsignal", lambda number: handler)
    changed = []
    monkeypatch.setattr(signal, "signal", lambda *given: changed.append(given))
    with until_signal(changed.append):
        pass
    assert changed == []


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode", "default device"])
def test_training_does_not_depend_on_the_callers_modes(pictures, tmp_path, mode):
    def run(folder: str) -> dict[str, torch.Tensor]:
        trainer = Trainer(tiny_config(pictures, tmp_path / folder, optim={"steps": 1}))
        trainer.fit()
        return dict(trainer.network.state_dict())

    expected = run("plain")
    with {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}.get(mode, lambda: torch.device("meta"))():
        assert_same(run("inside"), expected)


# -- files ------------------------------------------------------------------------------------------------------


def test_newest_stay_and_half_written_ones_go(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=2)
    for step in (1, 20, 3, 100):
        folder.save(step, {"step": step})
    assert folder.steps() == [20, 100]
    (tmp_path / "step_000000200.pt.unfinished").write_bytes(b"half")
    assert folder.files()[0] == tmp_path / "step_000000100.pt"
    folder.clean()
    assert sorted(f.name for f in tmp_path.iterdir()) == ["step_000000020.pt", "step_000000100.pt"]


@pytest.mark.skipif(files.fcntl is None, reason="no locks of whole files here")
def test_a_disk_without_locks_holds_a_run(tmp_path, monkeypatch):
    def lockf(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "lockf", lockf)
    with checkpoints.held(tmp_path / "run"):
        assert (tmp_path / "run").is_dir()


def test_damaged_newest_falls_back_with_a_warning(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=3)
    for step in (1, 2):
        folder.save(step, {"step": step, "x": torch.zeros(1000)})
    folder.path(2).write_bytes(folder.path(2).read_bytes()[:700])
    with pytest.warns(UserWarning, match="step_000000002.pt cannot be read .*; trying the one before"):
        assert folder.load_latest()["step"] == 1
    folder.path(1).write_bytes(b"")
    with (
        pytest.warns(UserWarning, match="trying the one before"),
        pytest.raises(TrainingError, match="step_000000001.pt cannot be read"),
    ):
        folder.load_latest()
    assert CheckpointFolder(tmp_path / "none", 3).load_latest() is None


def test_one_wrong_bit_of_a_tensor_is_noticed(tmp_path):
    """The file has checksums, which `torch.load` does not compare, also where the program has switched them off."""
    torch.serialization.set_crc32_options(False)
    try:
        folder = CheckpointFolder(tmp_path, keep=2)
        for step in (1, 2):
            folder.save(step, {"step": step, "x": torch.full((1000,), 0.75)})
        assert not torch.serialization.get_crc32_options()
    finally:
        torch.serialization.set_crc32_options(True)
    data = folder.path(2).read_bytes()
    at = data.index(torch.full((10,), 0.75).numpy().tobytes()) + 7
    folder.path(2).write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    assert (torch.load(folder.path(2))["x"] != 0.75).sum() == 1
    with pytest.warns(UserWarning, match="step_000000002.pt cannot .*/data/0 does not have its checksum.*; trying"):
        assert folder.load_latest()["step"] == 1


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_process_alone_tells_of_a_damaged_checkpoint(pictures, tmp_path, monkeypatch, rank):
    trainer = Trainer(tiny_config(pictures, tmp_path / "run", optim={"steps": 2}, run={"checkpoint_every": 1}))
    trainer.fit()
    trainer.checkpoints.path(2).write_bytes(b"damaged")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", str(rank))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(resume=True)
    assert sum("step_000000002.pt cannot be read" in str(one.message) for one in caught) == 1 - rank
    assert trainer.checkpoints.load_latest()["step"] == 2


def test_what_is_written_after_a_damaged_newest_stays(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=1)
    folder.save(4, {"step": 4})
    folder.path(4).write_bytes(b"damaged")
    folder.save(2, {"step": 2})
    folder.save(3, {"step": 3})
    assert folder.steps() == [3, 4]
    with pytest.warns(UserWarning, match="step_000000004.pt cannot be read"):
        assert folder.load_latest() == {"step": 3}


def test_the_best_alone_is_gone_on_from_with_a_note(pictures, tmp_path):
    run = tmp_path / "run"
    validation = {"data": {"validation": str(pictures)}, "run": {"validate_every": 2, "validation_pictures": 1}}
    first = Trainer(tiny_config(pictures, run, optim={"steps": 3}, **validation))
    first.validate = lambda: {"psnr": 20.0 - first.step}  # the best one is the first, of step 2
    first.fit()
    (run / "checkpoints" / "step_000000003.pt").unlink()
    with pytest.raises(TrainingError, match="holds a run already; resume it"):
        Trainer(tiny_config(pictures, run)).fit()
    rest = Trainer(tiny_config(pictures, run, optim={"steps": 4}, **validation))
    with pytest.warns(UserWarning, match=r"holds no step_\*.pt that can be read; best.pt is taken, of step 2"):
        rest.fit(resume=True)
    assert [line["step"] for line in lines(run) if line["kind"] == "train"] == [1, 2, 3, 4]
    assert rest.step == 4
    # One that can be read is preferred, however good the other was.
    rest.checkpoints.path(4).write_bytes(b"damaged")
    with pytest.warns(UserWarning, match="step_000000004.pt cannot be read|best.pt is taken"):
        assert rest.checkpoints.load_latest()["step"] == 2
    rest.checkpoints.save(3, {"step": 3})
    with pytest.warns(UserWarning, match="step_000000004.pt cannot be read"):
        assert rest.checkpoints.load_latest() == {"step": 3}


def test_a_best_that_is_newer_than_the_checkpoint_is_not_replaced_by_a_worse_one(pictures, tmp_path):
    """As a kill between two checkpoints leaves it."""
    run = tmp_path / "run"
    often = {"validate_every": 1, "checkpoint_every": 2, "validation_pictures": 1}
    config = tiny_config(pictures, run, data={"validation": str(pictures)}, optim={"steps": 9}, run=often)

    def killed_before(step, scores):
        trainer = Trainer(config)
        train_step = trainer.train_step
        trainer.validate = lambda: {"psnr": scores[trainer.step]}

        def train(batches):
            if trainer.step == step:
                raise KeyboardInterrupt
            return train_step(batches)

        trainer.train_step = train
        with pytest.raises(KeyboardInterrupt):
            trainer.fit(resume=True)
        best = load_checkpoint(run / "checkpoints" / "best.pt")
        return trainer.checkpoints.steps()[-1], best["step"], best["best"]

    assert killed_before(3, {1: 20.0, 2: 21.0, 3: 26.0}) == (2, 3, 26.0)
    model = (run / "best_model" / "model.safetensors").read_bytes()
    assert killed_before(5, {3: 23.0, 4: 24.0, 5: 25.0}) == (4, 3, 26.0)
    assert (run / "best_model" / "model.safetensors").read_bytes() == model
    assert load_checkpoint(run / "checkpoints" / "step_000000004.pt")["best"] == 26.0
    assert killed_before(6, {5: 26.5, 6: 0.0}) == (6, 5, 26.5)
    assert (run / "best_model" / "model.safetensors").read_bytes() != model


def test_full_disk_leaves_the_old_checkpoint(pictures, tmp_path, monkeypatch):
    config = tiny_config(pictures, tmp_path / "run", run={"checkpoint_every": 1})
    trainer = Trainer(config)
    sync = os.fsync

    def full(descriptor):
        if trainer.step == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(checkpoints.os, "fsync", full)
    with pytest.raises(TrainingError, match=r"step_000000003.pt cannot be written \(.*No space left.*as they were"):
        trainer.fit()
    folder = tmp_path / "run" / "checkpoints"
    assert sorted(f.name for f in folder.iterdir()) == ["step_000000001.pt", "step_000000002.pt"]
    monkeypatch.setattr(checkpoints.os, "fsync", sync)
    rest = Trainer(config)
    rest.fit(resume=True)
    assert rest.step == 4


@pytest.mark.skipif(sys.platform == "win32", reason="resource limits are POSIX's")
def test_file_size_limit_while_torch_writes(tmp_path):
    """The real writer on a real limit, in a process of its own."""
    code = """
import resource, signal, sys, torch
from pathlib import Path
from lgnet_fast.training.checkpoints import save_checkpoint
from lgnet_fast.training import TrainingError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
path = Path(sys.argv[1])
save_checkpoint(path, {"x": torch.zeros(100)})
try:
    save_checkpoint(path, {"x": torch.zeros(100_000)})
except TrainingError as error:
    print(error)
assert torch.load(path, weights_only=True)["x"].shape == (100,)
assert [f.name for f in path.parent.iterdir()] == [path.name]
"""
    path = tmp_path / "a.pt"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"checkpoint: {path} cannot be written ([Errno {errno.EFBIG}] File too large); ")


def test_checkpoints_hold_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    torch.save(torch.zeros(3), tmp_path / "a.pt")
    with pytest.raises(TrainingError, match="a.pt cannot be read .*: expected a dict in it, got Tensor"):
        load_checkpoint(tmp_path / "a.pt")
    torch.save({"step": Evil()}, tmp_path / "step_000000001.pt")
    with pytest.raises(TrainingError, match="cannot be read"):
        load_checkpoint(tmp_path / "step_000000001.pt")
    assert not (tmp_path / "made").exists()


def test_random_states_of_every_kind(tmp_path):
    def draw():
        return [random.random(), random.gauss(0, 1), np.random.standard_normal(), torch.rand(2).tolist()]  # noqa: NPY002

    random.gauss(0, 1)  # leaves a second value behind
    save_checkpoint(tmp_path / "r.pt", {"random": random_states()})
    first = draw()
    assert draw() != first
    restore_random_states(load_checkpoint(tmp_path / "r.pt")["random"])
    assert draw() == first


@pytest.mark.parametrize("count", [1, 3])
def test_random_states_of_more_gpus_or_fewer(monkeypatch, count):
    """A checkpoint has the states of all GPUs that its machine had."""
    generators = [torch.Generator() for _ in range(count)]

    def set_state(state, device):
        generators[device].set_state(state)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "set_rng_state", set_state)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", list)
    seeded = [torch.Generator().manual_seed(5 + device).get_state() for device in range(2)]
    restore_random_states({**random_states(), "cuda": seeded})
    fresh = torch.Generator().initial_seed()
    assert [one.initial_seed() for one in generators] == [5, 6, fresh][:count]


def test_what_cannot_be_resumed(pictures, tmp_path):
    run = tmp_path / "run"
    Trainer(tiny_config(pictures, run, optim={"steps": 1})).fit()
    with pytest.raises(TrainingError, match="holds a run already; resume it, or choose another"):
        Trainer(tiny_config(pictures, run)).fit()
    other = tiny_config(pictures, run, model={"overrides": {"coarse_channels": 3}})
    with pytest.raises(TrainingError, match="resume: the checkpoint is of another network"):
        Trainer(other).fit(resume=True)
    with pytest.raises(TrainingError, match=r"resume: optim.accumulate is not"):
        Trainer(tiny_config(pictures, run, optim={"accumulate": 2})).fit(resume=True)
    with pytest.raises(TrainingError, match=r"resume: optim.batch_size was 1 in the checkpoint, now it is 2"):
        Trainer(tiny_config(pictures, run, optim={"batch_size": 2})).fit(resume=True)
    with pytest.raises(TrainingError, match=r"resume: model.train_stages was \[\] in the checkpoint, now"):
        Trainer(tiny_config(pictures, run, model={"train_stages": [1, 2, 3]})).fit(resume=True)
    with pytest.raises(TrainingError, match=r"resume: model.freeze_batchnorm was False in the checkpoint, now it is"):
        Trainer(tiny_config(pictures, run, model={"freeze_batchnorm": True})).fit(resume=True)
    state = load_checkpoint(CheckpointFolder(run / "checkpoints", 3).path(1))
    with pytest.raises(TrainingError, match="written by 2 processes, now there are 1"):
        Trainer(tiny_config(pictures, run)).restore(state | {"processes": 2})
    with pytest.raises(
        TrainingError, match="^resume: expected a checkpoint of a run, got one without optimisers, step"
    ):
        Trainer(tiny_config(pictures, run)).restore(
            {k: v for k, v in state.items() if k not in ("optimisers", "step")}
        )
    # An average that is started later starts from the weights.
    late = Trainer(tiny_config(pictures, run, optim={"ema": 0.9}))
    late.restore(state)
    assert_same(dict(late.average.state), dict(late.network.state_dict()))
    assert all(late.average.state[name].data_ptr() != value.data_ptr() for name, value in state["network"].items())


def test_what_may_change_between_two_legs(pictures, tmp_path):
    run = tmp_path / "run"
    first = Trainer(tiny_config(pictures, run, data={"validation": str(pictures)}, optim={"steps": 1}))
    first.fit()
    assert first.best > 0
    state = load_checkpoint(CheckpointFolder(run / "checkpoints", 3).path(1))
    same = Trainer(tiny_config(pictures, run))
    same.restore(state)
    assert same.best == first.best
    other = Trainer(tiny_config(pictures, run, optim={"betas": [0.9, 0.99]}, run={"metric": "ssim"}))
    other.restore(state)
    assert other.best is None  # a PSNR says nothing about SSIM
    for data, changes, best in (
        ({"validation": str(pictures)}, {}, first.best),
        ({"validation": str(pictures)}, {"validation_pictures": 2}, None),
        ({"validation": str(pictures)}, {"validation_classes": [0]}, None),
        ({"validation": str(write_pictures(tmp_path / "others", 1))}, {}, None),
    ):
        trainer = Trainer(tiny_config(pictures, run, data=data, run=changes))
        trainer.restore(state)
        assert trainer.best == best, (data, changes)
    assert [group["betas"] for one in other.optimisers for group in one.param_groups] == [(0.9, 0.99)] * 2


def test_distances_by_another_network_are_not_compared(tmp_path):
    def settings(weights, metric):
        run = {"validation_kinds": ["box"], "metric": metric}
        loss, data = {"lpips_weights": weights}, {"validation": "held_out"}
        return settings_of(tiny_config(tmp_path, tmp_path, data=data, loss=loss, run=run))

    state = {"best": 0.25, "settings": settings("vgg16.npz", "lpips")}
    assert best_score(state, settings("vgg16.npz", "lpips")) == 0.25
    assert best_score(state, settings("alexnet.npz", "lpips")) is None
    state["settings"] = settings("vgg16.npz", "psnr")
    assert best_score(state, settings("alexnet.npz", "psnr")) == 0.25


# Entries of checkpoints before version 2.6; the oldest ones lack the last two.
OLD = ("network", "discriminator", "average", "optimisers", "scaler", "random", "step", "position", "processes")
OLD += ("minutes", "skipped", "broken", "best", "warm_from", "settings")


@pytest.mark.parametrize("entries", [OLD, OLD[:-2]])
def test_old_checkpoints_are_resumed(pictures, tmp_path, entries):
    """With the settings as they were written before the validation described itself."""

    def trainer(name, steps):
        optim = {"steps": steps, "schedule": "constant"}
        data = {"validation": str(pictures)}
        return Trainer(tiny_config(pictures, tmp_path / name, data=data, optim=optim, run={"validation_pictures": 1}))

    first = trainer("run", 2)
    first.fit()
    state = first.state()
    assert set(state) == set(OLD)
    state["settings"] = {
        "optim.batch_size": 1,
        "model.train_stages": [],
        "model.freeze_batchnorm": False,
        "run.metric": "psnr",
        "validation": [str(pictures), "photos", 256, 0, [1, 2], 1],
    }
    old = {name: state[name] for name in entries}
    save_checkpoint(tmp_path / "old" / "checkpoints" / "step_000000002.pt", old)
    rest, whole = trainer("old", 3), trainer("whole", 3)
    rest.restore(old)
    assert (rest.step, rest.best) == (2, first.best)
    rest.restore({**old, "best": math.inf})  # old versions took the PSNR of equal pictures for infinite
    assert rest.best is None
    rest.fit(resume=True)
    whole.fit()
    assert_same(dict(rest.network.state_dict()), dict(whole.network.state_dict()))


def test_a_signal_between_two_steps_counts_at_the_next_agreement():
    """Processes that stop by their own signal leave the others waiting, so only the agreed one counts."""
    stop = Stop(SimpleNamespace(num_processes=1))
    stop.ask(signal.SIGINT)
    assert stop.agreed == 0
    assert stop.agree(1.0) == 1.0
    assert stop.agreed == signal.SIGINT


@pytest.mark.parametrize(
    ("own", "another", "agreed"),
    [
        (0, 0, 0),
        (0, signal.SIGINT, signal.SIGINT),
        (0, signal.SIGTERM, signal.SIGTERM),
        (signal.SIGTERM, 0, signal.SIGTERM),
        (signal.SIGTERM, signal.SIGINT, signal.SIGINT),
    ],
)
def test_processes_agree_on_the_signal_that_one_of_them_got(own, another, agreed):
    both = []

    def reduce(sent, how):
        if not both:  # what the first process sends, with its clock
            both.append(sent)
            return sent
        return both[0] + sent

    def process(first):
        return SimpleNamespace(num_processes=2, is_main_process=first, device="cpu", reduce=reduce)

    first, second = Stop(process(True)), Stop(process(False))
    first.ask(another)
    second.ask(own)
    first.agree(3.0)
    assert second.agree(1.0) == 3.0
    assert second.agreed == agreed
