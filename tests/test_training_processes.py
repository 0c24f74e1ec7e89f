"""Several processes: an error of one alone ends the run in all of them, with a checkpoint and the error's text."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from lgnet_fast.training import TrainingError
from lgnet_fast.training.checkpoints import CheckpointFolder
from lgnet_fast.training.processes import failed_together, failing_together
from tests.test_training_distributed import ENVIRONMENT
from tests.training_support import tiny_settings, write_pictures

# Run by two processes. Each case: which process fails, in which function, at which call of it.
SCRIPT = """
import importlib, json, os, sys
from lgnet_fast.training import Trainer
from lgnet_fast.training.config import config_of

rank = os.environ["RANK"]
for case in json.load(open(sys.argv[1])):
    module, _, name = case["fails"].rpartition(":")
    owner = importlib.import_module(module)
    *path, name = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    own, calls = getattr(owner, name), []

    def fails(*given, **named):
        calls.append(1)
        if rank == case["process"] and len(calls) == case["call"]:
            raise OSError("no more")
        return own(*given, **named)

    setattr(owner, name, fails)
    try:
        Trainer(config_of(case["settings"])).fit()
    except Exception as error:
        sys.stdout.write(f"{case['title']}|{rank}|{type(error).__name__}|{error}\\n")
    setattr(owner, name, own)
"""

CASES = {
    "validation": ("lgnet_fast.data.metrics:Metrics.scores", "1", 1, "OSError|no more"),
    "export": ("lgnet_fast.training.export:LGNet.save_pretrained", "0", 1, "TrainingError|model: .*best_model"),
    "log": ("lgnet_fast.training.progress:Report.train", "0", 3, "OSError|no more"),
    "pictures": ("lgnet_fast.training.batches:Batches.take", "1", 4, "OSError|no more"),
    "checkpoint": ("lgnet_fast.training.trainer:CheckpointFolder.save", "0", 1, "OSError|no more"),
    "start": ("lgnet_fast.training.trainer:Report", "0", 1, "TrainingError|run.directory: .*no more"),
}


@pytest.mark.slow(reason="two processes of training")
def test_an_error_of_one_process_ends_all_with_a_checkpoint(tmp_path):
    pictures, held_out = write_pictures(tmp_path / "p", 3), write_pictures(tmp_path / "h", 2)
    cases = []
    for title, (fails, process, call, _) in CASES.items():
        settings = tiny_settings(pictures, tmp_path / title)
        settings["data"]["validation"] = str(held_out)
        settings["run"] |= {"validate_every": 3, "checkpoint_every": 3, "validation_classes": [1]}
        settings["run"]["device"] = "cpu" if title == "start" else "auto"  # without a GPU, see below
        cases.append({"title": title, "fails": fails, "process": process, "call": call, "settings": settings})
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(tmp_path / "script.py"), str(tmp_path / "cases.json")]
    environment = {**ENVIRONMENT, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr
    told = {tuple(line.split("|", 2)[:2]): line.split("|", 2)[2] for line in done.stdout.splitlines() if "|" in line}
    for title, (_, process, _, error) in CASES.items():
        kind, _, text = error.partition("|")
        other = "1" if process == "0" else "0"
        found = told[title, process].partition("|")
        assert found[0] == kind, title
        assert re.match(text, found[2]), (title, found[2])
        assert told[title, other] == f"TrainingError|process {process}: {found[2]}", title
    kept = {title: CheckpointFolder(tmp_path / title / "checkpoints", 3).steps() for title in CASES}
    # A checkpoint that could not be written is tried once more.
    assert kept == {"validation": [3], "export": [3], "log": [3], "pictures": [3], "checkpoint": [3], "start": []}


def process(index, others=False):
    """One of two processes, beside one that fails or not."""
    return SimpleNamespace(
        num_processes=2, process_index=index, device=torch.device("cpu"), reduce=lambda tensor, how: tensor + others
    )


def test_who_fails_together(monkeypatch):
    monkeypatch.setattr("accelerate.utils.gather_object", lambda texts: [texts[0], "its text"])
    with failing_together(process(0)):
        pass
    with pytest.raises(TrainingError, match="^process 1: its text$") as raised, failing_together(process(0, True)):
        pass
    assert failed_together(process(0), raised.value)
    own = KeyError("mine")
    assert not failed_together(process(0), own)
    assert failed_together(SimpleNamespace(num_processes=1), own)
    with pytest.raises(KeyError) as raised, failing_together(process(0)):
        raise own
    assert raised.value is own
    assert failed_together(process(0), own)
