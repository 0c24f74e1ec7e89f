"""Every setting of a configuration changes what a run does, or is an error."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch
from PIL import Image

from lgnet_fast.errors import LGNetError
from lgnet_fast.training import TrainConfig, Trainer
from lgnet_fast.training.config import config_of
from tests.training_support import lively_model, tiny_settings, write_pictures

FEATURES = {"loss.features": "tests.training_support:Features"}
MEMORY = {"data.in_memory": True, "data.mask_bank": 2}
VALIDATED = {"data.validation": "HELD_OUT", "run.validate_every": 2, "run.validation_pictures": 1}

# Setting -> its other value, and what must be set beside it. FILES, MASKS, MODEL and HELD_OUT are made by the test.
CHANGED: dict[str, tuple[Any, dict[str, Any]]] = {
    "model.name": ("lgnet_share", {}),
    "model.overrides": ({"coarse_channels": 3, "local_channels": 2, "global_channels": 2}, {}),
    "model.init_from": ("MODEL", {"model.overrides": {}}),
    "model.factory": ("tests.training_support:lively_model", {"model.overrides": {}}),
    "model.train_stages": ([3], {"discriminator.stage": "last"}),
    "model.freeze_batchnorm": (True, {}),
    "model.freeze_batchnorm_from": (0.5, {}),
    "model.batchnorm_momentum": (0.5, {}),
    "discriminator.variant": ("paper", {}),
    "discriminator.channels": (3, {}),
    "discriminator.stage": ("last", {}),
    "discriminator.start": (0.5, {}),
    "discriminator.init_from": ("none_net_D.pth", {"discriminator.channels": 64}),
    "discriminator.by_hole": (True, {}),
    "discriminator.crop": (64, {}),
    "data.pictures": (["HELD_OUT"], {}),
    "data.exclude": (["0"], {}),
    "data.validation": ("HELD_OUT", {}),
    "data.protocol": ("celeba_hq", {}),
    "data.categories": (["abbey"], {}),
    "data.size": (512, {}),
    "data.masks": ("MASKS", {}),
    "data.mask_kind": ("boxes", {}),
    "data.mask_polarity": ("black", {"data.masks": "MASKS"}),
    "data.hole_classes": ([5], {}),
    "data.in_memory": (True, {}),
    "data.mask_bank": (1, MEMORY),
    "data.colour": (0.5, {}),
    "loss.hole": (1.0, {}),
    "loss.adversarial": (1.0, {}),
    "loss.total_variation": (9.0, {}),
    "loss.perceptual": (1.0, FEATURES),
    "loss.style": (1.0, FEATURES),
    "loss.edge": (2.0, {}),
    "loss.lpips": (1.0, {}),
    "loss.hole_discount": (0.5, {}),
    "loss.features": (FEATURES["loss.features"], {}),
    "loss.features_sha256": ("ab", FEATURES),
    "loss.features_normalised": (True, FEATURES),
    "loss.lpips_weights": ("none.npz", {}),
    "loss.feature_stages": ("last", FEATURES),
    "loss.feature_pictures": ("merged", FEATURES),
    "loss.feature_crop": (64, FEATURES),
    "loss.feature_every": (2, FEATURES),
    "loss.feature_dtype": ("bf16", FEATURES),
    "optim.batch_size": (2, {}),
    "optim.accumulate": (2, {}),
    "optim.optimizer": ("muon", {}),
    "optim.learning_rate": (1e-3, {}),
    "optim.discriminator_learning_rate": (1e-3, {}),
    "optim.betas": ([0.9, 0.9], {}),
    "optim.epochs": (1, {"optim.steps": None, "optim.epochs": 2, "data.exclude": ["0"]}),
    "optim.steps": (3, {}),
    "optim.max_minutes": (1e-6, {}),
    "optim.leg_minutes": (1e-6, {}),
    "optim.schedule": ("constant", {}),
    "optim.warmup_steps": (2, {}),
    "optim.clip": (1e-3, {}),
    "optim.ema": (0.5, {}),
    "optim.precision": ("bf16", {}),
    "optim.dtype": ("float64", {}),
    "run.directory": ("OTHER", {}),
    "run.seed": (1, {}),
    "run.log_every": (2, {}),
    "run.validate_every": (1, VALIDATED),
    "run.metric": ("l1", VALIDATED),
    "run.validation_classes": ([5], VALIDATED),
    "run.validation_kinds": (["box"], VALIDATED),
    "run.validation_pictures": (2, VALIDATED),
    "run.checkpoint_every": (1, {}),
    "run.checkpoint_minutes": (1e-9, {}),
    "run.keep": (1, {"run.checkpoint_every": 1}),
    "run.tensorboard": (True, {}),
    "run.threads": (2, {}),
}

ELSEWHERE = {
    "model.backend": "the same results; test_ops.py",
    "data.workers": "the same results; test_training_data.py",
    "data.prefetch": "the same results, of worker processes",
    "loss.lean": "the same gradients in less memory; test_losses.py",
    "optim.channels_last": "the same results",
    "optim.compile": "the same results",
    "optim.cuda_graphs": "the same results, on a GPU; test_training_graphed.py",
    "run.device": "test_training_processes.py",
    "run.picture_every": "test_training_trainer.py",
    "run.on_nan": "test_training_learner.py",
    "run.finite_every": "test_training_learner.py",
}


def test_the_lists_have_every_setting():
    sections = get_type_hints(TrainConfig)
    every = {f"{name}.{field.name}" for name, kind in sections.items() for field in dataclasses.fields(kind)}
    assert every == CHANGED.keys() | ELSEWHERE.keys()
    assert not CHANGED.keys() & ELSEWHERE.keys()


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    base = tmp_path_factory.mktemp("settings")
    held_out = write_pictures(base / "held_out", 4, (90, 70))
    (base / "masks").mkdir()
    mask = np.zeros((256, 256), dtype=np.uint8)
    mask[:90, 20:150] = 255
    Image.fromarray(mask).save(base / "masks" / "0.png")
    lively_model().save_pretrained(base / "model")
    write_pictures(base / "files", 3)
    places = {"HELD_OUT": held_out, "MASKS": base / "masks", "MODEL": base / "model", "FILES": base / "files"}
    return {name: str(place) for name, place in places.items()}


def outcome(folder: Path, places: dict[str, str], changes: dict[str, Any]) -> dict[str, Any] | str:
    """What a run of two steps leaves; of one that cannot start, the error."""
    settings = tiny_settings(Path(places["FILES"]), folder)
    settings["optim"]["steps"] = 2
    settings["loss"]["edge"] = 1.0
    for name, value in changes.items():
        section, _, setting = name.partition(".")
        known = {**places, "OTHER": f"{folder}_other"}
        several = isinstance(value, list)
        given = [known.get(str(one), one) for one in (value if several else [value])]
        settings[section][setting] = given if several else given[0]
    threads = torch.get_num_threads()
    try:
        trainer = Trainer(config_of(settings))
        trainer.fit()
        own_threads = torch.get_num_threads()
    except LGNetError as error:
        return str(error)
    finally:
        torch.set_num_threads(threads)
    state = trainer.state()
    for name in ("minutes", "settings", "random"):
        del state[name]
    log = [json.loads(line) for line in (trainer.folder / "log.jsonl").read_text().splitlines()]
    files = sorted(str(file.relative_to(folder.parent)) for file in trainer.folder.rglob("*"))
    return {"state": state, "log": log, "threads": own_threads, "files": files}


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


UNCHANGED: dict[str, Any] = {}


@pytest.mark.slow(reason="a short training for each setting")
@pytest.mark.parametrize("name", CHANGED)
def test_a_setting_has_an_effect(tmp_path, places, name):
    value, beside = CHANGED[name]
    key = json.dumps(beside)
    if key not in UNCHANGED:
        UNCHANGED[key] = outcome(tmp_path / "run", places, beside)
        again = outcome(tmp_path / "again" / "run", places, beside)
        assert not isinstance(again, str) or name.endswith("init_from"), again
        assert same(again, UNCHANGED[key])  # otherwise any difference would count
    changed = outcome(tmp_path / "changed" / "run", places, {**beside, name: value})
    assert not same(changed, UNCHANGED[key])
    if isinstance(changed, str):
        assert changed.startswith((name, "loss.", "discriminator", "data.categories", "model", "weights")), changed
