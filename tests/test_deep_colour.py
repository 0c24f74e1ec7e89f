"""Colour pictures with 16 bits per sample, and all other content of picture files."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, PngImagePlugin

from lgnet_fast.errors import InvalidImageError
from lgnet_fast.pipeline import DeepImage, Inpainter, chunks, formats
from lgnet_fast.pipeline import deep_colour as deep
from lgnet_fast.pipeline.deep_colour import cut_depth
from lgnet_fast.pipeline.encoding import encode, save_picture
from lgnet_fast.pipeline.pictures import picture_of
from lgnet_fast.pipeline.reading import open_upright, read_picture

from .pipeline_support import ConstantFill, box_mask

HEIGHT, WIDTH = 24, 40
HOLE = box_mask(HEIGHT, WIDTH, (6, 8, 15, 20))
COLOUR = (0.2, -0.3, 0.7)


@pytest.fixture(scope="module")
def pipe():
    return Inpainter(ConstantFill(*COLOUR))


def _samples(channels: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 65536, (HEIGHT, WIDTH, channels), dtype=np.uint16)


def _write(path: Path, samples: np.ndarray, **options) -> Path:
    if path.suffix == ".png":
        path.write_bytes(pytest.importorskip("imagecodecs").png_encode(samples))
        return path
    channels = samples.shape[2]
    if options.get("planarconfig") == "separate":
        samples = np.moveaxis(samples, -1, 0)
    pytest.importorskip("imagecodecs")
    pytest.importorskip("tifffile").imwrite(
        path, samples, photometric="rgb" if channels > 2 else "minisblack",
        extrasamples=["unassalpha"] if channels % 2 == 0 else None, **{"planarconfig": "contig", **options},
    )  # fmt: skip
    return path


def _stored(path: Path) -> np.ndarray:
    """Samples read by another reader than the product's."""
    return pytest.importorskip("cv2").imread(str(path), -1)


TIFFS = [
    {},
    {"compression": "lzw", "predictor": True},
    {"byteorder": ">", "compression": "deflate"},
    {"planarconfig": "separate"},
    {"tile": (16, 16), "compression": "zstd"},
    {"bigtiff": True},
]
FILES = [("png", {}), *(("tif", options) for options in TIFFS)]


@pytest.mark.parametrize("channels", [2, 3, 4])
@pytest.mark.parametrize(("extension", "options"), FILES)
def test_known_samples_and_alpha_keep_their_sixteen_bits(pipe, tmp_path, channels, extension, options):
    samples = _samples(channels)
    source = _write(tmp_path / f"in.{extension}", samples, **options)
    result = pipe(source, HOLE)
    assert isinstance(result, DeepImage)
    assert (result.mode, result.size) == ({2: "LA;16", 3: "RGB;16", 4: "RGBA;16"}[channels], (WIDTH, HEIGHT))
    expected = samples.copy()
    levels = [round((one + 1) / 2 * 65535) for one in COLOUR]
    colours = 3 if channels > 2 else 1
    expected[HOLE, :colours] = levels if colours == 3 else round(sum((one + 1) / 2 * 65535 for one in COLOUR) / 3)
    np.testing.assert_allclose(np.asarray(result).astype(int), expected, atol=1)
    np.testing.assert_array_equal(np.asarray(result)[~HOLE], samples[~HOLE])
    np.testing.assert_array_equal(np.asarray(result)[..., colours:], samples[..., colours:])
    for extension in ("png", "tiff"):
        result.save(tmp_path / f"out.{extension}")
        again, _ = read_picture(tmp_path / f"out.{extension}")
        np.testing.assert_array_equal(again.samples, result.samples)


@pytest.mark.parametrize("extension", ["png", "tif"])
@pytest.mark.parametrize("channels", [3, 4])
def test_another_reader_finds_the_same_samples(pipe, tmp_path, extension, channels):
    samples = _samples(channels, 1)
    pipe(_write(tmp_path / f"in.{extension}", samples), HOLE).save(tmp_path / f"out.{extension}")
    stored = _stored(tmp_path / f"out.{extension}")
    assert stored.dtype == np.uint16
    order = [2, 1, 0, 3][:channels]
    np.testing.assert_array_equal(stored[..., order][~HOLE], samples[~HOLE])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_deep_pictures_are_turned_like_others(tmp_path, orientation):
    samples = _samples(3, 2)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation], exif[ExifTags.Base.Make] = orientation, "Camera"
    small = Image.fromarray((samples >> 8).astype(np.uint8))
    small.save(tmp_path / "small.png", exif=exif)
    expected, turn = open_upright(tmp_path / "small.png")
    source = _write(tmp_path / "in.png", samples)
    source.write_bytes(chunks.put_chunks(source.read_bytes(), [(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))]))
    picture, orientation_read = read_picture(source)
    assert orientation_read == turn == orientation
    np.testing.assert_array_equal(picture.samples >> 8, np.asarray(expected))
    picture.save(tmp_path / "out.png")
    with Image.open(tmp_path / "out.png") as saved:
        assert saved.getexif().get(ExifTags.Base.Orientation, 1) == 1
        assert saved.getexif()[ExifTags.Base.Make] == "Camera"


def test_metadata_passes_between_deep_formats(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Make], exif[ExifTags.Base.ImageDescription] = "Camera", "a tree"
    exif[ExifTags.IFD.Exif] = {ExifTags.Base.ExposureTime: 0.25, ExifTags.Base.ISOSpeedRatings: 200}
    exif[ExifTags.IFD.GPSInfo] = {ExifTags.GPS.GPSLatitudeRef: "S"}
    info = {"exif": exif.tobytes(), "icc_profile": b"a profile", "xmp": b"<x:xmpmeta/>", "dpi": (300.0, 150.0)}
    pytest.importorskip("tifffile")
    picture = DeepImage(_samples(3), "TIFF", info)
    for extension in ("tif", "png", "tiff"):
        file = tmp_path / f"one.{extension}"
        picture.save(file)
        picture, _ = read_picture(file)
        assert picture.info["icc_profile"] == b"a profile"
        assert picture.info["xmp"] == b"<x:xmpmeta/>"
        assert picture.info["dpi"] == pytest.approx((300, 150), rel=1e-3)
        with Image.open(file) as opened:
            found = opened.getexif()
            assert (found[ExifTags.Base.Make], found[ExifTags.Base.ImageDescription]) == ("Camera", "a tree")
            assert found.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.ISOSpeedRatings] == 200
            assert found.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.ExposureTime] == 0.25
            assert found.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitudeRef] == "S"
    np.testing.assert_array_equal(picture.samples, _samples(3))


def test_a_transparent_colour_keeps_its_pixels(pipe, tmp_path):
    samples = _samples(3, 3)
    samples[4:12, 4:12] = key = (1, 513, 65535)
    fill = tuple(round((one + 1) / 2 * 65535) for one in COLOUR)
    for transparent in (key, fill):
        source = _write(tmp_path / "in.png", samples)
        source.write_bytes(chunks.put_chunks(source.read_bytes(), [(b"tRNS", struct.pack(">3H", *transparent))]))
        pipe(source, HOLE).save(tmp_path / "out.png")
        assert dict(chunks.read_chunks((tmp_path / "out.png").read_bytes()))[b"tRNS"] == struct.pack(
            ">3H", *transparent
        )
        after, _ = read_picture(tmp_path / "out.png")
        clear = (after.samples == transparent).all(axis=2)
        np.testing.assert_array_equal(clear, (samples == transparent).all(axis=2))
        pipe(source, HOLE).save(tmp_path / "out.tif")  # which has no transparent colour
        other, _ = read_picture(tmp_path / "out.tif")
        np.testing.assert_array_equal(other.samples, np.dstack([after.samples, np.where(clear, 0, 65535)]))


def _ppm(depth: int) -> bytes:
    return b"P6\n# of sixteen bits\n4 4\n%d\n" % (2**depth - 1) + bytes(4 * 4 * 3 * 2)


def _jp2(depth: int) -> bytes:
    codec = pytest.importorskip("imagecodecs")
    return codec.jpeg2k_encode(_samples(3) >> (16 - depth), level=0, bitspersample=depth, codecformat="jp2")


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.ppm", lambda: _ppm(16), "got 16 in a PPM"),
        ("a.ppm", lambda: _ppm(12), "got 12 in a PPM"),
        ("a.jp2", lambda: _jp2(16), "got 16 in a JPEG2000"),
        ("a.jp2", lambda: _jp2(12), "got 12 in a JPEG2000"),
        (
            "a.avif",
            lambda: pytest.importorskip("imagecodecs").avif_encode(_samples(3) >> 6, bitspersample=10),
            "10 in a",
        ),
    ],
)
def test_formats_that_would_be_cut_to_eight_bits_are_refused(pipe, tmp_path, name, data, words):
    (tmp_path / name).write_bytes(data())
    with pytest.raises(InvalidImageError, match=words + r".*16-bit PNG or TIFF") as caught:
        pipe(tmp_path / name, np.ones((4, 4), bool))
    assert name in str(caught.value)


@pytest.mark.parametrize(("flags", "depth"), [(0x00, None), (0x40, 10), (0x60, 12), (0x20, None)])
def test_bits_of_an_avif_by_the_flags_of_its_configuration(flags, depth):
    # marker and version, profile and level, then seq_tier, high_bitdepth, twelve_bit (AV1 in ISOBMFF, 2.3.3)
    assert cut_depth("AVIF", b"....av1C" + bytes([0x81, 0x04, flags, 0])) == depth


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"photometric": "separated"}, "SEPARATED"),
        ({"photometric": "rgb", "extrasamples": ["assocalpha"]}, "multiplied by it"),
        ({"photometric": "rgb", "dtype": np.uint32}, "uint32"),
        ({"photometric": "rgb", "dtype": np.float32}, "float32"),
    ],
)
def test_tiffs_that_cannot_be_kept_are_refused(pipe, tmp_path, options, words):
    pytest.importorskip("imagecodecs")
    samples = _samples(4 if "separated" in options.values() or "extrasamples" in options else 3)
    tifffile = pytest.importorskip("tifffile")
    options = dict(options)
    tifffile.imwrite(tmp_path / "in.tif", samples.astype(options.pop("dtype", np.uint16)), **options)
    with pytest.raises(InvalidImageError, match=rf"in\.tif.*{words}"):
        pipe(tmp_path / "in.tif", HOLE)


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (np.uint8, {}),
        (np.uint8, {"imagej": True}),
        (np.uint8, {"ome": True}),
        (np.uint16, {}),
        (np.uint16, {"ome": True}),
    ],
)
@pytest.mark.filterwarnings("ignore:.*only one of its 2 frames is used")
def test_a_page_does_not_describe_the_pages_that_were_beside_it(pipe, tmp_path, options, dtype):
    """tifffile reads as many pages as the description says, and fails where there are fewer."""
    tifffile = pytest.importorskip("tifffile")
    pages = np.stack([_samples(3, seed) for seed in (1, 2)]).astype(dtype)
    tifffile.imwrite(tmp_path / "two.tif", pages, photometric="rgb", **options)
    tifffile.imwrite(tmp_path / "one.tif", pages[0], photometric="rgb", **options)
    for name in ("two.tif", "one.tif"):
        save = tmp_path / f"out_{name}"
        result = pipe(tmp_path / name, HOLE)
        result.save(save) if dtype == np.uint16 else save_picture(result, save)
        np.testing.assert_array_equal(tifffile.imread(save)[~HOLE], pages[0][~HOLE])
        with tifffile.TiffFile(tmp_path / name) as before, tifffile.TiffFile(save) as after:
            described = before.pages[0].description if name == "one.tif" else ""
            assert after.pages[0].description == described


@pytest.mark.parametrize("extension", ["png", "tif"])
def test_truncated_deep_files_are_one_clear_error(pipe, tmp_path, extension):
    file = _write(tmp_path / f"cut.{extension}", _samples(3))
    data = file.read_bytes()
    for share in (0.03, 0.5, 0.95):
        file.write_bytes(data[: int(len(data) * share)])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, about torn metadata
            with pytest.raises(InvalidImageError, match=f"cut.{extension}"):
                pipe(file, HOLE)


def test_bombs_are_refused_before_they_are_decoded(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", HEIGHT * WIDTH // 4)
    for extension in ("png", "tif"):
        with pytest.raises(InvalidImageError, match=f"in.{extension}.*DecompressionBombError"):
            pipe(_write(tmp_path / f"in.{extension}", _samples(3)), HOLE)


@pytest.mark.parametrize("extension", ["png", "tif"])
def test_files_beyond_half_of_the_limit_are_warned_of_once(pipe, tmp_path, monkeypatch, extension):
    source = _write(tmp_path / f"in.{extension}", _samples(3))
    for limit, told in ((HEIGHT * WIDTH - 1, 1), (HEIGHT * WIDTH, 0)):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            pipe(source, HOLE)
        bombs = [one for one in caught if issubclass(one.category, Image.DecompressionBombWarning)]
        assert len(bombs) == len(caught) == told
        assert all(f"{HEIGHT * WIDTH} pixels" in str(one.message) for one in bombs)


def test_missing_packages_are_named_and_so_is_the_extra(pipe, tmp_path, monkeypatch):
    source = _write(tmp_path / "in.png", _samples(3))
    monkeypatch.setitem(__import__("sys").modules, "imagecodecs", None)
    with pytest.raises(InvalidImageError, match=r"in\.png.*pip install 'lgnet-fast\[deep\]'"):
        pipe(source, HOLE)


@pytest.mark.parametrize("extension", ["png", "tif"])
def test_a_picture_that_pillow_cuts_to_eight_bits_is_warned_of(pipe, tmp_path, extension):
    source = _write(tmp_path / f"in.{extension}", _samples(3))
    with Image.open(source) as opened, pytest.warns(UserWarning, match="cuts 16-bit colour to 8 bits; give the file"):
        pipe(opened, HOLE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe(Image.fromarray(_samples(1)[..., 0]), HOLE)


def _wide_ppm() -> bytes:
    return b"P6 %d %d 65535\n" % (WIDTH, HEIGHT) + _samples(3).astype(">u2").tobytes()


def _avif(depth: int) -> bytes:
    samples = _samples(3) >> (16 - depth)
    codec = pytest.importorskip("imagecodecs")
    return codec.avif_encode(samples if depth > 8 else samples.astype(np.uint8), bitspersample=depth)


@pytest.mark.parametrize(
    ("data", "bits"),
    [(_wide_ppm, 16), (lambda: _jp2(12), 12), (lambda: _avif(10), 10), (lambda: _avif(8), None)],
    ids=["ppm", "jp2", "avif", "avif of 8 bits"],
)
def test_formats_whose_lower_bits_pillow_drops_are_warned_of_as_pictures(pipe, data, bits):
    def caught_of(picture: Image.Image) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = pipe(picture, HOLE)
        np.testing.assert_array_equal(np.asarray(result)[~HOLE], expected[~HOLE])
        return [str(one.message) for one in caught]

    encoded = data()
    with Image.open(io.BytesIO(encoded)) as decoded:
        expected = np.asarray(decoded)
        assert caught_of(decoded) == []
    with Image.open(io.BytesIO(encoded)) as opened:
        cuts = [] if bits is None else [f"picture: Pillow cuts {bits}-bit colour to 8 bits; give the file's path"]
        assert caught_of(opened) == cuts


def test_deep_pictures_and_masks_are_accepted_in_lists(pipe, tmp_path):
    source = _write(tmp_path / "in.png", _samples(3))
    picture, _ = read_picture(source)
    mask = _write(tmp_path / "m.png", np.where(HOLE[..., None], np.uint16(65535), np.zeros((1, 1, 3), np.uint16)))
    results = pipe([picture, source], mask)
    np.testing.assert_array_equal(results[0].samples, results[1].samples)
    np.testing.assert_array_equal(results[0].samples[~HOLE], _samples(3)[~HOLE])
    assert (results[0].samples[HOLE] != _samples(3)[HOLE]).mean() > 0.9


def test_sides_longer_than_libpng_takes_are_refused():
    for samples in (np.zeros((1, 1_000_001, 3), np.uint16), np.zeros((1_000_001, 1, 4), np.uint16)):
        picture = DeepImage(samples, "TIFF")
        for attempt in (partial(encode, picture), picture_of(picture).check_format):
            with pytest.raises(InvalidImageError) as caught:
                attempt("PNG")
            assert str(caught.value) == (
                "format: PNG holds at most 1000000 pixels a side at 16 bits a sample in colour, got 1000001; longer "
                "ones are held by TIFF"
            )
        picture_of(picture).check_format("TIFF")
    picture_of(DeepImage(samples[:-1], "TIFF")).check_format("PNG")


def test_deep_pictures_do_not_become_shallow_files(pipe, tmp_path):
    result = pipe(_write(tmp_path / "in.png", _samples(3)), HOLE)
    for name in ("out.jpg", "out.webp", "out.bmp", "out.avif"):
        with pytest.raises(InvalidImageError, match="16 bits"):
            result.save(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["in.png"]


# -- what a PNG holds beside its samples -------------------------------------------------------------------------

COLOUR_CHUNKS = {
    b"gAMA": struct.pack(">I", 45455),
    b"cHRM": struct.pack(">8I", 31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000),
    b"cICP": bytes([9, 16, 0, 1]),
    b"mDCV": bytes(range(24)),
    b"cLLI": bytes(8),
    b"pHYs": struct.pack(">IIB", 11811, 5906, 1),
    b"vpAg": b"safe to copy",
}


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "I;16", "RGB;16"])
def test_text_colour_space_and_resolution_of_a_png_are_kept(pipe, tmp_path, mode):
    texts = [(b"tEXt", b"parameters\0a cat, steps: 20"), (b"iTXt", b"Title\0\0\0\0\0Sch\xc3\xb6n")]
    bits = {
        b"sBIT": bytes([5] * {"RGB": 3, "RGBA": 4, "L": 1, "LA": 2, "P": 3, "1": 1, "I;16": 1, "RGB;16": 3}[mode])
    }
    if mode == "RGB;16":
        source = _write(tmp_path / "in.png", _samples(3))
    else:
        source = tmp_path / "in.png"
        grey = Image.fromarray(_samples(1)[..., 0])
        picture = grey if mode == "I;16" else Image.fromarray((_samples(3) >> 8).astype(np.uint8)).convert(mode)
        picture.save(source)
    extra = {**COLOUR_CHUNKS, **bits, b"prVT": b"not safe to copy"}
    source.write_bytes(chunks.put_chunks(source.read_bytes(), [*extra.items(), *texts]))
    picture, _ = read_picture(source)
    save_picture(picture, tmp_path / "out.png")
    found = chunks.read_chunks((tmp_path / "out.png").read_bytes())
    expected = [*COLOUR_CHUNKS.items(), *bits.items(), *texts]
    assert [one for one in expected if one not in found] == []
    assert b"prVT" not in dict(found)
    kinds = [kind for kind, _ in found]
    assert len(kinds) - len(set(kinds)) == sum(kind == b"IDAT" for kind in kinds) - 1
    assert kinds.index(b"gAMA") < kinds.index(b"IDAT")
    if mode == "P":
        assert max(kinds.index(kind) for kind in (b"gAMA", b"cICP", b"sBIT")) < kinds.index(b"PLTE")
    with Image.open(tmp_path / "out.png") as saved:
        saved.load()
        assert saved.info["parameters"] == "a cat, steps: 20"
        assert saved.text["Title"] == "Schön"


def test_a_quality_is_checked_for_deep_pictures_too(tmp_path):
    picture = DeepImage(np.zeros((8, 8, 3), np.uint16), "PNG")
    with pytest.raises(InvalidImageError, match="^quality: expected a whole number from 1 to 100, got 500$"):
        save_picture(picture, tmp_path / "out.png", quality=500)
    assert list(tmp_path.iterdir()) == []


def test_chunks_fit_a_layout_and_come_once():
    def png(depth, kind):
        header = struct.pack(">IIBBBBB", 1, 1, depth, kind, 0, 0, 0)
        return chunks.SIGNATURE + b"".join(chunks._chunk(*one) for one in ((b"IHDR", header), first, (b"IDAT", b"x")))

    first, second, bits = (b"tEXt", b"a\0b"), (b"tEXt", b"c\0d"), (b"sBIT", b"\5\5\5")
    for source, result, fits in (((8, 3), (4, 3), True), ((8, 2), (8, 2), True), ((16, 2), (8, 2), False)):
        kept = chunks.Kept(source, (first, second, bits))
        assert chunks.fitting(kept, png(*result)) == [second, bits][: 1 + fits]
    both = chunks.put_chunks(png(8, 2), [second])
    assert [one for one in chunks.read_chunks(both) if one[0] == b"tEXt"] == [first, second]
    assert [kind for kind, _ in chunks.read_chunks(both[:-1])] == [b"IHDR", b"tEXt", b"tEXt"]


def test_an_old_text_with_exif_is_not_copied(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_text("Raw profile type exif", "\nexif\n 8\n" + b"Exif\0\0..".hex())
    Image.new("RGB", (8, 8)).save(tmp_path / "in.png", pnginfo=info)
    kept = chunks.kept_chunks((tmp_path / "in.png").read_bytes())
    assert kept.chunks == ()


def test_the_chunks_a_format_cannot_hold_are_told(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", "a cat")
    Image.new("RGB", (8, 8)).save(tmp_path / "in.png", pnginfo=info)
    picture, _ = read_picture(tmp_path / "in.png")
    with pytest.warns(UserWarning, match="JPEG does not hold the picture's PNG chunks tEXt"):
        save_picture(picture, tmp_path / "out.jpg")


@pytest.mark.parametrize("extension", ["png", "jpg", "webp", "tif", "avif"])
def test_xmp_is_kept_and_its_orientation_is_not(tmp_path, extension):
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/" tiff:Orientation="6">a rose</x:xmpmeta>'
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    encoded = io.BytesIO()
    Image.new("RGB", (8, 6), "teal").save(encoded, "PNG", exif=exif)
    (tmp_path / "in.png").write_bytes(chunks.put_chunks(encoded.getvalue(), [chunks.xmp_chunk(xmp)]))
    picture, _ = read_picture(tmp_path / "in.png")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save_picture(picture, tmp_path / f"out.{extension}")
    with Image.open(tmp_path / f"out.{extension}") as saved:
        saved.load()
        found = saved.info["xmp"]
        assert saved.size == (6, 8)
    assert b"a rose" in found
    assert b'Orientation="6"' not in found


TURNED = [
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/" tiff:Orientation="6">a rose</x:xmpmeta>',
    b"<x:xmpmeta><tiff:Orientation>6</tiff:Orientation>a rose</x:xmpmeta>",
]


@pytest.mark.parametrize("xmp", TURNED, ids=["attribute", "element"])
@pytest.mark.parametrize("in_exif", [None, 1, 6])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("extension", ["png", "tif"])
def test_no_result_is_turned_again_by_its_xmp(pipe, tmp_path, extension, bits, in_exif, xmp):
    samples = _samples(3) if bits == 16 else (_samples(3) >> 8).astype(np.uint8)
    if extension == "png":
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = in_exif or 1
        added = [chunks.xmp_chunk(xmp)]
        if in_exif is not None:
            added.append((b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")))
        source = _write(tmp_path / "in.png", samples)
        source.write_bytes(chunks.put_chunks(source.read_bytes(), added))
    else:
        tags = [(700, 1, len(xmp), xmp, True), *([] if in_exif is None else [(274, 3, 1, in_exif, True)])]
        source = _write(tmp_path / "in.tif", samples, extratags=tags)
    turned = in_exif != 1  # the tag of EXIF counts, where there is one
    expected = samples.transpose(1, 0, 2)[:, ::-1] if turned else samples
    hole = np.ones(expected.shape[:2], bool)
    hole[2:] = False
    result = pipe(source, hole)
    np.testing.assert_array_equal(np.asarray(result)[~hole], expected[~hole])
    save_picture(result, tmp_path / f"out.{extension}")
    again, orientation = read_picture(tmp_path / f"out.{extension}")
    assert orientation == 1
    assert b"a rose" in again.info["xmp"]
    assert b"Orientation" not in again.info["xmp"]
    np.testing.assert_array_equal(np.asarray(again), np.asarray(result))
    with Image.open(tmp_path / f"out.{extension}") as saved:
        assert saved.getexif().get(ExifTags.Base.Orientation, 1) == 1


def test_the_orientation_in_a_compressed_xmp_chunk_goes_too(tmp_path):
    source = _write(tmp_path / "in.png", _samples(3))
    packed = chunks.XMP_KEYWORD + b"\0\1\0\0\0" + zlib.compress(TURNED[0])
    source.write_bytes(chunks.put_chunks(source.read_bytes(), [(b"iTXt", packed)]))
    picture, orientation = read_picture(source)
    assert (orientation, picture.size) == (6, (HEIGHT, WIDTH))
    picture.save(tmp_path / "out.png")
    again, orientation = read_picture(tmp_path / "out.png")
    assert (orientation, again.size) == (1, (HEIGHT, WIDTH))
    assert again.info["xmp"] == b'<x:xmpmeta xmlns:x="adobe:ns:meta/" >a rose</x:xmpmeta>'


# -- more formats -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("a.jp2", "RGB"), ("a.jp2", "RGBA"), ("a.jp2", "L"), ("a.ppm", "RGB"), ("a.pgm", "L"), ("a.pbm", "1"),
        ("a.tga", "RGB"), ("a.tga", "RGBA"), ("a.tga", "L"), ("a.tga", "P"),
    ],
)  # fmt: skip
def test_lossless_formats_keep_every_sample(pipe, tmp_path, name, mode):
    picture = Image.fromarray((_samples(3) >> 8).astype(np.uint8)).convert(mode)
    picture.save(tmp_path / name)
    result = pipe(tmp_path / name, HOLE)
    save_picture(result, tmp_path / f"out_{name}")
    with Image.open(tmp_path / f"out_{name}") as saved:
        assert saved.format == result.format == Image.open(tmp_path / name).format
        np.testing.assert_array_equal(np.asarray(saved)[~HOLE], np.asarray(picture)[~HOLE])
        np.testing.assert_array_equal(np.asarray(saved), np.asarray(result))


@pytest.mark.parametrize("extension", ["avif", "heic"])
def test_avif_and_heic(pipe, tmp_path, extension):
    reason = formats.reason_against_writing(formats.EXTENSIONS[f".{extension}"])
    if reason is not None:
        pytest.skip(reason)
    smooth = np.linspace(0, 255, HEIGHT * WIDTH * 3).reshape(HEIGHT, WIDTH, 3).astype(np.uint8)
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "Phone"
    Image.fromarray(smooth).save(tmp_path / f"in.{extension}", exif=exif.tobytes(), quality=90)
    before = np.asarray(Image.open(tmp_path / f"in.{extension}"))
    result = pipe(tmp_path / f"in.{extension}", HOLE)
    np.testing.assert_array_equal(np.asarray(result)[~HOLE], before[~HOLE])
    save_picture(result, tmp_path / f"out.{extension}")
    with Image.open(tmp_path / f"out.{extension}") as saved:
        assert saved.getexif()[ExifTags.Base.Make] == "Phone"
        apart = np.abs(np.asarray(saved).astype(int) - np.asarray(result))
    assert np.sqrt((apart**2).mean()) < 4


@pytest.mark.parametrize("extension", ["avif", "heic"])
def test_a_grey_avif_or_heic_stays_one_without_colours(pipe, tmp_path, extension):
    """Stored with colours it would come back as RGB, with levels of red, green and blue that differ."""
    reason = formats.reason_against_writing(formats.EXTENSIONS[f".{extension}"])
    if reason is not None:
        pytest.skip(reason)
    grey = Image.fromarray(np.linspace(0, 255, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).astype(np.uint8))
    grey.save(tmp_path / f"in.{extension}", quality=90, **({"subsampling": "4:0:0"} if extension == "avif" else {}))
    with Image.open(tmp_path / f"in.{extension}") as before:
        if before.mode != "L":
            pytest.skip(f"this version of its package reads grey {extension} as {before.mode}")
    save_picture(pipe(tmp_path / f"in.{extension}", HOLE), tmp_path / f"out.{extension}")
    one_of_8_bits = b"pixi\0\0\0\0\1\x08"
    assert one_of_8_bits in (tmp_path / f"out.{extension}").read_bytes()
    with Image.open(tmp_path / f"in.{extension}") as before, Image.open(tmp_path / f"out.{extension}") as saved:
        assert saved.mode == before.mode
        apart = np.abs(np.asarray(saved).astype(int) - np.asarray(before))[~HOLE]
    assert np.sqrt((apart**2).mean()) < 4


def test_a_heic_without_its_package_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pillow_heif", None)
    (tmp_path / "IMG_1.jpg").write_bytes(struct.pack(">I", 24) + b"ftypheic" + bytes(40))
    with pytest.raises(InvalidImageError, match=r"IMG_1\.jpg.*pip install 'lgnet-fast\[heif\]'"):
        read_picture(tmp_path / "IMG_1.jpg")


def test_depth_is_read_from_the_header_only():
    assert deep.deep_format(b"\x89PNG\r\n\x1a\n" + bytes(16) + bytes([16, 2])) == "PNG"
    assert deep.deep_format(b"\x89PNG\r\n\x1a\n" + bytes(16) + bytes([16, 0])) is None
    assert deep.deep_format(b"\x89PNG\r\n\x1a\n" + bytes(16) + bytes([8, 2])) is None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about torn tags
        for torn in (b"", b"II*\0", b"MM\0*\0\0\0\x08", b"II+\0\x08\0\0\0", b"\x89PNG\r\n\x1a\n"):
            assert deep.deep_format(torn) is None
