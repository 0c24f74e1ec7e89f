"""Saves that fail, are killed or meet: the old set of files or the new one, and mixtures that are refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest
import torch
from safetensors import SafetensorError

from lgnet_fast import LGNet, LGNetError, WeightsError, create_model
from tests.weights_support import demo_model, same


@pytest.fixture
def model() -> LGNet:
    return demo_model()


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
from lgnet_fast.reference import file_sets

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
    file_sets.shutil.rmtree = stop(file_sets.shutil.rmtree)
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


def test_a_name_that_no_folder_can_have_is_one_clear_error():
    with pytest.raises(LGNetError) as caught:
        LGNet("C", coarse_channels=1).save_pretrained("a\0b")
    assert str(caught.value) == "save: expected a folder's name, got 'a\\x00b'"


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are bytes on Linux alone")
def test_a_name_that_is_not_utf_8_is_one_clear_error(tmp_path):
    folder = tmp_path / os.fsdecode(b"\xff")
    with pytest.raises(LGNetError) as caught:
        LGNet("C", coarse_channels=1).save_pretrained(folder)
    assert str(caught.value).startswith(f"save: {folder} could not be written: 'utf-8' codec can't encode ")
    assert list(folder.iterdir()) == []
