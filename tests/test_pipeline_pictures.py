"""PIL modes, depths, alpha, EXIF, metadata and formats."""

from __future__ import annotations

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageCms, ImageOps, IptcImagePlugin

from lgnet_fast.engine.regions import Rect
from lgnet_fast.errors import InvalidImageError, InvalidMaskError
from lgnet_fast.pipeline import Inpainter, chunks, pictures, writing
from lgnet_fast.pipeline.encoding import save_picture
from lgnet_fast.pipeline.formats import EXTENSIONS
from lgnet_fast.pipeline.pictures import Picture, picture_of
from lgnet_fast.pipeline.reading import open_upright

from .pipeline_support import ConstantFill, box_mask, noise

HEIGHT, WIDTH = 40, 60
HOLE = box_mask(HEIGHT, WIDTH, (10, 15, 30, 45))
COLOUR = (0.2, -0.3, 0.7)  # of 255: 153, 89.25, 216.75; their mean 153


@pytest.fixture(scope="module")
def pipe():
    return Inpainter(ConstantFill(*COLOUR))


def _of_mode(mode: str) -> Image.Image:
    rgb = noise(HEIGHT, WIDTH)
    if mode == "I;16":
        return Image.fromarray(noise(HEIGHT, WIDTH, dtype=np.uint16)[..., 0])
    if mode == "I;16B":
        return Image.frombytes(
            mode, (WIDTH, HEIGHT), noise(HEIGHT, WIDTH, dtype=np.uint16)[..., 0].astype(">u2").tobytes()
        )
    if mode == "I":
        return Image.fromarray(noise(HEIGHT, WIDTH, dtype=np.uint16)[..., 0].astype(np.int32))
    if mode in ("LA", "RGBA"):
        alpha = np.random.default_rng(5).integers(0, 256, (HEIGHT, WIDTH, 1)).astype(np.uint8)
        return Image.fromarray(np.concatenate([rgb[..., : len(mode) - 1], alpha], axis=2))
    if mode == "P":
        return Image.fromarray(rgb).quantize(64)
    return Image.fromarray(rgb).convert(mode)


MODES = ["1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16", "I;16B", "CMYK", "YCbCr", "HSV"]


@pytest.mark.parametrize("mode", MODES)
def test_mode_alpha_and_known_pixels_are_kept(pipe, mode):
    picture = _of_mode(mode)
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
    rgb = np.asarray(pipe(_of_mode("RGB"), HOLE))[HOLE]
    assert {tuple(pixel) for pixel in rgb.tolist()} == {(153, 89, 217)}
    assert set(np.asarray(pipe(_of_mode("L"), HOLE))[HOLE].tolist()) == {153}
    for mode in ("I", "I;16", "I;16B"):
        assert set(np.asarray(pipe(_of_mode(mode), HOLE))[HOLE].tolist()) == {39321}
    assert np.asarray(pipe(_of_mode("1"), HOLE))[HOLE].all()
    cmyk = pipe(_of_mode("CMYK"), HOLE).convert("RGB")
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
    picture = _of_mode("P")
    result = pipe(picture, HOLE)
    assert result.getpalette() == picture.getpalette()
    palette = np.array(picture.getpalette()).reshape(-1, 3)
    apart = ((palette - [153, 89, 217]) ** 2).sum(axis=1)
    assert set(apart[np.asarray(result)[HOLE]]) == {apart.min()}


def test_palette_transparency_keeps_every_alpha(pipe):
    picture = _of_mode("P")
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


# -- orientation and metadata ------------------------------------------------------------------------------------


def _with_exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    exif[ExifTags.Base.Make] = "Camera"
    exif[ExifTags.IFD.Exif] = {ExifTags.Base.ExposureTime: 0.5, ExifTags.Base.ISOSpeedRatings: 400}
    exif[ExifTags.IFD.GPSInfo] = {ExifTags.GPS.GPSLatitudeRef: "N", ExifTags.GPS.GPSLatitude: (50.0, 30.0, 0.0)}
    return exif


# Transposes that make an upright picture look as a camera with that orientation tag stores it.
STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("extension", ["png", "tiff", "webp"])
def test_every_orientation_of_picture_and_mask_is_applied(pipe, tmp_path, orientation, extension):
    upright, mask = Image.fromarray(noise(HEIGHT, WIDTH)), Image.fromarray(HOLE.astype(np.uint8) * 255)
    paths = []
    for name, picture in (("picture", upright), ("mask", mask)):
        stored = picture if STORED[orientation] is None else picture.transpose(STORED[orientation])
        paths.append(tmp_path / f"{name}.{extension}")
        stored.save(paths[-1], exif=_with_exif(orientation).tobytes(), lossless=True)
    result = pipe(paths[0], paths[1])
    expected = np.asarray(pipe(upright, mask))
    np.testing.assert_array_equal(np.asarray(result), expected)

    again = tmp_path / f"again.{extension}"
    save_picture(result, again)
    exif = Image.open(again).getexif()
    assert exif.get(ExifTags.Base.Orientation, 1) == 1
    assert exif[ExifTags.Base.Make] == "Camera"
    assert exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.ISOSpeedRatings] == 400
    assert exif.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitudeRef] == "N"
    np.testing.assert_array_equal(np.asarray(ImageOps.exif_transpose(Image.open(again))), expected)
    # a PIL picture that carries the tag is turned too
    np.testing.assert_array_equal(np.asarray(pipe(Image.open(paths[0]), paths[1])), expected)


def test_a_mask_of_the_stored_size_is_told_about_the_turn(pipe):
    picture = Image.fromarray(noise(WIDTH, HEIGHT))
    picture.info["exif"] = _with_exif(6).tobytes()
    with pytest.raises(InvalidMaskError, match=r"expected the picture's size 60x40.*got 40x60.*orientation 6"):
        pipe(picture, np.zeros((WIDTH, HEIGHT), bool))


def test_the_exif_thumbnail_which_shows_what_was_removed_is_dropped(pipe, tmp_path):
    exif = _with_exif(1)
    base = exif.tobytes()
    # A thumbnail directory (IFD1) appended to the TIFF block, reached through the first directory's link.
    tiff = bytearray(base[6:])
    little = tiff[:2] == b"II"
    order = "little" if little else "big"
    first = int.from_bytes(tiff[4:8], order)
    link = first + 2 + 12 * int.from_bytes(tiff[first : first + 2], order)
    tiff[link : link + 4] = len(tiff).to_bytes(4, order)
    thumbnail = b"\xff\xd8thumbnail\xff\xd9"
    start = len(tiff) + 2 + 2 * 12 + 4
    tiff += (2).to_bytes(2, order)
    for tag, value in ((0x0201, start), (0x0202, len(thumbnail))):
        tiff += tag.to_bytes(2, order) + (4).to_bytes(2, order) + (1).to_bytes(4, order) + value.to_bytes(4, order)
    tiff += bytes(4) + thumbnail
    source = tmp_path / "photo.jpg"
    Image.fromarray(noise(HEIGHT, WIDTH)).save(source, exif=bytes(base[:6] + tiff))
    assert b"thumbnail" in source.read_bytes()
    assert Image.open(source).getexif().get_ifd(ExifTags.IFD.IFD1)

    save_picture(pipe(source, HOLE), tmp_path / "out.jpg")
    assert b"thumbnail" not in (tmp_path / "out.jpg").read_bytes()
    assert Image.open(tmp_path / "out.jpg").getexif()[ExifTags.Base.Make] == "Camera"


@pytest.mark.parametrize("extension", ["jpg", "png", "tiff", "webp", "bmp"])
def test_format_icc_and_dpi_are_kept(pipe, tmp_path, extension):
    profile = b"an ICC profile, opaque to Pillow"
    source, target = tmp_path / f"in.{extension}", tmp_path / f"out.{extension}"
    picture = Image.fromarray(noise(HEIGHT, WIDTH))
    picture.save(source, icc_profile=profile, dpi=(300, 300), lossless=True)
    result = pipe(source, HOLE)
    assert result.format == Image.open(source).format
    save_picture(result, target, like=Image.open(source))
    saved = Image.open(target)
    assert saved.format == result.format
    if extension != "bmp":
        assert saved.info["icc_profile"] == profile
    if extension != "webp":
        assert saved.info["dpi"] == pytest.approx((300, 300), abs=0.1)
    if extension != "jpg":
        np.testing.assert_array_equal(np.asarray(saved.convert("RGB"))[~HOLE], np.asarray(picture)[~HOLE])


def test_jpeg_reuses_the_source_tables_so_known_blocks_hardly_change(pipe, tmp_path):
    source, target = tmp_path / "in.jpg", tmp_path / "out.jpg"
    smooth = np.linspace(0, 255, HEIGHT * WIDTH * 3).reshape(HEIGHT, WIDTH, 3).astype(np.uint8)
    Image.fromarray(smooth).save(source, quality=60)
    result = pipe(source, HOLE)
    before = np.asarray(Image.open(source))
    np.testing.assert_array_equal(np.asarray(result)[~HOLE], before[~HOLE])  # exact before the lossy encoding
    save_picture(result, target, like=Image.open(source))
    saved = Image.open(target)
    assert saved.quantization == Image.open(source).quantization
    assert saved.layer == Image.open(source).layer
    far = np.ones_like(HOLE)
    far[:, 0:48] = far[:32] = False  # blocks of 16x16 that hold no hole pixel
    assert np.abs(np.asarray(saved).astype(int) - before)[far].max() <= 4
    save_picture(result, target, like=Image.open(source), quality=20)
    assert Image.open(target).quantization != saved.quantization


def test_deep_and_alpha_pictures_are_not_flattened_silently(pipe, tmp_path):
    for mode, extension in (("RGBA", "jpg"), ("I;16", "jpg"), ("I;16", "webp"), ("CMYK", "png"), ("RGBA", "bmp")):
        result = pipe(_of_mode(mode), HOLE)
        with pytest.raises(InvalidImageError, match=r"format: .*" + mode):
            save_picture(result, tmp_path / f"out.{extension}")
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("mode", "extension"),
    [
        ("1", "jpg"),
        ("1", "tiff"),
        ("L", "webp"),
        ("LA", "webp"),
        ("LA", "png"),
        ("P", "jpg"),
        ("P", "png"),
        ("P", "gif"),
        ("I;16", "png"),
        ("I;16", "tiff"),
        ("I;16B", "png"),
        ("I", "png"),
        ("RGB", "bmp"),
        ("CMYK", "tiff"),
        ("CMYK", "jpg"),
    ],
)
def test_samples_survive_the_file(pipe, tmp_path, mode, extension):
    result = pipe(_of_mode(mode), HOLE)
    file = tmp_path / f"out.{extension}"
    save_picture(result, file, quality=100 if extension == "jpg" else None)
    saved = Image.open(file)
    if mode.startswith("I"):
        np.testing.assert_array_equal(np.asarray(saved).astype(int), np.asarray(result).astype(int))
        return
    apart = np.abs(np.asarray(saved.convert("RGBA")).astype(int) - np.asarray(result.convert("RGBA")))
    assert apart.max() <= (8 if extension == "jpg" else 0)


# -- broken files -------------------------------------------------------------------------------------------------


def test_decompression_bombs_are_one_clear_error(pipe, tmp_path, monkeypatch):
    file = tmp_path / "bomb.png"
    Image.new("L", (100, 100)).save(file)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)
    with pytest.raises(InvalidImageError, match=r"bomb\.png.*DecompressionBombError"):
        pipe(file, np.ones((100, 100), bool))


@pytest.mark.parametrize("extension", ["png", "jpg", "webp", "tiff", "bmp", "gif"])
def test_truncated_files_are_one_clear_error(pipe, tmp_path, extension):
    file = tmp_path / f"cut.{extension}"
    Image.fromarray(noise(HEIGHT, WIDTH)).save(file)
    data = file.read_bytes()
    for share in (0.03, 0.5):
        file.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(InvalidImageError, match=f"cut.{extension}"):
            pipe(file, HOLE)


def test_missing_and_foreign_files_are_one_clear_error(pipe, tmp_path):
    (tmp_path / "notes.png").write_text("no picture")
    for path in (tmp_path / "notes.png", tmp_path / "missing.png", tmp_path):
        with pytest.raises(InvalidImageError, match=path.name):
            pipe(path, HOLE)


def test_only_the_first_frame_is_used_with_a_warning(pipe, tmp_path):
    frames = [Image.fromarray(noise(HEIGHT, WIDTH, seed)) for seed in (1, 2)]
    file = tmp_path / "two.tiff"
    frames[0].save(file, save_all=True, append_images=frames[1:])
    with pytest.warns(UserWarning, match="2 frames"):
        result = pipe(file, HOLE)
    np.testing.assert_array_equal(np.asarray(result)[~HOLE], np.asarray(frames[0])[~HOLE])


def test_writing_is_atomic(tmp_path, monkeypatch):
    target = tmp_path / "out.png"
    target.write_bytes(b"old")

    def crash(*_):
        raise OSError("disk full")

    monkeypatch.setattr(writing.os, "fsync", crash)
    with pytest.raises(OSError, match="disk full"):
        save_picture(Image.new("RGB", (4, 4)), target)
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_open_upright_reports_the_turn(tmp_path):
    file = tmp_path / "turned.jpg"
    Image.new("RGB", (30, 20)).save(file, exif=_with_exif(8))
    picture, orientation = open_upright(file)
    assert (picture.size, orientation, picture.format) == ((20, 30), 8, "JPEG")


# -- TIFF files ---------------------------------------------------------------------------------------------------

XMP = b"<x:xmpmeta>a rose</x:xmpmeta>"


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_adobe_deflate"])
@pytest.mark.parametrize("mode", ["RGB", "L", "I;16B"])
def test_a_tiff_holds_exif_and_xmp_with_every_compression(pipe, tmp_path, mode, compression):
    exif = _with_exif(1)
    exif[ExifTags.Base.ImageWidth], exif[ExifTags.Base.Compression] = 4000, 6  # as some cameras write
    exif[ExifTags.Base.Rating] = 4
    picture = _of_mode(mode)
    picture.info.update(exif=exif.tobytes(), xmp=XMP, compression=compression)
    result = pipe(picture, HOLE)
    save_picture(result, tmp_path / "out.tif")
    with Image.open(tmp_path / "out.tif") as saved:
        found = saved.getexif()
        assert saved.info["compression"] == compression
        assert (found[ExifTags.Base.Make], found[ExifTags.Base.Rating]) == ("Camera", 4)
        assert found[700] == XMP
        assert found.get_ifd(ExifTags.IFD.Exif) == {
            ExifTags.Base.ExposureTime: 0.5,
            ExifTags.Base.ISOSpeedRatings: 400,
        }
        assert found.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitude] == (50, 30, 0)
        np.testing.assert_array_equal(np.asarray(saved).astype(int), np.asarray(result).astype(int))


def test_a_camera_jpeg_becomes_a_tiff_with_its_exif(pipe, tmp_path):
    Image.fromarray(noise(HEIGHT, WIDTH)).save(tmp_path / "photo.jpg", exif=_with_exif(1), xmp=XMP)
    for source in ("photo.jpg", "one.tif"):  # from the JPEG, and from the TIFF again
        save_picture(pipe(tmp_path / source, HOLE), tmp_path / "one.tif")
        with Image.open(tmp_path / "one.tif") as saved:
            assert saved.getexif()[ExifTags.Base.Make] == "Camera"
            assert saved.getexif()[700] == XMP
            assert saved.getexif().get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.ISOSpeedRatings] == 400


@pytest.mark.parametrize("cause", [RuntimeError, OSError, ValueError])
def test_what_an_encoder_refuses_is_one_clear_error(tmp_path, monkeypatch, cause):
    picture = Image.new("RGB", (4, 4))

    def refuse(*_, **__):
        raise cause("Error setting from dictionary")

    monkeypatch.setattr(picture, "save", refuse)
    with pytest.raises(InvalidImageError, match="format: TIFF could not be written .*Error setting from dictionary"):
        save_picture(picture, tmp_path / "out.tif")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("extension", ["tif", "jpg", "png"])
def test_a_tiff_without_resolution_gets_none(pipe, tmp_path, extension):
    Image.fromarray(noise(HEIGHT, WIDTH)).save(tmp_path / "in.tif")
    save_picture(pipe(tmp_path / "in.tif", HOLE), tmp_path / f"out.{extension}")
    with Image.open(tmp_path / f"out.{extension}") as saved:
        assert ExifTags.Base.XResolution not in getattr(saved, "tag_v2", {})
        if extension != "tif":
            assert "dpi" not in saved.info


@pytest.mark.parametrize(
    ("extra", "words"),
    [(1, "expected alpha beside the colours, got colours multiplied by it"), (0, "got 1 of unspecified meaning")],
)
def test_a_tiff_whose_samples_would_change_or_go_is_refused(pipe, tmp_path, extra, words):
    samples = np.dstack([noise(HEIGHT, WIDTH), noise(HEIGHT, WIDTH)[..., 0]])
    Image.fromarray(samples).save(tmp_path / "in.tif", tiffinfo={})
    data = bytearray((tmp_path / "in.tif").read_bytes())
    at = data.index((338).to_bytes(2, "little") + (3).to_bytes(2, "little") + (1).to_bytes(4, "little"))
    data[at + 8] = extra
    (tmp_path / "in.tif").write_bytes(data)
    with pytest.raises(InvalidImageError, match=rf"in\.tif.*{words}"):
        pipe(tmp_path / "in.tif", HOLE)


def test_deep_grey_with_white_as_zero_is_inverted(pipe, tmp_path):
    stored = noise(HEIGHT, WIDTH, dtype=np.uint16)[..., 0]
    Image.fromarray(stored).save(tmp_path / "in.tif", tiffinfo={262: 0})
    result = pipe(tmp_path / "in.tif", HOLE)
    assert (result.mode, result.format) == ("I;16", "TIFF")
    np.testing.assert_array_equal(np.asarray(result)[~HOLE], 65535 - stored[~HOLE])
    assert set(np.asarray(result)[HOLE].tolist()) == {39321}
    save_picture(result, tmp_path / "out.tif")
    with Image.open(tmp_path / "out.tif") as saved:
        assert saved.tag_v2[262] == 1
        np.testing.assert_array_equal(np.asarray(saved), np.asarray(result))


# -- transparent level of a grey PNG ------------------------------------------------------------------------------


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


# -- arrays and JPEG 2000 -----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:the matrix subclass")
def test_a_numpy_matrix_is_taken_as_an_array(pipe):
    levels = noise(HEIGHT, WIDTH)[..., 0]
    result = pipe(np.matrix(levels), np.matrix(HOLE))
    assert (type(result), result.dtype, result.shape) == (np.ndarray, np.uint8, (HEIGHT, WIDTH))
    np.testing.assert_array_equal(result[~HOLE], levels[~HOLE])
    assert set(result[HOLE].tolist()) == {153}


def test_sixteen_bit_grey_jpeg_2000_is_kept(pipe, tmp_path):
    levels = noise(HEIGHT, WIDTH, dtype=np.uint16)[..., 0]
    Image.fromarray(levels).save(tmp_path / "in.jp2")
    result = pipe(tmp_path / "in.jp2", HOLE)
    save_picture(result, tmp_path / "out.jp2")
    with Image.open(tmp_path / "out.jp2") as saved:
        assert (saved.mode, saved.format) == ("I;16", "JPEG2000")
        np.testing.assert_array_equal(np.asarray(saved)[~HOLE], levels[~HOLE])
        assert set(np.asarray(saved)[HOLE].tolist()) == {39321}


def _profile() -> bytes:
    """Not that of sRGB, which a reader may take for granted."""
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "I;16"])
def test_jpeg_2000_keeps_the_colour_profile(pipe, tmp_path, mode):
    picture, out = _of_mode(mode), tmp_path / "a.jp2"
    picture.info["icc_profile"] = _profile()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_picture(picture, out)
    data = out.read_bytes()
    # One box for the colours: length, type, the method "restricted ICC profile", precedence, approximation.
    assert data.count(b"colr") == 1
    assert struct.pack(">I4sBBB", 11 + len(_profile()), b"colr", 2, 0, 0) + _profile() in data
    again = pipe(out, HOLE)
    assert again.info["icc_profile"] == _profile()
    np.testing.assert_array_equal(np.asarray(again)[~HOLE], np.asarray(picture)[~HOLE])


@pytest.mark.parametrize(
    ("extension", "lost"),
    [
        ("bmp", "colour profile, EXIF, XMP, IPTC"),
        ("tga", "colour profile, EXIF, XMP, IPTC"),
        ("ppm", "colour profile, EXIF, XMP, IPTC"),
        ("jp2", "EXIF, XMP, IPTC"),
        ("png", "IPTC"),
        ("webp", "IPTC"),
        ("jpg", None),
        ("tif", None),
    ],
)
def test_metadata_that_a_format_does_not_hold_is_named_once(tmp_path, extension, lost):
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "Maker"
    picture = _of_mode("RGB")
    picture.info = {"icc_profile": _profile(), "exif": exif.tobytes(), "xmp": b"<x/>", "iptc": IPTC}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        save_picture(picture, tmp_path / f"a.{extension}")
    format = EXTENSIONS[f".{extension}"]
    expected = [] if lost is None else [f"format: {format} does not hold the picture's {lost}"]
    assert [str(one.message) for one in told] == expected
    picture.info = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_picture(picture, tmp_path / f"b.{extension}")


IPTC = b"\x1c\x02\x78\x00\x07caption"
PHOTOSHOP = b"Photoshop 3.0\0" + b"".join(
    struct.pack(">4sHHI", b"8BIM", kind, 0, len(content)) + content + b"\0" * (len(content) % 2)
    for kind, content in ((0x040C, b"a thumbnail of what was removed"), (0x0404, IPTC))
)


def test_iptc_passes_between_jpeg_and_tiff_without_the_thumbnail_beside_it(pipe, tmp_path):
    source = tmp_path / "in.jpg"
    segment = b"\xff\xed" + struct.pack(">H", 2 + len(PHOTOSHOP)) + PHOTOSHOP
    _of_mode("RGB").save(source, quality=95, extra=segment)
    with Image.open(source) as before:
        assert before.info["photoshop"][0x040C].startswith(b"a thumbnail")
    for extension in ("tif", "jpg"):
        result = pipe(source, HOLE)
        source = tmp_path / f"out.{extension}"
        save_picture(result, source)
        assert b"thumbnail" not in source.read_bytes()
        with Image.open(source) as after:
            assert IptcImagePlugin.getiptcinfo(after) == {(2, 120): b"caption"}


def test_iptc_too_long_for_a_jpeg_is_named(tmp_path):
    picture = _of_mode("RGB")
    picture.info["iptc"] = b"\x1c" * 65507  # with its header and padding one byte more than a segment
    with pytest.warns(UserWarning, match="JPEG does not hold the picture's IPTC"):
        save_picture(picture, tmp_path / "a.jpg")
    picture.info["iptc"] = b"\x1c" * 65506
    save_picture(picture, tmp_path / "a.jpg")
    with Image.open(tmp_path / "a.jpg") as read:
        assert read.info["photoshop"] == {0x0404: b"\x1c" * 65506}


@pytest.mark.filterwarnings("ignore:Metadata Warning, tag 33723")  # Pillow's, because of the numbers
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("order", "<>")
def test_iptc_that_photoshop_declares_as_numbers_is_kept(pipe, tmp_path, dtype, order):
    pytest.importorskip("imagecodecs")
    stored = IPTC + b"\0" * (-len(IPTC) % 4)
    words = struct.unpack(f"{order}{len(stored) // 4}I", stored)
    source, out = tmp_path / "in.tif", tmp_path / "out.tif"
    pytest.importorskip("tifffile").imwrite(
        source, noise(HEIGHT, WIDTH, dtype=dtype), byteorder=order, photometric="rgb",
        extratags=[(33723, 4, len(words), words, True)],
    )  # fmt: skip
    result = pipe(source, HOLE)
    assert result.info["iptc"] == stored
    save_picture(result, out)
    assert stored in out.read_bytes()
    assert pipe(out, HOLE).info["iptc"] == stored


@pytest.mark.parametrize(
    ("header", "white"), [(b"P5 60 40 100\n", 100), (b"P5\n# a comment\n60 40\n1023\n", 1023), (b"P6 60 40 31\n", 31)]
)
def test_levels_that_pillow_would_rescale_are_refused(pipe, tmp_path, header, white):
    source = tmp_path / "a.pnm"
    samples = 3 if header.startswith(b"P6") else 1
    source.write_bytes(header + bytes(HEIGHT * WIDTH * samples * (2 if white > 255 else 1)))
    with pytest.raises(
        InvalidImageError, match=rf"a\.pnm.* whose largest level is 255 or 65535, got {white}: .* PNG"
    ):
        pipe(source, HOLE)


@pytest.mark.parametrize("white", [255, 65535])
def test_full_levels_of_pgm_are_kept(pipe, tmp_path, white):
    dtype = np.uint8 if white == 255 else np.uint16
    levels = noise(HEIGHT, WIDTH, dtype=dtype)[..., 0]
    source, out = tmp_path / "a.pgm", tmp_path / "b.pgm"
    source.write_bytes(
        f"P5 {WIDTH} {HEIGHT} {white}\n".encode() + levels.astype(levels.dtype.newbyteorder(">")).tobytes()
    )
    save_picture(pipe(source, HOLE), out)
    stored = out.read_bytes()
    assert stored.split()[:4] == [b"P5", b"60", b"40", str(white).encode()]
    again = np.frombuffer(stored[-levels.nbytes :], levels.dtype.newbyteorder(">")).reshape(HEIGHT, WIDTH)
    np.testing.assert_array_equal(again[~HOLE], levels[~HOLE])


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
    picture = _of_mode("P")
    whole = np.asarray(pipe(picture, HOLE))
    monkeypatch.setattr(pictures, "_MATCHED_PIXELS", 7)
    np.testing.assert_array_equal(np.asarray(pipe(picture, HOLE)), whole)
