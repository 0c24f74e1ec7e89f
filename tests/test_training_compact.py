"""A run packed into small files and brought back."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from lgnet_fast import LGNet
from lgnet_fast.training import Trainer, TrainingError
from lgnet_fast.training.checkpoints import CheckpointFolder, load_checkpoint
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
    assert all(file.stat().st_size <= 20_000 or len(load_file(file)) == 1 for file in parts)
    assert {"compact.json", "log.jsonl", "model_config.json"} <= {file.name for file in files}
    assert len({file.stat().st_mode for file in files}) == 1, "others may read some of the files, but not all"
    unpack(tmp_path / "packed", tmp_path / "again", tmp_path / "model")
    before = load_checkpoint(folder / "checkpoints" / "step_000000002.pt")
    after = load_checkpoint(tmp_path / "again" / "checkpoints" / "step_000000002.pt")
    assert after["step"] == 2
    for name, tensor in before["average"].items():
        assert torch.allclose(after["network"][name].float(), tensor.float(), rtol=1e-3, atol=1e-6), name
    for name, tensor in before["discriminator"].items():
        rounded = tensor.dim() > 1  # vectors are kept in float32
        assert torch.allclose(after["discriminator"][name], tensor, rtol=1e-3 * rounded, atol=1e-6 * rounded), name
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
    optim = {"schedule": "constant", "warmup_steps": 4, "learning_rate": 1e-3, "optimizer": optimizer}
    trainer = Trainer(tiny_config(pictures, tmp_path / "again", optim={**optim, "steps": 100}))
    checkpoints = tmp_path / "again" / "checkpoints"
    trainer.restore(load_checkpoint(checkpoints / "step_000000002.pt"))
    rates = []
    for _ in range(5):
        rates.append(trainer._set_learning_rates())
        trainer.step += 1
    assert rates == pytest.approx([0.1875e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3])  # in step 2 the first warm-up counts, too
    # The end of a leg in the middle of it is not its end.
    Trainer(tiny_config(pictures, tmp_path / "again", optim={**optim, "steps": 3})).fit(resume=True)
    trainer.restore(load_checkpoint(checkpoints / "step_000000003.pt"))
    assert trainer._set_learning_rates() == pytest.approx(0.5e-3)
    # Nor is a pack with the moments; one without them starts another.
    for optimiser, rate in ((True, 0.5e-3), (False, 0.25e-3)):
        moved = tmp_path / f"moved_{optimiser}"
        pack(tmp_path / "again", moved / "packed", optimiser=optimiser)
        unpack(moved / "packed", moved / "run")
        trainer.restore(load_checkpoint(moved / "run" / "checkpoints" / "step_000000003.pt"))
        assert trainer._set_learning_rates() == pytest.approx(rate)
    # Adam's bias correction begins anew, as its moments do.
    state = load_checkpoint(checkpoints / "step_000000002.pt")
    assert all("step" not in group for one in state["optimisers"] for group in one["param_groups"])


def test_the_best_score_stays_where_its_checkpoint_is(run, tmp_path):
    """Else a run that goes on elsewhere, without best.pt, would have none until it is better."""
    folder, _, _ = run
    state = load_checkpoint(folder / "checkpoints" / "step_000000002.pt")
    CheckpointFolder(tmp_path / "run" / "checkpoints", keep=1).save(2, {**state, "best": 25.0})
    pack(tmp_path / "run", tmp_path / "packed")
    unpack(tmp_path / "packed", tmp_path / "again")
    assert load_checkpoint(tmp_path / "again" / "checkpoints" / "step_000000002.pt")["best"] is None


def test_nothing_to_pack_or_unpack(tmp_path):
    with pytest.raises(TrainingError, match="run: expected a run's folder with checkpoints"):
        pack(tmp_path, tmp_path / "packed")
    with pytest.raises(TrainingError, match="compact: .* cannot be read"):
        unpack(tmp_path, tmp_path / "run")
    with pytest.raises(TrainingError, match="run, model: expected one of them at least"):
        unpack(tmp_path)


def test_a_run_that_goes_on_is_not_replaced(run, tmp_path):
    folder, _, _ = run
    pack(folder, tmp_path / "packed")
    before = sorted(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    with pytest.raises(TrainingError, match="run: expected a folder without checkpoints, got .*, which holds a run"):
        unpack(tmp_path / "packed", folder)
    assert sorted(path.read_bytes() for path in folder.rglob("*") if path.is_file()) == before


def test_parts_are_those_of_the_last_pack(run, tmp_path):
    folder, _, _ = run
    many = pack(folder, tmp_path / "packed", optimiser=True, part_bytes=20_000)
    few = pack(folder, tmp_path / "packed")
    assert len(few) < len(many)
    assert {path.name for path in few} == {path.name for path in (tmp_path / "packed").iterdir()}
    unpack(tmp_path / "packed", tmp_path / "again")
    state = load_checkpoint(tmp_path / "again" / "checkpoints" / "step_000000002.pt")
    assert all(one["state"] == {} for one in state["optimisers"])  # no moments of the pack before
    next(path for path in few if path.suffix == ".safetensors").unlink()
    with pytest.raises(TrainingError, match="compact: .* cannot be read"):
        unpack(tmp_path / "packed", tmp_path / "third")
    assert not (tmp_path / "third").exists()


def test_one_wrong_bit_of_a_pack_is_noticed(run, tmp_path):
    files = pack(run[0], tmp_path / "packed")
    assert len(files) == 4  # compact.json, one part, the log, the model's configuration
    for file in files:
        data = file.read_bytes()
        at = data.index(b'"step": 2') + 8 if file.suffix == ".json" and b'"step": 2' in data else len(data) - 3
        file.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(TrainingError, match=rf"compact: .* cannot be read \({file.name}: damaged"):
            unpack(tmp_path / "packed", tmp_path / "again")
        file.write_bytes(data)
    assert not (tmp_path / "again").exists()
    older = json.loads((tmp_path / "packed" / "compact.json").read_text())
    del older["hash"], older["hashes"]  # a pack of an earlier version has none
    (tmp_path / "packed" / "compact.json").write_text(json.dumps(older))
    unpack(tmp_path / "packed", tmp_path / "again")
    (tmp_path / "packed" / "compact.json").write_text("[]")
    with pytest.raises(TrainingError, match="compact: .* cannot be read"):
        unpack(tmp_path / "packed", tmp_path / "third")


def test_a_pack_has_nothing_of_another_run_in_its_folder(run, tmp_path):
    folder, _, _ = run
    state = load_checkpoint(folder / "checkpoints" / "step_000000002.pt")
    CheckpointFolder(tmp_path / "bare" / "checkpoints", keep=1).save(2, state)  # it was killed before its model
    pack(folder, tmp_path / "packed")
    pack(tmp_path / "bare", tmp_path / "packed")
    with pytest.raises(TrainingError, match="model_config.json is missing: the run had exported no model"):
        unpack(tmp_path / "packed", model=tmp_path / "model")
    unpack(tmp_path / "packed", tmp_path / "again")
    assert [path.name for path in (tmp_path / "again").iterdir()] == ["checkpoints"]


def test_a_command_s_error_is_one_line(run, tmp_path, capsys):
    folder, _, _ = run
    pack(folder, tmp_path / "packed")
    (tmp_path / "packed" / "model_config.json").unlink()
    for command, error in (
        (["pack", str(tmp_path), str(tmp_path / "x")], "error: run: expected a run's folder"),
        (["unpack", str(tmp_path / "packed"), "--model", str(tmp_path / "m")], "model_config.json is missing"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(command)
        assert stopped.value.code == 2
        text = capsys.readouterr().err
        assert error in text
        assert text.count("\n") == 1
