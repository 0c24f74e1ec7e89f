"""Pictures kept in memory: crops are the pictures' own pixels, masks and order follow the seed alone."""

from __future__ import annotations

import hashlib
import tarfile
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from lgnet_fast import limits
from lgnet_fast.data.masks import fine_mask, varied_mask
from lgnet_fast.training import DataError
from lgnet_fast.training.config import DataConfig
from lgnet_fast.training.loader import PositionSampler
from lgnet_fast.training.memory import MemoryBatches
from lgnet_fast.training.samples import InpaintingDataset
from tests.training_support import write_pictures


def memory(folder, seed: int = 0, workers: int = 1, **settings) -> MemoryBatches:
    data = DataConfig(pictures=(str(folder),), **{"mask_kind": "varied", "mask_bank": 4, **settings})
    return MemoryBatches(InpaintingDataset(data, seed), workers)


def test_batches_are_crops_of_the_pictures_and_masks_of_the_bank(tmp_path):
    rng = np.random.default_rng(0)
    levels = rng.integers(0, 256, (2, 300, 260, 3)).astype(np.uint8)  # shorter side below 1.125 times 256
    (tmp_path / "p").mkdir()
    for i, picture in enumerate(levels):
        Image.fromarray(picture).resize((256, 295)).save(tmp_path / "p" / f"{i}.png")
    sources = [np.asarray(Image.open(tmp_path / "p" / f"{i}.png")) for i in range(2)]
    kept = memory(tmp_path / "p")
    assert [len(levels) for levels in kept.places] == [1, 1]
    batch = kept.batch(0, 8)
    assert batch["image"].shape == (8, 3, 256, 256)
    assert batch["image"].dtype == batch["mask"].dtype == torch.float32
    seen = []
    for i, image in enumerate(batch["image"]):
        picture = ((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        source = sources[int(kept.dataset.order(i // 2)[i % 2])]
        found = [
            (top, flip)
            for top in range(295 - 256 + 1)
            for flip in (False, True)
            if np.array_equal(source[top : top + 256][:, ::-1] if flip else source[top : top + 256], picture)
        ]
        assert len(found) == 1
        seen += found
    assert len(set(seen)) > 4
    assert {flip for _, flip in seen} == {False, True}
    bank = kept.masks.numpy()
    for mask in batch["mask"][:, 0].numpy():
        turned = [np.rot90(m, k)[:, ::s] for m in bank for k in range(4) for s in (1, -1)]
        assert any(np.array_equal(mask, t) for t in turned)


def test_larger_pictures_come_at_several_scales(tmp_path):
    write_pictures(tmp_path / "p", 1, (420, 400))
    kept = memory(tmp_path / "p")
    assert [(h, w) for _, h, w in kept.places[0]] == [(256, 269), (288, 302), (320, 336), (384, 403)]
    assert len(memory(tmp_path / "p", protocol="paris_streetview").places[0]) == 1
    assert [(h, w) for _, h, w in memory(tmp_path / "p", protocol="places2").places[0]] == [(256, 256)]


def test_of_long_pictures_the_middle_is_kept(tmp_path):
    """Its shorter side is enlarged to the network's: 20,000 x 3 pixels would take 1.3 GB."""
    (tmp_path / "p").mkdir()
    levels = np.zeros((2, 100), dtype=np.uint8)
    levels[:, 34:66] = 200
    Image.fromarray(levels).save(tmp_path / "p" / "0.png")
    Image.fromarray(levels.T.copy()).save(tmp_path / "p" / "1.png")
    kept = memory(tmp_path / "p")
    assert [[(h, w) for _, h, w in levels] for levels in kept.places] == [[(256, 4096)], [(4096, 256)]]
    assert kept.pixels.unique().tolist() == [200]


def test_the_seed_and_the_position_decide(tmp_path):
    write_pictures(tmp_path / "p", 3, (300, 290))
    kept, again = memory(tmp_path / "p", colour=0.1), memory(tmp_path / "p", colour=0.1)
    first, second = kept.batch(6, 2), again.batch(6, 2)
    assert torch.equal(first["image"], second["image"])
    assert torch.equal(first["mask"], second["mask"])
    assert not torch.equal(first["image"], kept.batch(8, 2)["image"])
    other = memory(tmp_path / "p", seed=1).batch(6, 2)
    assert not torch.equal(first["mask"], other["mask"])
    batches = kept.batches(PositionSampler(3, 2))
    assert torch.equal(next(batches)["image"], first["image"])
    assert torch.equal(next(batches)["image"], kept.batch(8, 2)["image"])


@pytest.mark.parametrize(("colour", "expected"), [(0.0, "61a9e58fcde46ee5"), (0.1, "b98bd130e8a7ab10")])
def test_the_random_numbers_of_a_seed_stay_the_same(tmp_path, colour, expected):
    """Order, crop, mirroring and mask, and without a change of colours the pixels: a run can be resumed."""
    (tmp_path / "p").mkdir()
    rng = np.random.default_rng(0)
    for i in range(3):  # kept at one scale, without resampling
        levels = rng.integers(0, 256, (256, 300 + 10 * i, 3)).astype(np.uint8)
        Image.fromarray(levels).save(tmp_path / "p" / f"{i}.png")
    kept = memory(tmp_path / "p", seed=7, mask_bank=8, colour=colour)
    digest, means = hashlib.sha256(), []
    for batch in (kept.batch(4 * k, 4) for k in range(3)):
        if not colour:
            digest.update(batch["image"].mul(127.5).add(127.5).round().byte().numpy().tobytes())
        digest.update(batch["mask"].bool().numpy().tobytes())
        means += batch["image"].mean(dim=(1, 2, 3)).tolist()
    assert digest.hexdigest()[:16] == expected
    if colour:
        assert means[:4] == pytest.approx([-0.0224, 0.0432, -0.0350, -0.0196], abs=1e-4)


def test_masks_of_several_processes_are_those_of_one(tmp_path):
    write_pictures(tmp_path / "p", 1, (256, 256))
    one, two = (memory(tmp_path / "p", workers=workers, mask_bank=64) for workers in (1, 2))
    assert torch.equal(one.masks, two.masks)


def test_colours_move_within_their_bounds(tmp_path):
    (tmp_path / "p").mkdir()
    Image.new("RGB", (256, 256), (128, 128, 128)).save(tmp_path / "p" / "grey.png")
    kept = memory(tmp_path / "p", colour=0.2)
    image = kept.batch(0, 16)["image"]
    assert image.std(dim=(2, 3)).max() < 1e-5
    assert 0.02 < image.abs().max() <= 0.2
    assert image.mean(dim=(2, 3)).std() > 0.02


def test_broken_pictures_are_told_of_once(tmp_path):
    write_pictures(tmp_path / "p", 2, (256, 256))
    (tmp_path / "p" / "0.png").write_bytes(b"broken")
    kept = memory(tmp_path / "p")
    batches = kept.batches(PositionSampler(0, 2))
    told = next(batches)["broken"]
    assert len(told) == 1
    name, reason = told[0]  # as in the batches of the loader, which the trainer reads
    assert name == str(tmp_path / "p" / "0.png")
    assert reason == "no picture that Pillow can read"
    assert next(batches)["broken"] == []
    assert next(kept.batches(PositionSampler(0, 2, rank=1, processes=2)))["broken"] == []  # the first process tells
    (tmp_path / "p" / "1.png").write_bytes(b"broken")
    with pytest.raises(DataError, match="data.pictures: none of 2 can be read; the last: .*png: no picture"):
        memory(tmp_path / "p")


def test_broken_masks_are_told_of_once(tmp_path):
    (tmp_path / "m").mkdir()
    mask = np.zeros((256, 256), dtype=np.uint8)
    mask[:128, :64] = 255
    Image.fromarray(mask).save(tmp_path / "m" / "0.png")
    (tmp_path / "m" / "1.png").write_bytes(b"broken")
    write_pictures(tmp_path / "p", 1, (256, 256))
    kept = memory(tmp_path / "p", masks=str(tmp_path / "m"), mask_kind="strokes", mask_bank=16)
    assert kept.masks.float().mean(dim=(1, 2)).tolist() == [0.125] * 16
    ((name, reason),) = kept.broken
    assert name == str(tmp_path / "m" / "1.png")
    assert "no picture that Pillow can read" in reason


def test_batches_name_their_pictures(tmp_path):
    write_pictures(tmp_path / "p", 3, (256, 256))
    (tmp_path / "p" / "1.png").write_bytes(b"broken")
    kept = memory(tmp_path / "p")
    expected = {str(tmp_path / "p" / f"{i}.png"): np.asarray(Image.open(tmp_path / "p" / f"{i}.png")) for i in (0, 2)}
    batch = kept.batch(0, 12)
    assert set(batch["name"]) == set(expected)
    for name, image in zip(batch["name"], batch["image"], strict=True):
        levels = ((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        assert any(np.array_equal(levels[:, ::step], expected[name]) for step in (1, -1))


def test_pictures_that_exceed_the_free_memory(tmp_path, monkeypatch):
    write_pictures(tmp_path / "p", 4, (256, 256))
    monkeypatch.setattr(limits, "memory", lambda: 4 * 256 * 256 * 3)
    text = r"data.in_memory: .* into the 0.000786 GB of free memory, got 0.000786 GB by the first 4 of 4; without"
    with pytest.raises(DataError, match=text):
        memory(tmp_path / "p")
    monkeypatch.setattr(limits, "memory", lambda: 5 * 256 * 256 * 3)
    assert memory(tmp_path / "p").pixels.shape == (4 * 256 * 256, 3)


def test_threads_that_decode_leave_the_filters_of_warnings_alone(tmp_path):
    write_pictures(tmp_path / "p", 24, (256, 256))
    before = list(warnings.filters)
    for _ in range(4):
        memory(tmp_path / "p", workers=8)
        assert list(warnings.filters) == before


def test_paired_masks_are_refused(tmp_path):
    write_pictures(tmp_path / "p", 1)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("0.png", "0.mask.png"):
            tar.add(tmp_path / "p" / "0.png", name)
    with pytest.raises(DataError, match="data.in_memory: masks that come with the pictures"):
        memory(tmp_path / "a.tar", masks="paired")


def test_varied_masks_have_many_sizes_and_repeat():
    masks = [varied_mask(128, 160, seed=(1, i)) for i in range(40)]
    ratios = [mask.mean() for mask in masks]
    assert masks[0].shape == (128, 160)
    assert 0 < min(ratios) < 0.08
    assert 0.2 < max(ratios) < 0.6
    assert np.array_equal(masks[7], varied_mask(128, 160, seed=(1, 7)))


def test_half_of_the_fine_masks_are_thin_strokes_close_together():
    masks = torch.from_numpy(np.stack([fine_mask(128, 160, seed=(1, i)) for i in range(60)])[:, None]).float()
    # Nothing of a thin stroke of this size, at most 5 pixels wide, is left after eroding by 5 on either side unless
    # strokes lie side by side.
    left = 1 - torch.nn.functional.max_pool2d(1 - masks, 11, stride=1, padding=5)
    thin = left.mean(dim=(1, 2, 3)) < 0.01
    assert 18 <= int(thin.sum()) <= 48
    ratios = masks[thin].mean(dim=(1, 2, 3))
    assert float(ratios.max()) > 0.3
    assert np.array_equal(masks[7, 0].bool().numpy(), fine_mask(128, 160, seed=(1, 7)))
