"""The cache folder: damaged files, races and missing rights."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch

from lgnet_fast import cache
from lgnet_fast.cache import CHOICES, VERDICTS, Key

KEY = Key("a card", "580.1", "2.11", "3.6", "0.1.0", "float16")


@pytest.fixture
def where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(cache.ENVIRONMENT, str(tmp_path / "kept"))
    forget(monkeypatch)
    return tmp_path / "kept"


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget values in memory, as in a new process."""
    monkeypatch.setattr(cache, "_known", {})
    monkeypatch.setattr(cache, "_complained", set())


def test_values_come_back_in_a_new_process(where: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache.get(KEY, VERDICTS, "x") is None
    assert cache.put(KEY, VERDICTS, "x", {"runs": "graph", "steps": [1, 2]})
    assert cache.put(KEY, CHOICES, "x", "128x64")
    forget(monkeypatch)
    assert cache.get(KEY, VERDICTS, "x") == {"runs": "graph", "steps": [1, 2]}
    assert cache.get(KEY, CHOICES, "x") == "128x64"
    assert [(e.key, e.name, e.value) for e in cache.entries(CHOICES)] == [(KEY, "x", "128x64")]
    assert not [p for p in where.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("field", Key.__dataclass_fields__)
def test_another_machine_or_version_knows_nothing(where: Path, field: str) -> None:
    cache.put(KEY, VERDICTS, "x", 1)
    other = Key(**{**KEY.__dict__, field: "another"})
    assert cache.get(other, VERDICTS, "x") is None
    cache.put(other, VERDICTS, "x", 2)
    assert cache.get(KEY, VERDICTS, "x") == 1


@pytest.mark.parametrize(
    "damage",
    ["", "{", "[]", "null", "\x00\x01", '{"schema": 1}', '{"schema": 99}', '{"schema": 1, "key": 3}', "[" * 100_000],
)
def test_damaged_files_are_as_if_not_there(where: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    cache.put(KEY, VERDICTS, "x", 1)
    (file,) = where.iterdir()
    file.write_text(damage)
    forget(monkeypatch)
    assert cache.get(KEY, VERDICTS, "x") is None
    assert list(cache.entries(VERDICTS)) == []
    assert cache.put(KEY, VERDICTS, "x", 2)
    forget(monkeypatch)
    assert cache.get(KEY, VERDICTS, "x") == 2


def test_one_wrong_bit_gives_no_other_value(where: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    value = {10: "128x64", 2: [0.1, 1e-300, True, None], "runs": "graph"}
    cache.put(KEY, CHOICES, "x", value)
    (file,) = where.iterdir()
    data, known = file.read_bytes(), json.loads(json.dumps(value))
    forget(monkeypatch)
    assert cache.get(KEY, CHOICES, "x") == known
    answers = []
    for at in range(len(data)):
        file.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        forget(monkeypatch)
        answers.append(cache.get(KEY, CHOICES, "x"))
    assert all(answer in (None, known) for answer in answers)
    assert sum(answer is None for answer in answers) > len(data) / 2
    older = json.loads(data)
    del older["hash"]  # a file of an earlier version
    file.write_text(json.dumps(older))
    forget(monkeypatch)
    assert cache.get(KEY, CHOICES, "x") == known


def test_bytes_that_are_no_text(where: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.put(KEY, VERDICTS, "x", 1)
    (file,) = where.iterdir()
    file.write_bytes(b"\xff\xfe\x80")
    forget(monkeypatch)
    assert cache.get(KEY, VERDICTS, "x") is None


def test_a_file_of_another_key_is_not_believed(where: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.put(KEY, VERDICTS, "x", 1)
    (file,) = where.iterdir()
    content = json.loads(file.read_text())
    content["key"]["card"] = "another"
    file.write_text(json.dumps(content))
    forget(monkeypatch)
    assert cache.get(KEY, VERDICTS, "x") is None


def test_a_folder_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    blocked = tmp_path / "a file"
    blocked.write_text("")
    monkeypatch.setenv(cache.ENVIRONMENT, str(blocked))
    forget(monkeypatch)
    with caplog.at_level(logging.INFO, logger="lgnet_fast"):
        assert not cache.put(KEY, VERDICTS, "x", 1)
        assert not cache.put(KEY, VERDICTS, "y", 2)
    assert [cache.get(KEY, VERDICTS, name) for name in "xy"] == [1, 2]
    assert [r.levelname for r in caplog.records] == ["INFO"]
    assert list(cache.entries(VERDICTS)) == []
    cache.drop(KEY, VERDICTS)
    assert cache.get(KEY, VERDICTS, "x") is None


def test_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    forget(monkeypatch)
    monkeypatch.delenv(cache.ENVIRONMENT)
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.setattr(Path, "expanduser", lambda path: homeless())
    assert cache.folder() is None
    assert not cache.put(KEY, VERDICTS, "x", 1)
    assert cache.get(KEY, VERDICTS, "x") == 1
    assert list(cache.entries(VERDICTS)) == []


@pytest.mark.parametrize("name", [cache.ENVIRONMENT, "XDG_CACHE_HOME"])
def test_a_tilde_is_the_home(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forget(monkeypatch)
    monkeypatch.delenv(cache.ENVIRONMENT)
    monkeypatch.setattr(sys, "platform", "linux")
    for home in ("HOME", "USERPROFILE"):  # the other one is Windows'
        monkeypatch.setenv(home, str(tmp_path))
    monkeypatch.setenv(name, "~/kept")
    below = "" if name == cache.ENVIRONMENT else "lgnet_fast"
    assert cache.folder() == tmp_path / "kept" / below
    monkeypatch.setenv(name, "~nobody_of_this_name/kept")
    assert cache.folder() is None
    assert not cache.put(KEY, VERDICTS, "x", 1)
    assert cache.get(KEY, VERDICTS, "x") == 1


def test_an_interrupted_write_leaves_what_was_there(where: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.put(KEY, VERDICTS, "x", 1)

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        assert not cache.put(KEY, VERDICTS, "x", 2)
    assert len(list(where.iterdir())) == 1
    forget(monkeypatch)
    assert cache.get(KEY, VERDICTS, "x") == 1


@pytest.mark.skipif(os.name == "nt", reason="rights of files are others there")
def test_other_users_can_read_what_is_kept(where: Path) -> None:
    """As when root tunes while an image is built, and its programs run as another user."""
    before = os.umask(0o022)
    try:
        cache.put(KEY, CHOICES, "x", 1)
        cache.put_first(KEY, CHOICES, "y", 2)
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in where.iterdir()] == [0o644, 0o644]


def test_dropped_sections_are_forgotten_others_stay(where: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.put(KEY, VERDICTS, "x", 1)
    cache.put(KEY, CHOICES, "x", 2)
    cache.drop(KEY, VERDICTS)
    forget(monkeypatch)
    assert cache.get(KEY, VERDICTS, "x") is None
    assert cache.get(KEY, CHOICES, "x") == 2


WRITER = """
import sys
from lgnet_fast import cache
key = cache.Key("a card", "580.1", "2.11", "3.6", "0.1.0", "float16")
for number in range(50):
    assert cache.put(key, "verdicts", "shared", [int(sys.argv[1])] * 500)
    cache._known.clear()
    value = cache.get(key, "verdicts", "shared")
    assert len(value) == 500 and len(set(value)) == 1, value
    assert cache.put(key, "verdicts", f"own {sys.argv[1]} {number}", number)
"""


def test_processes_share_the_folder(where: Path) -> None:
    processes = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(i)], stderr=subprocess.PIPE, text=True) for i in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors
    assert len(list(cache.entries(VERDICTS))) == 101


def test_key_of_this_machine() -> None:
    key = cache.key_for(torch.device("cpu"), torch.bfloat16)
    assert key.dtype == "bfloat16"
    assert key.torch == torch.__version__
    assert key.card.startswith("cpu")
    assert key.digest != cache.key_for(torch.device("cpu"), torch.float16).digest


def test_key_changes_with_the_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = ModuleSpec("lgnet_fast.kernels", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(cache, "find_spec", lambda name: spec)
    known = {cache._package()}
    (tmp_path / "machine_code").mkdir()
    for name, counts in (("conv.py", True), ("machine_code/a.cubin", True), ("notes.txt", False)):
        for content in (b"1", b"2"):
            (tmp_path / name).write_bytes(content)
            assert (cache._package() not in known) == counts
            known.add(cache._package())


ZEN = "processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: {}\nmodel\t\t: {}\nmodel name\t: AMD  EPYC\n\n"
ARM = "processor\t: 0\nBogoMIPS\t: 243.75\nCPU implementer\t: 0x41\nCPU part\t: 0xd40\n\n"


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (ZEN.format(25, 17) + ZEN.format(26, 2), "AMD EPYC (cpu family 25, model 17)"),
        (ZEN.format(26, 2), "AMD EPYC (cpu family 26, model 2)"),
        (ARM + ARM, "0x41/0xd40"),
    ],
)
def test_the_processor_is_named_as_precisely_as_the_system_does(tmp_path: Path, content: str, name: str) -> None:
    (tmp_path / "cpuinfo").write_text(content)
    assert cache.processor(tmp_path / "cpuinfo") == name


def test_a_processor_that_the_system_does_not_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache.platform, "processor", lambda: "AMD64 Family 25 Model 33")
    (tmp_path / "empty").write_text("")
    assert {cache.processor(tmp_path / name) for name in ("empty", "missing")} == {"AMD64 Family 25 Model 33"}


@pytest.mark.parametrize("links", [True, False])
def test_of_processes_that_store_at_once_all_return_one_value(
    where: Path, links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process stores its value after this one has looked for it."""
    if not links:

        def refuse(*paths: str) -> None:
            raise PermissionError("no hard links here")

        monkeypatch.setattr(os, "link", refuse)
    assert cache.put_first(KEY, cache.CHOICES, "a", 1) == 1
    monkeypatch.setattr(cache, "_known", {})
    assert cache.put_first(KEY, cache.CHOICES, "a", 2) == cache.get(KEY, cache.CHOICES, "a") == 1

    read = cache._read

    def late(path: Path) -> cache.Entry | None:
        monkeypatch.setattr(cache, "_read", read)
        cache.put(KEY, cache.CHOICES, "b", "theirs")
        return None

    monkeypatch.setattr(cache, "_read", late)
    stored = cache.put_first(KEY, cache.CHOICES, "b", "mine")
    assert stored == cache.get(KEY, cache.CHOICES, "b") == ("theirs" if links else "mine")
    monkeypatch.setattr(cache, "_known", {})
    assert cache.get(KEY, cache.CHOICES, "b") == stored
    assert not list(where.glob(".writing-*"))


def test_a_first_value_replaces_a_damaged_file(where: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.put(KEY, cache.CHOICES, "a", 1)
    (file,) = where.iterdir()
    file.write_text("{")
    monkeypatch.setattr(cache, "_known", {})
    assert cache.put_first(KEY, cache.CHOICES, "a", 2) == 2
    monkeypatch.setattr(cache, "_known", {})
    assert cache.get(KEY, cache.CHOICES, "a") == 2


def test_an_interrupted_process_leaves_no_half_file(where: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*paths: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        cache.put(KEY, cache.CHOICES, "a", 1)
    assert not list(where.iterdir())
