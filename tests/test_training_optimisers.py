"""Muon: orthogonal updates of the size of Adam's, for convolutions between feature maps only."""

from __future__ import annotations

import sys

import pytest
import torch

from lgnet_fast.errors import MissingExtraError
from lgnet_fast.reference import create_model
from lgnet_fast.training import Trainer
from lgnet_fast.training.checkpoints import load_checkpoint
from lgnet_fast.training.config import OptimConfig
from lgnet_fast.training.optimisers import generator_optimiser
from tests.training_support import assert_same, tiny_config, write_pictures

RATE = 1e-3
# What Newton and Schulz's five steps leave of singular values that are not tiny.
LEAST, MOST = 0.6, 1.25


def network():
    return create_model("lgnet_demo", coarse_channels=4, local_channels=8, global_channels=4, backend="eager")


def updates(optimizer):
    """Of the first step with random gradients, by name."""
    model = network()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)
    generator_optimiser(model, OptimConfig(optimizer=optimizer, learning_rate=RATE), None).step()
    return {name: p.detach() - before[name] for name, p in model.named_parameters()}


def test_muon_orthogonalises_the_updates_of_hidden_convolutions():
    moved = updates("muon")
    hidden = {name: u for name, u in moved.items() if u.ndim == 4 and min(u.shape[:2]) >= 16}
    for name in ("net_l.blocks.0.first.conv", "net_c.encoder.e5.conv", "net_g.decoder.d4.deconv"):
        assert f"{name}.weight" in hidden
    for name in ("net_l.stem.conv", "net_l.out", "net_g.decoder.d1.deconv"):
        assert f"{name}.weight" not in hidden
    for name, update in hidden.items():
        matrix = update.flatten(1)
        values = torch.linalg.svdvals(matrix) / (0.2 * RATE * max(matrix.shape) ** 0.5)
        # Random square matrices have some singular values near 0, which stay small.
        assert float(values.quantile(0.1)) > LEAST or matrix.shape[0] == matrix.shape[1], name
        assert float(values.max()) < MOST, name


def test_an_update_of_muon_is_as_large_as_one_of_adam():
    muon, adam = updates("muon"), updates("adam")
    for name, update in muon.items():
        size, expected = update.square().mean().sqrt(), adam[name].square().mean().sqrt()
        hidden = update.ndim == 4 and min(update.shape[:2]) >= 16
        # Adam's first step is the learning rate times the gradient's sign; Muon's is a fifth of it.
        assert float(size / expected) == pytest.approx(0.2 if hidden else 1.0, rel=0.25 if hidden else 1e-3), name


def test_frozen_parameters_are_left_out():
    model = network()
    model.requires_grad_(False)
    model.net_l.requires_grad_(True)
    optimiser = generator_optimiser(model, OptimConfig(optimizer="muon"), None)
    held = {id(p) for group in optimiser.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.net_l.parameters()}


def test_a_run_with_muon_resumes_with_equal_bits(tmp_path):
    pictures = write_pictures(tmp_path / "pictures")

    def config(name, steps):
        optim = {"optimizer": "muon", "steps": steps, "schedule": "constant"}
        return tiny_config(pictures, tmp_path / name, optim=optim)

    Trainer(config("whole", 4)).fit()
    Trainer(config("parts", 2)).fit()
    Trainer(config("parts", 4)).fit(resume=True)
    whole, parts = (load_checkpoint(tmp_path / n / "checkpoints" / "step_000000004.pt") for n in ("whole", "parts"))
    for state in (whole, parts):
        state.pop("minutes")
    assert whole["optimisers"][0]["param_groups"][0]["use_muon"]
    assert_same(whole, parts)


def test_muon_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    with pytest.raises(MissingExtraError, match="optim.optimizer: muon needs pytorch_optimizer"):
        generator_optimiser(network(), OptimConfig(optimizer="muon"), None)
