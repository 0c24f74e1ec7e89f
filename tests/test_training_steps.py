"""Three optimiser steps of the trainer in float64 against the released network's: every loss term."""

from __future__ import annotations

import json

import pytest
import torch

from lgnet_fast.reference import LGNet
from lgnet_fast.reference.discriminator import Discriminator
from lgnet_fast.reference.vgg import VGG16Features
from lgnet_fast.training import TrainConfig, Trainer
from lgnet_fast.training.config import config_of
from tests.support import CONFORMANCE, case, recipe, released_state


@pytest.fixture
def config(tmp_path) -> TrainConfig:
    return config_of({"optim": {"dtype": "float64"}, "run": {"directory": str(tmp_path), "device": "cpu"}})


@pytest.mark.slow(reason="three steps of the full networks in float64; test_losses.py checks the terms one by one")
def test_three_steps_reproduce_every_term_of_the_released_network(config):
    expected = json.loads((CONFORMANCE / "training_steps.json").read_text())
    model = LGNet.from_released({net: released_state(net) for net in ("G1", "G2", "G3")}, backend="eager")
    features = VGG16Features().double()
    features.load_state_dict(
        {k: torch.from_numpy(recipe.parameter("VGG", k, tuple(v.shape))) for k, v in features.state_dict().items()}
    )
    trainer = Trainer(config, model, Discriminator.from_released(released_state("D")), features)
    trainer.training_mode()
    assert len(expected) == 3
    for step, wanted in enumerate(expected):
        image, mask = case(f"train{step}", 2, 256, 256)
        terms = trainer.train_step([{"image": image, "mask": mask, "name": ["", ""]}])
        assert list(terms) == list(wanted)
        for name, value in wanted.items():
            assert terms[name].item() == pytest.approx(value, rel=1e-6), f"step {step}, {name}"
