"""Picture files through the pipeline: orientation, metadata, formats, broken files, writing."""

from __future__ import annotations

import functools
import struct
import warnings

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms, ImageOps, IptcImagePlugin

from lgnet_fast.errors import InvalidImageError, InvalidMaskError
from lgnet_fast.pipeline import Inpainter, writing
from lgnet_fast.pipeline.encoding import encode, save_picture
from lgnet_fast.pipeline.formats import EXTENSIONS, MODES
from lgnet_fast.pipeline.reading import open_upright

from .pipeline_support import ConstantFill, box_mask, noise, noise_of_mode

HEIGHT, WIDTH = 40, 60
HOLE = box_mask(HEIGHT, WIDTH, (10, 15, 30, 45))
COLOUR = (0.2, -0.3, 0.7)  # of 255: 153, 89.25, 216.75; their mean 153


@pytest.fixture(scope="module")
def pipe():
    return Inpainter(ConstantFill(*COLOUR))


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


def test_open_upright_reports_the_turn(tmp_path):
    file = tmp_path / "turned.jpg"
    Image.new("RGB", (30, 20)).save(file, exif=_with_exif(8))
    picture, orientation = open_upright(file)
    assert (picture.size, orientation, picture.format) == ((20, 30), 8, "JPEG")


XMP = b"<x:xmpmeta>a rose</x:xmpmeta>"


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_adobe_deflate"])
@pytest.mark.parametrize("mode", ["RGB", "L", "I;16B"])
def test_a_tiff_holds_exif_and_xmp_with_every_compression(pipe, tmp_path, mode, compression):
    exif = _with_exif(1)
    exif[ExifTags.Base.ImageWidth], exif[ExifTags.Base.Compression] = 4000, 6  # as some cameras write
    exif[ExifTags.Base.Rating] = 4
    picture = noise_of_mode(mode)
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


def test_sixteen_bit_grey_jpeg_2000_is_kept(pipe, tmp_path):
    levels = noise(HEIGHT, WIDTH, dtype=np.uint16)[..., 0]
    Image.fromarray(levels).save(tmp_path / "in.jp2")
    result = pipe(tmp_path / "in.jp2", HOLE)
    save_picture(result, tmp_path / "out.jp2")
    with Image.open(tmp_path / "out.jp2") as saved:
        assert (saved.mode, saved.format) == ("I;16", "JPEG2000")
        np.testing.assert_array_equal(np.asarray(saved)[~HOLE], levels[~HOLE])
        assert set(np.asarray(saved)[HOLE].tolist()) == {39321}


@functools.cache  # a profile holds the second in which it was made
def _profile() -> bytes:
    """Not that of sRGB, which a reader may take for granted."""
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "I;16"])
def test_jpeg_2000_keeps_the_colour_profile(pipe, tmp_path, mode):
    picture, out = noise_of_mode(mode), tmp_path / "a.jp2"
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
    picture = noise_of_mode("RGB")
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
    noise_of_mode("RGB").save(source, quality=95, extra=segment)
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
    picture = noise_of_mode("RGB")
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
