"""Saved engines: they load elsewhere, and what is damaged or of another machine is refused."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lgnet_fast import Engine, LGNet, LGNetError, WeightsError, create_model, limits, load_engine, optimize
from lgnet_fast.engine import saved
from lgnet_fast.reference.file_sets import complete_set, staged
from tests.engine_support import assert_same_pixels, narrow_model, needs_extension
from tests.support import assert_accurate, case
from tests.test_plan import NARROW, lively


@pytest.fixture
def model() -> LGNet:
    return narrow_model()


@needs_extension
def test_save_and_load(model, tmp_path):
    image, mask = case("gen256", 1, 256, 256, torch.float32)
    fast = optimize(model)
    fast.save(tmp_path / "engine")
    loaded = load_engine(tmp_path / "engine")
    assert isinstance(loaded, Engine)
    assert torch.equal(loaded(image, mask), fast(image, mask))
    wide, wide_mask = case("gen512", 2, 256, 512, torch.float32)
    assert torch.equal(loaded(wide, wide_mask), fast(wide, wide_mask))


@needs_extension
@pytest.mark.skipif(sys.platform != "linux", reason="names of files are bytes on Linux alone")
def test_a_folder_whose_name_is_not_utf_8(model, tmp_path):
    fast, folder = optimize(model), tmp_path / os.fsdecode(b"\xff")
    fast.save(folder)
    loaded = load_engine(folder)
    loaded.save(folder)  # over the files that it has mapped
    image, mask = case("gen256", 1, 256, 256, torch.float32)
    assert torch.equal(load_engine(folder)(image, mask), loaded(image, mask))
    assert torch.equal(loaded(image, mask), fast(image, mask))


FORKED = """
import os, sys, torch
import lgnet_fast
torch.set_num_threads(2)
widths = {"coarse_channels": 4, "local_channels": 4, "global_channels": 4}
engine = lgnet_fast.optimize(lgnet_fast.create_model("lgnet", **widths), device="cpu", dtype="float32")
engine.save(sys.argv[1])
image, mask = torch.zeros(1, 3, 256, 256), torch.ones(1, 1, 256, 256)
expected = engine(image, mask)
child = os.fork()
if child == 0:
    code = 1
    try:
        code = 0 if torch.equal(lgnet_fast.load_engine(sys.argv[1])(image, mask), expected) else 2
    finally:
        os._exit(code)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.once
@needs_extension
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork() here")
@pytest.mark.skipif(sys.platform == "darwin", reason="macOS's libraries do not work after fork()")
def test_a_saved_engine_loads_in_a_forked_child(tmp_path):
    """There PyTorch has one thread, the kernels have the parent's two."""
    done = subprocess.run([sys.executable, "-c", FORKED, str(tmp_path / "e")], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("0\n", 0), done.stderr


LIMITED = """
import resource, signal, sys
import lgnet_fast
from pathlib import Path
model = lgnet_fast.create_model("lgnet_demo", coarse_channels=4, local_channels=4, global_channels=4).eval()
engine = lgnet_fast.optimize(model, size=(256, 256))
folder = Path(sys.argv[1])
engine.save(folder)
before = sorted(folder.iterdir())
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
try:
    engine.save(folder)
except lgnet_fast.LGNetError as error:
    print(error)
assert sorted(folder.iterdir()) == before
lgnet_fast.load_engine(folder)
"""


@pytest.mark.once
@needs_extension
@pytest.mark.skipif(sys.platform == "win32", reason="resource limits are POSIX's")
def test_a_save_that_the_disk_does_not_take_names_the_reason_and_keeps_the_old_engine(tmp_path):
    folder = tmp_path / "e"
    done = subprocess.run([sys.executable, "-c", LIMITED, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"save: {folder} could not be written: [Errno {errno.EFBIG}] File too large\n"


@pytest.mark.once
@needs_extension
def test_capped_widths_saved_and_loaded(tmp_path):
    torch.manual_seed(0)
    model = lively(create_model("lgnet_small", **NARROW, max_channels=12, backend="eager")).float()
    image, mask = case("gen256", 1, 256, 256, torch.float32)
    with torch.no_grad():
        exact = model.double()(image.double(), mask.double())
    fast = optimize(model.float())
    assert_same_pixels(fast(image, mask), exact, mask)
    fast.save(tmp_path / "engine")
    assert torch.equal(load_engine(tmp_path / "engine")(image, mask), fast(image, mask))


@needs_extension
def test_a_saved_engine_loads_where_processors_were_taken_away(model, tmp_path, monkeypatch):
    """Its kernels were chosen for the program's threads; a worker that is confined later has the same engine."""
    fast = optimize(model)
    fast.save(tmp_path)
    image, mask = case("gen256", 1, 256, 256, torch.float32)
    expected = fast(image, mask)
    monkeypatch.setattr(limits, "narrowed", lambda: 1)
    assert_accurate("confined", load_engine(tmp_path)(image, mask), expected, roundings=2**8)


@needs_extension
@pytest.mark.parametrize("circumstance", ["instruction set", "kernel sources", "threads", "lgnet_fast", "torch"])
def test_an_engine_made_elsewhere_is_refused(model, tmp_path, circumstance, monkeypatch):
    here = saved._circumstances
    with monkeypatch.context() as patch:
        patch.setattr(saved, "_circumstances", lambda isa: here(isa) | {circumstance: "other"})
        optimize(model).save(tmp_path)
    with pytest.raises(LGNetError, match=f"{circumstance}: other there, .* here"):
        load_engine(tmp_path)


@pytest.mark.once
@needs_extension
def test_damaged_engines_are_refused(model, tmp_path):
    optimize(model).save(tmp_path)
    data = bytearray((tmp_path / "weights.bin").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "weights.bin").write_bytes(data)
    with pytest.raises(WeightsError, match=r"weights.bin: damaged or of another save"):
        load_engine(tmp_path)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(
        WeightsError, match=r"expected a manifest.json beside engine.json and weights.bin; save again"
    ):
        load_engine(tmp_path)


def wrong_set(folder: Path, *, manifest_needed: bool = True) -> str:
    """The error of `complete_set` for a folder, without the folder's name."""
    with pytest.raises(WeightsError) as caught:
        complete_set(folder, ("engine.json", "weights.bin"), manifest_needed=manifest_needed)
    assert str(caught.value).startswith(str(folder))
    return str(caught.value).removeprefix(str(folder))


def write_set(folder: Path) -> Path:
    with staged(folder) as staging:
        (staging / "engine.json").write_text("{}")
        (staging / "weights.bin").write_bytes(b"weights")
    return folder


DAMAGED = ": weights.bin: damaged or of another save, size or hash is not what manifest.json says; save again"
UNCHECKED = ", or delete manifest.json to take the files unchecked"


def test_folders_without_a_set_are_told_what_they_lack(tmp_path):
    wanted = ": expected a folder with engine.json, weights.bin and manifest.json, got "
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_bytes(b"")
    assert wrong_set(tmp_path / "empty") == wanted + "none of them"
    assert wrong_set(tmp_path / "file") == wanted + "a file"
    assert wrong_set(tmp_path / "nowhere") == wanted + "nothing of that name"
    folder = write_set(tmp_path / "set")
    (folder / "manifest.json").unlink()
    assert wrong_set(folder) == ": expected a manifest.json beside engine.json and weights.bin; save again"
    assert complete_set(folder, ("engine.json", "weights.bin")) == folder
    (folder / "weights.bin").unlink()
    assert wrong_set(folder) == ": missing weights.bin and manifest.json; save again"


@pytest.mark.parametrize("needed", [True, False])
def test_a_missing_file_is_not_called_damaged(tmp_path, needed):
    folder = write_set(tmp_path)
    (folder / "engine.json").unlink()
    assert wrong_set(folder, manifest_needed=needed) == ": missing engine.json; save again"
    (folder / "weights.bin").unlink()
    assert wrong_set(folder, manifest_needed=needed) == ": missing engine.json and weights.bin; save again"


def test_deleting_the_manifest_is_advised_only_where_files_are_taken_without_one(tmp_path):
    folder = write_set(tmp_path)
    (folder / "weights.bin").write_bytes(b"weighty")
    assert wrong_set(folder) == DAMAGED
    assert wrong_set(folder, manifest_needed=False) == DAMAGED + UNCHECKED
    (folder / "manifest.json").write_text("{}")
    damaged = f"{os.sep}manifest.json is damaged (KeyError: 'files'); save again"
    assert wrong_set(folder) == damaged
    assert wrong_set(folder, manifest_needed=False) == damaged + UNCHECKED


def test_the_folder_of_a_model_is_not_called_a_damaged_engine(tmp_path):
    LGNet("C", coarse_channels=1).save_pretrained(tmp_path)
    expected = ": expected the files engine.json and weights.bin, got a manifest.json of "
    assert wrong_set(tmp_path) in (
        expected + "model.safetensors and config.json",
        expected + "config.json and model.safetensors",
    )


def test_a_killed_saves_complete_set_is_found_before_its_files_are_missed(tmp_path):
    folder = write_set(tmp_path)
    staging = folder / ".saving-1"
    staging.mkdir()
    for name in ("engine.json", "weights.bin"):
        (folder / name).rename(staging / name)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"staging": staging.name}))
    assert complete_set(folder, ("engine.json", "weights.bin"), manifest_needed=True) == staging


@needs_extension
def test_an_engine_is_saved_to_a_path_only(model):
    fast = optimize(model)
    for wrong in (None, 3, b"engine"):
        with pytest.raises(TypeError, match=f"^directory: expected a path, got {wrong!r}$"):
            fast.save(wrong)
        with pytest.raises(TypeError, match=f"^directory: expected a path, got {wrong!r}$"):
            load_engine(wrong)
    with pytest.raises(LGNetError, match="^save: expected a folder's name, got "):
        fast.save("a\0b")


@needs_extension
def test_every_edit_of_an_engines_description_is_noticed(model, tmp_path):
    optimize(model).save(tmp_path)
    for name in ("engine.json", "manifest.json"):
        whole = (tmp_path / name).read_bytes()
        for position in range(0, len(whole), 97 if name == "engine.json" else 1):
            for bit in (0, 3) if name == "engine.json" else (0,):
                damaged = bytearray(whole)
                damaged[position] ^= 1 << bit
                (tmp_path / name).write_bytes(damaged)
                try:
                    complete_set(tmp_path, ("engine.json", "weights.bin"), manifest_needed=True)
                except WeightsError:
                    continue
                # A remaining manifest may differ in names that are not read.
                assert name == "manifest.json"
                now, then = (json.loads(text)["files"] for text in (damaged, whole))
                assert now == then
        (tmp_path / name).write_bytes(whole)
    load_engine(tmp_path)


@needs_extension
@pytest.mark.parametrize(
    "edit",
    [
        lambda d: d.update(size=[1, 257, 256]),
        lambda d: d.update(size="big"),
        lambda d: d["config"].update(coarse_channels=10**9),
        lambda d: d["config"].update(stages=["C"]),
        lambda d: d["state"].pop("dtype"),
        lambda d: d["state"]["choices"].popitem(),
        lambda d: d["state"]["choices"].update({"net_l.down1": "dirict"}),
        lambda d: d["state"]["choices"].update({"net_l.down1": None}),
        lambda d: d.update(state=None),
        lambda d: d.update(bytes=-1),
    ],
)
def test_a_description_that_makes_no_sense_raises_what_is_documented(model, tmp_path, edit, monkeypatch):
    """A file that a program could write, with the right hash."""
    write = json.dumps

    def edited(description, **options):
        if "made for" in description:
            description = json.loads(write(description))
            edit(description)
        return write(description, **options)

    with monkeypatch.context() as patch:
        patch.setattr(json, "dumps", edited)
        optimize(model).save(tmp_path)
    with pytest.raises(LGNetError):
        load_engine(tmp_path)


@needs_extension
@pytest.mark.parametrize("change", ["another variant", "another width", "a shared block"])
def test_an_engine_whose_layers_are_not_those_of_its_config_is_not_saved(model, tmp_path, change):
    """Loading builds the plan from the config. The weights would fit that of another variant."""
    if change == "another variant":
        model.net_g = create_model("lgnet", **NARROW, variant="paper").net_g
    elif change == "another width":
        model.net_l = create_model("lgnet", **NARROW | {"local_channels": 8}).net_l
    else:
        model.net_l.blocks[1] = model.net_l.blocks[0]
    with pytest.raises(LGNetError, match="save: expected an engine of a model with the layers that LGNet made"):
        optimize(model.eval()).save(tmp_path / "engine")
    assert not (tmp_path / "engine").exists()
