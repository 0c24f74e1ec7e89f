"""`Inpainter`: sizes, strategies, known pixels, masks, precision, stages, threads."""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from lgnet_fast.errors import InvalidMaskError, LGNetError
from lgnet_fast.pipeline import Inpainter

from .pipeline_support import BlurFill, ConstantFill, IdentityFill, box_mask, noise, some_holes

STRATEGIES = ("auto", "full", "crop", "resize", "tile")


@pytest.fixture(scope="module")
def pipe():
    return Inpainter(BlurFill())


@pytest.fixture(scope="module")
def bundled():
    return Inpainter.from_pretrained(None, device="cpu", backend="eager", window=256)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("size", [(1, 1), (1, 300), (17, 933), (255, 257), (256, 256), (600, 800)])
def test_any_size_comes_back_with_known_pixels_untouched(pipe, size, strategy):
    picture, hole = noise(*size), some_holes(*size)
    if size == (1, 1):
        hole[:] = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a picture of one pixel is all hole
        warnings.simplefilter("error", RuntimeWarning)  # numpy's of NaN
        result = pipe(picture, hole, strategy=strategy)
    assert result.shape == picture.shape
    assert result.dtype == np.uint8
    np.testing.assert_array_equal(result[~hole], picture[~hole])
    if size != (1, 1):
        assert (result[hole] != picture[hole]).mean() > 0.9


def test_a_photo_of_six_megapixels_runs_in_small_passes():
    model = BlurFill()
    picture, hole = noise(2000, 3000), box_mask(2000, 3000, (300, 400, 380, 500), (1500, 2400, 1560, 2500))
    done = Inpainter(model).inpaint(picture, hole)
    assert done.strategy == "crop"
    assert done.passes == 2
    assert done.size == (2000, 3000)
    assert done.hole_ratio == pytest.approx(14000 / 6e6)
    assert model.seen == [(2, 256, 256)]
    np.testing.assert_array_equal(done.picture[~hole], picture[~hole])


def test_windows_of_one_size_go_through_the_network_together():
    holes = [(y, x, y + 20, x + 20) for y in (300, 900) for x in (300, 900, 1500)]
    picture, hole = noise(1200, 1800), box_mask(1200, 1800, *holes)
    together, alone = BlurFill(), BlurFill()
    result = Inpainter(together, window=512)(picture, hole, strategy="crop")
    assert together.seen == [(4, 256, 256), (2, 256, 256)]
    expected = Inpainter(alone, window=256)(picture, hole, strategy="crop")
    assert alone.seen == [(1, 256, 256)] * 6
    np.testing.assert_array_equal(result, expected)


def test_padding_reflects_picture_and_mask_together():
    model = IdentityFill()
    picture, hole = noise(100, 300), box_mask(100, 300, (40, 40, 60, 60))
    Inpainter(model)(picture, hole, strategy="full")
    image, mask = model.images[0][0].numpy(), model.masks[0][0, 0].numpy()
    assert image.shape == (3, 256, 512)
    expected = np.pad(np.where(hole[..., None], 127.5, picture), ((0, 99), (0, 212), (0, 0)), mode="reflect")
    np.testing.assert_allclose((image[:, :199].transpose(1, 2, 0) + 1) * 127.5, expected, atol=1e-4)
    np.testing.assert_array_equal(mask[:199], np.pad(hole, ((0, 99), (0, 212)), mode="reflect"))


def test_a_side_of_one_replicates():
    model = IdentityFill()
    Inpainter(model)(noise(1, 256), box_mask(1, 256, (0, 10, 1, 20)), strategy="full")
    assert (model.images[0][0] == model.images[0][0, :, :1]).all()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("edge", [{}, {"dilate": 7}, {"feather": 9}, {"dilate": 3, "feather": 12}])
def test_content_under_the_mask_does_not_matter(pipe, strategy, edge):
    picture, hole = noise(300, 700), some_holes(300, 700)
    poisoned = picture.copy()
    poisoned[hole] = noise(300, 700, seed=9)[hole]
    assert (poisoned != picture).any()
    with_noise, without = (
        pipe(poisoned, hole, strategy=strategy, **edge),
        pipe(picture, hole, strategy=strategy, **edge),
    )
    np.testing.assert_array_equal(with_noise, without)


@pytest.mark.parametrize("strategy", ["auto", "full", "crop", "tile"])
def test_known_is_what_lies_outside_dilation_and_feather(strategy):
    pipe = Inpainter(ConstantFill(1, 1, 1))
    picture = noise(300, 700) // 2
    hole = box_mask(300, 700, (100, 100, 140, 160))
    result = pipe(picture, hole, strategy=strategy, dilate=5, feather=4)
    assert (result[95:145, 100:160] == 255).all()  # the hole and 5 pixels above and below
    np.testing.assert_array_equal(result[:91], picture[:91])  # 5 + 4 pixels away
    np.testing.assert_array_equal(result[:, 169:], picture[:, 169:])
    for away, alpha in ((6, 0.8), (7, 0.6), (8, 0.4), (9, 0.2)):
        row, old = result[100 - away, 110:150].astype(float), picture[100 - away, 110:150].astype(float)
        np.testing.assert_array_equal(row, np.rint(old * (1 - np.float32(alpha)) + 255 * np.float32(alpha)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("strategy", ["full", "crop", "resize", "tile"])
def test_known_pixels_keep_their_bits_in_every_network_dtype(dtype, strategy):
    model = ConstantFill(0.5, 0.5, 0.5)
    picture, hole = noise(270, 600, dtype=np.uint16), some_holes(270, 600)
    result = Inpainter(model, dtype=dtype)(picture, hole, strategy=strategy)
    np.testing.assert_array_equal(result[~hole], picture[~hole])
    if strategy != "resize":  # there the rim of the fill is interpolated with the known pixels around it
        assert set(np.unique(result[hole])) == {49151}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_tensors_keep_dtype_and_known_bits(pipe, dtype):
    generator = torch.Generator().manual_seed(0)
    batch = torch.rand(2, 3, 100, 140, generator=generator, dtype=torch.float64).to(dtype)
    masks = torch.zeros(2, 1, 100, 140)
    masks[0, :, 10:30, 20:60] = masks[1, :, 50:70, 100:130] = 1
    before = batch.clone()
    result = pipe(batch, masks)
    assert result.dtype == dtype
    assert result.shape == batch.shape
    assert torch.equal(batch, before)
    known = (masks == 0).expand_as(batch)
    assert torch.equal(result[known], batch[known])
    assert result.isfinite().all()
    assert result.min() >= 0
    assert result.max() <= 1
    assert not torch.equal(result[~known], batch[~known])
    for number in range(2):
        alone = pipe(batch[number : number + 1], masks[number : number + 1])
        assert torch.equal(alone[0], result[number])
    assert pipe(batch[:0], masks[:1]).shape == (0, 3, 100, 140)
    grey = pipe(batch[:, :1], masks)
    assert grey.shape == (2, 1, 100, 140)


def test_the_order_of_overlapping_windows_does_not_matter(pipe, monkeypatch):
    from lgnet_fast.pipeline import strategies

    picture, hole = noise(600, 700), some_holes(600, 700)
    for strategy in ("crop", "tile"):
        forward = pipe(picture, hole, strategy=strategy)
        original = strategies.windows_for
        with monkeypatch.context() as patch:
            patch.setattr(strategies, "windows_for", lambda *args, original=original: original(*args)[::-1])
            backward = pipe(picture, hole, strategy=strategy)
        assert np.abs(forward.astype(int) - backward).max() <= (0 if strategy == "crop" else 1)
        assert (forward == backward).mean() > 0.9999


def test_overlapping_crops_never_see_each_others_fill():
    """Each group's fill is the same whether the other group is filled in the same call or not, as long as both are
    holes to the network."""
    pipe = Inpainter(BlurFill())
    hole = box_mask(1024, 1024, (400, 300, 500, 400), (520, 460, 620, 560))
    picture = noise(1024, 1024)
    done = pipe.inpaint(picture, hole, strategy="crop")
    assert done.passes == 2
    flipped = pipe(picture[::-1, ::-1].copy(), hole[::-1, ::-1].copy(), strategy="crop")[::-1, ::-1]
    assert np.abs(flipped.astype(int) - done.picture).max() <= 1


def test_an_empty_mask_returns_the_picture_without_running_the_network():
    model = BlurFill()
    pipe, picture = Inpainter(model), noise(50, 60)
    with pytest.warns(UserWarning, match="no hole"):
        result = pipe(picture, np.zeros((50, 60), bool), dilate=3, feather=3)
    np.testing.assert_array_equal(result, picture)
    assert result is not picture
    assert model.seen == []
    with pytest.warns(UserWarning, match="no hole"):
        assert pipe.stages(picture, np.zeros((50, 60), bool)).result.shape == picture.shape


def test_more_than_95_percent_hole_warns(pipe):
    picture, hole = noise(100, 100), np.ones((100, 100), bool)
    hole[:5] = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe(picture, hole)  # 95 % exactly
    hole[4, 0] = True
    with pytest.warns(UserWarning, match=r"95\.0%.*invert"):
        pipe(picture, hole)


def test_the_mask_channel_reaches_the_mask(pipe):
    picture, hole = noise(100, 120), some_holes(100, 120)
    rubbed_out = np.dstack([picture, np.where(hole, 0, 255).astype(np.uint8)])
    expected = pipe(picture, hole)
    with pytest.raises(InvalidMaskError, match="mask_channel"):
        pipe(picture, rubbed_out)
    np.testing.assert_array_equal(pipe(picture, rubbed_out, mask_channel="inverse_alpha"), expected)
    brushed = np.where(hole[..., None], np.uint8([255, 0, 255]), picture)
    np.testing.assert_array_equal(pipe(picture, brushed), expected)
    np.testing.assert_array_equal(pipe.inpaint(picture, brushed, mask_channel="colour").picture, expected)
    result = pipe(torch.from_numpy(picture), torch.from_numpy(brushed))
    np.testing.assert_array_equal(result.numpy(), expected)


def test_the_picture_is_searched_for_holes_once(pipe, monkeypatch):
    from lgnet_fast.pipeline import filling, masks, strategies

    searched = []
    for module in (filling, masks, strategies):
        original = module.group_holes
        monkeypatch.setattr(
            module, "group_holes", lambda hole, original=original: searched.append(hole.shape) or original(hole)
        )
    pipe(noise(700, 900), box_mask(700, 900, (100, 100, 140, 160), (500, 600, 520, 700)))
    assert searched == [(700, 900)]


def test_few_small_holes_of_a_large_picture_take_little_memory(pipe):
    """Peak memory besides the samples and the returned copy: less than the bytes of the samples, plus one byte per
    pixel for the hole, two with a soft edge, and four while that edge is made."""
    import tracemalloc

    picture = np.zeros((2160, 3840, 3), np.uint8)
    hole = box_mask(2160, 3840, *[(y, x, y + 100, x + 100) for y in (200, 1700) for x in (100, 1200, 3000)])
    for edge, bytes_a_pixel in (({}, 6), ({"dilate": 3, "feather": 3}, 9)):
        tracemalloc.start()
        pipe(picture, hole, **edge)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak <= bytes_a_pixel * hole.size


@pytest.mark.filterwarnings("ignore:mask")
def test_threshold_and_inversion_reach_the_mask(pipe):
    picture = noise(64, 64)
    grey = np.full((64, 64), 100, np.uint8)
    grey[:32] = 160
    default, low = pipe(picture, grey), pipe(picture, grey, mask_threshold=0.3, invert_mask=True, strategy="full")
    np.testing.assert_array_equal(default[32:], picture[32:])
    assert (default[:32] != picture[:32]).mean() > 0.9
    np.testing.assert_array_equal(low, picture)


class OverflowsInHalf(BlurFill):
    """Products beyond 65504, as in badly scaled activations."""

    def forward(self, image, mask, return_stages=False):
        output = (image * 0 + 300) * 300 / 90000 * self.gain
        return image * (1 - mask) + output * mask


class NeverFinite(BlurFill):
    def forward(self, image, mask, return_stages=False):
        return image / 0 * 0


def test_overflow_in_half_precision_is_retried_in_float32():
    picture, hole = noise(64, 64), some_holes(64, 64)
    pipe = Inpainter(OverflowsInHalf(), dtype="float16")
    expected = Inpainter(OverflowsInHalf(), dtype="float32")(picture, hole)
    assert (expected[hole] == 255).all()
    np.testing.assert_array_equal(pipe(picture, hole), expected)


def test_an_output_that_is_never_finite_is_a_clear_error():
    for dtype in ("float16", "bfloat16", "float32"):
        with pytest.raises(LGNetError, match="not finite"):
            Inpainter(NeverFinite(), dtype=dtype)(noise(64, 64), some_holes(64, 64))


def test_the_callers_model_is_not_changed():
    model = BlurFill().train()
    pipe = Inpainter(model, dtype="bfloat16")
    pipe(noise(20, 20), some_holes(20, 20))
    assert model.training
    assert model.gain.dtype == torch.float32
    assert model.seen == []


def test_stages_are_pictures_of_the_same_kind():
    picture, hole = noise(300, 200), box_mask(300, 200, (100, 50, 150, 100))
    stages = Inpainter(BlurFill()).stages(Image.fromarray(picture), hole)
    assert len(stages.merged) == 3
    for one in (stages.masked, *stages.merged):
        np.testing.assert_array_equal(np.asarray(one)[~hole], picture[~hole])
    assert (np.asarray(stages.masked)[hole] == 255).all()
    assert (np.asarray(stages.coarse)[hole] == 0).all()
    filled = Inpainter(BlurFill())(picture, hole)
    np.testing.assert_array_equal(np.asarray(stages.result), filled)
    local = np.asarray(stages.local)[hole].astype(float)
    np.testing.assert_allclose(local, filled[hole] / 2, atol=1)
    two = replace(stages, merged=stages.merged[:2])
    assert (two.local, two.result) == (None, stages.merged[1])


def test_eight_threads_give_what_one_gives(bundled):
    pictures = [noise(90 + 20 * seed, 120, seed) for seed in range(8)]
    masks = [some_holes(*picture.shape[:2]) for picture in pictures]
    serial = [bundled(picture, mask) for picture, mask in zip(pictures, masks, strict=True)]
    with ThreadPoolExecutor(8) as pool:
        parallel = list(pool.map(bundled, pictures, masks))
    for one, other in zip(serial, parallel, strict=True):
        np.testing.assert_array_equal(one, other)


def test_eight_threads_share_one_lazily_decoded_picture_and_one_retry(tmp_path):
    file = tmp_path / "shared.png"
    Image.fromarray(noise(200, 200)).save(file)
    hole = some_holes(200, 200)
    pipe = Inpainter(OverflowsInHalf(), dtype="float16")
    expected = np.asarray(pipe(file, hole))
    for _ in range(5):
        shared, fresh = Image.open(file), Inpainter(OverflowsInHalf(), dtype="float16")
        with ThreadPoolExecutor(8) as pool:
            results = list(pool.map(lambda _, shared=shared, fresh=fresh: np.asarray(fresh(shared, hole)), range(8)))
        for result in results:
            np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("strategy", ["full", "crop", "resize", "tile"])
def test_the_bundled_model_fills_a_photo_better_than_its_mean_colour(bundled, strategy):
    from lgnet_fast import samples

    photo = Image.open(samples.sample_paths()["coffee"][0]).convert("RGB").resize((300, 200))
    hole = box_mask(200, 300, (90, 130, 110, 160), (30, 40, 36, 120))
    truth = np.asarray(photo).astype(float)
    result = np.asarray(bundled(photo, hole, strategy=strategy)).astype(float)
    np.testing.assert_array_equal(result[~hole], truth[~hole])
    flat = truth[~hole].mean(axis=0)
    assert ((result - truth)[hole] ** 2).mean() < 0.5 * ((flat - truth)[hole] ** 2).mean()


def test_a_schedule_runs_every_pass():
    pipe, asked = Inpainter(BlurFill()), []

    def schedule(key, run, images, holes):
        asked.append((key, images.shape, images.dtype, holes.dtype))
        return run(images, holes)

    pipe.schedule_passes(schedule)
    picture, mask = noise(600, 900), box_mask(600, 900, (50, 60, 90, 120), (400, 700, 440, 760))
    np.testing.assert_array_equal(pipe(picture, mask, "crop"), Inpainter(BlurFill())(picture, mask, "crop"))
    assert [one[1:] for one in asked] == [((2, 256, 256, 3), np.float32, np.bool_)]


def test_warmup_runs_the_network_once():
    model = BlurFill()
    assert Inpainter(model).warmup(300, 200) > 0
    assert model.seen == [(1, 512, 256)]
