"""Files as Windows and macOS see them: locks, renames, names. By stand-ins for these systems, on Linux."""

from __future__ import annotations

import errno
import gc
import os
import socket
import sys
import time
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from lgnet_fast import LGNet, files
from lgnet_fast.cli import output
from lgnet_fast.data.folders import scan
from lgnet_fast.engine.build import _wide
from lgnet_fast.engine.devices import resolve_dtype
from lgnet_fast.errors import BackendError, DataError, JobError
from lgnet_fast.jobs.folders import MasksByName, MasksBySuffix, of_mask
from lgnet_fast.jobs.items import is_special_on_windows
from lgnet_fast.jobs.journal import Journal
from lgnet_fast.jobs.outputs import distinct
from lgnet_fast.jobs.world import World
from lgnet_fast.pipeline import writing
from lgnet_fast.reference.features import registered_features
from lgnet_fast.reference.file_sets import remains_of_saves
from lgnet_fast.serve import command
from lgnet_fast.training import Trainer, TrainingError
from lgnet_fast.training.checkpoints import CheckpointFolder, held
from lgnet_fast.training.sources import HuggingFaceSource

from .cli_support import FILLED, names, run
from .training_support import own_threads, tiny_config, write_pictures  # noqa: F401 (a fixture of this module)

# -- files in use ------------------------------------------------------------------------------------------------


def test_results_and_reports_are_written(case, windows):
    name = "あ" * 40 + ".png"
    (case / "in" / "a.png").rename(case / "in" / name)
    arguments = ["-i", "in", "-m", "m.png", "-o", "out", "--report", "r.json", "--resume"]
    for _ in range(2):
        result = run(*arguments)
        assert result.exit_code == 0, result.stderr
    assert windows == []
    assert [one for one in names(case / "out") if not one.startswith(".")] == ["b.jpg", name]
    with Image.open(case / "out" / name) as written:
        assert written.tobytes() == FILLED.tobytes()


def test_a_file_that_is_in_use_stays_as_it_was(tmp_path, windows):
    path = tmp_path / "a.json"
    path.write_bytes(b"old")
    with open(path, "rb"), pytest.raises(PermissionError):
        writing.write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_file_that_is_held_for_a_moment_is_waited_for(tmp_path, windows, monkeypatch):
    path = tmp_path / "a.json"
    path.write_bytes(b"old")
    file = open(path, "rb")  # noqa: SIM115 (a scanner, which closes it during the first wait)
    monkeypatch.setattr(files.time, "sleep", lambda seconds: file.close())
    writing.write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert windows == [str(path)]


def test_leftovers_go_after_a_minute_but_not_those_that_are_written(tmp_path, windows):
    old = [tmp_path / f".a.png.{'0' * 31}{digit}.tmp" for digit in range(3)]
    for path in old:
        path.write_bytes(b"half")
    for path in old[:2]:
        os.utime(path, (time.time() - 100,) * 2)
    with open(old[1], "rb"):
        writing.remove_leftovers([tmp_path])
        assert names(tmp_path) == [path.name for path in old[1:]]


def test_a_model_that_is_loaded_is_saved_over(tmp_path, windows):
    torch.manual_seed(0)
    size = {"coarse_channels": 2, "local_channels": 2, "global_channels": 2}
    LGNet(**size).save_pretrained(tmp_path)
    for _ in range(2):
        loaded = LGNet.from_pretrained(tmp_path)  # its weights stay mapped
        with torch.no_grad():
            next(loaded.parameters()).add_(1)
        loaded.save_pretrained(tmp_path)
        again = LGNet.from_pretrained(tmp_path)
        assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), again.state_dict().values()))
    assert any(path.endswith(".safetensors") for path in windows)
    del loaded, again
    gc.collect()
    LGNet(**size).save_pretrained(tmp_path)
    assert remains_of_saves(tmp_path) == []


def test_a_checkpoint_that_is_read_does_not_end_a_run(tmp_path, windows):
    folder = CheckpointFolder(tmp_path, keep=1)
    folder.save(1, {"step": 1})
    with open(folder.path(1), "rb"):
        folder.save(2, {"step": 2})
        assert folder.steps() == [1, 2]
    folder.save(3, {"step": 3})
    assert folder.steps() == [3]


# -- locks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("system", ["this one", "Windows"])
def test_a_lock_is_of_one_opening_until_it_is_closed(tmp_path, request, system):
    if system == "Windows":
        request.getfixturevalue("windows")
    path = tmp_path / "a"
    with open(path, "wb", buffering=0) as file:
        file.write(b"line\n")
        assert files.lock(file) is True
        file.write(b"next\n")  # at the place where it was
        assert files.is_locked(path) is True
        with open(path, "rb") as other:
            assert files.lock(other) is False
        assert path.read_bytes() == b"line\nnext\n"
    assert files.is_locked(path) is False
    assert files.is_locked(tmp_path / "none") is None
    with files.lockable(tmp_path) as first, files.lockable(tmp_path) as second:
        assert files.lock(first) is True
        assert files.lock(second) is False
        files.unlock(first)
        assert files.lock(second, wait=True) is True


def test_a_second_run_is_refused_on_windows(tmp_path, windows):
    refused = pytest.raises(TrainingError, match=r"run\.directory: .*, where one is")
    with held(tmp_path / "run"), refused, held(tmp_path / "run"):
        raise AssertionError("two runs in one folder")
    with held(tmp_path / "run"):
        pass

    first = Journal(tmp_path / "job", World(launch="a"))
    with pytest.raises(JobError, match="another run of this job is at work"):
        Journal(tmp_path / "job", World(launch="b"))
    first.close()
    second = Journal(tmp_path / "job", World(launch="c"))
    second.remove_earlier()
    second.close()
    assert [name for name in names(tmp_path / "job") if name.endswith(".jsonl")] == ["c-00000.jsonl"]


@pytest.mark.skipif(files.fcntl is None, reason="no such locks here")
def test_where_there_are_no_locks_a_heartbeat_tells_of_a_run(tmp_path, monkeypatch):
    def flock(*arguments):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(files.fcntl, "flock", flock)
    first = Journal(tmp_path, World(launch="a"))
    with pytest.raises(JobError, match="another run of this job is at work"):
        Journal(tmp_path, World(launch="b"))
    first.finish()
    first.close()
    Journal(tmp_path, World(launch="c")).close()  # not to its end
    for part in tmp_path.glob("*.jsonl"):
        os.utime(part, (time.time() - 11,) * 2)
    Journal(tmp_path, World(launch="d")).close()


# -- names -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a" * 300, "é" * 120, "あ" * 60, "a" + "é" * 120, "\udce3" * 150])
def test_names_of_temporary_files_cut_no_character(name):
    prefix = writing.temporary_prefix(Path(name))
    assert name.startswith(prefix[1:-1])
    assert 97 < len(os.fsencode(prefix)) <= 102


@pytest.mark.parametrize(
    "key",
    [
        "C:/x",
        "C:x",
        "\\x",
        "\\\\server\\share\\x",
        "a\\..\\..\\x",
        "a:b",
        "nul",
        "x/NUL.png",
        "com1",
        "a./b",
        "a/b ",
        "a?",
    ],
)
def test_names_in_shards_that_windows_takes_for_more(key):
    assert is_special_on_windows(key)


@pytest.mark.parametrize("key", ["a", "x/y.z", "null", "com10", "é ü", ".hidden", "console/a"])
def test_names_in_shards_that_windows_takes_as_they_are(key):
    assert not is_special_on_windows(key)


def test_masks_are_found_however_their_accents_are_written(tmp_path):
    one, two = (unicodedata.normalize(form, "été") for form in ("NFC", "NFD"))
    assert one != two
    for picture, mask in ((one, two), (two, one)):
        masks = [tmp_path / f"{mask}.png"]
        assert MasksByName(tmp_path, masks).of_picture(Path(f"{picture}.jpg")) == (masks[0], None)
        masks = [tmp_path / mask / f"{mask}_mask.png"]
        by_suffix = MasksBySuffix(tmp_path, masks, "_mask", [Path(f"{picture}/{picture}.jpg")])
        assert by_suffix.of_picture(Path(f"{picture}/{picture}.jpg")) == (masks, None)
    # Where a file system keeps both spellings apart, each picture has its own mask, and none takes another's.
    pictures, masks = ([Path(f"{name}{end}") for name in (one, two)] for end in (".jpg", ".png"))
    by_name = MasksByName(tmp_path, [tmp_path / mask for mask in masks], pictures)
    assert [by_name.of_picture(picture)[0] for picture in pictures] == [tmp_path / mask for mask in masks]
    alone = MasksByName(tmp_path, [tmp_path / masks[0]], pictures)
    assert [alone.of_picture(picture)[0] for picture in pictures] == [tmp_path / masks[0], None]
    masks = [tmp_path / f"{name}_mask.png" for name in (one, two)]
    by_suffix = MasksBySuffix(tmp_path, masks, "_mask", pictures)
    assert [by_suffix.of_picture(picture)[0] for picture in pictures] == [[mask] for mask in masks]
    assert of_mask(f"a_{two}", f"_{one}") == "a"
    both = [Path(f"{name}.png") for name in (one, two)]
    chosen = distinct(both, [Path(f"{name}.jpg.png") for name in (one, two)])
    assert len({files.folded(name) for name in chosen}) == 2


@pytest.mark.skipif(files.fcntl is None or sys.platform == "darwin", reason="a stand-in for macOS")
def test_the_true_spelling_on_macos(tmp_path, monkeypatch):
    (tmp_path / "Photos").mkdir()

    def spelt(descriptor, command, room):
        assert (command, len(room)) == (50, 1024)
        found = os.readlink(f"/proc/self/fd/{descriptor}")
        return found.replace("photos", "Photos").encode().ljust(1024, b"\0")

    (tmp_path / "photos").symlink_to("Photos")
    monkeypatch.setattr(files.os.path, "realpath", os.path.abspath)  # which keeps the spelling there
    monkeypatch.setattr(files.sys, "platform", "darwin")
    monkeypatch.setattr(files, "fcntl", SimpleNamespace(fcntl=spelt, F_GETPATH=50))
    assert files.real_path(tmp_path / "photos" / "new" / "a.png") == tmp_path / "Photos" / "new" / "a.png"
    assert files.real_path(tmp_path / "other" / "b") == tmp_path / "other" / "b"


def test_a_junction_is_a_link(tmp_path, monkeypatch):
    (tmp_path / "in" / "loop").mkdir(parents=True)
    (tmp_path / "in" / "a.png").write_bytes(b"")
    assert not files.is_link(tmp_path / "in" / "loop")
    tag, lstat = 0xA0000003, os.lstat

    def tagged(path, **options):
        if Path(path).name != "loop":
            return lstat(path, **options)
        return SimpleNamespace(st_mode=lstat(path).st_mode, st_reparse_tag=tag)

    monkeypatch.setattr(files.stat, "IO_REPARSE_TAG_MOUNT_POINT", tag, raising=False)
    monkeypatch.setattr(files.os, "lstat", tagged)
    assert files.is_link(tmp_path / "in" / "loop")
    assert scan(tmp_path / "in", []).pictures == [tmp_path / "in" / "a.png"]


def test_drives_are_no_modules_and_no_splits(monkeypatch):
    assert registered_features("C:\\weights\\vgg16.npz") is None
    assert registered_features("D:/weights/vgg16.npz") is None
    asked = []
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=asked.append))
    with pytest.raises(DataError, match="could not be loaded"):  # it returned nothing
        HuggingFaceSource("hf:C:\\faces:test:picture", "data.pictures")
    assert asked == ["C:\\faces"]


# -- other things of these systems ----------------------------------------------------------------------------------


def test_a_folder_without_the_right_to_write_is_told_at_once(tmp_path, monkeypatch):
    trial = Path(tmp_path / "x")
    with monkeypatch.context() as patched:
        patched.setattr(files.os, "name", "nt")
        files.check_writable(trial.parent, b"{}")
        with pytest.raises(FileNotFoundError):
            files.check_writable(trial, b"{}")
    assert os.listdir(tmp_path) == []


def test_a_port_in_use_is_not_shared(monkeypatch):
    asked = []

    class Listening(socket.socket):
        def setsockopt(self, *arguments):
            asked.append(arguments)

    monkeypatch.setattr(command.socket, "socket", Listening)
    monkeypatch.setattr(socket, "SO_EXCLUSIVEADDRUSE", -5, raising=False)
    command._socket(SimpleNamespace(host="127.0.0.1", port=0)).close()
    assert asked == [(socket.SOL_SOCKET, -5, 1)]


def test_a_pipe_that_nobody_reads_is_no_error_of_the_output(monkeypatch):
    with pytest.raises(output.OutputError, match="Invalid argument"), output._written():
        raise OSError(errno.EINVAL, "Invalid argument")
    monkeypatch.setattr(output.os, "name", "nt")
    with pytest.raises(BrokenPipeError), output._written():
        raise OSError(errno.EINVAL, "Invalid argument")


def test_weights_of_apples_gpus_are_folded_on_the_cpu():
    values = torch.tensor([1.5, 2.5])
    there = SimpleNamespace(device=torch.device("mps:0"), cpu=lambda: values)
    there.detach = lambda: there
    wide = _wide(there)
    assert (wide.dtype, wide.device.type, wide.tolist()) == (torch.float64, "cpu", [1.5, 2.5])
    assert resolve_dtype("float16", torch.device("mps")) == torch.float16
    with pytest.raises(BackendError, match="on MPS, which has no float64"):
        resolve_dtype("float64", torch.device("mps"))


def test_a_program_without_a_guard_is_told_so(tmp_path, monkeypatch):
    import multiprocessing

    config = tiny_config(write_pictures(tmp_path / "pictures", 1), tmp_path / "run")
    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)
    with pytest.raises(TrainingError, match="under `if __name__ == '__main__':`"):
        Trainer(config)
