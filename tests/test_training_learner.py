"""One step of both optimisers: precision, accumulation, the discriminator, frozen parts, bad losses."""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from lgnet_fast import WeightsError, create_model
from lgnet_fast.reference.losses import adversarial_loss, hole_share
from lgnet_fast.training import ConfigError, Trainer, TrainingError
from lgnet_fast.training.setup import make_accelerator
from tests.training_support import (
    TINY,
    Features,
    assert_same,
    batch,
    own_threads,  # noqa: F401
    tiny_config,
    write_pictures,
)


@pytest.fixture
def pictures(tmp_path):
    return write_pictures(tmp_path / "pictures")


def test_it_learns(pictures, tmp_path):
    """Sixty steps on one batch take a quarter of the hole's error away."""
    config = tiny_config(pictures, tmp_path, optim={"learning_rate": 5e-3, "steps": 60, "schedule": "constant"})
    torch.manual_seed(0)
    trainer = Trainer(config, create_model("lgnet_demo", **{**TINY, "coarse_channels": 4}, backend="eager"))
    trainer.training_mode()
    one = batch(1)
    errors = [trainer.train_step([one])["hole3"].item() for _ in range(60)]
    assert sum(errors[-3:]) < 0.75 * sum(errors[:3])


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
    assert not any(term.requires_grad for terms in (first, second) for term in terms.values())
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
        forward = vars(trainer.network).get("forward")  # accelerate's, with autocast
        assert (forward is None) == (precision == "no")
        with trainer.averaged():
            assert "forward" not in vars(trainer.network)
        assert vars(trainer.network).get("forward") is forward
    for name, value in terms["no"].items():
        assert terms["bf16"][name].item() == pytest.approx(value.item(), rel=0.05, abs=2e-3), name
        assert terms["bf16"][name].dtype == torch.float32
    assert terms["bf16"]["G"].item() != terms["no"]["G"].item()
    # Three power iterations; in bfloat16 they would be off by 4e-3.
    assert torch.allclose(vectors["no"], vectors["bf16"], atol=1e-3)


@pytest.mark.parametrize(("precision", "fast", "count"), [("bf16", False, 1), ("bf16", True, 0), ("no", False, 0)])
def test_bfloat16_on_a_cpu_without_it_is_told(pictures, tmp_path, monkeypatch, precision, fast, count):
    monkeypatch.setattr("lgnet_fast.training.setup.has_fast_bfloat16", lambda: fast)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Trainer(tiny_config(pictures, tmp_path, optim={"precision": precision}))
    assert sum("optim.precision: bf16" in str(one.message) for one in caught) == count


def test_float16_needs_a_gpu(pictures, tmp_path):
    with pytest.raises(ConfigError, match="optim.precision: 'fp16' cannot be used here"):
        Trainer(tiny_config(pictures, tmp_path, optim={"precision": "fp16"}))


def test_a_trainer_has_the_device_it_asks_for(monkeypatch):
    """Accelerate keeps that of the first one in a process."""
    from accelerate.state import AcceleratorState, PartialState

    gpu = torch.device("cuda")
    monkeypatch.setattr(PartialState, "default_device", property(lambda state: gpu))
    try:
        for precision in ("no", "bf16"):
            found = [make_accelerator(precision, device).device.type for device in ("cpu", "auto", "cpu", "cpu")]
            assert found == ["cpu", "cuda", "cpu", "cpu"]
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


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
    counts = {key: int(value) for key, value in trainer.average.state.items() if value.dtype == torch.int64}
    assert set(counts.values()) == {3}  # batches that the BatchNorms have seen
    own = trainer.network.state_dict()[name].clone()
    with trainer.averaged():
        assert torch.equal(trainer.network.state_dict()[name], trainer.average.state[name])
        assert not trainer.network.training
    assert torch.equal(trainer.network.state_dict()[name], own)
    assert trainer.network.training


def test_a_moving_average_follows_the_dtype_of_the_run(pictures, tmp_path):
    """A run may be resumed in another dtype than that of its checkpoint."""
    single = Trainer(tiny_config(pictures, tmp_path / "a", optim={"ema": 0.5}))
    double = Trainer(tiny_config(pictures, tmp_path / "b", optim={"ema": 0.5, "dtype": "float64"}))
    double.restore(single.state())
    own = double.network.state_dict()
    assert {name: value.dtype for name, value in double.average.state.items()} == {k: v.dtype for k, v in own.items()}
    double.training_mode()
    assert double.train_step([batch()]) is not None
    assert all(torch.isfinite(value).all() for value in double.average.state.values())


def test_statistics_are_shared_before_they_are_frozen(pictures, tmp_path, monkeypatch):
    """Each process has statistics of its own pictures; frozen, they would stay different."""
    trainer = Trainer(tiny_config(pictures, tmp_path, model={"freeze_batchnorm_from": 0.5}, optim={"steps": 4}))
    shared = []
    monkeypatch.setattr(trainer.learner, "share_statistics", lambda: shared.append(trainer.step))
    trainer.training_mode()
    for step in range(4):
        trainer.train_step([batch(seed=step)])
        trainer.step += 1
    assert shared == [2]


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


def test_no_network_of_features_is_read_where_no_stage_has_its_terms(pictures, tmp_path):
    loss = {"features": str(tmp_path / "none.npz")}
    trainer = Trainer(tiny_config(pictures, tmp_path, model={"train_stages": [1]}, loss=loss))
    assert trainer.learner.features is None
    trainer.training_mode()
    terms = trainer.train_step([batch()])
    assert {name for name in terms if name.startswith(("style", "perceptual", "tv"))} == set()
    for stages in ([], [1, 2]):
        with pytest.raises(WeightsError, match="loss.features: .* does not exist"):
            Trainer(tiny_config(pictures, tmp_path, model={"train_stages": stages}, loss=loss))


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
    scores, holes = [], []
    trainer.discriminator.register_forward_hook(lambda module, inputs, found: scores.append(found.detach()))
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
        holes.append(sample["mask"][i, :, row : row + 64, column : column + 64])
        known = (holes[-1] == 0).expand(3, 64, 64)
        assert not known.all()
        assert torch.equal(fake[i][known], real[i][known])
        assert not torch.equal(fake[i], real[i])
    assert all(torch.isfinite(term) for term in terms.values())
    weighted = adversarial_loss(scores[2], True, hole_share(torch.stack(holes), scores[2]))
    assert terms["G_adv"].item() == pytest.approx(weighted.item(), rel=1e-6)


def test_feature_terms_in_every_second_step_and_in_bfloat16(pictures, tmp_path):
    seen = []

    class Seeing(Features):
        def forward(self, picture):
            seen.append((picture.dtype, tuple(picture.shape)))
            return super().forward(picture)

    loss = {"feature_every": 2, "feature_dtype": "bf16", "feature_stages": "last", "feature_pictures": "merged"}
    config = tiny_config(pictures, tmp_path, loss={**loss, "feature_crop": 64, "features": "torchvision"})
    trainer = Trainer(config, features=Seeing())
    step = trainer.learner._optimise
    lpips = SimpleNamespace(directions=lambda picture: picture, distance=lambda a, b: (a - b).abs().mean((1, 2, 3)))
    step.objective = replace(step.objective, lpips=lpips)
    trainer.training_mode()
    found = []
    for number in range(3):
        terms = trainer.train_step([batch(seed=number)])
        found.append(["style3" in terms, "lpips3" in terms])
        trainer.step += 1
    assert found == [[True] * 2, [False] * 2, [True] * 2]
    assert seen == [(torch.bfloat16, (2, 3, 64, 64))] * 4  # the truth and the merged picture, twice


def test_a_step_of_no_batches(pictures, tmp_path):
    with pytest.raises(ValueError, match="^batches: expected at least one, got none$"):
        Trainer(tiny_config(pictures, tmp_path)).train_step([])


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


def test_losses_are_looked_at_in_every_second_step(pictures, tmp_path):
    trainer = Trainer(tiny_config(pictures, tmp_path / "run", run={"finite_every": 2}))
    trainer.training_mode()
    trainer.step = 1
    assert math.isnan(trainer.train_step([poisoned()])["G"].item())
    trainer.step = 2
    with pytest.raises(TrainingError, match="the loss of step 3 is not finite"):
        trainer.train_step([batch()])


def test_weights_that_are_not_finite_at_the_check_are_no_checkpoint(pictures, tmp_path):
    changes = {"finite_every": 3, "checkpoint_every": 1000}
    trainer = Trainer(tiny_config(pictures, tmp_path / "run", optim={"steps": 6}, run=changes))
    step, seen = trainer.train_step, []

    def poisoned_second(batches):
        seen.append(batches[0]["name"])
        if trainer.step == 1:
            batches[0]["image"][0, 0, 0, 0] = math.nan
        return step(batches)

    trainer.train_step = poisoned_second
    with pytest.raises(TrainingError, match="the loss of step 4 is not finite"):
        trainer.fit()
    assert trainer.checkpoints.files() == []
    (file,) = (tmp_path / "run").glob("not_finite_step_*.pt")
    assert torch.load(file, weights_only=True)["name"] == seen[3]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_not_finite_stops_with_a_checkpoint_of_the_step_before(pictures, tmp_path, capsys, accumulate):
    """Though the discriminator has made its step, with gradients that are not finite."""
    config = tiny_config(pictures, tmp_path / "run", optim={"accumulate": accumulate, "steps": 3})
    trainer = Trainer(config)
    step, expected = trainer.train_step, {}

    def poisoned_third(batches):
        if trainer.step == 2:
            expected.update(copy.deepcopy(trainer.state()))
            batches[-1]["image"][0, 0, 0, 0] = math.nan
        return step(batches)

    trainer.train_step = poisoned_third
    with pytest.raises(TrainingError, match="the loss of step 3 is not finite .*; set run.on_nan=skip"):
        trainer.fit()
    assert "the checkpoint of step 2 was saved before an error; --resume goes on" in capsys.readouterr().err
    saved = trainer.checkpoints.load_latest()
    for name in expected.keys() - {"minutes"}:
        assert_same(saved[name], expected[name], name)
    assert Trainer(config).fit(resume=True) == tmp_path / "run" / "model"  # the batch is all right now


def test_a_batch_that_cannot_be_saved_is_not_the_error(pictures, tmp_path, monkeypatch):
    def full(path, state):
        raise TrainingError("disk full")

    monkeypatch.setattr("lgnet_fast.training.nonfinite.save_checkpoint", full)
    trainer = Trainer(tiny_config(pictures, tmp_path / "run"))
    with pytest.raises(TrainingError, match="the loss of step 1 is not finite .* could not be saved: disk full"):
        trainer.train_step([poisoned()])


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


def test_a_new_loss_scale_is_that_of_all_the_generators_gradients(pictures, tmp_path):
    """In fp16 the discriminator's step may change the scale, while gradients of the generators have the old one."""
    from accelerate.optimizer import AcceleratedOptimizer

    batches = [batch(1), batch(1, seed=1)]
    gradients = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1)):
        trainer = Trainer(tiny_config(pictures, tmp_path, optim={"accumulate": 2}))
        trainer.training_mode()
        if scaler is not None:
            step = trainer.learner._optimise
            step.accelerator.scaler = scaler
            step.generator_optimiser, step.discriminator_optimiser = (
                AcceleratedOptimizer(one.optimizer, scaler=scaler) for one in trainer.optimisers
            )
        trainer.train_step(batches)
        gradients.append([p.grad.clone() for p in trainer.network.parameters()])
        trainer.accelerator.scaler = None
    assert scaler.get_scale() == 4096  # after two steps
    for plain, scaled in zip(*gradients, strict=True):
        assert torch.allclose(plain, scaled, rtol=1e-4, atol=1e-6 * plain.abs().max().item())
