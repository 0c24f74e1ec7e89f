"""Picture files through the pipeline: formats, samples, broken files, writing; metadata has a file of its own."""

from __future__ import annotations

import io
import struct
from functools import partial
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lgnet_fast.errors import InvalidImageError, InvalidMaskError
from lgnet_fast.pipeline import Inpainter, writing
from lgnet_fast.pipeline.encoding import encode, held_modes, save_picture
from lgnet_fast.pipeline.formats import EXTENSIONS, MODES, MOST_SIDE
from lgnet_fast.pipeline.pictures import picture_of

from .pipeline_support import COLOUR, HEIGHT, HOLE, WIDTH, ConstantFill, noise, noise_of_mode


@pytest.fixture(scope="module")
def pipe():
    return Inpainter(ConstantFill(*COLOUR))


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


@pytest.mark.parametrize("extension", ["jpg", "webp", "avif", "png"])
@pytest.mark.parametrize("quality", [0, 101, 500, -1, True, 90.0, "90", np.float32(90)])
def test_a_quality_that_no_format_has_is_refused_before_the_file_is_written(tmp_path, extension, quality):
    with pytest.raises(InvalidImageError) as caught:
        save_picture(Image.new("RGB", (8, 8)), tmp_path / f"out.{extension}", quality=quality)
    assert str(caught.value) == f"quality: expected a whole number from 1 to 100, got {quality!r}"
    assert list(tmp_path.iterdir()) == []


def test_whole_numbers_of_numpy_are_qualities():
    picture = Image.fromarray(noise(HEIGHT, WIDTH))
    for format in ("JPEG", "WEBP"):
        files = {quality: encode(picture, format, quality=quality) for quality in (1, 50, 100)}
        assert len(files[1]) < len(files[50]) < len(files[100])
        for quality, file in files.items():
            assert encode(picture, format, quality=np.uint8(quality)) == file


def test_a_format_that_there_is_not_is_told_which_there_are(tmp_path):
    picture, message = Image.new("RGB", (8, 8)), f"format: expected one of {', '.join(MODES)}, got 'XYZ'"
    for write in (lambda: encode(picture, "XYZ"), lambda: save_picture(picture, tmp_path / "out.png", format="XYZ")):
        with pytest.raises(InvalidImageError) as caught:
            write()
        assert str(caught.value) == message


def test_deep_and_alpha_pictures_are_not_flattened_silently(pipe, tmp_path):
    grey, alpha = "PNG, TIFF, JPEG2000, PPM", "PNG, WEBP, TIFF, AVIF, HEIF, JPEG2000, TGA"
    for mode, extension, holding in (
        ("RGBA", "jpg", alpha), ("LA", "jpg", alpha), ("I;16", "jpg", grey), ("I", "webp", grey),
        ("CMYK", "png", "JPEG, TIFF"), ("RGBA", "bmp", alpha),
    ):  # fmt: skip
        result = pipe(noise_of_mode(mode), HOLE)
        with pytest.raises(InvalidImageError, match=f"format: .*of mode {mode}; it is held by {holding}$"):
            save_picture(result, tmp_path / f"out.{extension}")
        assert list(tmp_path.iterdir()) == []


def _keyed(mode: str, key: Any) -> Image.Image:
    """A picture of four vertical bands, the first of which is transparent by `key`, as some PNG and GIF files are."""
    levels = np.zeros((HEIGHT, WIDTH), np.uint8)
    for band in range(4):
        levels[:, WIDTH * band // 4 :] = 255 * (band % 2) if mode == "1" else 85 * band
    grey = Image.fromarray(levels)
    picture = Image.merge("RGB", [grey] * 3) if mode == "RGB" else grey.convert(mode)
    if mode == "I;16":
        picture = Image.fromarray(levels.astype(np.uint16))
    picture.info["transparency"] = key
    return picture


KEYS = {"1": 0, "L": 0, "P": bytes([0, 255, 128]), "RGB": (0, 0, 0), "I;16": 0}


@pytest.mark.parametrize("extension", ["png", "webp", "tif", "jp2", "tga", "gif", "jpg", "bmp", "ppm"])
@pytest.mark.parametrize("mode", KEYS)
def test_a_transparent_colour_becomes_a_channel_or_is_refused(tmp_path, mode, extension):
    picture, file = _keyed(mode, KEYS[mode]), tmp_path / f"out.{extension}"
    format = EXTENSIONS[file.suffix]
    refused = extension in ("jpg", "bmp", "ppm") or (mode == "I;16" and extension != "png")
    if refused or (extension == "gif" and mode in ("RGB", "P")):  # a GIF has no levels of alpha
        for attempt in (lambda: save_picture(picture, file), lambda: picture_of(picture).check_format(format)):
            with pytest.raises(InvalidImageError, match=f"format: .*of mode {mode} with a transparent colour; it is"):
                attempt()
        assert list(tmp_path.iterdir()) == []
        return
    picture_of(picture).check_format(format)
    save_picture(picture, file)
    with Image.open(file) as saved:
        if mode == "I;16":
            assert (saved.mode, saved.info["transparency"]) == (mode, 0)
        else:
            shown = np.asarray(saved.convert("RGBA"))
            np.testing.assert_array_equal(shown, np.asarray(picture.convert("RGBA")))
            assert set(shown[:, 0, 3].tolist()) == {0}


@pytest.mark.parametrize("format", MOST_SIDE)
def test_sides_that_a_format_does_not_hold_are_refused(format):
    """Up to the limit the file has the picture's size. HEIC's encoder takes no narrow picture of such a length."""
    most, mode = MOST_SIDE[format], "L" if format in ("GIF", "JPEG") else "RGB"
    if format not in ("HEIF", "AVIF"):
        for size in ((most, 2), (2, most)):
            with Image.open(io.BytesIO(encode(Image.new(mode, size), format))) as saved:
                assert saved.size == size
    for size in ((most + 1, 2), (2, most + 1)):
        picture = Image.new(mode, size)
        for attempt in (partial(encode, picture), picture_of(picture).check_format):
            with pytest.raises(InvalidImageError) as caught:
                attempt(format)
            assert str(caught.value) == (
                f"format: {format} holds at most {most} pixels a side, got {most + 1}; longer ones are held by PNG, "
                "TIFF, BMP, JPEG2000, PPM"
            )


def test_narrow_pictures_that_x265_does_not_take_are_refused():
    pytest.importorskip("pillow_heif")
    for size in ((4216, 1), (31, 4216), (4217, 32)):
        with Image.open(io.BytesIO(encode(Image.new("RGB", size), "HEIF"))) as saved:
            assert saved.size == size
    for size in ((4217, 1), (31, 4217), (31, 65528)):
        picture = Image.new("RGB", size)
        for attempt in (partial(encode, picture), picture_of(picture).check_format):
            with pytest.raises(InvalidImageError) as caught:
                attempt("HEIF")
            assert str(caught.value) == (
                "format: HEIF holds at most 4216 pixels a side where the other has less than 32, got "
                f"{max(size)} beside {min(size)}; PNG holds more"
            )


@pytest.mark.parametrize(("format", "most"), [("TIFF", 2**32 - 2**25), ("BMP", 2**32 - 2**11)])
@pytest.mark.parametrize(("mode", "size"), [("1", 1 / 8), ("L", 1), ("RGB", 3)])
def test_samples_of_more_bytes_than_a_format_holds_are_refused(format, most, mode, size):
    """Only by their size: a test of such a file would take its 4 GiB."""
    width = 2**16
    rows = int(most // (width * size))
    held_modes(mode, None, format, (width, rows))
    for other in ("PNG", "PPM"):
        held_modes(mode, None, other, (width, rows + 1))
    with pytest.raises(InvalidImageError) as caught:
        held_modes(mode, None, format, (width, rows + 1))
    assert str(caught.value) == (
        f"format: {format} holds at most {most} bytes of samples, got {int(width * (rows + 1) * size)} "
        f"({width}x{rows + 1}, mode {mode}); PNG and PPM hold more"
    )
    if format == "TIFF":  # a transparent colour becomes a channel, which counts too
        with pytest.raises(InvalidImageError, match=r"mode (LA|RGBA)\); PNG and PPM hold more"):
            held_modes(mode, 0, format, (width, rows))


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
    result = pipe(noise_of_mode(mode), HOLE)
    file = tmp_path / f"out.{extension}"
    save_picture(result, file, quality=100 if extension == "jpg" else None)
    saved = Image.open(file)
    if mode.startswith("I"):
        np.testing.assert_array_equal(np.asarray(saved).astype(int), np.asarray(result).astype(int))
        return
    apart = np.abs(np.asarray(saved.convert("RGBA")).astype(int) - np.asarray(result.convert("RGBA")))
    assert apart.max() <= (8 if extension == "jpg" else 0)


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


@pytest.mark.parametrize("cause", [RuntimeError, OSError, ValueError, OverflowError, struct.error])
def test_what_an_encoder_refuses_is_one_clear_error(tmp_path, monkeypatch, cause):
    picture = Image.new("RGB", (4, 4))

    def refuse(*_, **__):
        raise cause("Error setting from dictionary")

    monkeypatch.setattr(picture, "save", refuse)
    with pytest.raises(InvalidImageError, match="format: TIFF could not be written .*Error setting from dictionary"):
        save_picture(picture, tmp_path / "out.tif")
    assert list(tmp_path.iterdir()) == []


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


def test_a_bmp_whose_bits_pillow_takes_for_pixels_is_refused(pipe, tmp_path):
    """8 bits a pixel, and a palette of black and white: read as 1 bit a pixel, half of the pixels would be wrong."""
    picture = Image.frombytes("P", (WIDTH, HEIGHT), HOLE.astype(np.uint8).tobytes())
    picture.putpalette([0, 0, 0, 255, 255, 255])
    picture.save(tmp_path / "eight.bmp")
    Image.fromarray(HOLE).save(tmp_path / "one.bmp")
    words = "expected a BMP of 1 bit a pixel for black and white, got one of 8 bits"
    with pytest.raises(InvalidImageError, match=words):
        pipe(tmp_path / "eight.bmp", HOLE)
    with pytest.raises(InvalidMaskError, match=words):
        pipe(noise(HEIGHT, WIDTH), tmp_path / "eight.bmp")
    np.testing.assert_array_equal(np.asarray(pipe(tmp_path / "one.bmp", ~HOLE))[HOLE], True)
    for colours in ([0, 0, 0, 200, 200, 200], [255, 255, 255, 0, 0, 0]):
        picture.putpalette(colours)
        picture.save(tmp_path / "other.bmp")
        result = pipe(tmp_path / "other.bmp", HOLE)
        assert result.mode == "P"
        np.testing.assert_array_equal(np.asarray(result)[~HOLE], 0)


@pytest.mark.parametrize("colours", [[0, 0, 0, 255, 255, 255], [0, 0, 0], [255, 255, 255, 0, 0, 0]])
def test_a_bmp_of_a_short_palette_is_read_as_it_was_written(pipe, tmp_path, colours):
    levels = HOLE.astype(np.uint8) * (len(colours) > 3)
    picture = Image.frombytes("P", (WIDTH, HEIGHT), levels.tobytes())
    picture.putpalette(colours)
    save_picture(picture, tmp_path / "out.bmp")
    with Image.open(tmp_path / "out.bmp") as saved:
        np.testing.assert_array_equal(np.asarray(saved.convert("RGB")), np.asarray(picture.convert("RGB")))
    np.testing.assert_array_equal(np.asarray(pipe(tmp_path / "out.bmp", HOLE))[~HOLE], levels[~HOLE])


@pytest.mark.parametrize("extension", ["png", "webp", "tif", "jp2", "tga"])
def test_the_alphas_of_a_palette_are_kept(tmp_path, extension):
    picture = noise_of_mode("RGBA").quantize(32, method=Image.Quantize.FASTOCTREE)
    assert "transparency" not in picture.info
    shown = np.asarray(picture.convert("RGBA"))
    assert len(np.unique(shown[..., 3])) > 4
    save_picture(picture, tmp_path / f"out.{extension}")
    with Image.open(tmp_path / f"out.{extension}") as saved:
        np.testing.assert_array_equal(np.asarray(saved.convert("RGBA")), shown)


@pytest.mark.parametrize("format", ["BMP", "GIF", "PPM", "JPEG"])
def test_a_format_without_a_palette_of_alphas_refuses_it(format):
    picture = noise_of_mode("RGBA").quantize(32, method=Image.Quantize.FASTOCTREE)
    for attempt in (partial(encode, picture), picture_of(picture).check_format):
        with pytest.raises(InvalidImageError, match=r"format: .*a transparent colour; it is held by PNG"):
            attempt(format)


def test_a_gif_of_a_picture_that_pillow_has_given_alphas_has_its_colours():
    picture = noise_of_mode("P")
    picture.info["transparency"] = 3
    shown = np.asarray(picture.convert("RGBA"))  # from now on its palette has four bytes a colour
    with Image.open(io.BytesIO(encode(picture, "GIF"))) as saved:
        np.testing.assert_array_equal(np.asarray(saved.convert("RGBA")), shown)
    assert set(shown[..., 3].flat) == {0, 255}


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


def test_sixteen_bit_grey_jpeg_2000_is_kept(pipe, tmp_path):
    levels = noise(HEIGHT, WIDTH, dtype=np.uint16)[..., 0]
    Image.fromarray(levels).save(tmp_path / "in.jp2")
    result = pipe(tmp_path / "in.jp2", HOLE)
    save_picture(result, tmp_path / "out.jp2")
    with Image.open(tmp_path / "out.jp2") as saved:
        assert (saved.mode, saved.format) == ("I;16", "JPEG2000")
        np.testing.assert_array_equal(np.asarray(saved)[~HOLE], levels[~HOLE])
        assert set(np.asarray(saved)[HOLE].tolist()) == {39321}


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


@pytest.mark.parametrize(("bits", "channels"), [(4, 1), (7, 3), (12, 1)])
def test_jpeg_2000_of_other_depths_is_refused(pipe, tmp_path, bits, channels):
    codec = pytest.importorskip("imagecodecs")
    levels = noise(HEIGHT, WIDTH, dtype=np.uint16)[..., :channels] >> (16 - bits)
    levels = (levels if bits > 8 else levels.astype(np.uint8)).squeeze()
    source = tmp_path / "a.jp2"
    source.write_bytes(codec.jpeg2k_encode(levels, level=0, bitspersample=bits, codecformat="jp2"))
    with pytest.raises(
        InvalidImageError, match=rf"a\.jp2.* JPEG2000 file of 8 or 16 bits a sample, got {bits}: .* PNG"
    ):
        pipe(source, HOLE)


def test_a_tiff_of_12_bits_is_refused(pipe, tmp_path):
    """Pillow leaves its levels in 0..4095 of 65535: the fill would be of another white than the picture."""
    levels = noise(HEIGHT, WIDTH, dtype=np.uint16)[..., 0] >> 4
    bits = (levels[..., None] >> np.arange(11, -1, -1)) & 1
    data = np.packbits(bits.astype(np.uint8).reshape(HEIGHT, -1), axis=1).tobytes()
    tags = {256: WIDTH, 257: HEIGHT, 258: 12, 259: 1, 262: 1, 273: 110, 277: 1, 279: len(data)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
    assert len(head) == 110
    (tmp_path / "a.tif").write_bytes(head + data)
    with Image.open(tmp_path / "a.tif") as opened:
        np.testing.assert_array_equal(np.asarray(opened), levels)
    with pytest.raises(InvalidImageError, match=r"a\.tif.* TIFF file of 8 or 16 bits a sample, got 12: .* PNG"):
        pipe(tmp_path / "a.tif", HOLE)
    with pytest.raises(InvalidMaskError, match=r"mask .*a\.tif.* TIFF file of 8 or 16 bits a sample, got 12"):
        pipe(noise(HEIGHT, WIDTH), tmp_path / "a.tif")


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
