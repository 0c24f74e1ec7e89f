"""A run packed into small files and brought back."""

from __future__ import annotations

import pytest
import torch

from lgnet_fast import LGNet
from lgnet_fast.training import Trainer, TrainingError
from lgnet_fast.training.checkpoints import load_checkpoint
from lgnet_fast.training.compact import main, pack, unpack
from tests.training_support import tiny_config, write_pictures


@pytest.fixture(scope="module", params=["adam", "muon"])
def run(tmp_path_factory, request):
    folder = tmp_path_factory.mktemp("compact")
    pictures = write_pictures(folder / "pictures")
    config = tiny_config(pictures, folder / "run", optim={"steps": 2, "ema": 0.9, "optimizer": request.param})
    Trainer(config).fit()
    return folder / "run", pictures, request.param


def test_packed_and_unpacked(run, tmp_path):
    folder, pictures, optimizer = run
    files = pack(folder, tmp_path / "packed", optimiser=True, part_bytes=20_000)
    parts = [file for file in files if file.suffix == ".safetensors"]
    assert len(parts) > 2
    assert {"compact.json", "log.jsonl", "model_config.json"} <= {file.name for file in files}
    unpack(tmp_path / "packed", tmp_path / "again", tmp_path / "model")
    before = load_checkpoint(folder / "checkpoints" / "step_000000002.pt")
    after = load_checkpoint(tmp_path / "again" / "checkpoints" / "step_000000002.pt")
    assert after["step"] == 2
    for name, tensor in before["average"].items():
        assert torch.allclose(after["network"][name].float(), tensor.float(), rtol=1e-3, atol=1e-6), name
    for name, tensor in before["discriminator"].items():
        assert torch.allclose(after["discriminator"][name], tensor, rtol=1e-3, atol=1e-6), name
    for old, new in zip(before["optimisers"], after["optimisers"]):
        assert old["state"].keys() == new["state"].keys()
        for index, moments in old["state"].items():
            assert float(new["state"][index]["step"]) == float(moments.get("step", 0))
            kept = {"exp_avg", "exp_avg_sq", "momentum_buffer"} & moments.keys()
            assert kept
            for name in kept:
                assert torch.allclose(new["state"][index][name], moments[name], rtol=1e-2, atol=1e-30)
    model = LGNet.from_pretrained(tmp_path / "model")
    assert model.max_channels is None
    expected = {k: v for k, v in before["average"].items() if v.is_floating_point()}
    assert all(torch.allclose(model.state_dict()[k], v, rtol=1e-3, atol=1e-6) for k, v in expected.items())
    config = tiny_config(pictures, tmp_path / "again", optim={"steps": 3, "optimizer": optimizer})
    trainer = Trainer(config)
    assert trainer.fit(resume=True) == tmp_path / "again" / "model"
    assert trainer.step == 3
    assert len((tmp_path / "again" / "log.jsonl").read_text().splitlines()) == 3


def test_without_moments_the_learning_rate_warms_up_again(run, tmp_path):
    folder, pictures, optimizer = run
    main(["pack", str(folder), str(tmp_path / "packed")])
    main(["unpack", str(tmp_path / "packed"), str(tmp_path / "again")])
    config = tiny_config(
        pictures,
        tmp_path / "again",
        optim={
            "steps": 100,
            "schedule": "constant",
            "warmup_steps": 2,
            "learning_rate": 1,
            "optimizer": optimizer,
        },
    )
    trainer = Trainer(config)
    trainer.restore(load_checkpoint(tmp_path / "again" / "checkpoints" / "step_000000002.pt"))
    rates = []
    for _ in range(3):
        rates.append(trainer._set_learning_rates())
        trainer.step += 1
    assert rates == [0.5, 1.0, 1.0]


def test_nothing_to_pack_or_unpack(tmp_path):
    with pytest.raises(TrainingError, match="run: expected a run's folder with checkpoints"):
        pack(tmp_path, tmp_path / "packed")
    with pytest.raises(TrainingError, match="compact: .* cannot be read"):
        unpack(tmp_path, tmp_path / "run")
