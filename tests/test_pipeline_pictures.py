"""Pictures of every kind, mode and depth through the pipeline: known samples, alpha and palettes are kept."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from lgnet_fast.engine.regions import Rect
from lgnet_fast.errors import InvalidImageError
from lgnet_fast.pipeline import Inpainter, chunks, pictures
from lgnet_fast.pipeline.encoding import save_picture
from lgnet_fast.pipeline.pictures import Picture, picture_of

from .pipeline_support import ConstantFill, box_mask, noise, noise_of_mode

HEIGHT, WIDTH = 40, 60
HOLE = box_mask(HEIGHT, WIDTH, (10, 15, 30, 45))
COLOUR = (0.2, -0.3, 0.7)  # of 255: 153, 89.25, 216.75; their mean 153


@pytest.fixture(scope="module")
def pipe():
    return Inpainter(ConstantFill(*COLOUR))


MODES = ["1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16", "I;16B", "CMYK", "YCbCr", "HSV"]


@pytest.mark.parametrize("mode", MODES)
def test_mode_alpha_and_known_pixels_are_kept(pipe, mode):
    picture = noise_of_mode(mode)
    assert picture.mode == mode
    before = np.array(picture)
    result = pipe(picture, HOLE)
    after = np.asarray(result)
    assert result.mode == mode
    assert result.size == picture.size
    np.testing.assert_array_equal(after[~HOLE], before[~HOLE])
    np.testing.assert_array_equal(np.asarray(picture), before)  # the picture of the caller is unchanged
    if mode in ("LA", "RGBA"):
        np.testing.assert_array_equal(after[..., -1], before[..., -1])
    assert (after[HOLE] != before[HOLE]).any()


def test_filled_levels_are_exact_in_each_depth(pipe):
    rgb = np.asarray(pipe(noise_of_mode("RGB"), HOLE))[HOLE]
    assert {tuple(pixel) for pixel in rgb.tolist()} == {(153, 89, 217)}
    assert set(np.asarray(pipe(noise_of_mode("L"), HOLE))[HOLE].tolist()) == {153}
    for mode in ("I", "I;16", "I;16B"):
        assert set(np.asarray(pipe(noise_of_mode(mode), HOLE))[HOLE].tolist()) == {39321}
    assert np.asarray(pipe(noise_of_mode("1"), HOLE))[HOLE].all()
    cmyk = pipe(noise_of_mode("CMYK"), HOLE).convert("RGB")
    assert np.abs(np.asarray(cmyk)[HOLE].astype(int) - [153, 89, 217]).max() <= 2


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_levels_survive_the_network_range_and_back(dtype):
    """x / (white / 2) - 1 and round((y + 1) * white / 2) is the identity for every level."""
    levels = np.arange(np.iinfo(dtype).max + 1, dtype=dtype)
    array = np.stack([levels.reshape(-1, 256)] * 3, axis=2)
    picture = picture_of(array)
    network = picture.network_range(slice(None), slice(None))
    assert network.dtype == np.float32
    assert network.min() == -1
    assert network.max() == 1
    everywhere = np.ones(array.shape[:2], np.float32)
    box = Rect(0, array.shape[0], 0, array.shape[1])
    np.testing.assert_array_equal(picture.with_fill([(box, network)], everywhere), array)


def test_palette_is_kept_and_fills_take_its_nearest_colour(pipe):
    picture = noise_of_mode("P")
    result = pipe(picture, HOLE)
    assert result.getpalette() == picture.getpalette()
    palette = np.array(picture.getpalette()).reshape(-1, 3)
    apart = ((palette - [153, 89, 217]) ** 2).sum(axis=1)
    assert set(apart[np.asarray(result)[HOLE]]) == {apart.min()}


def test_palette_transparency_keeps_every_alpha(pipe):
    picture = noise_of_mode("P")
    picture.info["transparency"] = bytes([0] * 8 + [255] * 20 + [128] * 36)
    before, after = picture.convert("RGBA"), pipe(picture, HOLE).convert("RGBA")
    np.testing.assert_array_equal(np.asarray(after)[..., 3], np.asarray(before)[..., 3])
    file = io.BytesIO()
    pipe(picture, HOLE).save(file, "PNG")
    np.testing.assert_array_equal(np.asarray(Image.open(file).convert("RGBA")), np.asarray(after))


def test_colour_key_transparency_keeps_every_alpha(pipe):
    array = noise(HEIGHT, WIDTH)
    for key in ((153, 89, 217), (1, 2, 3)):  # the first is what the fill comes to
        array[5:25, 5:25] = key
        picture = Image.fromarray(array)
        picture.info["transparency"] = key
        result = pipe(picture, HOLE)
        alpha = np.asarray(result.convert("RGBA"))[..., 3]
        np.testing.assert_array_equal(alpha, np.asarray(picture.convert("RGBA"))[..., 3])
        np.testing.assert_array_equal(np.asarray(result)[~HOLE], array[~HOLE])


@pytest.mark.parametrize("key", [0, 255])
@pytest.mark.parametrize("fill", [-1.0, 1.0])
def test_fills_of_a_bilevel_picture_are_opaque(tmp_path, key, fill):
    """A fill of the transparent level would be transparent: the file then has grey levels, one of them beside it."""
    levels = np.zeros((HEIGHT, WIDTH), np.uint8)
    levels[:, 30:] = 255
    Image.fromarray(levels).convert("1").save(tmp_path / "in.png", transparency=key)
    result = Inpainter(ConstantFill(fill, fill, fill))(tmp_path / "in.png", HOLE)
    save_picture(result, tmp_path / "out.png")
    wanted = round(127.5 * (fill + 1))
    with Image.open(tmp_path / "out.png") as saved:
        assert saved.mode == ("L" if wanted == key else "1")
        grey, alpha = np.moveaxis(np.asarray(saved.convert("LA")), 2, 0)
    np.testing.assert_array_equal(alpha, np.where(levels == key, 0, 255))
    np.testing.assert_array_equal(grey[~HOLE], levels[~HOLE])
    assert np.abs(grey[HOLE & (levels != key)].astype(int) - wanted).max() <= 1


@pytest.mark.parametrize("mode", ["LAB", "F", "PA", "RGBX"])
def test_modes_that_cannot_be_kept_are_refused(pipe, mode):
    with pytest.raises(InvalidImageError, match=mode):
        pipe(Image.new(mode, (8, 8)), np.ones((8, 8), bool))


@pytest.mark.parametrize(
    ("picture", "words"),
    [
        (np.zeros((4, 4, 3), np.int64), "int64"),
        (np.zeros((5, 4, 5), np.uint8), r"\[5, 4, 5\]"),
        (np.zeros((0, 4, 3), np.uint8), r"\[0, 4, 3\]"),
        (np.full((4, 4, 3), 255.0), "0, 1.*got 255 to 255.*divide"),
        (torch.zeros(9, 4, 9), r"\[9, 4, 9\]"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.int32), "int32"),
        (torch.full((1, 3, 4, 4), float("nan")), "NaN"),
        (torch.full((1, 3, 4, 4), float("inf")), "infinity"),
        (torch.full((1, 3, 4, 4), 1.01), "1.01"),
        (torch.full((1, 3, 4, 4), -1.0), "got -1"),
        (Image.fromarray(np.full((4, 4), 70000, np.int32)), "70000"),
        (7, "int"),
    ],
)
def test_pictures_that_cannot_be_used_are_named(pipe, picture, words):
    with pytest.raises(InvalidImageError, match=words):
        pipe(picture, np.ones((4, 4), bool))


@pytest.mark.parametrize(
    "dtype", [np.uint8, np.uint16, np.float16, np.float32, np.float64], ids=lambda dtype: dtype.__name__
)
@pytest.mark.parametrize("layout", ["HW", "HW1", "HW3", "HW4", "3HW", "4HW"])
def test_arrays_of_every_layout_and_depth(pipe, layout, dtype):
    channels = int(layout.strip("HW") or 1)
    white = 1 if dtype is np.float16 or dtype in (np.float32, np.float64) else np.iinfo(dtype).max
    array = (np.random.default_rng(4).random((HEIGHT, WIDTH, channels)) * white).astype(dtype)
    if white == 1:
        array[0, 0] = np.nextafter(dtype(1), dtype(2))  # 1 but for rounding
    given = {"HW": array[..., 0]}.get(layout, array if layout.startswith("HW") else array.transpose(2, 0, 1))
    before = given.copy()
    result = pipe(given, HOLE)
    np.testing.assert_array_equal(given, before)
    assert result.dtype == dtype
    assert result.shape == given.shape
    back = result.reshape(HEIGHT, WIDTH, -1) if layout.startswith("HW") else result.transpose(1, 2, 0)
    np.testing.assert_array_equal(back[~HOLE], array[~HOLE])
    if channels == 4:
        np.testing.assert_array_equal(back[..., 3], array[..., 3])
    colour = np.array([0.6, 0.35, 0.85]) if channels >= 3 else np.array([0.6])
    step = 1.01 if white != 1 else np.finfo(dtype).eps + 1e-6
    np.testing.assert_allclose(back[HOLE][:, : len(colour)], np.tile(colour * white, (HOLE.sum(), 1)), atol=step)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", ["HW", "3HW", "4HW", "HW3", "B4HW"])
def test_tensors_of_every_shape(pipe, shape, dtype):
    white = 255 if dtype == torch.uint8 else 1
    sizes = {"H": HEIGHT, "W": WIDTH, "B": 2}
    full = [sizes[axis] if axis in sizes else int(axis) for axis in shape]
    tensor = (torch.rand(full, generator=torch.Generator().manual_seed(1)) * white).to(dtype)
    result = pipe(tensor, torch.from_numpy(HOLE))
    assert result.dtype == dtype
    assert result.shape == tensor.shape
    hole = torch.from_numpy(HOLE)[..., None] if shape == "HW3" else torch.from_numpy(HOLE)
    known = ~hole.expand(tensor.shape)
    assert torch.equal(result[known], tensor[known])
    red = result[..., 0] if shape == "HW3" else result.reshape(-1, HEIGHT, WIDTH)[0]
    assert (red[torch.from_numpy(HOLE)].float() / white - 0.6).abs().max() < 0.004
    if "4" in shape:
        assert torch.equal(result[..., 3, :, :], tensor[..., 3, :, :])


@pytest.mark.parametrize(("bits", "key", "widened"), [(2, 1, 85), (2, 2, 170), (4, 9, 153), (4, 3, 51)])
@pytest.mark.parametrize("opened", [False, True])
def test_the_transparent_level_of_two_and_four_bits_is_kept(pipe, tmp_path, bits, key, widened, opened):
    levels = np.tile(np.arange(WIDTH, dtype=np.uint8) % 2**bits, (HEIGHT, 1))
    source = tmp_path / "in.png"
    _store_grey(source, levels, bits, key)
    result = pipe(Image.open(source) if opened else source, HOLE)
    assert (result.mode, result.info["transparency"]) == ("L", widened)
    save_picture(result, tmp_path / "out.png")
    with Image.open(tmp_path / "out.png") as saved:
        alpha = np.asarray(saved.convert("LA"))[..., 1]
        np.testing.assert_array_equal(np.asarray(saved)[~HOLE], levels[~HOLE] * (255 // (2**bits - 1)))
    np.testing.assert_array_equal(alpha == 0, levels == key)


def _store_grey(path, levels: np.ndarray, bits: int, key: int) -> None:
    """A grey PNG of 2 or 4 bits with a transparent level, which Pillow does not write."""
    groups = levels.reshape(len(levels), -1, 8 // bits)
    packed = sum(groups[..., place] << (8 - bits * (place + 1)) for place in range(8 // bits)).astype(np.uint8)
    rows = b"".join(b"\0" + row.tobytes() for row in packed)
    header = struct.pack(">IIBBBBB", levels.shape[1], len(levels), bits, 0, 0, 0, 0)
    parts = [chunks.SIGNATURE]
    for kind, content in (
        (b"IHDR", header), (b"tRNS", struct.pack(">H", key)), (b"IDAT", zlib.compress(rows)), (b"IEND", b""),
    ):  # fmt: skip
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        parts += [struct.pack(">I", len(content)), kind, content, checksum]
    path.write_bytes(b"".join(parts))


def test_the_transparent_level_of_sixteen_bits_is_kept(pipe, tmp_path):
    levels = noise(HEIGHT, WIDTH, dtype=np.uint16)[..., 0].copy()
    levels[5:15, 5:20] = 513
    for key in (513, 39321):  # the second is what the fill comes to
        Image.fromarray(levels).save(tmp_path / "in.png", transparency=key)
        result = pipe(tmp_path / "in.png", HOLE)
        save_picture(result, tmp_path / "out.png")
        with Image.open(tmp_path / "out.png") as saved:
            assert (saved.mode, saved.info["transparency"]) == ("I;16", key)
            np.testing.assert_array_equal(np.asarray(saved) == key, levels == key)
            np.testing.assert_array_equal(np.asarray(saved)[~HOLE], levels[~HOLE])
            np.testing.assert_array_equal(np.asarray(saved)[HOLE & (levels != 513)], 39321 if key == 513 else 39320)


@pytest.mark.filterwarnings("ignore:the matrix subclass")
def test_a_numpy_matrix_is_taken_as_an_array(pipe):
    levels = noise(HEIGHT, WIDTH)[..., 0]
    result = pipe(np.matrix(levels), np.matrix(HOLE))
    assert (type(result), result.dtype, result.shape) == (np.ndarray, np.uint8, (HEIGHT, WIDTH))
    np.testing.assert_array_equal(result[~HOLE], levels[~HOLE])
    assert set(result[HOLE].tolist()) == {153}


def test_strips_are_painted_as_one(monkeypatch):
    rng = np.random.default_rng(0)
    for samples, white in ((noise(50, 61), 255.0), (rng.random((50, 61, 1), np.float32), 1.0)):
        picture = Picture(samples, white, lambda samples, touched: samples)
        fill = rng.uniform(-1, 1, (30, 40, 3)).astype(np.float32)
        alpha = rng.choice(np.array([0, 0.3, 1], np.float32), (30, 40))
        painted = picture.painted([(Rect(7, 37, 11, 51), fill, alpha)])
        with monkeypatch.context() as patch:
            patch.setattr(pictures, "_STRIP_PIXELS", 130)
            np.testing.assert_array_equal(picture.painted([(Rect(7, 37, 11, 51), fill, alpha)]), painted)
        known = np.ones((50, 61), bool)
        known[7:37, 11:51] = alpha == 0
        np.testing.assert_array_equal(painted[known], samples[known])


def test_a_palette_is_matched_by_parts(pipe, monkeypatch):
    picture = noise_of_mode("P")
    whole = np.asarray(pipe(picture, HOLE))
    monkeypatch.setattr(pictures, "_MATCHED_PIXELS", 7)
    np.testing.assert_array_equal(np.asarray(pipe(picture, HOLE)), whole)
