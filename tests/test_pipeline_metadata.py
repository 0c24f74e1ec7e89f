"""Metadata of picture files through the pipeline: orientation, EXIF, XMP, IPTC, colour profiles, resolution."""

from __future__ import annotations

import functools
import struct
import warnings
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms, ImageOps, IptcImagePlugin, PngImagePlugin, TiffTags
from PIL.TiffImagePlugin import IFDRational, ImageFileDirectory_v2

from lgnet_fast.errors import InvalidMaskError
from lgnet_fast.pipeline import DeepImage, Inpainter
from lgnet_fast.pipeline.encoding import save_picture
from lgnet_fast.pipeline.formats import EXTENSIONS
from lgnet_fast.pipeline.reading import open_upright

from .pipeline_support import COLOUR, HEIGHT, HOLE, WIDTH, ConstantFill, noise, noise_of_mode


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


@pytest.mark.parametrize("entry", [b"\2\0\4\0\0\0top\0", b"\3\0\1\0\0\0\0\0\0\0", b"\3\0\1\0\0\0\x09\0\0\0"])
def test_an_orientation_that_is_none_turns_nothing(pipe, tmp_path, entry):
    """`entry`: type, count and value of the tag: text, 0, 9."""
    exif = b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1" + entry + bytes(4)
    Image.fromarray(noise(HEIGHT, WIDTH)).save(tmp_path / "a.png", exif=exif, dpi=(100, 200))
    assert open_upright(tmp_path / "a.png")[1] == 1
    result = pipe(tmp_path / "a.png", HOLE)
    np.testing.assert_array_equal(np.asarray(result)[~HOLE], noise(HEIGHT, WIDTH)[~HOLE])
    save_picture(result, tmp_path / "b.png")
    with Image.open(tmp_path / "b.png") as read:
        assert [round(one) for one in read.info["dpi"]] == [100, 200]


def test_open_upright_reports_the_turn(tmp_path):
    file = tmp_path / "turned.jpg"
    Image.new("RGB", (30, 20)).save(file, exif=_with_exif(8))
    picture, orientation = open_upright(file)
    assert (picture.size, orientation, picture.format) == ((20, 30), 8, "JPEG")


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


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("extension", [".jpg", ".png", ".webp"])
def test_the_exif_of_a_camera_keeps_its_byte_order_and_its_interoperability(pipe, tmp_path, extension, order):
    exif = Image.Exif()
    exif.endian = order
    exif[ExifTags.Base.Make] = "maker"
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.IFD.Interop] = {1: "R98", 2: b"0100"}
    Image.fromarray(noise(HEIGHT, WIDTH)).save(tmp_path / "a.jpg", exif=exif)
    save_picture(pipe(tmp_path / "a.jpg", HOLE), tmp_path / f"b{extension}")
    with Image.open(tmp_path / f"b{extension}") as result:
        written = result.getexif()
        assert written[ExifTags.Base.Make] == "maker"
        assert written.endian == order
        assert written.get_ifd(ExifTags.IFD.Interop) == {1: "R98", 2: b"0100"}


def _exif_with(**values: tuple[int, Any]) -> bytes:
    """EXIF with an orientation of 6 and tags whose types, by number, are not those that they should have."""
    directory, sub = ImageFileDirectory_v2(), ImageFileDirectory_v2()
    directory[ExifTags.Base.Orientation], directory[ExifTags.Base.Make] = 6, "Camera"
    for name, (kind, value) in values.items():
        tag = ExifTags.Base[name]
        own = sub if name in ("CFAPattern", "CameraOwnerName", "UserComment") else directory
        own.tagtype[tag] = kind
        own[tag] = value
    sub[ExifTags.Base.LensModel] = "Lens"
    place = 8 + len(directory.tobytes(8)) + 12
    directory[ExifTags.IFD.Exif] = place
    first = directory.tobytes(8)
    return b"Exif\0\0" + b"II*\0\x08\0\0\0" + first.ljust(place - 8, b"\0") + sub.tobytes(place)


@pytest.mark.parametrize("extension", ["jpg", "png", "webp", "tif"])
def test_exif_that_pillow_cannot_write_costs_its_tags_not_the_picture(pipe, tmp_path, extension):
    exif = _exif_with(ImageWidth=(TiffTags.DOUBLE, 0.5), CFAPattern=(TiffTags.DOUBLE, -1.5))
    upright = noise(HEIGHT, WIDTH)
    stored = Image.fromarray(upright).transpose(STORED[6])
    source = tmp_path / f"in.{'png' if extension == 'tif' else extension}"
    stored.save(source, exif=exif, **({"lossless": True} if extension == "webp" else {}))
    with pytest.warns(UserWarning, match="left out: ImageWidth, CFAPattern$") as told:
        result = pipe(source, HOLE)
    assert len(told) == 1
    if extension != "jpg":
        np.testing.assert_array_equal(np.asarray(result)[~HOLE], upright[~HOLE])
    save_picture(result, tmp_path / f"out.{extension}")
    with Image.open(tmp_path / f"out.{extension}") as saved:
        written = saved.getexif()
        assert saved.size == (WIDTH, HEIGHT)
        assert written[ExifTags.Base.Make] == "Camera"
        assert dict(written.get_ifd(ExifTags.IFD.Exif)) == {ExifTags.Base.LensModel: "Lens"}
        assert written.get(ExifTags.Base.Orientation, 1) == 1


def _exif_of_one_directory(tag: int, kind: int, value: Any) -> bytes:
    directory = ImageFileDirectory_v2()
    directory.tagtype[tag] = kind
    directory[tag] = value
    directory[ExifTags.Base.Make] = "Camera"
    return b"Exif\0\0II*\0\x08\0\0\0" + directory.tobytes(8)


def test_exif_that_a_tiff_does_not_take_costs_its_tag_not_the_result(tmp_path):
    """A text where a number belongs."""
    picture = Image.fromarray(noise(HEIGHT, WIDTH))
    picture.info["exif"] = _exif_of_one_directory(ExifTags.Base.BestQualityScale, TiffTags.ASCII, b"best")
    with pytest.warns(UserWarning, match="^format: TIFF does not take .* EXIF tags BestQualityScale$"):
        save_picture(picture, tmp_path / "out.tif")
    with Image.open(tmp_path / "out.tif") as saved:
        assert saved.getexif()[ExifTags.Base.Make] == "Camera"
        assert ExifTags.Base.BestQualityScale not in saved.getexif()
        np.testing.assert_array_equal(np.asarray(saved), noise(HEIGHT, WIDTH))


@pytest.mark.parametrize("compression", [None, "raw", "tiff_lzw", "packbits"])
@pytest.mark.parametrize(
    ("tag", "kind", "value"),
    [
        (50706, TiffTags.BYTE, b"\1\4\0\0"),  # DNGVersion
        (ExifTags.Base.Artist, TiffTags.SHORT, 2),
        (50736, TiffTags.RATIONAL, (24.0, 70.0, 2.8, 4.0)),  # LensInfo
        (50717, TiffTags.SHORT, 16383),  # WhiteLevel
        (33421, TiffTags.SIGNED_BYTE, (51, 0, -56, -27)),  # CFARepeatPatternDim, which has two other numbers
        (65000, TiffTags.ASCII, b"private"),
    ],
)
def test_tags_that_libtiff_knows_otherwise_are_kept(tmp_path, tag, kind, value, compression):
    """Libtiff expects other types or lengths of them than Pillow hands over, and ends the process."""
    picture = Image.fromarray(noise(HEIGHT, WIDTH))
    picture.info["exif"] = _exif_of_one_directory(tag, kind, value)
    picture.info["icc_profile"] = profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    if compression is not None:
        picture.info["compression"] = compression
    save_picture(picture, tmp_path / "out.tif")
    with Image.open(tmp_path / "out.tif") as saved:
        found = saved.getexif()[tag]
        if isinstance(value, bytes):
            assert found == (value if kind == TiffTags.BYTE else value.decode())
        else:  # Pillow stores a text under Artist
            assert found == ("2" if tag == ExifTags.Base.Artist else pytest.approx(value, rel=1e-6))
        assert saved.getexif()[ExifTags.Base.Make] == "Camera"
        assert saved.info["icc_profile"] == profile
        np.testing.assert_array_equal(np.asarray(saved), noise(HEIGHT, WIDTH))


def test_tags_of_another_file_replace_none_of_a_tiff(tmp_path):
    """Such as a colour profile among the EXIF of a JPEG."""
    picture = Image.fromarray(noise(HEIGHT, WIDTH))
    exif = _exif_of_one_directory(ExifTags.Base.InterColorProfile, TiffTags.UNDEFINED, b"another profile")
    picture.info["exif"] = exif
    picture.info["icc_profile"] = profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    save_picture(picture, tmp_path / "out.tif")
    with Image.open(tmp_path / "out.tif") as saved:
        assert saved.info["icc_profile"] == profile


@pytest.mark.parametrize(
    ("mode", "extension", "compression"),
    [("RGB", extension, None) for extension in ("jpg", "png", "webp", "tif", "avif", "heic")]
    + [("RGB", "tif", "raw"), ("RGB;16", "tif", None), ("RGB;16", "png", None)],
)
def test_text_of_exif_that_is_not_ascii_is_kept_byte_for_byte(pipe, tmp_path, mode, extension, compression):
    """As many programs write it: a copyright sign in UTF-8 or Latin-1. Pillow itself writes "?" for it."""
    pytest.importorskip({"heic": "pillow_heif"}.get(extension, "tifffile" if mode == "RGB;16" else "PIL"))
    texts = {"Copyright": "© Zoë 字".encode(), "Artist": "Zo\xeb".encode("latin-1"), "DateTime": b"2026-01-02"}
    owner, comment = "Zoë".encode(), b"UNICODE\0\0s\0t\0e\0p\0s"
    exif = _exif_with(
        **{name: (TiffTags.ASCII, text) for name, text in texts.items()},
        CameraOwnerName=(TiffTags.ASCII, owner),
        UserComment=(TiffTags.UNDEFINED, comment),
    )
    picture: Any = Image.fromarray(noise(WIDTH, HEIGHT))
    picture.info.update({"exif": exif} | ({"compression": compression} if compression else {}))
    if mode == "RGB;16":
        picture = tmp_path / "deep.png"
        DeepImage(noise(WIDTH, HEIGHT, dtype=np.uint16), "PNG", {"exif": exif}).save(picture)
    save_picture(pipe(picture, HOLE), tmp_path / f"a.{extension}")
    save_picture(pipe(tmp_path / f"a.{extension}", HOLE), tmp_path / f"b.{extension}")
    with Image.open(tmp_path / f"b.{extension}") as saved:
        directory = saved.getexif()
        for name, text in texts.items():
            assert directory[ExifTags.Base[name]].encode("latin-1") == text
        further = directory.get_ifd(ExifTags.IFD.Exif)
        assert further[ExifTags.Base.CameraOwnerName].encode("latin-1") == owner
        assert further[ExifTags.Base.UserComment] == comment
    # Some programs read a comment only where its type is undefined.
    stated = [struct.pack(f"{order}HHI", ExifTags.Base.UserComment, 7, len(comment)) for order in "<>"]
    assert any(one in (tmp_path / f"b.{extension}").read_bytes() for one in stated)


@pytest.mark.parametrize("mode", ["RGB", "RGB;16"])
@pytest.mark.parametrize(("across", "kept"), [((0, 0), None), ((1, 0), None), ((4 * 10**9, 1), 4e9), ((300, 1), 300)])
def test_a_resolution_that_is_none_or_too_high_does_not_cost_the_result(pipe, tmp_path, mode, across, kept):
    """0/0 pixels per inch, as some scanners write, and more than a format's field holds."""
    if not across[1]:
        pytest.importorskip("PIL", minversion="12", reason="earlier versions do not open such a file")
    resolution = IFDRational(*across)
    tags = {ExifTags.Base.XResolution: resolution, ExifTags.Base.YResolution: resolution}
    if mode == "RGB":
        Image.fromarray(noise(HEIGHT, WIDTH)).save(tmp_path / "in.tif", tiffinfo={**tags, 296: 2})
    else:
        samples, tifffile = noise(HEIGHT, WIDTH, dtype=np.uint16), pytest.importorskip("tifffile")
        tifffile.imwrite(tmp_path / "in.tif", samples, photometric="rgb", resolution=(54321, 54321), resolutionunit=2)
        data, stated = (tmp_path / "in.tif").read_bytes(), struct.pack("<II", 54321, 1)
        assert data.count(stated) == 2
        (tmp_path / "in.tif").write_bytes(data.replace(stated, struct.pack("<II", *across)))
    result = pipe(tmp_path / "in.tif", HOLE)
    for extension, most in (("tif", 2**32 - 1), ("png", (2**31 - 1) * 0.0254), ("jpg", 65535), ("bmp", 54e6)):
        if mode == "RGB;16" and extension in ("jpg", "bmp"):
            continue
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            save_picture(result, tmp_path / f"out.{extension}")
        held = kept is not None and kept <= most
        lost = kept is not None and not held
        format = EXTENSIONS[f".{extension}"]
        assert [str(one.message) for one in told] == [
            f"format: {format} does not hold the picture's resolution"
        ] * lost
        with Image.open(tmp_path / f"out.{extension}") as saved:
            assert saved.size == (WIDTH, HEIGHT)
            if held:
                assert saved.info["dpi"] == pytest.approx((kept, kept), rel=1e-4)
            elif extension not in ("tif", "bmp"):  # Pillow takes 1 and 96 for those
                assert "dpi" not in saved.info


@pytest.mark.parametrize("extension", ["jpg", "png", "tif"])
@pytest.mark.parametrize("source", ["in.jpg", "in.png", "in.tif"])
def test_a_quarter_turn_exchanges_the_resolutions(pipe, tmp_path, source, extension):
    stored = Image.fromarray(noise(HEIGHT, WIDTH)).transpose(STORED[6])
    stored.save(tmp_path / source, exif=_with_exif(6).tobytes(), dpi=(100, 200))
    save_picture(pipe(tmp_path / source, HOLE), tmp_path / f"out.{extension}")
    with Image.open(tmp_path / f"out.{extension}") as saved:
        assert saved.size == (WIDTH, HEIGHT)
        assert [round(one) for one in saved.info["dpi"]] == [200, 100]
    with pytest.raises(InvalidMaskError, match="turned upright by its EXIF orientation 6"):
        pipe(tmp_path / source, HOLE.T)


@pytest.mark.parametrize("extension", ["tif", "jpg", "png"])
def test_a_tiff_without_resolution_gets_none(pipe, tmp_path, extension):
    Image.fromarray(noise(HEIGHT, WIDTH)).save(tmp_path / "in.tif")
    save_picture(pipe(tmp_path / "in.tif", HOLE), tmp_path / f"out.{extension}")
    with Image.open(tmp_path / f"out.{extension}") as saved:
        assert ExifTags.Base.XResolution not in getattr(saved, "tag_v2", {})
        if extension != "tif":
            assert "dpi" not in saved.info


@pytest.mark.parametrize("mode", ["L", "LA"])
@pytest.mark.parametrize("extension", ["webp", "avif", "heic", "png", "tif"])
def test_a_profile_of_greys_is_not_put_into_a_file_in_colour(tmp_path, mode, extension):
    pytest.importorskip("pillow_heif" if extension == "heic" else "PIL")
    picture, profile = noise_of_mode(mode), bytes(16) + b"GRAY" + bytes(112)
    picture.info["icc_profile"] = profile
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        save_picture(picture, tmp_path / f"out.{extension}")
    grey = extension in ("png", "tif") or (mode == "L" and extension in ("avif", "heic"))
    format = EXTENSIONS[f".{extension}"]
    lost = [] if grey else [f"format: {format} does not hold the picture's colour profile"]
    assert [str(one.message) for one in told] == lost
    with Image.open(tmp_path / f"out.{extension}") as saved:
        assert saved.info.get("icc_profile") == (profile if grey else None)
        if extension not in ("avif", "heic") or not grey:  # older versions of Pillow and pillow-heif read it as RGB
            assert saved.mode == (mode if grey else {"L": "RGB", "LA": "RGBA"}[mode])
    picture.info["icc_profile"] = bytes(16) + b"RGB " + bytes(112)  # some programs give grey pictures one in colour
    save_picture(picture, tmp_path / f"out.{extension}")
    with Image.open(tmp_path / f"out.{extension}") as saved:
        assert saved.info["icc_profile"] == picture.info["icc_profile"]


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


@pytest.mark.parametrize("key", ["dpi", "exif", "icc_profile", "iptc", "photoshop", "transparency", "xmp"])
@pytest.mark.parametrize("behind", [False, True])
def test_text_of_a_png_under_the_name_of_other_metadata_is_text(pipe, tmp_path, key, behind):
    """As programs write it that copy Pillow's `info` to text. `behind`: after the image data."""
    text = PngImagePlugin.PngInfo()
    text.add(b"tEXt", f"{key}\0(96, 96)".encode(), after_idat=behind)
    noise_of_mode("RGB").save(tmp_path / "a.png", pnginfo=text)
    result = pipe(tmp_path / "a.png", HOLE)
    for extension in ("png", "jpg", "webp", "tif"):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*PNG chunks tEXt")
            save_picture(result, tmp_path / f"b.{extension}")
    with Image.open(tmp_path / "b.png") as read:
        read.load()
        assert read.text == {key: "(96, 96)"}


@pytest.mark.parametrize(("key", "name", "room"), [("exif", "EXIF", 65533), ("xmp", "XMP", 65504)])
def test_metadata_too_long_for_a_segment_of_a_jpeg_is_named(tmp_path, key, name, room):
    picture = noise_of_mode("RGB")
    start = Image.Exif().tobytes() if key == "exif" else b"<x/>"
    picture.info[key] = start.ljust(room + 1)
    with pytest.warns(UserWarning, match=f"JPEG does not hold the picture's {name}"):
        save_picture(picture, tmp_path / "a.jpg")
    with Image.open(tmp_path / "a.jpg") as read:
        assert key not in read.info
    picture.info[key] = start.ljust(room)
    save_picture(picture, tmp_path / "a.jpg")
    with Image.open(tmp_path / "a.jpg") as read:
        assert read.info[key] == picture.info[key]


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
