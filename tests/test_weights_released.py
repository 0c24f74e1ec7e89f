"""The authors' checkpoint files: names, widths, epochs, dtypes, and files that must be rejected."""

from __future__ import annotations

import os
import pickle
import zipfile

import pytest
import torch

from lgnet_fast import LGNet, WeightsError, create_model
from lgnet_fast.reference.released import load_state_dict_file
from tests.support import keys
from tests.weights_support import demo_model, same


@pytest.fixture
def model() -> LGNet:
    return demo_model()


def save_released(model: LGNet, folder, epoch: str = "200", prefix: str = "") -> None:
    for net, state in model.to_released().items():
        torch.save({prefix + k: v for k, v in state.items()}, folder / f"{epoch}_net_{net}.pth")


def test_released_names_and_shapes_are_the_authors(model):
    with torch.device("meta"):
        full = create_model("lgnet")
    for net, state in full.to_released().items():
        assert {k: list(v.shape) for k, v in state.items()} == keys()["shapes"][net]


@pytest.mark.parametrize("prefix", ["", "module."])
def test_released_directory_round_trip_infers_widths(model, tmp_path, prefix):
    save_released(model, tmp_path, prefix=prefix)
    loaded = LGNet.from_released(tmp_path)
    assert loaded.channels == (8, 4, 12)
    assert same(model, loaded)
    assert not loaded.training


def test_epoch_is_needed_where_a_directory_holds_several(model, tmp_path):
    save_released(model, tmp_path, "100")
    other = create_model("lgnet_demo", coarse_channels=8, local_channels=4, global_channels=12)
    save_released(other, tmp_path, "latest")
    with pytest.raises(WeightsError, match=r"epoch: .* expected one of \['100', 'latest'\]"):
        LGNet.from_released(tmp_path)
    assert same(LGNet.from_released(tmp_path, epoch=100), model)
    assert same(LGNet.from_released(tmp_path, epoch="latest"), other)
    with pytest.raises(WeightsError, match="epoch: expected one of .*got '7'"):
        LGNet.from_released(tmp_path, epoch=7)


def test_dtypes_of_released_tensors(model):
    nets = model.to_released()
    half = {n: {k: v.half() if v.is_floating_point() else v for k, v in s.items()} for n, s in nets.items()}
    assert next(LGNet.from_released(half).parameters()).dtype == torch.float32
    double = {n: {k: v.double() if v.is_floating_point() else v for k, v in s.items()} for n, s in nets.items()}
    loaded = LGNet.from_released(double)
    assert {p.dtype for p in loaded.parameters()} == {torch.float64}
    assert loaded.net_c.encoder.e2.norm.num_batches_tracked.dtype == torch.int64


def test_loaded_model_does_not_share_memory_with_the_callers_tensors(model):
    nets = model.to_released()
    loaded = LGNet.from_released(nets)
    with torch.no_grad():
        for p in loaded.parameters():
            p.zero_()
    assert not any((v == 0).all() for k, v in nets["G1"].items() if k.endswith("0.weight"))


def test_every_wrong_name_and_shape_is_listed(model):
    nets = {n: dict(s) for n, s in model.to_released().items()}
    del nets["G1"]["model.model.3.bias"]
    nets["G2"]["model.99.weight"] = torch.zeros(1)
    nets["G3"]["att_16.combiner.bias"] = torch.zeros(7)
    with pytest.raises(WeightsError) as error:
        LGNet.from_released(nets)
    text = str(error.value)
    assert "G1: " in text
    assert "missing (1): model.model.3.bias" in text
    assert "unexpected (1): model.99.weight" in text
    assert "att_16.combiner.bias: expected [96], got [7]" in text


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"G1": {}}, r"missing \['G2', 'G3'\]"),
        ({"G1": {}, "G2": {}, "G3": {}, "G4": {}}, r"unexpected \['G4'\]"),
        ({"G1": {}, "G2": {}, "G3": {}}, "G1: expected a tensor model.model.0.weight"),
        ({"G1": 3, "G2": {}, "G3": {}}, "G1: expected a state dict"),
        ({"G1": {1: torch.zeros(1)}, "G2": {}, "G3": {}}, "G1: expected a state dict .* other things in the mapping"),
        ("/nowhere/at/all", "expected a directory with"),
        ("x" * 300, "expected a directory with"),
        ({"G1": "x" * 300, "G2": {}, "G3": {}}, "expected a checkpoint file"),
    ],
)
def test_unusable_sources(source, message):
    with pytest.raises(WeightsError, match=message):
        LGNet.from_released(source)


def test_missing_and_broken_files(model, tmp_path):
    with pytest.raises(WeightsError, match="found none"):
        LGNet.from_released(tmp_path)
    save_released(model, tmp_path)
    whole = (tmp_path / "200_net_G2.pth").read_bytes()
    for broken in (whole[: len(whole) // 2], b"", b"not a checkpoint at all"):
        (tmp_path / "200_net_G2.pth").write_bytes(broken)
        with pytest.raises(WeightsError, match="200_net_G2.pth"):
            LGNet.from_released(tmp_path)
    (tmp_path / "200_net_G2.pth").unlink()
    with pytest.raises(WeightsError, match=r"missing in .*200_net_G2\.pth"):
        LGNet.from_released(tmp_path)


def test_the_authors_files_are_sent_to_what_reads_them(model, tmp_path):
    save_released(model, tmp_path)
    with pytest.raises(WeightsError, match="LGNet.from_released and `lgnet-fast convert`"):
        LGNet.from_pretrained(tmp_path)


class Exploit:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("save", [torch.save, lambda o, f: f.write_bytes(pickle.dumps(o))])
def test_a_malicious_pickle_is_refused_and_does_not_run(model, tmp_path, save):
    save_released(model, tmp_path)
    ran = tmp_path / "owned"
    save({"model.model.0.weight": Exploit(str(ran))}, tmp_path / "200_net_G1.pth")
    with pytest.raises(WeightsError, match="200_net_G1.pth was refused"):
        LGNet.from_released(tmp_path)
    assert not ran.exists()


IMPOSTORS = {
    "page": (b"\n<!DOCTYPE html>\n<html><body>Quota exceeded</body></html>", "web page"),
    "upper": (b"<HTML><HEAD><TITLE>403</TITLE>", "web page"),
    "xml": (b"\xef\xbb\xbf<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "web page"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "Git LFS pointer"),
}


@pytest.mark.parametrize("kind", IMPOSTORS)
def test_what_is_no_checkpoint_is_named_and_no_protection_is_talked_down(model, tmp_path, kind):
    content, named = IMPOSTORS[kind]
    save_released(model, tmp_path)
    (tmp_path / "200_net_G2.pth").write_bytes(content)
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "config").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "config" / name).write_bytes((tmp_path / "model" / name).read_bytes())
    (tmp_path / "model" / "model.safetensors").write_bytes(content)
    (tmp_path / "config" / "config.json").write_bytes(content)
    for load in (
        lambda: LGNet.from_released(tmp_path),
        lambda: LGNet.from_pretrained(tmp_path / "model"),
        lambda: LGNet.from_pretrained(tmp_path / "config"),
    ):
        with pytest.raises(WeightsError, match=named) as caught:
            load()
        assert "weights_only" not in str(caught.value)
        assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\0" * 64, b'{"a": 1}', b"PK\3\4 not a zip", b"\x80\x04."])
def test_other_files_that_are_no_checkpoint(tmp_path, content):
    path = tmp_path / "x.pth"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=r"weights: .*x.pth (was refused|is not a readable checkpoint)") as caught:
        load_state_dict_file(path)
    assert "weights_only" not in str(caught.value)
    assert "\x1b" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_one_wrong_bit_is_noticed(tmp_path):
    """`torch.load` does not compare the checksums of the file."""
    torch.save({"x": torch.full((1000,), 0.75)}, tmp_path / "x.pth")
    data = (tmp_path / "x.pth").read_bytes()
    at = data.index(torch.full((10,), 0.75).numpy().tobytes()) + 7
    (tmp_path / "x.pth").write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    with pytest.raises(WeightsError, match=r"weights: .*x.pth is not .*: x/data/0 does not have its checksum$"):
        load_state_dict_file(tmp_path / "x.pth")


@pytest.mark.parametrize("zipped", [True, False])
def test_files_without_checksums_are_read(tmp_path, zipped):
    """Those of a program that has switched checksums off, and of PyTorch before 1.6."""
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"x": torch.full((1000,), 0.75)}, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    finally:
        torch.serialization.set_crc32_options(True)
    if zipped:
        assert {record.CRC for record in zipfile.ZipFile(tmp_path / "x.pth").infolist()} == {0}
    assert load_state_dict_file(tmp_path / "x.pth")["x"].sum() == 750
