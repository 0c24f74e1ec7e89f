"""Loading and saving weights: the authors' files, safetensors, and files that must be rejected."""

from __future__ import annotations

import csv
import gzip
import json
import os
import pickle
import signal
import subprocess
import sys
import threading

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lgnet_fast import LGNet, LGNetError, WeightsError, create_model
from lgnet_fast.reference.released import load_state_dict_file
from lgnet_fast.weights import bundled_path
from tests.support import keys


@pytest.fixture
def model() -> LGNet:
    torch.manual_seed(0)
    return create_model("lgnet_demo", coarse_channels=8, local_channels=4, global_channels=12).eval()


def save_released(model: LGNet, folder, epoch: str = "200", prefix: str = "") -> None:
    for net, state in model.to_released().items():
        torch.save({prefix + k: v for k, v in state.items()}, folder / f"{epoch}_net_{net}.pth")


def same(a: LGNet, b: LGNet) -> bool:
    sa, sb = a.state_dict(), b.state_dict()
    return sa.keys() == sb.keys() and all(torch.equal(sa[k], sb[k]) and sa[k].dtype == sb[k].dtype for k in sa)


def test_released_names_and_shapes_are_the_authors(model):
    with torch.device("meta"):
        full = create_model("lgnet")
    for net, state in full.to_released().items():
        assert {k: list(v.shape) for k, v in state.items()} == keys()["shapes"][net]


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
    assert (tmp_path / "m" / "model.safetensors").stat().st_mode & 0o777 == 0o644


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


def test_stored_dtype(model, tmp_path):
    model.save_pretrained(tmp_path / "half", dtype=torch.float16)
    model.save_pretrained(tmp_path / "full")
    size = {k: (tmp_path / k / "model.safetensors").stat().st_size for k in ("half", "full")}
    assert size["half"] < 0.6 * size["full"]
    loaded = LGNet.from_pretrained(tmp_path / "half")
    for a, b in zip(loaded.parameters(), model.parameters(), strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b.half().float())


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


def test_a_failed_save_keeps_the_old_file(model, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    for error in (OSError(28, "No space left on device"), SafetensorError("I/O error: No space left on device")):

        def full_disk(*args, error=error, **kwargs):
            raise error

        monkeypatch.setattr("lgnet_fast.reference.pretrained.save_file", full_disk)
        with pytest.raises(LGNetError, match="save: .* could not be written: .*No space"):
            create_model("lgnet_demo").save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert same(model, LGNet.from_pretrained(tmp_path))
    assert not list(tmp_path.glob(".saving-*"))


KILLED = """
import os, signal, sys
import torch
from lgnet_fast import LGNet
from lgnet_fast.reference import folders

torch.set_num_threads(1)
torch.manual_seed(1)
model = LGNet("C", variant="paper", coarse_channels=1)

def save(folder, steps):
    calls = 0

    def stop(real):
        def call(*args, **kwargs):
            nonlocal calls
            if calls == steps:
                os.kill(os.getpid(), signal.SIGKILL)
            calls += 1
            return real(*args, **kwargs)
        return call

    def no_links(*args):
        raise OSError("no links here")

    os.link = stop(os.link if sys.argv[1] == "links" else no_links)
    os.replace, os.fsync = stop(os.replace), stop(os.fsync)
    folders.shutil.rmtree = stop(folders.shutil.rmtree)
    model.save_pretrained(folder)

for steps, folder in enumerate(sys.argv[2:]):
    pid = os.fork()
    if pid == 0:
        save(folder, steps)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


def killed_saves(links: str, folders) -> list[int]:
    """Exit codes of saves of one model, to these folders, killed before their first, second, ... change of it."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED, links, *folders], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return [int(status) for status in done.stdout.split()]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork() here")
@pytest.mark.parametrize("links", ["links", "copies"])
def test_a_save_killed_anywhere_leaves_the_old_set_or_the_new_one(tmp_path, links):
    """Killed before every call that changes the folder, one after another; then the next save cleans up."""
    torch.manual_seed(0)
    old = LGNet("C", coarse_channels=1)
    torch.manual_seed(1)
    new = LGNet("C", variant="paper", coarse_channels=1)
    folders = [tmp_path / str(steps) for steps in range(16)]
    for folder in folders:
        old.save_pretrained(folder)
    seen = []
    for folder, status in zip(folders, killed_saves(links, folders), strict=True):
        loaded = LGNet.from_pretrained(folder)
        assert same(loaded, new if loaded.variant == "paper" else old)
        seen.append((status, loaded.variant))
        assert len(list(folder.glob(".saving-*"))) <= 1
        old.save_pretrained(folder)
        assert same(LGNet.from_pretrained(folder), old)
        assert not list(folder.glob(".saving-*"))
    assert (-signal.SIGKILL, "released") in seen
    assert (-signal.SIGKILL, "paper") in seen
    assert seen[-1] == (0, "paper"), "one save has fewer calls than were stopped"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork() here")
@pytest.mark.parametrize("links", ["links", "copies"])
def test_a_first_save_killed_anywhere_leaves_the_whole_model_or_an_error_that_says_so(tmp_path, links):
    torch.manual_seed(1)
    new = LGNet("C", variant="paper", coarse_channels=1)
    folders = [tmp_path / str(steps) for steps in range(20)]
    seen = set()
    for folder, status in zip(folders, killed_saves(links, folders), strict=True):
        written = (folder / "manifest.json").exists()
        if written:
            assert same(LGNet.from_pretrained(folder), new)
        else:
            with pytest.raises(WeightsError, match="was killed before its files were complete: save again"):
                LGNet.from_pretrained(folder)
        seen.add((status, written))
    assert seen == {(-signal.SIGKILL, False), (-signal.SIGKILL, True), (0, True)}


def test_a_folder_that_lost_a_file_of_its_manifest_says_so(model, tmp_path):
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match="missing model.safetensors; save again$"):
        LGNet.from_pretrained(tmp_path)


def test_a_mixture_of_two_saves_is_refused(model, tmp_path):
    model.save_pretrained(tmp_path / "a")
    other = LGNet(variant="paper", coarse_channels=8, local_channels=4, global_channels=12)
    other.save_pretrained(tmp_path / "b")
    (tmp_path / "b" / "model.safetensors").replace(tmp_path / "a" / "model.safetensors")
    with pytest.raises(WeightsError, match=r"model.safetensors: damaged or of another save"):
        LGNet.from_pretrained(tmp_path / "a")
    (tmp_path / "a" / "manifest.json").unlink()  # as in a download from a hub: taken as it is
    assert LGNet.from_pretrained(tmp_path / "a").variant == "released"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "manifest.json"])
def test_a_flipped_bit_in_any_file_is_noticed(model, tmp_path, name):
    model.save_pretrained(tmp_path)
    whole = (tmp_path / name).read_bytes()
    for position in (0, len(whole) // 3, len(whole) // 2):
        damaged = bytearray(whole)
        damaged[position] ^= 4
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(WeightsError, match=r"manifest.json"):
            LGNet.from_pretrained(tmp_path)
    (tmp_path / name).write_bytes(whole)
    assert same(LGNet.from_pretrained(tmp_path), model)


def test_two_saves_of_one_folder_do_not_mix(model, tmp_path):
    others = [LGNet("C", coarse_channels=1 + n) for n in range(4)]
    threads = [threading.Thread(target=other.save_pretrained, args=(tmp_path,)) for other in others]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    loaded = LGNet.from_pretrained(tmp_path)
    assert same(loaded, others[loaded.channels[0] - 1])
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "README.md", "config.json", "manifest.json", "model.safetensors"
    ]  # fmt: skip


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
    ):
        with pytest.raises(WeightsError) as caught:
            LGNet.from_pretrained(tmp_path, **arguments)
        assert str(caught.value) == f"weights: {str(tmp_path)!r} could not be loaded: {message}"
    (tmp_path / "config.json").write_text(json.dumps(config | {"variant": "nips"}))
    with pytest.raises(WeightsError, match=r"/config.json: variant: expected one of .*, got 'nips'$"):
        LGNet.from_pretrained(tmp_path, backend="eager")


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
    with gzip.open(path / "ATTRIBUTION.tsv.gz", "rt") as table:
        rows = list(csv.DictReader(table, delimiter="\t"))
    assert len(rows) == 1680
    assert all(row["licence"] and row["source"] for row in rows)
    with pytest.raises(ValueError, match="name: expected one of"):
        bundled_path("nonsense")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
@pytest.mark.parametrize(("umask", "rights"), [(0o077, 0o600), (0o022, 0o644), (0o027, 0o640)])
@pytest.mark.parametrize("links", [True, False], ids=["links", "copies"])
def test_others_may_read_a_model_where_the_umask_lets_them(tmp_path, monkeypatch, umask, rights, links):
    def no_links(*args):
        raise OSError("no links on this file system")

    if not links:
        monkeypatch.setattr(os, "link", no_links)
    before = os.umask(umask)
    try:
        create_model("lgnet_demo", coarse_channels=4, local_channels=4, global_channels=4).save_pretrained(tmp_path)
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"config.json", "model.safetensors", "manifest.json"} <= {path.name for path in files}
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in files} == {p.name: oct(rights) for p in files}


@pytest.mark.parametrize("wrong", [None, 3, b"model"])
def test_a_model_is_saved_to_a_path_only(wrong):
    with pytest.raises(TypeError, match=f"^save_directory: expected a path, got {wrong!r}$"):
        create_model("lgnet_demo").save_pretrained(wrong)
