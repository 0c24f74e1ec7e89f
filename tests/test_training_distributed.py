"""`accelerate launch` on two processes: the same losses as one process with twice the batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lgnet_fast.training import Trainer
from lgnet_fast.training.checkpoints import CheckpointFolder, load_checkpoint
from lgnet_fast.training.config import config_of
from tests.training_support import tiny_settings, write_pictures

STEPS = 10
ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def settings(pictures, held_out, run, batch_size, **run_options):
    """Float64 with frozen BatchNorm, so that sums over a batch do not depend on its split."""
    changed = tiny_settings(pictures, run)
    changed["model"] = {"factory": "tests.training_support:lively_model", "freeze_batchnorm": True}
    changed["data"]["validation"] = str(held_out)
    changed["optim"] |= {"batch_size": batch_size, "steps": STEPS, "dtype": "float64", "learning_rate": 1e-3}
    changed["run"] |= {"validate_every": STEPS, "checkpoint_every": 4, **run_options}
    return changed


def launch(file, *options):
    """Two processes by torchrun's launcher, which `--multi_gpu` names; with `--cpu`, accelerate would leave their
    number to MPI, and start one. The configuration's device decides that they compute on the CPU."""
    flags = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    flags += ["--dynamo_backend", "no", "--main_process_port", "0"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *flags]
    return [*command, "-m", "lgnet_fast", "train", str(file), *options]


def log(run, kind):
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


@pytest.mark.slow(reason="two processes of training, and one beside them that equals both")
def test_two_processes_equal_one_with_twice_the_batch(tmp_path):
    pictures, held_out = write_pictures(tmp_path / "p", 15), write_pictures(tmp_path / "h", 3)
    broken = [pictures / f"{number}_broken.png" for number in range(3)]  # the first process meets one of them alone
    for picture in broken:
        picture.write_bytes(b"broken")
    file = tmp_path / "c.json"
    file.write_text(json.dumps(settings(pictures, held_out, tmp_path / "two", 1)))
    done = subprocess.run(launch(file), capture_output=True, text=True, timeout=280, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert "3 pictures could not be read and were skipped" in done.stderr
    threads = torch.get_num_threads()
    Trainer(config_of(settings(pictures, held_out, tmp_path / "one", 2))).fit()
    torch.set_num_threads(threads)

    a, b = log(tmp_path / "two", "train"), log(tmp_path / "one", "train")
    assert [line["step"] for line in a] == [line["step"] for line in b] == list(range(1, STEPS + 1))
    worst = 0.0
    for two, single in zip(a, b, strict=True):
        assert two.keys() == single.keys()
        assert {"G", "D", "hole3", "edge1", "G_adv"} <= two.keys()
        for name in two.keys() - {"kind", "step"}:
            worst = max(worst, abs(two[name] / single[name] - 1))
    assert worst < 1e-5
    # The networks depend on their input and change by training; otherwise the comparison would prove nothing.
    assert max(line["tv3"] for line in b) > 1e-3
    assert all(x["hole3"] != y["hole3"] for x, y in zip(b, b[3:]))
    for two, single in zip(log(tmp_path / "two", "validation"), log(tmp_path / "one", "validation"), strict=True):
        assert two["psnr"] == pytest.approx(single["psnr"], rel=1e-5)
        assert two["ssim"] == pytest.approx(single["ssim"], rel=1e-5)

    states = [load_checkpoint(CheckpointFolder(tmp_path / n / "checkpoints", 3).path(STEPS)) for n in ("two", "one")]
    for part in ("network", "discriminator"):
        for name, value in states[0][part].items():
            # Adam divides by the root of the squared gradient, so the rounding of tiny gradients matters.
            assert torch.allclose(value, states[1][part][name], rtol=1e-5, atol=1e-6), name
    assert [len(state["random"]) for state in states] == [2, 1]
    # Whichever process has met them.
    told = [{message.partition(": ")[0] for message in state["broken"]} for state in states]
    assert told == [{str(picture) for picture in broken}] * 2
