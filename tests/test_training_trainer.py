"""The trainer: schedules, precision, accumulation, losses that are not finite, every kind of model."""

from __future__ import annotations

import itertools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from lgnet_fast import LGNet, LocalGlobalRefinement, WeightsError, create_model
from lgnet_fast.cli import app
from lgnet_fast.reference import list_models
from lgnet_fast.reference.discriminator import Discriminator
from lgnet_fast.reference.features import register_features
from lgnet_fast.reference.networks import UNet
from lgnet_fast.reference.vgg import VGG16Features
from lgnet_fast.training import ConfigError, DataError, TrainConfig, Trainer, TrainingError, load_config
from lgnet_fast.training.config import DataConfig, LossConfig, OptimConfig, config_of
from lgnet_fast.training.networks import keep_spectral_norm_wide, make_discriminator, make_features, make_lpips
from lgnet_fast.training.progress import Report
from lgnet_fast.training.schedule import learning_rate_factor
from lgnet_fast.training.validation import gradient_energy
from tests.support import released_state
from tests.test_features import weights
from tests.training_support import TINY, tiny_config, tiny_settings, write_pictures


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def pictures(tmp_path):
    return write_pictures(tmp_path / "pictures")


def batch(count: int = 2, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 8, 8, generator=generator, dtype=dtype) * 2 - 1
    image = nn.functional.interpolate(coarse, 256, mode="bilinear")
    mask = torch.zeros(count, 1, 256, 256, dtype=dtype)
    mask[:, :, 60:180, 90:200] = 1
    return {"image": image, "mask": mask, "name": [f"{seed}-{i}" for i in range(count)], "broken": []}


def lines(run) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


class Features(nn.Module):
    """A feature network with two levels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=4)

    def forward(self, picture):
        first = torch.relu(self.conv(picture))
        return [first, nn.functional.max_pool2d(first, 2)]


# -- the whole run ----------------------------------------------------------------------------------------------


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
    for image, mask in trainer.validation:
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


def test_it_learns(pictures, tmp_path):
    """Sixty steps on one batch take a quarter of the hole's error away."""
    config = tiny_config(pictures, tmp_path, optim={"learning_rate": 5e-3, "steps": 60, "schedule": "constant"})
    torch.manual_seed(0)
    trainer = Trainer(config, create_model("lgnet_demo", **{**TINY, "coarse_channels": 4}, backend="eager"))
    trainer.training_mode()
    one = batch(1)
    errors = [trainer.train_step([one])["hole3"].item() for _ in range(60)]
    assert sum(errors[-3:]) < 0.75 * sum(errors[:3])


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


# -- one step ---------------------------------------------------------------------------------------------------


def exact_trainer(pictures, tmp_path, features=None, **changes) -> Trainer:
    """Float64 and frozen BatchNorm: batches can be split without changing the sums."""
    settings = {"model": {"freeze_batchnorm": True}, "optim": {"dtype": "float64"}}
    for section, values in changes.items():
        settings.setdefault(section, {}).update(values)
    return Trainer(tiny_config(pictures, tmp_path, **settings), features=features)


def test_accumulated_halves_equal_the_whole_batch(pictures, tmp_path):
    features = Features()
    options = {"loss": {"style": 120.0, "perceptual": 0.05}}
    whole = exact_trainer(pictures, tmp_path, features, **options)
    halves = exact_trainer(pictures, tmp_path, features, optim={"accumulate": 2}, **options)
    image, mask = batch(2, dtype=torch.float64)["image"], batch(2, dtype=torch.float64)["mask"]
    for trainer in (whole, halves):
        trainer.training_mode()
    # The discriminator does one power iteration per pass; from its fixed point on, passes are equal.
    for trainer in (whole, halves):
        with torch.no_grad():
            for _ in range(300):
                trainer.discriminator(image[:1, :, :64, :64])
    halves.discriminator.load_state_dict(whole.discriminator.state_dict())
    first = whole.train_step([{"image": image, "mask": mask, "name": ["a", "b"]}])
    parts = [{"image": image[i : i + 1], "mask": mask[i : i + 1], "name": ["ab"[i]]} for i in range(2)]
    second = halves.train_step(parts)
    assert first.keys() == second.keys()
    for name in first:
        # In the first half, the generators' loss uses the discriminator before its step.
        tolerance = 1e-2 if name in ("G", "G_adv") else 1e-9
        assert second[name].item() == pytest.approx(first[name].item(), rel=tolerance), name
    for (name, a), b in zip(whole.discriminator.named_parameters(), halves.discriminator.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-8), name


def test_the_generators_loss_leaves_no_gradient_in_the_discriminator(pictures, tmp_path):
    trainer = Trainer(tiny_config(pictures, tmp_path))
    trainer.training_mode()
    trainer.train_step([batch()])
    after_one = [p.grad.clone() for p in trainer.discriminator.parameters()]
    # With learning rate 0 its gradient is that of its own loss alone, which does not depend on the weight of G_adv.
    other = Trainer(tiny_config(pictures, tmp_path, loss={"adversarial": 100.0}))
    other.training_mode()
    other.train_step([batch()])
    for a, b in zip(after_one, other.discriminator.parameters(), strict=True):
        assert torch.equal(a, b.grad)
    assert all(p.requires_grad for p in trainer.discriminator.parameters())


@pytest.mark.parametrize(
    ("discriminator", "adversarial", "progress", "runs"),
    [
        ({}, 0.1, 0, 3),
        ({}, 0.0, 0, 0),
        ({"start": 0.5}, 0.1, 1, 0),
        ({"start": 0.5}, 0.1, 2, 3),
        ({"stage": "last"}, 0.1, 0, 3),
    ],
)
def test_when_and_what_the_discriminator_judges(pictures, tmp_path, discriminator, adversarial, progress, runs):
    config = tiny_config(pictures, tmp_path, discriminator=discriminator, loss={"adversarial": adversarial})
    trainer = Trainer(config)
    trainer.training_mode()
    trainer.step = progress  # of 4
    judged, outputs = [], []
    trainer.discriminator.register_forward_pre_hook(lambda module, inputs: judged.append(inputs[0].detach()))
    trainer.network.register_forward_hook(lambda module, inputs, stages: outputs.append(stages))
    one = batch()
    terms = trainer.train_step([one])
    assert len(judged) == runs
    assert ("D" in terms) == bool(runs)
    if runs:
        merged = outputs[0].merged[-1 if discriminator.get("stage") == "last" else 0].detach()
        assert torch.equal(judged[0], merged)
        assert torch.equal(judged[1], one["image"])
        assert torch.equal(judged[2], merged)
    else:
        assert terms["G_adv"].item() == 0


def test_bfloat16_steps_stay_close_to_float32_and_keep_the_spectral_norm(pictures, tmp_path):
    terms, vectors = {}, {}
    for precision in ("no", "bf16"):
        trainer = Trainer(tiny_config(pictures, tmp_path, optim={"precision": precision}))
        trainer.training_mode()
        terms[precision] = trainer.train_step([batch()])
        vectors[precision] = trainer.discriminator.state_dict()["encoder.2.weight_u"]
        assert all(p.dtype == torch.float32 for p in trainer.network.parameters())
        assert trainer.accelerator.mixed_precision == precision
    for name, value in terms["no"].items():
        assert terms["bf16"][name].item() == pytest.approx(value.item(), rel=0.05, abs=2e-3), name
        assert terms["bf16"][name].dtype == torch.float32
    assert terms["bf16"]["G"].item() != terms["no"]["G"].item()
    # Three power iterations; in bfloat16 they would be off by 4e-3.
    assert torch.allclose(vectors["no"], vectors["bf16"], atol=1e-3)


def test_float16_needs_a_gpu(pictures, tmp_path):
    with pytest.raises(ConfigError, match="optim.precision: 'fp16' cannot be used here"):
        Trainer(tiny_config(pictures, tmp_path, optim={"precision": "fp16"}))


def test_wide_spectral_norm_is_the_same_function():
    torch.manual_seed(0)
    a = Discriminator(channels=4).train()
    b = Discriminator(channels=4).train()
    b.load_state_dict(a.state_dict())
    keep_spectral_norm_wide(b)
    x = batch()["image"]
    for _ in range(2):
        assert torch.equal(a(x), b(x))
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())
    with torch.autocast("cpu", torch.bfloat16):
        b(x)
        weight = b.encoder[0].weight
    assert weight.dtype == torch.float32


def test_slim_discriminator_has_the_papers_shape_at_its_width(tmp_path):
    config = config_of({"discriminator": {"channels": 16, "variant": "paper"}})
    slim, full = make_discriminator(config.discriminator), make_discriminator(config_of({}).discriminator)
    assert [m.out_channels for m in slim.encoder if isinstance(m, nn.Conv2d)] == [16, 32, 64, 128]
    assert sum(p.numel() for p in full.parameters()) == 4_318_401
    assert slim.state_dict().keys() == full.state_dict().keys()
    assert slim(batch()["image"]).shape == (2, 1, 32, 32)
    torch.save(released_state("D", torch.float32), tmp_path / "200_net_D.pth")
    loaded = make_discriminator(
        config_of({"discriminator": {"init_from": str(tmp_path / "200_net_D.pth")}}).discriminator
    )
    assert torch.equal(loaded.classifier.weight, released_state("D", torch.float32)["classifier.weight"])
    assert loaded.training


def test_clipping_bounds_both_gradients(pictures, tmp_path):
    trainer = Trainer(tiny_config(pictures, tmp_path, optim={"clip": 0.01}))
    trainer.training_mode()
    trainer.train_step([batch()])
    for module in (trainer.network, trainer.discriminator):
        norm = torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in module.parameters()])).item()
        assert 0 < norm <= 0.01 * 1.001


def test_clipping_unscales_the_gradients_of_one_optimiser_alone(pictures, tmp_path, monkeypatch):
    """The loss scale of fp16 must stay in the generators' gradients while batches are still to be added."""
    trainer = Trainer(tiny_config(pictures, tmp_path, optim={"clip": 1.0, "accumulate": 2}))
    unscaled = []
    monkeypatch.setattr(trainer.accelerator, "unscale_gradients", unscaled.append)
    trainer.training_mode()
    trainer.train_step([batch(), batch(seed=1)])
    generators, discriminator = trainer.optimisers
    assert [one is discriminator for one in unscaled] == [True, False]
    assert unscaled[1] is generators


def test_moving_average(pictures, tmp_path):
    trainer = Trainer(tiny_config(pictures, tmp_path, optim={"ema": 0.15, "learning_rate": 0.01}))
    trainer.training_mode()
    name = "net_c.encoder.e1.conv.weight"
    expected = trainer.network.state_dict()[name].clone()
    for step in range(3):
        trainer.train_step([batch(seed=step)])
        trainer.step += 1
        decay = min(0.15, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * trainer.network.state_dict()[name]
    assert torch.allclose(trainer.average.state[name], expected, atol=1e-7)
    own = trainer.network.state_dict()[name].clone()
    with trainer.averaged():
        assert torch.equal(trainer.network.state_dict()[name], trainer.average.state[name])
        assert not trainer.network.training
    assert torch.equal(trainer.network.state_dict()[name], own)
    assert trainer.network.training


def test_frozen_batchnorm_keeps_its_statistics(pictures, tmp_path):
    trainer = Trainer(tiny_config(pictures, tmp_path, model={"freeze_batchnorm": True}))
    trainer.training_mode()
    before = {k: v.clone() for k, v in trainer.network.state_dict().items() if "norm" in k}
    trainer.train_step([batch()])
    after = trainer.network.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items())
    assert "net_l.stem.norm.running_mean" in before


def test_batchnorm_is_frozen_from_a_share_of_the_run_on(pictures, tmp_path):
    model = {"freeze_batchnorm_from": 0.5, "batchnorm_momentum": 0.25}
    trainer = Trainer(tiny_config(pictures, tmp_path, model=model, optim={"steps": 4}))
    trainer.training_mode()
    norm = trainer.network.net_l.stem.norm
    seen = []
    mean = norm.running_mean.clone()
    for step in range(4):
        trainer.train_step([batch(seed=step)])
        trainer.step += 1
        seen.append(norm.running_mean.clone())
    assert norm.momentum == 0.25
    assert not torch.equal(mean, seen[0])
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[1], seen[2])
    assert torch.equal(seen[2], seen[3])
    assert norm.weight.requires_grad
    assert norm.weight.grad.any()


@pytest.mark.parametrize(("stages", "trained"), [([3], {"net_g"}), ([1, 2], {"net_c", "net_l"}), ([2], {"net_l"})])
def test_some_stages_are_trained_and_later_ones_do_not_run(pictures, tmp_path, stages, trained):
    judged = {"stage": "first" if 1 in stages else "last"}
    trainer = Trainer(tiny_config(pictures, tmp_path, model={"train_stages": stages}, discriminator=judged))
    trainer.training_mode()
    network = trainer.network
    ran = []
    for name in ("net_c", "net_l", "net_g"):
        network.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
    before = {k: v.clone() for k, v in network.state_dict().items()}
    terms = trainer.train_step([batch()])
    assert {k.split(".")[0] for k, v in network.state_dict().items() if not torch.equal(v, before[k])} == trained
    assert ran == ["net_c", "net_l", "net_g"][: max(stages)]
    assert [name for name in terms if name.startswith("hole")] == ["hole1", "hole2", "hole3"][: max(stages)]
    for name in ("net_c", "net_l", "net_g"):
        module = network.get_submodule(name)
        assert {p.grad is not None for p in module.parameters()} == {name in trained}
    norms = {"net_c": network.net_c.decoder["d2"].norm, "net_l": network.net_l.up1.norm}
    assert all(norm.training == (name in trained) for name, norm in norms.items())


def test_stages_that_cannot_be_trained_alone(pictures, tmp_path):
    with pytest.raises(ConfigError, match="model.train_stages: expected all stages that one network"):
        Trainer(tiny_config(pictures, tmp_path, model={"name": "lgnet_share", "train_stages": [3]}))
    with pytest.raises(ConfigError, match="model.train_stages: expected numbers from 1 to 3, .* got .0, 4."):
        Trainer(tiny_config(pictures, tmp_path, model={"train_stages": [0, 4]}))
    with pytest.raises(ConfigError, match="discriminator.stage: expected last .* got first, which is not trained"):
        Trainer(tiny_config(pictures, tmp_path, model={"train_stages": [3]}))


def test_the_discriminator_judges_a_crop(pictures, tmp_path):
    trainer = Trainer(tiny_config(pictures, tmp_path, discriminator={"crop": 64, "stage": "last", "by_hole": True}))
    seen = []
    trainer.discriminator.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach().clone()))
    trainer.training_mode()
    sample = batch()
    terms = trainer.train_step([sample])
    assert [list(picture.shape) for picture in seen] == [[2, 3, 64, 64]] * 3
    fake, real, again = seen
    assert torch.equal(fake, again)
    places = sample["image"].unfold(2, 64, 1).unfold(3, 64, 1)
    found = (places == real[:, :, None, None]).all(dim=(1, 4, 5)).nonzero().tolist()
    assert [i for i, _, _ in found] == [0, 1]
    for i, row, column in found:
        known = (sample["mask"][i, :, row : row + 64, column : column + 64] == 0).expand(3, 64, 64)
        assert not known.all()
        assert torch.equal(fake[i][known], real[i][known])
        assert not torch.equal(fake[i], real[i])
    assert all(torch.isfinite(term) for term in terms.values())


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


def test_feature_terms_in_every_second_step_and_in_bfloat16(pictures, tmp_path):
    seen = []

    class Seeing(Features):
        def forward(self, picture):
            seen.append((picture.dtype, tuple(picture.shape)))
            return super().forward(picture)

    loss = {"feature_every": 2, "feature_dtype": "bf16", "feature_stages": "last", "feature_pictures": "merged"}
    config = tiny_config(pictures, tmp_path, loss={**loss, "feature_crop": 64, "features": "torchvision"})
    trainer = Trainer(config, features=Seeing())
    trainer.training_mode()
    found = []
    for number in range(3):
        found.append("style3" in trainer.train_step([batch(seed=number)]))
        trainer.step += 1
    assert found == [True, False, True]
    assert seen == [(torch.bfloat16, (2, 3, 64, 64))] * 4  # the truth and the merged picture, twice


def test_pictures_in_memory_and_scores_by_kind_of_hole(pictures, tmp_path):
    held_out = write_pictures(tmp_path / "held_out", 2, (256, 256))
    np.savez(tmp_path / "alexnet.npz", **weights("alexnet"))
    run = tmp_path / "run"
    config = tiny_config(
        pictures,
        run,
        data={"in_memory": True, "mask_bank": 2, "mask_kind": "varied", "validation": str(held_out)},
        loss={"lpips_weights": str(tmp_path / "alexnet.npz"), "lpips": 1.0},
        optim={"steps": 2},
        run={"validation_kinds": ["thin", "box"], "validation_pictures": 1, "metric": "lpips", "finite_every": 2},
    )
    trainer = Trainer(config)
    trainer.fit()
    train, scores = lines(run)[-2:]
    assert train["lpips3"] > 0
    assert {"l1", "psnr", "lpips", "sharpness", "psnr_thin", "lpips_box"} <= scores.keys()
    assert scores["psnr"] == pytest.approx((scores["psnr_thin"] + scores["psnr_box"]) / 2)
    assert trainer.best == pytest.approx(scores["lpips"])
    assert len(trainer.by_kind.images) == 1
    image, mask = trainer.by_kind.images, trainer.by_kind.masks["box"]
    truth = ((image + 1) * 127.5).round()
    with trainer.averaged(), torch.no_grad():
        error = ((trainer.network(image, mask) + 1) * 127.5).round().clamp(0, 255) - truth
    expected = 10 * math.log10(255**2 / float(error.square().mean()))
    assert scores["psnr_box"] == pytest.approx(expected, abs=1e-3)


def test_feature_networks_by_configuration(tmp_path):
    register_features("mine", Features)
    assert isinstance(make_features(LossConfig(features="mine")), Features)
    assert isinstance(make_features(LossConfig(features="lgnet_fast.reference.vgg:VGG16Features")), VGG16Features)
    with pytest.raises(ConfigError, match="loss.features: expected package.module:function, got 'nowhere:at_all'"):
        make_features(LossConfig(features="nowhere:at_all"))
    np.savez(tmp_path / "vgg.npz", **weights("vgg16", convolutions=7))
    file = str(tmp_path / "vgg.npz")
    assert make_features(LossConfig(features=file, features_normalised=True)).normalised
    with pytest.raises(WeightsError, match="expected a SHA-256 of '0000"):
        make_features(LossConfig(features=file, features_sha256="00" * 32))
    assert make_features(LossConfig(features=file, style=0, perceptual=0)) is None
    assert make_lpips(LossConfig()) is None


def test_gradient_energy_by_hand():
    picture = torch.zeros(1, 3, 3, 3)
    picture[0, :, 1, 1] = 10  # grey 10
    mask = torch.ones(1, 1, 3, 3)
    assert float(gradient_energy(picture, mask)) == pytest.approx(400)
    mask[..., 0] = 0
    assert float(gradient_energy(picture, mask)) == pytest.approx(300)


# -- losses that are not finite -----------------------------------------------------------------------------------


def poisoned() -> dict:
    bad = batch(seed=1)
    bad["image"][0, 0, 0, 0] = math.nan
    return bad


def test_not_finite_stops_and_saves_the_batch(pictures, tmp_path):
    trainer = Trainer(tiny_config(pictures, tmp_path / "run"))
    trainer.training_mode()
    trainer.train_step([batch()])
    trainer.step = 1
    with pytest.raises(
        TrainingError, match=r"the loss of step 2 is not finite \(.*G.*its batch is in .*step_2_pro"
    ) as e:
        trainer.train_step([poisoned()])
    file = str(e.value).split("its batch is in ")[1].split(";")[0]
    saved = torch.load(file, weights_only=True)
    assert saved["name"] == ["1-0", "1-1"]
    assert torch.equal(saved["image"].nan_to_num(9), poisoned()["image"].nan_to_num(9))
    assert math.isnan(saved["terms"]["G"])


def test_not_finite_is_skipped_and_counted(pictures, tmp_path):
    trainer = Trainer(tiny_config(pictures, tmp_path, run={"on_nan": "skip"}, optim={"ema": 0.9}))
    trainer.training_mode()
    trainer.train_step([batch()])
    before = {k: v.clone() for k, v in trainer.network.state_dict().items()}
    average = {k: v.clone() for k, v in trainer.average.state.items()}
    assert trainer.train_step([poisoned()]) is None
    assert trainer.skipped == 1
    after = trainer.network.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items())  # with the running statistics
    assert all(torch.equal(v, trainer.average.state[k]) for k, v in average.items())
    assert all(torch.isfinite(term) for term in trainer.train_step([batch(seed=2)]).values())


def test_weights_that_are_not_finite_are_not_kept(pictures, tmp_path, monkeypatch):
    """A gradient may be NaN where the loss is finite."""
    trainer = Trainer(tiny_config(pictures, tmp_path / "run", run={"checkpoint_every": 1, "keep": 1}))
    step = trainer.train_step

    def poisoned_in_the_second(batches):
        terms = step(batches)
        if trainer.step == 1:
            with torch.no_grad():
                next(trainer.network.parameters()).view(-1)[0] = math.nan
        return terms

    monkeypatch.setattr(trainer, "train_step", poisoned_in_the_second)
    with pytest.raises(TrainingError, match="after step 2 the weights are not finite"):
        trainer.fit()
    assert trainer.checkpoints.steps() == [1]
    assert not (tmp_path / "run" / "model").exists()
    assert all(torch.isfinite(t).all() for t in trainer.checkpoints.load_latest()["network"].values())


def test_scores_by_kind_in_float64(pictures, tmp_path):
    np.savez(tmp_path / "alexnet.npz", **weights("alexnet"))
    config = tiny_config(
        pictures,
        tmp_path / "run",
        data={"validation": str(pictures)},
        loss={"lpips_weights": str(tmp_path / "alexnet.npz")},
        optim={"steps": 1, "dtype": "float64"},
        run={"validation_kinds": ["box"], "validation_pictures": 1},
    )
    Trainer(config).fit()
    assert {"psnr_box", "lpips_box"} <= lines(tmp_path / "run")[-1].keys()


# -- schedules --------------------------------------------------------------------------------------------------


def test_paper_schedule_is_specs():
    optim = OptimConfig()
    for per_epoch in (1, 7, 6750):
        total = 200 * per_epoch
        for epoch in range(200):
            expected = 1 - max(0, epoch + 1 - 100) / 101
            for step in {epoch * per_epoch, epoch * per_epoch + per_epoch - 1}:
                factor = learning_rate_factor(optim, step, total, step / total, per_epoch)
                assert factor == pytest.approx(expected, abs=1e-12), (per_epoch, epoch)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("linear", [1, 0.75, 0.5, 0.25, 0]), ("cosine", [1, 0.853553, 0.5, 0.146447, 0]), ("constant", [1] * 5)],
)
def test_schedules_by_progress(schedule, expected):
    optim = OptimConfig(schedule=schedule, warmup_steps=4)
    warm = [learning_rate_factor(optim, step, 100, step / 100, 10) for step in range(4)]
    assert warm == [0.25, 0.5, 0.75, 1.0]
    found = [learning_rate_factor(optim, 50, 100, progress, 10) for progress in (0, 0.25, 0.5, 0.75, 1)]
    assert found == pytest.approx(expected, abs=1e-6)


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


# -- configuration ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("optim: {lerning_rate: 1}", "optim.lerning_rate: no such setting; there are batch_size"),
        ("optimiser: {}", "optimiser: no such setting; there are model, "),
        ("optim: 3", "^optim: expected a mapping, got 3"),
        ("optim: {batch_size: four}", "optim.batch_size: expected int, got 'four'"),
        ("optim: {batch_size: true}", "optim.batch_size: expected int, got True"),
        ("optim: {batch_size: 0}", "optim.batch_size: expected 1 or more, got 0"),
        ("optim: {learning_rate: fast}", "optim.learning_rate: expected float, got 'fast'"),
        ("optim: {betas: [0.5, 1.5]}", "optim.betas: expected two numbers"),
        ("optim: {schedule: step}", "optim.schedule: expected one of paper, linear, cosine, constant, got 'step'"),
        ("optim: {ema: 1}", "optim.ema: expected a number between 0 and 1, got 1"),
        ("data: {size: 300}", "data.size: expected a positive multiple of 256, got 300"),
        ("data: {hole_classes: [6]}", "data.hole_classes: expected indices from 0 to 5"),
        ("data: {mask_kind: dots}", "data.mask_kind: expected one of"),
        ("loss: {hole: -1}", "loss.hole: expected 0 or more, got -1"),
        ("loss: {feature_crop: 300}", "loss.feature_crop: expected 64 to 256, got 300"),
        ("loss: {hole_discount: 0}", "loss.hole_discount: expected a factor in"),
        ("discriminator: {crop: 32}", "discriminator.crop: expected 64 to 256, got 32"),
        ("model: {train_stages: [last]}", "model.train_stages.0.: expected int, got 'last'"),
        ("loss: {feature_every: 0}", "loss.feature_every: expected 1 or more, got 0"),
        ("loss: {feature_stages: first}", "loss.feature_stages: expected one of later, last, got 'first'"),
        ("loss: {lpips: 1}", "loss.lpips_weights: expected a file, for loss.lpips, got None"),
        ("run: {validation_kinds: [round]}", "run.validation_kinds: expected names of"),
        ("run: {metric: lpips}", "run.metric: expected one that is scored"),
        ("run: {metric: ssim, validation_kinds: [box]}", "run.metric: expected one that is scored"),
        ("model: {freeze_batchnorm_from: 1}", "model.freeze_batchnorm_from: expected a share in"),
        ("data: {colour: 1}", "data.colour: expected a share in"),
        ("discriminator: {start: 1}", "discriminator.start: expected a share in"),
        ("run: {validation_pictures: 0}", "run.validation_pictures: expected 1 or more, got 0"),
        ("run: {threads: 100000}", "run.threads: expected 1 to 1024, got 100000"),
        ("run: {seed: 18446744073709551616}", "run.seed: expected 0 to 2.*, got 18446744073709551616"),
        ('run: {directory: "a\\0b"}', "run.directory: expected a folder's name"),
        ("run: {on_nan: ignore}", "run.on_nan: expected one of stop, skip, got 'ignore'"),
        ("optim: {learning_rate: .inf}", "optim.learning_rate: expected a positive number, got inf"),
        ("optim: {discriminator_learning_rate: .inf}", "optim.discriminator_learning_rate: expected a positive"),
        ("loss: {style: .inf}", "loss.style: expected 0 or more, got inf"),
        ("loss: {style: 1" + "0" * 400 + "}", "loss.style: expected float, got 1000"),
        ("optim: {precision: bf16, dtype: float64}", "optim.precision: expected no with optim.dtype: float64"),
        ("data: {masks: there, hole_classes: [1]}", "data.hole_classes: expected none with data.masks: there"),
        ("data: {mask_kind: fine, hole_classes: [1]}", "data.hole_classes: expected none with data.mask_kind: fine"),
        ("data: {mask_polarity: black}", "data.mask_polarity: expected none with data.masks: generated"),
        ("optim: {steps: 3}\nrun: {}\noptim: {clip: 1}", "config: .*optim is there twice, the second time in line 3"),
        ("optim:\n  steps: 3\n  steps: 4", "config: .*steps is there twice, the second time in line 3"),
        ("run: [1", "config: expected a readable YAML or JSON file"),
        ("- 1", "config: expected a mapping in .* got list"),
    ],
)
def test_bad_configurations_are_named(tmp_path, text, error):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=error):
        load_config(file)


def test_what_python_code_gives_is_checked_as_well(pictures, tmp_path):
    for make, error in (
        (lambda: TrainConfig(optim={"steps": 3}), "optim: expected a OptimConfig, got .'steps': 3}"),
        (lambda: TrainConfig(optim=OptimConfig(batch_size=2.5)), "optim.batch_size: expected int, got 2.5"),
        (lambda: TrainConfig(optim=OptimConfig(clip="high")), "optim.clip: expected float, got 'high'"),
        (lambda: TrainConfig(optim=OptimConfig(precision="half")), "optim.precision: expected one of no, bf16, fp16"),
        (lambda: Trainer(tiny_settings(pictures, tmp_path)), "^config: expected a TrainConfig, .* got dict"),
        (lambda: Trainer(tiny_config(pictures, tmp_path), model="bundled"), "^model: expected an LGNet .* got str"),
        (lambda: Trainer(tiny_config(pictures, tmp_path), features="vgg"), "^features: expected a module .* got str"),
    ):
        with pytest.raises(ConfigError, match=error):
            make()
    config = TrainConfig(data=DataConfig(pictures=str(pictures)), optim=OptimConfig(learning_rate="2e-3"))
    assert (config.data.pictures, config.optim.learning_rate) == ((str(pictures),), 2e-3)


@pytest.mark.parametrize(
    "text",
    [
        "x: !!timestamp 2020",
        "run: {seed: !!timestamp x}",
        "run: {seed: !!int x}",
        "run: {seed: !!float []}",
        "run: {seed: 2020-01-01}",
        "run: {seed: !!binary 1}",
        "model: {overrides: {coarse_channels: 2020-01-01}}",
        "? [a]\n: b",
        "1: 2",
        "[" * 3000,
        "data: {pictures: 2020-01-01}",
    ],
)
def test_whatever_stands_in_a_configuration_is_a_configuration_error(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError):
        load_config(tmp_path / "c.yaml")
    with pytest.raises(ConfigError):
        load_config(tmp_path / ("z" * 300))
    (tmp_path / "empty.yaml").write_text("")
    with pytest.raises(ConfigError):
        load_config(tmp_path / "empty.yaml", ["run.seed=!!timestamp x"])


def test_a_picture_that_is_met_often_counts_once(pictures, tmp_path, capsys):
    """For every text of the reason."""
    trainer = Trainer(tiny_config(pictures, tmp_path / "run"))
    for number in range(3):
        trainer._note_broken([{"broken": [("a.png", f"reason {number}"), ("b: c.png", f"at 0x{number}")]}])
    assert trainer.broken == ["a.png: reason 0", "b: c.png: at 0x0"]


def test_configuration_from_yaml_json_and_the_command_line(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("optim: {learning_rate: 2e-3, precision: no}\ndata: {pictures: here}\n")
    config = load_config(file, ["optim.steps=7", "data.pictures=[a, b]", "loss.features=null"])
    assert config.optim.learning_rate == 2e-3
    assert config.optim.precision == "no"
    assert config.optim.steps == 7
    assert config.data.pictures == ("a", "b")
    assert config.loss == LossConfig(features=None)
    saved = tmp_path / "c.json"
    saved.write_text(json.dumps(config.as_dict()))
    assert load_config(saved) == config
    file.write_text("optim:\n#  steps: 3\nrun:\n")  # sections with nothing but comments
    assert load_config(file) == config_of({})
    assert load_config(file, ["optim.steps=7"]).optim.steps == 7
    with pytest.raises(ConfigError, match=r"set: expected section.name=value, got 'optim.steps'"):
        load_config(file, ["optim.steps"])
    with pytest.raises(ConfigError, match="config: expected a readable YAML or JSON file, got '.*none.yaml'"):
        load_config(tmp_path / "none.yaml")


@pytest.mark.parametrize("name", ["demo", "demo_local", "demo_gpu", "lgnet_places2"])
def test_shipped_configurations_are_valid(name):
    from pathlib import Path

    config = load_config(Path(__file__).parent.parent / "configs" / f"{name}.yaml")
    assert config.data.size == 256
    if name == "lgnet_places2":
        # The paper's settings are the defaults.
        assert config.loss == LossConfig()
        assert (config.optim.learning_rate, config.optim.betas, config.optim.batch_size) == (2e-4, (0.5, 0.999), 4)
        assert (config.optim.epochs, config.optim.schedule) == (200, "paper")


def test_networks_by_configuration(pictures, tmp_path):
    settings = tiny_settings(pictures, tmp_path)
    settings["model"] = {"init_from": "bundled"}
    assert Trainer(config_of(settings)).network.channels == (32, 32, 32)
    settings["model"] = {"factory": "tests.test_training_trainer:make_small"}
    assert Trainer(config_of(settings)).network.channels == (2, 2, 2)
    for model, text in (
        ({"name": "lgnett"}, "model: name: expected one of"),
        ({"overrides": {"width": 3}}, "model: .*width"),
        ({"factory": "nowhere:x"}, "^model.factory: expected package.module:function, got 'nowhere:x'"),
        (
            {"factory": "nowhere:x", "init_from": "bundled"},
            "model.factory: it makes the whole model; leave init_from",
        ),
        ({"factory": "nowhere:x", "overrides": TINY}, "model.factory: it makes the whole model; leave init_from"),
        ({"factory": "math:isqrt2"}, "model.factory: expected package.module:function"),
        ({"factory": "tests.training_support:dict"}, "model.factory"),
        ({"factory": ":x"}, "model.factory: expected package.module:function, got ':x'"),
        ({"factory": "os:sep"}, "model.factory: expected package.module:function, got 'os:sep' .it is of type str"),
        ({"factory": "math:isqrt"}, "model.factory: expected a function without arguments, got math:isqrt"),
        ({"backend": "nope"}, "model.backend: expected one of .*'nope'"),
    ):
        settings["model"] = model
        with pytest.raises(ConfigError, match=text):
            Trainer(config_of(settings))


def make_small():
    return create_model("lgnet_demo", **TINY)


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


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_but_broken_pictures_is_one_line(pictures, tmp_path, workers):
    for file in pictures.iterdir():
        file.write_bytes(b"nothing")
    with pytest.raises(DataError, match="^data: none of 5 pictures in a row can be read; the first: [^\\n]*$"):
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


def test_time_left_of_a_resumed_run(tmp_path, monkeypatch, capsys):
    """Half done by time when resumed; a tenth in one minute leaves four."""
    now = [1000.0]
    monkeypatch.setattr("lgnet_fast.training.progress.time.monotonic", lambda: now[0])
    report = Report(tmp_path, step=100, total=100_000, progress=0.5, tensorboard=False)
    now[0] += 60
    report.train(160, 1, {"G": 2.0}, progress=0.6, pictures=4)
    assert capsys.readouterr().err == "step 160/100000: epoch 1, G 2.0000, 4.0 pictures/s, 0:04:00 left\n"
    report.train(99_960, 1, {"G": 2.0}, progress=0.9996, pictures=4)  # 40 steps at 1664 a second
    assert capsys.readouterr().err.endswith(", 0:00:00 left\n")
    report.close(skipped=0, broken=0)
