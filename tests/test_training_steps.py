"""Three optimiser steps in float64 against the released network's: every loss term, in training mode."""

from __future__ import annotations

import json

import pytest
import torch

from lgnet_fast.reference import LGNet
from lgnet_fast.reference.discriminator import Discriminator
from lgnet_fast.reference.losses import discriminator_loss, generator_loss
from lgnet_fast.reference.vgg import VGG16Features
from tests.support import CONFORMANCE, case, recipe, released_state


@pytest.mark.slow
def test_three_steps_reproduce_every_term_of_the_released_network():
    expected = json.loads((CONFORMANCE / "training_steps.json").read_text())
    model = LGNet.from_released({net: released_state(net) for net in ("G1", "G2", "G3")}, backend="eager").train()
    discriminator = Discriminator.from_released(released_state("D")).train()
    features = VGG16Features().double()
    features.load_state_dict(
        {k: torch.from_numpy(recipe.parameter("VGG", k, tuple(v.shape))) for k, v in features.state_dict().items()}
    )
    adam_g, adam_d = (
        torch.optim.Adam(module.parameters(), lr=2e-4, betas=(0.5, 0.999)) for module in (model, discriminator)
    )
    assert len(expected) == 3
    for step, wanted in enumerate(expected):
        image, mask = case(f"train{step}", 2, 256, 256)
        stages = model(image, mask, return_stages=True)

        # Fake first: each pass moves the power iteration on.
        fake = discriminator(stages.merged[0].detach())
        terms = discriminator_loss(fake, discriminator(image))
        adam_d.zero_grad()
        terms["D"].backward()
        adam_d.step()

        terms |= generator_loss(stages, image, mask, discriminator(stages.merged[0]), features)
        adam_g.zero_grad()
        terms["G"].backward()
        adam_g.step()

        assert list(terms) == list(wanted)
        for name, value in wanted.items():
            assert terms[name].item() == pytest.approx(value, rel=1e-6), f"step {step}, {name}"
