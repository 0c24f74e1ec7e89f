"""Models in safetensors: what survives saving, loading by name, and files and configs that must be rejected."""

from __future__ import annotations

import copy
import csv
import gzip
import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrizations, prune

from lgnet_fast import Inpainter, LGNet, WeightsError, create_model
from lgnet_fast.weights import bundled_path
from tests.weights_support import demo_model, same


@pytest.fixture
def model() -> LGNet:
    return demo_model()


def test_capped_widths_round_trip_and_have_no_released_names(tmp_path):
    model = create_model(
        "lgnet_small", coarse_channels=4, local_channels=4, global_channels=4, max_channels=12
    ).eval()
    model.save_pretrained(tmp_path)
    loaded = LGNet.from_pretrained(tmp_path)
    assert loaded.max_channels == 12
    assert loaded.net_g.encoder["e5"].conv.weight.shape == (12, 12, 4, 4)
    assert same(model, loaded)
    with pytest.raises(ValueError, match="only plain LGNet has released names.*max_channels=12"):
        model.to_released()
    with pytest.raises(ValueError, match="max_channels: expected a positive integer or None, got 0"):
        create_model("lgnet_small", max_channels=0)


def test_save_and_load_pretrained(model, tmp_path):
    model.save_pretrained(tmp_path / "m")
    loaded = LGNet.from_pretrained(tmp_path / "m", backend="eager")
    assert same(model, loaded)
    assert loaded.config == model.config
    assert loaded.backend == "eager"
    assert not loaded.training
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == [
        "README.md",
        "config.json",
        "manifest.json",
        "model.safetensors",
    ]


def test_options_of_huggingface_hub_before_1_0(model, tmp_path):
    """Its ``from_pretrained`` hands over two options that later versions do not have."""
    model.save_pretrained(tmp_path)
    options = {"revision": None, "cache_dir": None, "force_download": False, "local_files_only": False, "token": None}
    old = {"proxies": None, "resume_download": None}
    loaded = LGNet._from_pretrained(model_id=str(tmp_path), **options, **old, **model.config)
    assert same(model, loaded)


@pytest.mark.parametrize("name", ["lgnet_share", "C", "C+G+G_att", "C+L+G"])
def test_every_kind_of_model_survives_saving(name, tmp_path):
    narrow = {"coarse_channels": 4, "local_channels": 4, "global_channels": 4}
    model = create_model(name, variant="paper", **narrow)
    model.save_pretrained(tmp_path)
    loaded = LGNet.from_pretrained(tmp_path)
    assert same(model, loaded)
    assert (loaded.stages, loaded.variant) == (model.stages, "paper")


def _pruned(model: LGNet) -> None:
    prune.l1_unstructured(model.net_l.out, "weight", 0.5)


def _normed(model: LGNet) -> None:
    parametrizations.weight_norm(model.net_l.out)


def _compiled(model: LGNet) -> None:
    model.net_l.out = torch.compile(model.net_l.out)


def _replaced(model: LGNet) -> None:
    model.net_l.out = nn.Conv2d(4, 3, 5)


def _in_two_dtypes(model: LGNet) -> None:
    model.net_l.out.double()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            _pruned,
            "names and shapes do not fit. missing (1): net_l.out.weight | unexpected (2): net_l.out.weight_mask; "
            "net_l.out.weight_orig",
        ),
        (
            _normed,
            "names and shapes do not fit. missing (1): net_l.out.weight | unexpected (2): "
            "net_l.out.parametrizations.weight.original0; net_l.out.parametrizations.weight.original1",
        ),
        (
            _compiled,
            "names and shapes do not fit. missing (2): net_l.out.bias; net_l.out.weight | unexpected (2): "
            "net_l.out._orig_mod.bias; net_l.out._orig_mod.weight",
        ),
        (
            _replaced,
            "names and shapes do not fit. wrong shape (1): net_l.out.weight: expected [3, 4, 7, 7], got [3, 4, 5, 5]",
        ),
        (_in_two_dtypes, "expected weights of one dtype, got torch.float32 and torch.float64"),
    ],
)
def test_what_could_not_be_loaded_again_is_not_saved(change, text, model, tmp_path):
    model.save_pretrained(tmp_path)
    before = copy.deepcopy(model)
    change(model)
    with pytest.raises(WeightsError) as caught:
        model.save_pretrained(tmp_path)
    assert str(caught.value) == f"save: from_pretrained makes the layers anew and could not load these: {text}"
    assert same(before, LGNet.from_pretrained(tmp_path))


def test_changes_that_no_tensor_shows_are_not_saved(model, tmp_path):
    model.net_c.encoder["e2"].activation = torch.nn.ReLU()
    model.net_l.stem.conv.register_forward_hook(lambda *_: None)
    model.save_pretrained(tmp_path)
    loaded = LGNet.from_pretrained(tmp_path)
    assert loaded.net_c.encoder["e2"].activation.negative_slope == 0.2
    assert not loaded.net_l.stem.conv._forward_hooks


def test_weights_that_are_shared_or_in_several_dtypes_are_saved_where_they_can_be_loaded(model, tmp_path):
    first, second = model.net_l.blocks[:2]
    second.first.conv.weight = first.first.conv.weight
    model.save_pretrained(tmp_path)
    assert same(model, LGNet.from_pretrained(tmp_path))
    model.net_g.half()
    model.net_l.double()
    model.save_pretrained(tmp_path, dtype=torch.float32)
    assert same(model.float(), LGNet.from_pretrained(tmp_path))


def test_stored_dtype(model, tmp_path):
    model.save_pretrained(tmp_path / "half", dtype=torch.float16)
    model.save_pretrained(tmp_path / "full")
    size = {k: (tmp_path / k / "model.safetensors").stat().st_size for k in ("half", "full")}
    assert size["half"] < 0.6 * size["full"]
    loaded = LGNet.from_pretrained(tmp_path / "half")
    for a, b in zip(loaded.parameters(), model.parameters(), strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b.half().float())


def test_the_stored_dtype_is_pushed_too(model, tmp_path, monkeypatch):
    """huggingface_hub saves once more, into a folder of its own, and does not pass the dtype on."""
    pushed = {}

    class FakeApi:
        def __init__(self, **options):
            pass

        def create_repo(self, repo_id, **options):
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, folder_path, **options):
            tensors = load_file(Path(folder_path) / "model.safetensors")
            pushed.update({name: tensor.dtype for name, tensor in tensors.items() if tensor.is_floating_point()})
            return "address"

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", FakeApi)
    address = model.save_pretrained(tmp_path / "m", dtype=torch.float16, push_to_hub=True, repo_id="me/m")
    assert address == "address"
    assert set(pushed.values()) == {torch.float16}
    model.save_pretrained(tmp_path / "again")
    kinds = {tensor.dtype for tensor in load_file(tmp_path / "again" / "model.safetensors").values()}
    assert torch.float32 in kinds


def test_pretrained_loading_is_strict(model, tmp_path):
    model.save_pretrained(tmp_path)
    (tmp_path / "manifest.json").unlink()
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"local_channels": 5}))
    with pytest.raises(WeightsError, match=r"wrong shape .*net_l\.stem\.conv\.weight: expected \[5, 4, 7, 7\]"):
        LGNet.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"stages": "C+L"}))
    with pytest.raises(WeightsError, match=r"unexpected .*net_g\.encoder"):
        LGNet.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"stages": "L+C"}))
    with pytest.raises(WeightsError, match="stages: expected one of"):
        LGNet.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(WeightsError):
        LGNet.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(WeightsError):
        LGNet.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"missing \['model.safetensors'\]"):
        LGNet.from_pretrained(tmp_path)
    for nowhere in (tmp_path / "nowhere", "", " ", "x" * 300, "x" * 300 + "/y", "a\0b", "/" + "y/" * 3000):
        with pytest.raises(WeightsError, match="weights: "):
            LGNet.from_pretrained(nowhere)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool])
def test_weights_that_are_no_floats_are_named(tmp_path, dtype):
    LGNet(coarse_channels=1, local_channels=1, global_channels=1).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    name = next(name for name in state if name.endswith("conv.weight"))
    state[name] = state[name].to(dtype)
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "manifest.json").unlink()  # as from a hub: with it, the hash is what differs
    with pytest.raises(WeightsError, match=f"expected floating weights and integer counters, got {name}: {dtype}"):
        LGNet.from_pretrained(tmp_path)


@pytest.mark.parametrize("source", ["", "x" * 300 + "/y", "a\0b/c", "/" + "y" * 300, ".", "a/b/c"])
def test_names_that_name_no_model(source):
    with pytest.raises(WeightsError, match="weights: "):
        LGNet.from_pretrained(source)


@pytest.mark.parametrize(
    "config",
    [
        "[]",
        "null",
        "7",
        "{",
        '{"stages": 5}',
        '{"stages": ["C"]}',
        '{"coarse_channels": 1e9}',
        '{"coarse_channels": 1000000000}',
        '{"variant": {}}',
        '{"nonsense": 1}',
        '{"backend": []}',
        "[" * 100_000,
        "\xff\xfe",
    ],
)
def test_a_config_of_any_content_raises_what_is_documented(tmp_path, config):
    LGNet("C", coarse_channels=1).save_pretrained(tmp_path)
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "config.json").write_text(config, encoding="latin-1")
    with pytest.raises(WeightsError):
        LGNet.from_pretrained(tmp_path)


OVERFLOW = "Storage size calculation overflowed with sizes="


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("[]", "expected a JSON object, got []"),
        ("null", "expected a JSON object, got null"),
        ('"text"', 'expected a JSON object, got "text"'),
        (
            "{",
            "expected a JSON object, got a file that is not JSON: Expecting property name enclosed in double quotes",
        ),
        ("", "expected a JSON object, got a file that is not JSON: Expecting value: line 1 column 1 (char 0)"),
        ("\xff\xfe", "expected a JSON object, got a file that is not JSON: 'utf-8' codec can't decode byte 0xff"),
        ("[" * 100_000, "expected a JSON object, got a file that is not JSON: "),
        ('{"stages": "L+C"}', "stages: expected one of ('C', "),
        ('{"coarse_channels": true}', "coarse_channels: expected a positive integer, got True"),
        ('{"share_coarse": "yes"}', "share_coarse: expected a bool, got 'yes'"),
        ('{"backend": []}', "backend: expected one of ('auto', 'eager', 'triton', 'cpp'), got []"),
        ('{"coarse_channels": 1000000000}', OVERFLOW),
    ],
)
def test_a_wrong_config_is_named_with_its_folder(tmp_path, config, message):
    LGNet("C", coarse_channels=1).save_pretrained(tmp_path)
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "config.json").write_text(config, encoding="latin-1")
    with pytest.raises(WeightsError) as caught:
        LGNet.from_pretrained(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'config.json'}: {message}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("config", ["{", "[]", ""])
def test_a_damaged_config_of_the_hub_is_named(tmp_path, config):
    """As a broken download leaves it in the hub's cache."""
    revision = "0" * 40
    snapshot = tmp_path / "models--someone--model" / "snapshots" / revision
    LGNet("C", coarse_channels=1).save_pretrained(snapshot)
    (snapshot / "config.json").write_text(config)
    (tmp_path / "models--someone--model" / "refs").mkdir()
    (tmp_path / "models--someone--model" / "refs" / "main").write_text(revision)
    for more in ({}, {"revision": revision}):
        with pytest.raises(WeightsError) as caught:
            LGNet.from_pretrained("someone/model", cache_dir=tmp_path, local_files_only=True, **more)
        assert str(caught.value).startswith(f"{snapshot / 'config.json'}: expected a JSON object, got ")


def test_a_revision_of_the_hub(tmp_path, monkeypatch):
    """Two of them in the hub's cache, without a network."""
    folder = tmp_path / "models--someone--model"
    for letter, width in (("a", 1), ("b", 2)):
        LGNet("C", coarse_channels=width).save_pretrained(folder / "snapshots" / (letter * 40))
    (folder / "refs").mkdir()
    for name, commit in (("main", "a" * 40), ("v2", "b" * 40)):
        (folder / "refs" / name).write_text(commit)
    offline = {"cache_dir": tmp_path, "local_files_only": True}

    def width(source, **more):
        return LGNet.from_pretrained(source, **offline, **more).channels[0]

    assert width("someone/model") == 1
    assert [width(f"someone/model@{revision}") for revision in ("v2", "b" * 40, "main")] == [2, 2, 1]
    assert width("someone/model@v2", revision="v2") == width("someone/model", revision="v2") == 2
    with pytest.raises(WeightsError, match="expected one revision, got 'v2' and 'main'"):
        width("someone/model@v2", revision="main")
    with pytest.raises(WeightsError, match="expected a branch, tag or commit after the @, got 'someone/model@'"):
        width("someone/model@")
    LGNet("C", coarse_channels=3).save_pretrained(tmp_path / "own" / "model@v2")
    monkeypatch.chdir(tmp_path)
    assert width("own/model@v2") == 3
    monkeypatch.setattr(LGNet, "from_pretrained", partial(LGNet.from_pretrained, **offline))
    assert (
        Inpainter.from_pretrained("someone/model@v2", device="cpu", backend="eager")._network.source.channels[0] == 2
    )


def test_weights_of_the_hub_are_compared_with_their_hash(tmp_path):
    snapshot = tmp_path / "models--someone--model" / "snapshots" / ("0" * 40)
    LGNet("C", coarse_channels=1).save_pretrained(snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    offline = {"cache_dir": tmp_path, "local_files_only": True}
    assert LGNet.from_pretrained("someone/model", **offline).channels[0] == 1
    file = snapshot / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1  # one bit of the last value
    file.write_bytes(data)
    with pytest.raises(WeightsError, match="model.safetensors: damaged or of another save, size or hash is not what"):
        LGNet.from_pretrained("someone/model", **offline)
    (snapshot / "manifest.json").unlink()
    assert LGNet.from_pretrained("someone/model", **offline).channels[0] == 1  # nothing to compare with


def test_a_config_is_not_blamed_for_the_callers_arguments(tmp_path):
    LGNet("C", coarse_channels=1).save_pretrained(tmp_path)
    (tmp_path / "manifest.json").unlink()
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"_of_a_hub": 1}))
    assert LGNet.from_pretrained(tmp_path, backend="eager").backend == "eager"
    for arguments, message in (
        ({"backend": "nope"}, "backend: expected one of ('auto', 'eager', 'triton', 'cpp'), got 'nope'"),
        ({"coarse_channels": 0}, "coarse_channels: expected a positive integer, got 0"),
        ({"nonsense": 1}, "LGNet.__init__() got an unexpected keyword argument 'nonsense'"),
        ({"map_location": 7}, "map_location: expected a torch.device or its name, got 7"),
        (
            {"map_location": torch.device("meta")},
            "map_location: expected a device of this machine, got 'meta' (it has no memory)",
        ),
    ):
        with pytest.raises(WeightsError) as caught:
            LGNet.from_pretrained(tmp_path, **arguments)
        assert str(caught.value) == f"weights: {str(tmp_path)!r} could not be loaded: {message}"
    with pytest.raises(WeightsError, match=r": map_location: expected a device of this machine, got 'tape' \(.+\)$"):
        LGNet.from_pretrained(tmp_path, map_location="tape")
    (tmp_path / "config.json").write_text(json.dumps(config | {"variant": "nips"}))
    with pytest.raises(WeightsError, match=r"[/\\]config.json: variant: expected one of .*, got 'nips'$"):
        LGNet.from_pretrained(tmp_path, backend="eager")


def test_names_in_a_config_that_lgnet_lacks_are_warned_of(tmp_path):
    model = LGNet("C", coarse_channels=1)
    model.save_pretrained(tmp_path)
    (tmp_path / "manifest.json").unlink()
    config = model.config | {"varient": "paper", "zoom": 2, "_of_a_hub": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match=r"config.json: ignored varient, zoom, which LGNet does not have$") as caught:
        assert LGNet.from_pretrained(tmp_path).variant == "released"
    assert len(caught) == 1


@pytest.mark.parametrize("kind", ["I32", "I64 counter"])
def test_tensors_of_the_wrong_kind_are_refused(tmp_path, kind):
    LGNet("C", coarse_channels=1).save_pretrained(tmp_path)
    (tmp_path / "manifest.json").unlink()
    state = load_file(tmp_path / "model.safetensors")
    name = "net_c.encoder.e2.norm." + ("num_batches_tracked" if "counter" in kind else "weight")
    state[name] = state[name].to(torch.float32 if "counter" in kind else torch.int32)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=f"expected floating weights and integer counters, got {name}"):
        LGNet.from_pretrained(tmp_path)


def test_offline_hub_id_is_one_clear_error(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsError, match="'someone/lgnet-nowhere' could not be loaded"):
        LGNet.from_pretrained("someone/lgnet-nowhere", local_files_only=True)


def test_bundled_model():
    path = bundled_path()
    assert sum(f.stat().st_size for f in path.iterdir()) < 32e6
    model = LGNet.from_pretrained(path)
    assert model.config == create_model("lgnet_small").config
    assert sum(p.numel() for p in model.parameters()) == 9_790_761
    with gzip.open(path / "ATTRIBUTION.tsv.gz", "rt", encoding="utf-8") as table:
        rows = list(csv.DictReader(table, delimiter="\t"))
    assert len(rows) == 1680
    assert all(row["licence"] and row["source"] for row in rows)
    for name in ("nonsense", "", ".", "..", str(path), None):
        with pytest.raises(ValueError, match=r"name: expected one of \['lgnet_small'\], got "):
            bundled_path(name)
