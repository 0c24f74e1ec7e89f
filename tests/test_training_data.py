"""Training data: modes, protocols and masks, samples independent of the reader, what cannot be read is replaced."""

from __future__ import annotations

import hashlib
import itertools
import multiprocessing
import os
import signal
import sys
import time
import typing

import numpy as np
import pytest
import torch
from PIL import Image

from lgnet_fast.training import DataError, hole_class
from lgnet_fast.training.config import DataConfig
from lgnet_fast.training.crops import PROTOCOLS, crop_box
from lgnet_fast.training.held_out import HeldOut, HeldOutPairs
from lgnet_fast.training.loader import PositionSampler, _start_worker, make_loader
from lgnet_fast.training.memory import MemoryBatches
from tests.training_support import dataset, write_pictures


def first(loader, count):
    return list(itertools.islice(iter(loader), count))


def read(data, count, batch_size=2, start=0, rank=0, processes=1):
    return first(make_loader(data, PositionSampler(start, batch_size, rank, processes), pin=False), count)


def assert_same_batches(a, b):
    for x, y in zip(a, b, strict=True):
        assert x["name"] == y["name"]
        assert torch.equal(x["image"], y["image"])
        assert torch.equal(x["mask"], y["mask"])


# -- samples ----------------------------------------------------------------------------------------------------


def test_a_sample(tmp_path):
    data = dataset(write_pictures(tmp_path / "p"), hole_classes=(1, 4))
    classes = set()
    for sample in (data[i] for i in range(20)):
        assert sample.image.shape == (3, 256, 256)
        assert sample.image.dtype == sample.mask.dtype == torch.float32
        assert -1 <= sample.image.min() < sample.image.max() <= 1
        assert sample.mask.unique().tolist() == [0, 1]
        classes.add(hole_class(sample.mask[0].bool().numpy()))
        assert sample.broken == []
    assert classes == {1, 4}


def test_every_epoch_has_every_picture_in_another_order_with_other_crops(tmp_path):
    data = dataset(write_pictures(tmp_path / "p", 6, (400, 300)))
    epochs = [[data[p] for p in range(e * 6, e * 6 + 6)] for e in range(3)]
    names = [[s.name for s in epoch] for epoch in epochs]
    assert all(sorted(n) == sorted(names[0]) for n in names)
    assert len(set(names[0])) == 6
    assert len({tuple(n) for n in names}) > 1
    by_name = [{s.name: s for s in epoch} for epoch in epochs]
    for name in names[0]:
        assert not torch.equal(by_name[0][name].image, by_name[1][name].image)
        assert not torch.equal(by_name[0][name].mask, by_name[1][name].mask)
    other = dataset(tmp_path / "p", seed=1)
    assert not torch.equal(other[0].mask, epochs[0][0].mask)


def test_workers_and_a_later_start_change_nothing(tmp_path):
    data = dataset(write_pictures(tmp_path / "p"))
    alone = read(data, 6)
    assert_same_batches(alone, read(dataset(tmp_path / "p", workers=2), 6))
    assert_same_batches(alone[4:], read(dataset(tmp_path / "p"), 2, start=4))


def test_each_of_several_processes_goes_on_behind_what_all_have_read():
    started = [next(iter(PositionSampler(3, 2, rank, 4))) for rank in range(4)]
    assert started == [[24, 25], [26, 27], [28, 29], [30, 31]]


def test_processes_together_read_what_one_reads(tmp_path):
    data = dataset(write_pictures(tmp_path / "p"))
    whole = read(data, 4, batch_size=4)
    parts = [read(data, 4, batch_size=2, rank=rank, processes=2) for rank in range(2)]
    joined = [
        {"name": a["name"] + b["name"], **{k: torch.cat((a[k], b[k])) for k in ("image", "mask")}}
        for a, b in zip(*parts, strict=True)
    ]
    assert_same_batches(whole, joined)


def write_noise(folder):
    """Pictures whose shorter edge is the network's size, so that no resampling changes their pixels."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(rng.integers(0, 256, (256, 300 + 10 * i, 3)).astype(np.uint8)).save(folder / f"{i}.png")
    return folder


def digest_of(pairs):
    """Of (image in [-1, 1], mask) pairs, in 8-bit levels."""
    digest = hashlib.sha256()
    for image, mask in pairs:
        digest.update(image.mul(127.5).add(127.5).round().byte().numpy().tobytes())
        digest.update(mask.bool().numpy().tobytes())
    return digest.hexdigest()[:16]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "f3fa643d66d951e9"),
        ({"mask_kind": "fine"}, "ab5df239e32679bb"),
        ({"mask_kind": "mixed", "hole_classes": (1, 3)}, "48e2e50513dfa0e7"),
        ({"masks": "FOLDER"}, "5f684ab63c7917b3"),
    ],
)
def test_the_random_numbers_of_a_seed_stay_the_same(tmp_path, options, expected):
    """Order, crop, mirroring and mask of three epochs: a change makes a run that is resumed another one."""
    (tmp_path / "m").mkdir()
    for i in range(3):
        mask = np.zeros((256, 256), dtype=np.uint8)
        mask[: 40 * (i + 1), :90] = 255
        Image.fromarray(mask).save(tmp_path / "m" / f"{i}.png")
    options = {name: str(tmp_path / "m") if value == "FOLDER" else value for name, value in options.items()}
    data = dataset(write_noise(tmp_path / "p"), seed=7, protocol="paris_streetview", **options)
    assert digest_of((data[i].image, data[i].mask) for i in range(9)) == expected


def test_the_masks_of_the_validation_stay_the_same(tmp_path):
    pairs = HeldOutPairs(HeldOut(str(write_noise(tmp_path / "p")), 256, "photos", None), (0, 4), 7)
    assert digest_of(pairs) == "e2904a2bf823b4e3"  # a change makes earlier scores incomparable


def test_random_state_of_the_caller_is_left_alone(tmp_path):
    data = dataset(write_pictures(tmp_path / "p"))
    before = torch.get_rng_state()
    read(data, 2)
    assert torch.equal(before, torch.get_rng_state())


def test_broken_pictures_are_replaced_and_named(tmp_path):
    folder = write_pictures(tmp_path / "p", 4)
    (folder / "2.png").write_bytes((folder / "2.png").read_bytes()[:300])
    data = dataset(folder)
    batches = read(data, 4, batch_size=4)
    for batch in batches:
        assert len(batch["name"]) == 4
        assert not any(name.endswith("2.png") for name in batch["name"])
        ((name, reason),) = batch["broken"]
        assert name == str(folder / "2.png")
        assert "expected a readable picture" in reason
    for file in folder.iterdir():
        file.write_bytes(b"nothing")
    with pytest.raises(DataError, match="data.pictures: none of 4 in a row can be read; the first: .*png"):
        dataset(folder)[0]  # the other one remembers what it has decoded


# -- pictures of every kind -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "1", "CMYK", "I;16"])
def test_modes(tmp_path, mode):
    rgb = np.zeros((256, 256, 3), dtype=np.uint8)
    rgb[:128] = 255
    if mode == "I;16":
        picture = Image.fromarray(rgb[..., 0].astype(np.uint16) * 257)
    else:
        picture = Image.fromarray(rgb).convert(mode)
    picture.save(tmp_path / f"a.{'tif' if mode == 'CMYK' else 'png'}")
    image = dataset(tmp_path, protocol="celeba_hq")[0].image
    assert image[:, :128].unique().tolist() == [1]
    assert image[:, 128:].unique().tolist() == [-1]


def test_exif_orientation_turns_the_picture(tmp_path):
    upright = np.zeros((256, 256), dtype=np.uint8)
    upright[:64] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned by a quarter
    Image.fromarray(np.rot90(upright)).save(tmp_path / "a.jpg", quality=95, exif=exif)
    image = dataset(tmp_path, protocol="celeba_hq")[0].image
    assert image[:, :60].min() > 0.9
    assert image[:, 68:].max() < -0.9


# -- protocols --------------------------------------------------------------------------------------------------


def ramp(tmp_path, width, height):
    """Red grows from left to right and green from top to bottom, 0 to 250."""
    x, y = np.meshgrid(np.linspace(0, 250, width), np.linspace(0, 250, height))
    Image.fromarray(np.uint8(np.stack((x, y, 0 * x), axis=2))).save(tmp_path / "a.png")


def test_whole_pictures_are_squashed(tmp_path):
    ramp(tmp_path, 600, 300)
    for position in range(4):
        red, green, _ = (dataset(tmp_path, protocol="places2")[position].image + 1) * 127.5
        assert sorted([red[0, 0].item(), red[0, -1].item()]) == pytest.approx([0, 250], abs=3)
        assert [green[0, 0].item(), green[-1, 0].item()] == pytest.approx([0, 250], abs=3)


@pytest.mark.parametrize(("protocol", "largest"), [("logo_removal", 1.0), ("paris_streetview", 1.0), ("photos", 2.0)])
def test_crops_of_the_shorter_edge(tmp_path, protocol, largest):
    ramp(tmp_path, 1200, 600)
    data = dataset(tmp_path, protocol=protocol)
    shares, lefts = [], []
    for position in range(12):
        red, green, _ = (data[position].image + 1) * 127.5
        across = abs(red[0, -1] - red[0, 0]).item() / 250  # share of the width
        down = (green[-1, 0] - green[0, 0]).item() / 250
        assert across * 2 == pytest.approx(down, abs=0.05)  # proportions are kept
        shares.append(down)
        lefts.append(min(red[0, 0], red[0, -1]).item())
    assert max(lefts) - min(lefts) > 40
    assert 1 / largest - 0.03 <= min(shares) <= max(shares) <= 1.01
    assert (min(shares) < 0.8) == (largest > 1)
    (image, mask), *rest = HeldOutPairs(HeldOut(str(tmp_path), 256, protocol, None), (0, 3), 0)
    assert len(rest) == 1
    red, green, _ = (image[0] + 1) * 127.5
    assert [red[0, 0].item(), red[0, -1].item()] == pytest.approx([62.5, 187.5], abs=3)  # the centre
    assert [green[0, 0].item(), green[-1, 0].item()] == pytest.approx([0, 250], abs=3)
    assert [hole_class(m[0, 0].bool().numpy()) for m in (mask, rest[0][1])] == [0, 3]


def test_crop_boxes_stay_inside():
    rng = np.random.default_rng(0)
    for height, width in [(256, 256), (1, 300), (300, 1), (31, 77), (1000, 257), (255, 256)]:
        for largest in (1.0, 2.0):
            for generator in [None] + [rng] * 20:
                left, top, right, bottom = crop_box(height, width, 256, largest, generator)
                assert 0 <= left < right <= width
                assert 0 <= top < bottom <= height


def test_flips_half_of_the_pictures(tmp_path):
    ramp(tmp_path, 256, 256)
    data = dataset(tmp_path, protocol="places2")
    flipped = sum(bool(data[i].image[0, 0, 0] > 0) for i in range(40))
    assert 10 <= flipped <= 30


# -- masks ------------------------------------------------------------------------------------------------------


def test_masks_of_a_folder(tmp_path):
    (tmp_path / "m").mkdir()
    mask = np.zeros((512, 512), dtype=np.uint8)
    mask[:128, :256] = 255
    Image.fromarray(mask).save(tmp_path / "m" / "0.png")
    write_pictures(tmp_path / "p")
    data = dataset(tmp_path / "p", masks=str(tmp_path / "m"))
    found = {data[i].mask.numpy().tobytes() for i in range(60)}
    small = np.zeros((1, 256, 256), dtype=np.float32)
    small[:, :64, :128] = 1
    assert small.tobytes() in found
    assert len(found) == 8  # its turns and reflections
    assert all(data[i].mask.mean().item() == 0.125 for i in range(10))
    inverted = dataset(tmp_path / "p", masks=str(tmp_path / "m"), mask_polarity="black")
    assert inverted[0].mask.mean().item() == 0.875


def test_a_mask_that_cannot_be_read_is_replaced_and_named(tmp_path):
    (tmp_path / "m").mkdir()
    mask = np.zeros((512, 512), dtype=np.uint8)
    mask[:128, :256] = 255
    Image.fromarray(mask).save(tmp_path / "m" / "0.png")
    (tmp_path / "m" / "1.png").write_bytes((tmp_path / "m" / "0.png").read_bytes()[:60])
    write_pictures(tmp_path / "p")
    data = dataset(tmp_path / "p", masks=str(tmp_path / "m"))
    samples = [data[i] for i in range(20)]
    assert {sample.mask.mean().item() for sample in samples} == {0.125}
    named = {name for sample in samples for name, _ in sample.broken}
    assert named == {str(tmp_path / "m" / "1.png")}
    (tmp_path / "m" / "0.png").write_bytes(b"")
    with pytest.raises(
        DataError, match="data.masks: none of 2 masks in a row can be used; the first: mask '.*[01].png': expected a"
    ):
        dataset(tmp_path / "p", masks=str(tmp_path / "m"))[0]
    with pytest.raises(DataError, match="data.masks: "):
        MemoryBatches(dataset(tmp_path / "p", masks=str(tmp_path / "m"), in_memory=True, mask_bank=4))


@pytest.mark.skipif(sys.platform == "win32", reason="os.kill() ends a process at once there")
def test_workers_leave_the_signals_of_their_group_to_the_trainer():
    """timeout, Ctrl-C and a job's end reach every process of the group; the step that runs still needs them."""
    context = multiprocessing.get_context("fork" if hasattr(os, "fork") else "spawn")
    ready = context.Event()
    worker = context.Process(target=_wait_as_a_worker, args=(ready,))
    worker.start()
    assert ready.wait(60)
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(worker.pid, number)
    worker.join(0.5)
    assert worker.is_alive()
    worker.kill()
    worker.join()


def _wait_as_a_worker(ready):
    _start_worker(0)
    ready.set()
    time.sleep(600)


def test_colours_are_changed_by_seed_epoch_and_picture(tmp_path):
    (tmp_path / "p").mkdir()
    for i in range(2):
        Image.new("RGB", (256, 256), (128, 128, 128)).save(tmp_path / "p" / f"{i}.png")
    plain, data = dataset(tmp_path / "p"), dataset(tmp_path / "p", colour=0.2)
    images = torch.stack([data[i].image for i in range(16)])
    assert images.std(dim=(2, 3)).max() < 1e-5
    assert 0.02 < images.abs().max() <= 0.2
    assert len(images.mean(dim=(1, 2, 3)).unique()) == 16
    assert torch.equal(dataset(tmp_path / "p", colour=0.2)[5].image, data[5].image)
    assert not torch.equal(dataset(tmp_path / "p", colour=0.2, seed=1)[5].image, data[5].image)
    assert torch.equal(plain[5].mask, data[5].mask)  # all else is as without


def test_masks_without_a_hole_are_replaced_and_named(tmp_path):
    (tmp_path / "m").mkdir()
    mask = np.zeros((256, 256), dtype=np.uint8)
    Image.fromarray(mask).save(tmp_path / "m" / "0.png")
    mask[:64, :128] = 1  # levels 0 and 1 are bool, as in masks of `lgnet-fast run`
    Image.fromarray(mask).save(tmp_path / "m" / "1.png")
    data = dataset(write_pictures(tmp_path / "p"), masks=str(tmp_path / "m"))
    samples = [data[i] for i in range(12)]
    assert {sample.mask.mean().item() for sample in samples} == {0.125}
    assert {one for sample in samples for one in sample.broken} == {
        (str(tmp_path / "m" / "0.png"), f"mask {str(tmp_path / 'm' / '0.png')!r}: no hole pixel at 256x256")
    }


def test_odd_pictures(tmp_path):
    """Tiny, long, with 16 or 32 bits, with several frames: each a sample; those that cannot be read are named."""
    rng = np.random.default_rng(0)
    Image.new("RGB", (1, 1)).save(tmp_path / "1x1.png")
    Image.new("RGB", (1, 5000)).save(tmp_path / "1x5000.png")
    Image.new("L", (20_000, 3)).save(tmp_path / "20000x3.png")
    Image.fromarray(rng.integers(0, 65536, (90, 80)).astype(np.int32)).save(tmp_path / "levels.tif")
    Image.new("P", (80, 70)).save(tmp_path / "frames.gif", save_all=True, append_images=[Image.new("P", (80, 70), 1)])
    broken = {"float.tif": "got F", "cut.jpg": "truncated", "empty.jpg": "no picture", "gone.png": "No such file"}
    Image.fromarray(rng.random((90, 80)).astype(np.float32)).save(tmp_path / "float.tif")
    Image.effect_noise((600, 400), 50).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:9000])
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "folder.png").mkdir()
    for protocol in ("photos", "celeba_hq"):
        data = dataset(tmp_path, protocol=protocol)
        assert len(data) == 9
        samples = [data[i] for i in range(9)]
        assert all(sample.image.shape == (3, 256, 256) and sample.image.abs().max() <= 1 for sample in samples)
        found = {os.path.basename(name): reason for sample in samples for name, reason in sample.broken}
        assert found.keys() == broken.keys()
        assert all(text in found[name] for name, text in broken.items())


def test_protocols_of_the_configuration():
    assert typing.get_args(typing.get_type_hints(DataConfig)["protocol"]) == tuple(PROTOCOLS)
