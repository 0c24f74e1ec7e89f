"""Configurations from files, from the command line and from Python."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import yaml

from lgnet_fast.training import ConfigError, TrainConfig, Trainer, load_config
from lgnet_fast.training.config import DataConfig, LossConfig, OptimConfig, config_of
from lgnet_fast.training.crops import PROTOCOLS
from tests.training_support import tiny_config, tiny_settings, write_pictures


@pytest.fixture
def pictures(tmp_path):
    return write_pictures(tmp_path / "pictures")


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
        ("data: {masks: ''}", "data.masks: expected generated, paired or a folder, got ''"),
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
        (
            "data: {masks: there, hole_classes: [1]}",
            r"data.hole_classes: expected the default \(.0, 1, 2, 3, 4, 5.\) with data.masks: there, where",
        ),
        (
            "data: {mask_kind: fine, hole_classes: [1]}",
            "data.hole_classes: expected the default .* with data.mask_kind: fine",
        ),
        ("data: {protocol: squares}", "^data.protocol: expected one of photos, celeba_hq, .*, got 'squares'"),
        ("data: {validation: ''}", "^data.validation: expected a folder, a tar shard or a dataset, got ''"),
        ("data: {pictures: [a, '']}", "^data.pictures: expected a folder, a tar shard or a dataset, got ''"),
        (
            "discriminator: {init_from: 200_net_D.pth, channels: 32}",
            "^discriminator.channels: expected 64, the width of discriminator.init_from, got 32",
        ),
        (
            "data: {mask_polarity: black}",
            r"data.mask_polarity: expected the default \(white\) with data.masks: generated",
        ),
        (
            "data: {masks: there, mask_kind: fine}",
            r"data.mask_kind: expected the default \(strokes\) with data.masks: there",
        ),
        ("data: {mask_bank: 8}", r"data.mask_bank: expected the default \(4096\) with data.in_memory: false, where"),
        ("loss: {features_sha256: ab}", "loss.features_sha256: .* with loss.features: torchvision, .* got 'ab'"),
        ("loss: {hole: 0, hole_discount: 0.9}", "loss.hole_discount: .* with loss.hole: 0, .* got 0.9"),
        ("loss: {lpips_weights: a.npz}", "loss.lpips_weights: .* with loss.lpips: 0, no validation_kinds, .* got"),
        ("run: {on_nan: skip, finite_every: 2}", "run.finite_every: .* with run.on_nan: skip, .* got 2"),
        (
            "run: {validation_kinds: [box], validation_classes: [0]}",
            "run.validation_classes: .* with run.validation_kinds",
        ),
        (
            "model: {freeze_batchnorm: yes, batchnorm_momentum: 0.2}",
            "model.batchnorm_momentum: .*freeze_batchnorm: true",
        ),
        (
            "model: {freeze_batchnorm: yes, freeze_batchnorm_from: 0}",
            "freeze_batchnorm_from: .*freeze_batchnorm: true",
        ),
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


@pytest.mark.parametrize(
    ("setting", "good", "bad"),
    [
        ("model.freeze_batchnorm_from", (0, 0.5), (-0.1, 1)),
        ("model.batchnorm_momentum", (0.1, 1), (0, 1.1)),
        ("discriminator.channels", (1,), (0,)),
        ("discriminator.crop", (64, 256), (63, 257)),
        ("discriminator.start", (0, 0.5), (-0.1, 1)),
        ("data.size", (256, 512), (0, -256, 257)),
        ("data.workers", (0, 1), (-1,)),
        ("data.prefetch", (4,), (0,)),
        ("data.mask_bank", (4096,), (0,)),
        ("data.colour", (0, 0.5), (-0.1, 1)),
        ("loss.hole", (0, 10), (-0.1,)),
        ("loss.hole_discount", (0.1, 1), (0, 1.1)),
        ("loss.feature_every", (1,), (0,)),
        ("loss.feature_crop", (64, 256), (63, 257)),
        ("optim.batch_size", (1,), (0,)),
        ("optim.accumulate", (1,), (0,)),
        ("optim.learning_rate", (1e-9,), (0,)),
        ("optim.discriminator_learning_rate", (1e-9,), (0,)),
        ("optim.betas", ([0, 0.5],), ([0, 1], [-0.1, 0.5], [0.5])),
        ("optim.warmup_steps", (0,), (-1,)),
        ("optim.epochs", (1,), (0,)),
        ("optim.steps", (1,), (0,)),
        ("optim.max_minutes", (0.1,), (0,)),
        ("optim.clip", (0.1,), (0,)),
        ("optim.ema", (0.1, 0.9), (0, 1)),
        ("run.seed", (0, 2**63 - 1), (-1, 2**63)),
        ("run.validation_pictures", (1,), (0,)),
        ("run.threads", (1, 1024), (0, 1025)),
        ("run.picture_every", (0,), (-1,)),
        ("run.checkpoint_minutes", (0.1,), (0,)),
        ("run.log_every", (1,), (0,)),
        ("run.keep", (1,), (0,)),
        ("run.finite_every", (1,), (0,)),
    ],
)
def test_numbers_are_taken_up_to_their_bounds(setting, good, bad):
    section, _, name = setting.partition(".")
    for value in good:
        assert config_of({section: {name: value}})
    for value in bad:
        with pytest.raises(ConfigError, match=f"^{setting}: expected"):
            config_of({section: {name: value}})


def test_what_python_code_gives_is_checked_as_well(pictures, tmp_path):
    for make, error in (
        (lambda: TrainConfig(optim={"steps": 3}), "optim: expected a OptimConfig, got .'steps': 3}"),
        (lambda: TrainConfig(optim=OptimConfig(batch_size=2.5)), "optim.batch_size: expected int, got 2.5"),
        (lambda: TrainConfig(optim=OptimConfig(clip="high")), "optim.clip: expected float, got 'high'"),
        (lambda: TrainConfig(optim=OptimConfig(precision="half")), "optim.precision: expected one of no, bf16, fp16"),
        (lambda: Trainer(tiny_settings(pictures, tmp_path)), "^config: expected a TrainConfig, .* got dict"),
        (lambda: Trainer(tiny_config(pictures, tmp_path), model="bundled"), "^model: expected an LGNet .* got str"),
        (lambda: Trainer(tiny_config(pictures, tmp_path), discriminator=3), "^discriminator: expected a .* got int$"),
        (lambda: Trainer(tiny_config(pictures, tmp_path), features="vgg"), "^features: expected a module .* got str"),
        (
            lambda: Trainer(tiny_config(pictures, tmp_path, loss={"feature_dtype": "bf16"}), features=lambda x: [x]),
            "^loss.feature_dtype: expected same with features that are no module, got 'bf16'",
        ),
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


def test_a_configuration_that_is_no_mapping():
    with pytest.raises(ConfigError, match="^config: expected a mapping, got 3"):
        config_of(3)


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
    with pytest.raises(ConfigError, match="set: expected a YAML value, got .*a is there twice"):
        load_config(file, ["model.overrides={a: 1, a: 2}"])
    with pytest.raises(ConfigError, match=r"set: expected section.name=value, got 'optim.steps'"):
        load_config(file, ["optim.steps"])
    with pytest.raises(ConfigError, match="config: expected a readable YAML or JSON file, got '.*none.yaml'"):
        load_config(tmp_path / "none.yaml")


@pytest.mark.parametrize("name", ["demo", "demo_local", "demo_gpu", "lgnet_places2"])
def test_shipped_configurations_are_valid(name):
    config = load_config(Path(__file__).parent.parent / "configs" / f"{name}.yaml")
    assert config.data.size == 256
    if name == "lgnet_places2":
        # The paper's settings are the defaults.
        assert config.loss == LossConfig()
        assert (config.optim.learning_rate, config.optim.betas, config.optim.batch_size) == (2e-4, (0.5, 0.999), 4)
        assert (config.optim.epochs, config.optim.schedule) == (200, "paper")


def test_the_protocols_of_the_configuration_are_those_of_the_crops():
    assert get_args(get_type_hints(DataConfig)["protocol"]) == tuple(PROTOCOLS)


def test_a_file_is_parsed_once(tmp_path, monkeypatch):
    """Long lists of pictures take seconds."""
    file = tmp_path / "c.yaml"
    file.write_text("data: {pictures: [a, b, c]}")
    scalars = []
    compose = yaml.SafeLoader.compose_scalar_node
    monkeypatch.setattr(
        yaml.SafeLoader, "compose_scalar_node", lambda *given: scalars.append(given) or compose(*given)
    )
    assert load_config(file).data.pictures == ("a", "b", "c")
    assert len(scalars) == 5
