"""`Inpainter`: sizes, strategies, kinds, known pixels, precision, threads, devices, errors."""

from __future__ import annotations

import io
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from lgnet_fast.errors import BackendError, InvalidImageError, InvalidMaskError, LGNetError
from lgnet_fast.pipeline import DeepImage, Inpainter
from lgnet_fast.reference import LGNet

from .pipeline_support import BlurFill, ConstantFill, IdentityFill, box_mask, noise, write_picture

STRATEGIES = ("auto", "full", "crop", "resize", "tile")


@pytest.fixture(scope="module")
def pipe():
    return Inpainter(BlurFill())


@pytest.fixture(scope="module")
def bundled():
    return Inpainter.from_pretrained(None, device="cpu", backend="eager", window=256)


def _holes(height: int, width: int) -> np.ndarray:
    hole = np.random.default_rng(height * width).random((height, width)) > 0.9995
    hole[height // 4 : height // 4 + max(1, height // 6), width // 3 : width // 3 + max(1, width // 5)] = True
    return hole


# -- any size -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("size", [(1, 1), (1, 300), (17, 933), (255, 257), (256, 256), (600, 800)])
def test_any_size_comes_back_with_known_pixels_untouched(pipe, size, strategy):
    picture, hole = noise(*size), _holes(*size)
    if size == (1, 1):
        hole[:] = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a picture of one pixel is all hole
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


# -- what may and may not change ----------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("edge", [{}, {"dilate": 7}, {"feather": 9}, {"dilate": 3, "feather": 12}])
def test_content_under_the_mask_does_not_matter(pipe, strategy, edge):
    picture, hole = noise(300, 700), _holes(300, 700)
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
    picture, hole = noise(270, 600, dtype=np.uint16), _holes(270, 600)
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

    picture, hole = noise(600, 700), _holes(600, 700)
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


# -- kinds --------------------------------------------------------------------------------------------------------


def test_the_same_kind_comes_back_and_all_kinds_agree(pipe, tmp_path):
    array, hole = noise(120, 90), _holes(120, 90)
    file = tmp_path / "picture.png"
    Image.fromarray(array).save(file)
    expected = pipe(array, hole)
    assert isinstance(expected, np.ndarray)
    for given in (Image.fromarray(array), file, str(file)):
        result = pipe(given, hole)
        assert isinstance(result, Image.Image)
        np.testing.assert_array_equal(np.asarray(result), expected)
    tensor = torch.from_numpy(array).permute(2, 0, 1)[None] / 255
    result = pipe(tensor, torch.from_numpy(hole)[None, None])
    np.testing.assert_allclose(result[0].permute(1, 2, 0).numpy() * 255, expected, atol=0.51)


def test_lists_take_one_mask_or_one_each(pipe):
    arrays, masks = [noise(64, 80, seed) for seed in range(3)], [_holes(64, 80)] * 3
    masks[1] = np.roll(masks[1], 9, axis=0)
    results = pipe([*arrays[:2], Image.fromarray(arrays[2])], masks)
    assert isinstance(results, list)
    assert isinstance(results[2], Image.Image)
    for result, array, mask in zip(results, arrays, masks, strict=True):
        np.testing.assert_array_equal(np.asarray(result), pipe(array, mask))
    for result, array in zip(pipe(arrays, masks[0]), arrays, strict=True):
        np.testing.assert_array_equal(result, pipe(array, masks[0]))
    assert pipe([], masks[0]) == []
    with pytest.raises(InvalidMaskError, match="3 pictures, got 2"):
        pipe(arrays, masks[:2])


# -- masks --------------------------------------------------------------------------------------------------------


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
    picture, hole = noise(100, 120), _holes(100, 120)
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


# -- precision and errors -----------------------------------------------------------------------------------------


class OverflowsInHalf(BlurFill):
    """Products beyond 65504, as in badly scaled activations."""

    def forward(self, image, mask, return_stages=False):
        output = (image * 0 + 300) * 300 / 90000 * self.gain
        return image * (1 - mask) + output * mask


class NeverFinite(BlurFill):
    def forward(self, image, mask, return_stages=False):
        return image / 0 * 0


def test_overflow_in_half_precision_is_retried_in_float32():
    picture, hole = noise(64, 64), _holes(64, 64)
    pipe = Inpainter(OverflowsInHalf(), dtype="float16")
    expected = Inpainter(OverflowsInHalf(), dtype="float32")(picture, hole)
    assert (expected[hole] == 255).all()
    np.testing.assert_array_equal(pipe(picture, hole), expected)


def test_an_output_that_is_never_finite_is_a_clear_error():
    for dtype in ("float16", "bfloat16", "float32"):
        with pytest.raises(LGNetError, match="not finite"):
            Inpainter(NeverFinite(), dtype=dtype)(noise(64, 64), _holes(64, 64))


def test_the_callers_model_is_not_changed():
    model = BlurFill().train()
    pipe = Inpainter(model, dtype="bfloat16")
    pipe(noise(20, 20), _holes(20, 20))
    assert model.training
    assert model.gain.dtype == torch.float32
    assert model.seen == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"device": "cuda:99"}, "device: cuda:99 is not available"),
        ({"device": "quantum"}, "device: .*'quantum'"),
        ({"dtype": "int8"}, "dtype: .*'int8'"),
        ({"dtype": torch.int32}, "dtype: .*int32"),
        ({"backend": "triton"}, "backend: 'triton'.*BlurFill"),
    ],
)
def test_devices_dtypes_and_backends_that_are_not_there(arguments, words):
    with pytest.raises(BackendError, match=words):
        Inpainter(BlurFill(), **arguments)


def test_the_backend_is_passed_on_to_a_copy():
    class Chooses(BlurFill):
        backend = "auto"

        def set_backend(self, backend):
            if backend not in ("eager", "cpp"):
                raise ValueError(f"backend: expected eager or cpp, got {backend!r}")
            self.backend = backend

    model = Chooses()
    assert Inpainter(model, backend="cpp")._network.model.backend == "cpp"
    assert model.backend == "auto"
    with pytest.raises(BackendError, match="'fast'"):
        Inpainter(model, backend="fast")


def test_wrong_arguments_are_named(pipe):
    picture, hole = noise(20, 20), _holes(20, 20)
    with pytest.raises(ValueError, match="strategy: .*'huge'"):
        pipe(picture, hole, strategy="huge")
    with pytest.raises(InvalidImageError, match="picture: .*dict"):
        pipe({}, hole)
    for several in ([picture], torch.zeros(3, 20, 20)):
        with pytest.raises(InvalidImageError, match="picture: expected one .*, which only a call of the Inpainter"):
            pipe.inpaint(several, hole)
    for threshold in ("0.5", None, True, np.full(2, 0.5)):
        with pytest.raises(InvalidMaskError, match="mask_threshold: expected 0 <= value < 1, got "):
            pipe(picture, hole, mask_threshold=threshold)
    with pytest.raises(TypeError, match="model"):
        Inpainter("lgnet")
    with pytest.raises(ValueError, match="window: .*256"):
        Inpainter(BlurFill(), window=128)
    with pytest.raises(TypeError, match=r"window: expected a whole number of pixels, got 512\.5"):
        Inpainter(BlurFill(), window=512.5)
    with pytest.raises(TypeError, match="memory_limit: expected a number of bytes or None, got '1G'"):
        Inpainter(BlurFill(), memory_limit="1G")


def test_arrays_of_the_other_byte_order(pipe):
    picture, hole = noise(20, 20).astype(np.uint16) * 257, _holes(20, 20)
    for own in (picture, (picture / 65535).astype(np.float32)):
        swapped = own.astype(own.dtype.newbyteorder())
        result = pipe(swapped, hole)
        assert result.dtype == swapped.dtype
        assert np.array_equal(result, pipe(own, hole))
    levels = (hole * np.uint16(65535)).astype(">u2")
    assert np.array_equal(pipe(picture, levels), pipe(picture, hole))


def test_tensors_that_numpy_does_not_take(pipe):
    picture, hole = torch.rand(3, 20, 20), torch.from_numpy(_holes(20, 20))
    expected = pipe(picture, hole)
    assert torch.equal(pipe(torch._neg_view(-picture), hole), expected)
    assert torch.equal(pipe(picture, hole.to(torch.float8_e4m3fn)), expected)
    for bad, words in ((picture.to("meta"), "without values, on meta"), (picture.to_sparse(), "layout torch.sparse")):
        with pytest.raises(InvalidImageError, match=f"picture: expected a dense tensor .*{words}"):
            pipe(bad, hole)
        with pytest.raises(InvalidMaskError, match=f"mask: expected a dense tensor .*{words}"):
            pipe(picture, bad)


def test_a_batch_of_no_pictures_takes_as_many_masks(pipe):
    none = torch.zeros(0, 3, 20, 20)
    assert pipe(none, torch.zeros(0, 1, 20, 20)).shape == none.shape


def test_a_picture_whose_file_was_closed_is_named(pipe, tmp_path):
    Image.fromarray(noise(20, 20)).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as opened:
        pass
    with pytest.raises(InvalidImageError, match="picture: .*its file was closed before it was read"):
        pipe(opened, _holes(20, 20))


def test_half_precision_on_a_cpu_warns_once():
    model = LGNet("C", coarse_channels=4)
    with pytest.warns(UserWarning, match="dtype: float16 on a CPU") as caught:
        Inpainter(model, device="cpu", dtype="float16")
    assert len(caught) == 1
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Inpainter(model, device="cpu", dtype="bfloat16")


# -- the rest -----------------------------------------------------------------------------------------------------


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


def test_eight_threads_give_what_one_gives(bundled):
    pictures = [noise(90 + 20 * seed, 120, seed) for seed in range(8)]
    masks = [_holes(*picture.shape[:2]) for picture in pictures]
    serial = [bundled(picture, mask) for picture, mask in zip(pictures, masks, strict=True)]
    with ThreadPoolExecutor(8) as pool:
        parallel = list(pool.map(bundled, pictures, masks))
    for one, other in zip(serial, parallel, strict=True):
        np.testing.assert_array_equal(one, other)


def test_eight_threads_share_one_lazily_decoded_picture_and_one_retry(tmp_path):
    file = tmp_path / "shared.png"
    Image.fromarray(noise(200, 200)).save(file)
    hole = _holes(200, 200)
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


def test_warmup_runs_the_network_once():
    model = BlurFill()
    assert Inpainter(model).warmup(300, 200) > 0
    assert model.seen == [(1, 512, 256)]


# -- what callers pass ----------------------------------------------------------------------------------------------


def test_bytes_and_open_files_give_what_their_paths_give(pipe, tmp_path):
    picture = write_picture(tmp_path / "a.png", noise(20, 24))
    mask = write_picture(tmp_path / "m.png", np.uint8(255) * box_mask(20, 24, (5, 5, 12, 16)))
    expected = np.asarray(pipe(picture, mask))
    for given in (bytes, bytearray, memoryview, io.BytesIO):
        result = pipe(given(picture.read_bytes()), given(mask.read_bytes()))
        np.testing.assert_array_equal(np.asarray(result), expected)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(picture, "a.png")
    packed = zipfile.Path(tmp_path / "a.zip", "a.png")
    with open(picture, "rb") as file, open(mask, "rb") as hole:
        results = pipe([file, picture, packed], hole)  # the mask of all is read once
    assert len(results) == 3
    for result in results:
        np.testing.assert_array_equal(np.asarray(result), expected)


def test_files_that_cannot_be_read_are_one_clear_error(pipe, tmp_path):
    hole = box_mask(20, 24, (5, 5, 12, 16))
    (tmp_path / "a.txt").write_text("text")
    archive = zipfile.ZipFile(tmp_path / "a.zip", "w")
    closed = io.BytesIO()
    closed.close()
    with open(tmp_path / "a.txt") as text:
        for given, message in (
            ("", "picture: expected a picture file, got an empty path"),
            ("https://example.com/a.png", "got the address https://example.com/a.png; download it first"),
            (b"a.png", "picture: expected a readable picture file, got '5 bytes'"),
            (text, "opened for reading bytes .mode 'rb'., got '.*a.txt' opened as text"),
            (closed, "picture: expected a readable file, got 'BytesIO'"),
            (zipfile.Path(archive, "b.png"), "picture: expected a readable file, got '.*b.png'"),
        ):
            with pytest.raises(InvalidImageError, match=message):
                pipe(given, hole)
    with pytest.raises(InvalidMaskError, match="mask: expected a picture file, got the address"):
        pipe(noise(20, 24), "https://example.com/a.png")


def test_batches_in_another_layout_are_told_what_to_do(pipe):
    hole = box_mask(20, 24, (5, 5, 12, 16))
    with pytest.raises(InvalidImageError, match=r"got \[2, 20, 24, 3\]; a batch of arrays is a list: list"):
        pipe(np.stack([noise(20, 24)] * 2), hole)
    with pytest.raises(InvalidImageError, match=r"got \[2, 20, 24, 3\]; permute\(0, 3, 1, 2\)"):
        pipe(torch.from_numpy(np.stack([noise(20, 24)] * 2)), hole)


def test_wrong_options_name_themselves(pipe):
    picture, hole = noise(20, 24), box_mask(20, 24, (5, 5, 12, 16))
    for call in (pipe.inpaint, pipe.stages):
        with pytest.raises(TypeError, match="dilation: expected one of the options mask_threshold, .*, dilate"):
            call(picture, hole, dilation=3)
    with pytest.raises(InvalidMaskError, match="invert_mask: expected True or False, got 'no'"):
        pipe(picture, hole, invert_mask="no")
    for call in (pipe.warmup, pipe.estimate_memory):
        with pytest.raises(ValueError, match="width: expected at least 1 pixel, got 0"):
            call(256, 0)
        with pytest.raises(TypeError, match="height: expected a whole number of pixels, got 'a'"):
            call("a", 256)
    for limit in (-1, float("nan")):
        with pytest.raises(ValueError, match=f"memory_limit: expected at least 0 bytes, got {limit}"):
            Inpainter(BlurFill(), memory_limit=limit)
    for model, got in ((b"a", "b'a'"), (3, "3"), (BlurFill(), "the network BlurFill, which Inpainter")):
        with pytest.raises(TypeError, match=f"model: expected a model folder, a hub id or None, got {got}"):
            Inpainter.from_pretrained(model)
    with pytest.raises(TypeError, match="weights: expected a model directory or a hub id, got None"):
        LGNet.from_pretrained(None)


def test_warnings_point_at_the_callers_line(pipe):
    picture, hole = noise(20, 24), np.zeros((20, 24), bool)
    tensor = torch.from_numpy(picture).permute(2, 0, 1)
    for call in (
        lambda: pipe(picture, hole),
        lambda: pipe([picture], hole),
        lambda: pipe(tensor, hole),
        lambda: pipe.inpaint(picture, hole),
        lambda: pipe.stages(picture, hole),
    ):
        with pytest.warns(UserWarning, match="no hole pixel") as seen:
            call()
        assert [warning.filename for warning in seen] == [__file__]


def test_a_model_that_returns_something_else_is_one_clear_error():
    picture, hole = noise(20, 24), box_mask(20, 24, (5, 5, 12, 16))
    for model, got in (
        (lambda image, mask: image[:, :1], r"\[1, 1, 256, 256\]"),
        (lambda image, mask: None, "NoneType"),
        (lambda image, mask: image.numpy(), "ndarray"),
    ):
        with pytest.raises(TypeError, match=rf"model: expected it to return a tensor \[1, 3, 256, 256\], got {got}"):
            Inpainter(model)(picture, hole)


def test_representations_are_short(pipe):
    assert repr(pipe) == f"Inpainter(BlurFill, device={str(pipe.device)!r}, dtype={str(pipe.dtype)[6:]!r})"
    deep = DeepImage(np.zeros((20, 24, 4), np.uint16), "TIFF")
    assert repr(deep) == "DeepImage(RGBA;16, 24x20, TIFF)"


@pytest.mark.parametrize(
    ("samples", "format", "message"),
    [
        (
            np.zeros((8, 8, 3), np.uint8),
            "PNG",
            r"samples: expected an array uint16 \[H, W, C\], C = 2 to 4, got uint8",
        ),
        (np.zeros((8, 8), np.uint16), "PNG", r"samples: expected .* got uint16 \[8, 8\]"),
        ("a.png", "PNG", "samples: expected .* got str"),
        (np.zeros((8, 8, 3), np.uint16), "JPEG", "format: expected PNG or TIFF, got 'JPEG'"),
    ],
)
def test_deep_images_of_other_samples_are_refused(samples, format, message):
    with pytest.raises(InvalidImageError, match=message):
        DeepImage(samples, format)


def test_models_are_stored_in_floating_dtypes_only(tmp_path):
    model = LGNet("C", coarse_channels=4)
    for dtype in ("float16", torch.int8):
        with pytest.raises(TypeError, match="dtype: expected a floating torch.dtype or None, got"):
            model.save_pretrained(tmp_path, dtype=dtype)
    assert list(tmp_path.iterdir()) == []
