"""The arguments of `Inpainter`: kinds of pictures and masks, devices and dtypes, and the errors of wrong ones."""

from __future__ import annotations

import io
import warnings
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from lgnet_fast.errors import BackendError, InvalidImageError, InvalidMaskError
from lgnet_fast.pipeline import DeepImage, Inpainter
from lgnet_fast.reference import LGNet

from .engine_support import needs_extension
from .pipeline_support import BlurFill, box_mask, noise, some_holes, write_picture


@pytest.fixture(scope="module")
def pipe():
    return Inpainter(BlurFill())


def test_the_same_kind_comes_back_and_all_kinds_agree(pipe, tmp_path):
    array, hole = noise(120, 90), some_holes(120, 90)
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
    arrays, masks = [noise(64, 80, seed) for seed in range(3)], [some_holes(64, 80)] * 3
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


def failing(call, error):
    """The message of the error that a call raises; it is of this class itself, and chained to its cause."""
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    if str(caught.value).startswith("picture["):
        assert type(caught.value.__cause__) is error
    return str(caught.value)


def test_of_several_pictures_the_wrong_one_is_named(pipe, tmp_path):
    good, hole, small = noise(80, 96), some_holes(80, 96), some_holes(40, 40)
    lab = Image.fromarray(good).convert("LAB")
    message = failing(lambda: pipe([good, good, good, lab], hole), InvalidImageError)
    assert message.startswith("picture[3]: expected one of the modes 1, L, LA, ")
    assert message.endswith(", got LAB; convert it, for example to RGB")
    message = failing(lambda: pipe((good, good), [hole, small]), InvalidMaskError)
    assert message == "picture[1]: mask: expected the picture's size 96x80 (width x height), got 40x40"
    message = failing(lambda: pipe([good, [good, lab]], hole), InvalidImageError)
    assert message.startswith("picture[1][1]: expected one of the modes ")
    missing = tmp_path / "missing.png"
    message = failing(lambda: pipe([missing], hole), InvalidImageError)
    assert message.startswith(f"picture[0]: expected a readable picture file, got {str(missing)!r}")
    extra = write_picture(tmp_path / "a.ppm", good)
    extra.write_bytes(extra.read_bytes().replace(b"255", b"100", 1))
    message = failing(lambda: pipe([good, extra], hole), InvalidImageError)
    assert message.startswith(f"picture[1] {str(extra)!r}: expected a PPM or PGM file whose largest level is 255")
    message = failing(lambda: pipe([good], hole, mask_channel="alpha"), InvalidMaskError)
    assert message.startswith("picture[0]: mask_channel: 'alpha' needs a mask with transparency, got ")


def test_of_a_batch_the_wrong_picture_is_named(pipe):
    batch = torch.rand(3, 3, 80, 96)
    bad, hole, small = batch.clone(), some_holes(80, 96), some_holes(40, 40)
    bad[1, 0, 0, 0] = float("nan")
    message = failing(lambda: pipe(bad, hole), InvalidImageError)
    assert message == "picture[1]: expected finite levels in [0, 1], got NaN or infinity"
    message = failing(lambda: pipe(bad[1], hole), InvalidImageError)
    assert message == "picture: expected finite levels in [0, 1], got NaN or infinity"
    message = failing(lambda: pipe(batch, [hole, hole, small]), InvalidMaskError)
    assert message == "picture[2]: mask: expected the picture's size 96x80 (width x height), got 40x40"
    message = failing(lambda: pipe(batch.permute(0, 2, 3, 1), hole), InvalidImageError)
    assert message.startswith("picture: expected a tensor [B, C, H, W] with C = 1 to 4, got [3, 80, 96, 3]; permute")
    for whole, words in (
        (batch.to(torch.int32), "picture: expected a tensor of uint8 or of floats in [0, 1], got torch.int32"),
        (batch.to("meta"), "picture: expected a dense tensor of plain values, got one without values, on meta"),
        (batch.to_sparse(), "picture: expected a dense tensor of plain values, got layout torch.sparse_coo, "),
    ):
        assert failing(lambda whole=whole: pipe(whole, hole), InvalidImageError).startswith(words)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"dilate": -1}, "dilate: expected a whole number of pixels >= 0, got -1"),
        ({"feather": 0.5}, "feather: expected a whole number of pixels >= 0, got 0.5"),
        ({"mask_threshold": 1}, "mask_threshold: expected 0 <= value < 1, got 1"),
        ({"invert_mask": "no"}, "invert_mask: expected True or False, got 'no'"),
        ({"mask_channel": "x"}, "mask_channel: expected one of auto, luma, alpha, inverse_alpha, colour, got 'x'"),
    ],
)
def test_no_picture_is_blamed_for_an_option_of_the_call(pipe, option, message):
    picture, hole = noise(20, 24), some_holes(20, 24)
    batch = torch.from_numpy(picture).permute(2, 0, 1)[None]
    for given in ([picture, picture], batch):
        assert failing(lambda given=given: pipe(given, hole, **option), InvalidMaskError) == message


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


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_a_model_without_weights_is_an_error_of_the_constructor(backend):
    with torch.device("meta"):
        model = LGNet(coarse_channels=1, local_channels=1, global_channels=1)
    for given in (model, torch.nn.Conv2d(4, 3, 1, device="meta")):
        with pytest.raises(ValueError, match="^model: expected weights with values, got a model on the meta device$"):
            Inpainter(given, device="cpu", backend=backend)


@needs_extension
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
    picture, hole = noise(20, 20), some_holes(20, 20)
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
    picture, hole = noise(20, 20).astype(np.uint16) * 257, some_holes(20, 20)
    for own in (picture, np.dstack([picture, picture[..., :1]]), (picture / 65535).astype(np.float32)):
        swapped = own.astype(own.dtype.newbyteorder())
        result = pipe(swapped, hole)
        assert result.dtype == swapped.dtype
        assert np.array_equal(result, pipe(own, hole))
    levels = (hole * np.uint16(65535)).astype(">u2")
    assert np.array_equal(pipe(picture, levels), pipe(picture, hole))


def test_tensors_that_numpy_does_not_take(pipe):
    picture, hole = torch.rand(3, 20, 20), torch.from_numpy(some_holes(20, 20))
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
        pipe(opened, some_holes(20, 20))


def test_half_precision_on_a_cpu_warns_once():
    model = LGNet("C", coarse_channels=4)
    with pytest.warns(UserWarning, match="dtype: float16 on a CPU") as caught:
        Inpainter(model, device="cpu", dtype="float16")
    assert len(caught) == 1
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Inpainter(model, device="cpu", dtype="bfloat16")


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


def test_open_files_are_read_from_their_start(pipe):
    """As by Pillow: just written, or read before; a pipe is read from where it is."""
    array, hole = noise(20, 24), box_mask(20, 24, (5, 5, 12, 16))
    expected, picture, mask = pipe(array, hole), io.BytesIO(), io.BytesIO()
    Image.fromarray(array).save(picture, "PNG")
    Image.fromarray(np.uint8(255) * hole).save(mask, "PNG")
    for result in pipe([picture, picture], [mask, mask]):
        np.testing.assert_array_equal(np.asarray(result), expected)

    class Pipe:
        def seek(self, place: int) -> int:
            raise ValueError("cannot seek")  # as of fsspec, where files raise OSError

        def read(self, size: int | None = -1) -> bytes:
            return picture.getvalue()

    np.testing.assert_array_equal(np.asarray(pipe(Pipe(), mask)), expected)


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


def test_attributes_of_other_networks_may_be_of_any_kind():
    """`channels` of an LGNet are a tuple; many networks have a number of that name."""
    model, array, hole = BlurFill(), noise(64, 80), some_holes(64, 80)
    expected = Inpainter(model)(array, hole)
    for channels in (32, None, "RGB", ()):
        model.channels = channels
        np.testing.assert_array_equal(Inpainter(model)(array, hole), expected)
    for multiple, error, text in (
        (0, ValueError, "^model: expected a size_multiple of at least 1 pixel, got 0$"),
        (8.5, TypeError, "^model: expected a whole number of pixels as its size_multiple, got 8.5$"),
        (None, TypeError, "got None$"),
    ):
        model.size_multiple = multiple
        with pytest.raises(error, match=text):
            Inpainter(model)


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
