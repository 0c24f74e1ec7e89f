"""Training data: every source and protocol, samples independent of the reader, damaged files skipped."""

from __future__ import annotations

import hashlib
import io
import itertools
import multiprocessing
import os
import signal
import tarfile
import time
import typing
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lgnet_fast.training import ConfigError, DataError, hole_class
from lgnet_fast.training.config import DataConfig
from lgnet_fast.training.crops import PROTOCOLS, crop_box
from lgnet_fast.training.held_out import validation_pairs
from lgnet_fast.training.loader import PositionSampler, _start_worker, make_loader
from lgnet_fast.training.memory import MemoryBatches
from lgnet_fast.training.samples import InpaintingDataset
from lgnet_fast.training.sources import open_source
from tests.training_support import write_pictures


def dataset(*places, seed=0, **options) -> InpaintingDataset:
    return InpaintingDataset(DataConfig(**{"pictures": tuple(map(str, places)), "workers": 0, **options}), seed)


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
    pairs = validation_pairs(str(write_noise(tmp_path / "p")), 256, (0, 4), 7)
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
    (image, mask), *rest = validation_pairs(str(tmp_path), 256, (0, 3), 0, protocol)
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


# -- places -----------------------------------------------------------------------------------------------------


def test_categories_and_exclusion(tmp_path):
    for name in ("abbey", "beach", "bridge"):
        write_pictures(tmp_path / "p" / name[0] / name, 2)
    (tmp_path / "list.txt").write_text("/b/beach\n/b/bridge\n")
    assert len(dataset(tmp_path / "p")) == 6
    data = dataset(tmp_path / "p", categories=("abbey",))
    assert {data[i].name for i in range(2)} == {str(tmp_path / "p" / "a" / "abbey" / f"{i}.png") for i in range(2)}
    assert len(dataset(tmp_path / "p", categories=(str(tmp_path / "list.txt"),))) == 4
    data = dataset(tmp_path / "p", categories=("beach",), exclude=("0",))
    assert [data[i].name[-11:] for i in range(2)] == ["beach/1.png"] * 2
    with pytest.raises(DataError, match=r"data.categories: no pictures in .* for castle"):
        dataset(tmp_path / "p", categories=("abbey", "castle"))
    with pytest.raises(DataError, match="data.exclude: no picture of the name 7"):
        dataset(tmp_path / "p", exclude=("7",))
    with pytest.raises(DataError, match="data.exclude: expected names of some of the 6 pictures, got all of them"):
        dataset(tmp_path / "p", exclude=("0", "1"))
    with pytest.raises(ConfigError, match=r"data.categories: expected a text file of names, got '.*missing.txt'"):
        dataset(tmp_path / "p", categories=(str(tmp_path / "missing.txt"),))


def test_categories_are_looked_for_in_all_places_together(tmp_path):
    for name in ("abbey", "beach"):
        write_pictures(tmp_path / name[0] / name, 2)
    places = (tmp_path / "a", tmp_path / "b")
    assert len(dataset(*places, categories=("abbey", "beach"))) == 4
    assert len(dataset(*places, categories=("beach",))) == 2
    with pytest.raises(DataError, match=r"data.categories: no pictures in .*a, .*b for castle"):
        dataset(*places, categories=("abbey", "castle"))
    (tmp_path / "c").mkdir()
    with tarfile.open(tmp_path / "c" / "0.tar", "w") as tar:
        add(tar, "0.png", np.zeros((9, 9), dtype=np.uint8))
    for place in (tmp_path / "c" / "0.tar", tmp_path / "c"):  # a shard, and a folder of shards
        with pytest.raises(DataError, match=r"data.categories: expected folders of pictures to choose from, got '"):
            dataset(place, categories=("abbey",))


def test_categories_of_places365(tmp_path):
    """Several of its categories end in the same folder's name; its list has the number of each class."""
    for name in ("a/abbey", "c/cabin/outdoor", "c/church/outdoor", "c/church/indoor", "h/highway 61"):
        write_pictures(tmp_path / "p" / name, 1)
    (tmp_path / "list.txt").write_text("/a/abbey 1\n/c/church/outdoor 91\n\nhighway 61\n")

    def chosen(place, *categories):
        source = open_source([str(place)], "data.pictures", categories)
        return [str(Path(source.name(i)).parent.relative_to(tmp_path / "p")) for i in range(len(source))]

    assert chosen(tmp_path / "p", str(tmp_path / "list.txt")) == ["a/abbey", "c/church/outdoor", "h/highway 61"]
    assert chosen(tmp_path / "p" / "c", "church/outdoor", "/c/cabin/") == ["c/cabin/outdoor", "c/church/outdoor"]
    assert chosen(tmp_path / "p", "outdoor") == ["c/cabin/outdoor", "c/church/outdoor"]
    with pytest.raises(DataError, match="data.categories: no pictures in .*p for abbey/outdoor, door"):
        chosen(tmp_path / "p", "abbey/outdoor", "door", "outdoor")


@pytest.mark.parametrize("content", ["", "\n\n", "\udcff"])
def test_lists_of_categories_without_names(tmp_path, content):
    write_pictures(tmp_path / "p", 1)
    (tmp_path / "list.txt").write_text(content, "utf-8", "surrogateescape")
    text = r"expected a text file of names, got '.*list.txt' \(.*utf-8" if content > "z" else "got none in"
    with pytest.raises(ConfigError, match=f"data.categories: .*{text}"):
        dataset(tmp_path / "p", categories=(str(tmp_path / "list.txt"),))


def test_hidden_pictures_are_left_out_and_links_followed(tmp_path):
    """As `lgnet-fast run` does; in trees with folders that link to one above them, too."""
    write_pictures(tmp_path / "p", 2)
    write_pictures(tmp_path / "p" / ".thumbnails", 1)
    (tmp_path / "p" / ".2.png").write_bytes((tmp_path / "p" / "1.png").read_bytes())
    write_pictures(tmp_path / "elsewhere", 1)
    (tmp_path / "p" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "p" / "again").symlink_to(tmp_path / "p")
    expected = [tmp_path / "p" / name for name in ("0.png", "1.png", "more/0.png")]
    source = open_source([str(tmp_path / "p")], "data.pictures")
    assert [source.name(i) for i in range(len(source))] == [str(path) for path in expected]
    masks = dataset(tmp_path / "p", masks=str(tmp_path / "p")).masks.folder
    assert sorted(masks.files) == expected


def test_files_that_are_left_out_are_told_of(tmp_path):
    write_pictures(tmp_path / "p", 1)
    for name in ("a.psd", "b.psd", "notes.txt"):
        (tmp_path / "p" / name).write_bytes(b"")
    with pytest.warns(UserWarning, match=r"^2 left out of '.*p', the first: .*a.psd: .* \.psd are not read"):
        assert len(dataset(tmp_path / "p")) == 1
    (tmp_path / "p" / "0.png").unlink()
    with pytest.raises(DataError, match=r"data.pictures: .*, which has none \(.*a.psd: pictures of the format"):
        dataset(tmp_path / "p")


def add(tar, name, array):
    data = io.BytesIO()
    Image.fromarray(array).save(data, "PNG")
    info = tarfile.TarInfo(name)
    info.size = len(data.getvalue())
    tar.addfile(info, io.BytesIO(data.getvalue()))


def test_tar_shards_with_their_own_masks(tmp_path):
    picture = np.full((300, 256, 3), 128, dtype=np.uint8)
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            for i in range(2):
                marked, mask = picture.copy(), np.zeros((300, 256), dtype=np.uint8)
                mask[100 + 40 * i : 160, 50:90] = 255
                marked[mask > 0] = 255
                add(tar, f"{shard}{i}.png", marked)
                add(tar, f"{shard}{i}.mask.png", mask)
    data = dataset(tmp_path, masks="paired", protocol="logo_removal")
    assert len(data) == 4
    assert len(dataset(tmp_path / "1.tar")) == 2
    for sample in (data[i] for i in range(8)):
        # The mask went through the same crop and mirroring as its picture.
        assert torch.equal(sample.mask[0] == 1, sample.image[0] == 1)
        assert sample.mask.sum().item() in (60 * 40, 20 * 40)
    with tarfile.open(tmp_path / "1.tar", "w") as tar:
        add(tar, "a.png", picture)
    text = r"data.masks: expected <key>.mask.* got none for 1 of 3 pictures, the first .*1.tar/a.png"
    with pytest.raises(DataError, match=text):  # at once, not when a run comes to it
        dataset(tmp_path, masks="paired")
    (tmp_path / "1.tar").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"data.pictures: expected an uncompressed tar file, got '.*1.tar'"):
        dataset(tmp_path / "1.tar")


def test_a_folder_of_pictures_and_shards_is_an_error(tmp_path):
    """Neither is silently left out, nor are the pictures of an archive and its extracted files used twice."""
    write_pictures(tmp_path / "p" / "extracted", 2)
    with tarfile.open(tmp_path / "p" / "a.TAR", "w") as tar:
        add(tar, "0.png", np.zeros((9, 9), dtype=np.uint8))
    text = r"data.pictures: .* with both: 2 pictures \('.*0.png', ...\) and 1 shards \('.*a.TAR', ...\); name"
    with pytest.raises(DataError, match=text):
        dataset(tmp_path / "p")
    assert len(dataset(tmp_path / "p" / "a.TAR", tmp_path / "p" / "extracted")) == 3
    (tmp_path / "shards" / "below").mkdir(parents=True)
    (tmp_path / "p" / "a.TAR").replace(tmp_path / "shards" / "below" / "b.tar")
    assert len(dataset(tmp_path / "shards")) == 1


@pytest.mark.parametrize(
    ("prepare", "text"),
    [
        (lambda place: None, "data.validation: expected folders .*, got '.*held', which is not a folder"),
        (lambda place: place.mkdir(), "data.validation: expected folders .*, got '.*held', which has none"),
        (
            lambda place: write_pictures(place, 1),
            "data.validation: none of 1 pictures in '.*held' can be read; the first: .*0.png",
        ),
    ],
)
def test_errors_of_the_validation_name_its_setting(tmp_path, prepare, text):
    prepare(tmp_path / "held")
    for file in (tmp_path / "held").glob("*.png"):
        file.write_bytes(b"no picture")
    with pytest.raises(DataError, match=f"^{text}"):
        validation_pairs(str(tmp_path / "held"), 256, (0,), 0)


def test_a_broken_picture_of_the_validation_is_told_of(tmp_path):
    write_pictures(tmp_path / "p", 2)
    (tmp_path / "p" / "0.png").write_bytes(b"no picture")
    with pytest.warns(UserWarning, match="data.validation: left out .*0.png: no picture"):
        assert len(validation_pairs(str(tmp_path / "p"), 256, (0,), 0)) == 1


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
        (str(tmp_path / "m" / "0.png"), f"mask '{tmp_path / 'm' / '0.png'}': no hole pixel at 256x256")
    }


def test_truncated_and_damaged_shards_are_errors(tmp_path):
    """Cut anywhere before its end: at a file, in a header, in a picture."""
    with tarfile.open(tmp_path / "whole.tar", "w") as tar:
        for i in range(3):
            add(tar, f"{i}.png", np.full((64, 64), i, dtype=np.uint8))
        end = tar.offset
    whole = (tmp_path / "whole.tar").read_bytes()
    assert len(dataset(tmp_path / "whole.tar")) == 3
    size = end // 3
    for length in range(100, end + 512, 100):
        (tmp_path / "cut.tar").write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"data.pictures: expected an uncompressed tar file, got '.*cut.tar' \("):
            dataset(tmp_path / "cut.tar")
    for length in (size, 2 * size, end):
        (tmp_path / "cut.tar").write_bytes(whole[:length])
        with pytest.raises(DataError, match=rf"\(truncated at byte {length}\)"):
            dataset(tmp_path / "cut.tar")
    (tmp_path / "cut.tar").write_bytes(whole[: 2 * size] + b"x" * 512 + whole[2 * size + 512 :])
    with pytest.raises(DataError, match=rf"\(damaged at byte {2 * size}\)"):
        dataset(tmp_path / "cut.tar")
    (tmp_path / "cut.tar").write_bytes(whole[: end + 512])  # one block of zeros marks the end
    assert len(dataset(tmp_path / "cut.tar")) == 3


def test_names_in_shards(tmp_path):
    names = [
        "./a.png",
        "b/../c.png",
        "/d.png",
        "../e.png",
        "line\nfeed.png",
        "bad\udcff.png",
        "F.PNG",
        60 * "long" + ".png",
    ]
    hidden = [".a.png", ".git/b.png", "x/.y/c.png", "__MACOSX/._d.png", ".png"]
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in [*names, *hidden, "note.txt", "noext"]:
            add(tar, name, np.zeros((9, 9), dtype=np.uint8))
    source = open_source([str(tmp_path / "a.tar")], "data.pictures")
    assert [source.name(i) for i in range(len(source))] == [f"{tmp_path / 'a.tar'}/{name}" for name in names]
    assert {source.picture(i).size for i in range(len(source))} == {(9, 9)}


def test_files_that_a_tar_stores_once_under_several_names(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "a.png", np.full((9, 9), 7, dtype=np.uint8))
        link = tarfile.TarInfo("b.png")
        link.type, link.linkname = tarfile.LNKTYPE, "a.png"
        tar.addfile(link)
        link.name, link.linkname = "c.png", "missing.png"
        tar.addfile(link)
    source = open_source([str(tmp_path / "a.tar")], "data.pictures")
    assert [source.name(i)[-5:] for i in range(len(source))] == ["a.png", "b.png"]
    assert np.asarray(source.picture(1)).tolist() == np.asarray(source.picture(0)).tolist()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_pipes_in_a_folder_are_left_out(tmp_path):
    """Reading one waits for a writer."""
    write_pictures(tmp_path / "p", 1)
    os.mkfifo(tmp_path / "p" / "1.png")
    with pytest.warns(UserWarning, match=r"^1 left out of '.*p', the first: .*1.png: a pipe or a device"):
        assert len(dataset(tmp_path / "p")) == 1


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


def test_hugging_face_dataset(tmp_path):
    datasets = pytest.importorskip("datasets")
    folder = write_pictures(tmp_path / "p", 3, (256, 256))
    files = [str(folder / f"{i}.png") for i in range(3)]
    rows = datasets.Dataset.from_dict({"photo": files, "number": [0, 1, 2]}).cast_column("photo", datasets.Image())
    datasets.DatasetDict({"train": rows}).save_to_disk(str(tmp_path / "hf"))
    data = dataset(f"hf:{tmp_path / 'hf'}:train:photo", protocol="places2")
    assert len(data) == 3
    sample = data[0]
    index = int(sample.name[-2])
    expected = np.asarray(Image.open(files[index])).transpose(2, 0, 1)
    shown = ((sample.image + 1) * 127.5).round().byte().numpy()
    assert np.array_equal(shown, expected) or np.array_equal(shown[..., ::-1], expected)
    for rest, text in (
        (":test", "data.validation: expected 'hf:.*:test' to name a split of train"),
        ("", "data.validation: expected 'hf:.*' to name a column of photo, number"),
        (":train:number", "data.validation: the pictures of 'hf:.*' could not be loaded"),
        (":train:photo:more", r"data.validation: expected hf:NAME\[:SPLIT\[:COLUMN\]\], got 'hf:.*more'"),
        ("::photo", r"data.validation: expected hf:NAME\[:SPLIT\[:COLUMN\]\], got 'hf:.*'"),
        ("/missing", "data.validation: the pictures of 'hf:.*missing' could not be loaded"),
    ):
        with pytest.raises(DataError, match=text):
            open_source([f"hf:{tmp_path / 'hf'}{rest}"], "data.validation")


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({}, DataError, "data.pictures: expected folders .*, got none"),
        ({"pictures": ("nowhere",)}, DataError, "data.pictures: expected folders .*, got 'nowhere', which is not a"),
        ({"pictures": ("EMPTY",)}, DataError, "which has none"),
        ({"pictures": ("SOME",), "masks": "nowhere"}, DataError, "^data.masks: expected a folder of mask pictures"),
        ({"pictures": ("SOME",), "masks": "EMPTY"}, DataError, "^data.masks: expected a folder of mask pictures"),
    ],
)
def test_nothing_to_train_on(tmp_path, options, error, text):
    places = {"EMPTY": tmp_path / "empty", "SOME": write_pictures(tmp_path / "some", 1)}
    places["EMPTY"].mkdir()

    def place(value):
        return str(places.get(value, value))

    options = {
        key: tuple(map(place, value)) if isinstance(value, tuple) else place(value) for key, value in options.items()
    }
    with pytest.raises(error, match=text):
        InpaintingDataset(DataConfig(**options), 0)
