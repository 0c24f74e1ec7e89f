"""`Session`: fills equal the pipeline's on the whole picture; history, kinds of pictures, threads."""

from __future__ import annotations

import io
import threading

import numpy as np
import pytest
from PIL import Image

from lgnet_fast import InvalidImageError, InvalidMaskError
from lgnet_fast.engine.regions import Rect
from lgnet_fast.pipeline import Inpainter
from lgnet_fast.pipeline.sources import Encoded
from lgnet_fast.serve import Session
from lgnet_fast.serve.display import Display
from lgnet_fast.serve.errors import OptionError

from .pipeline_support import BlurFill
from .serve_support import file_of, hole, photo

pytestmark = pytest.mark.once  # what runs the network is tested elsewhere


@pytest.fixture(scope="module")
def pipe() -> Inpainter:
    return Inpainter(BlurFill(), device="cpu")


HOLES = {
    "small": [(500, 540, 600, 660)],
    "corner": [(0, 30, 0, 20)],
    "last pixel": [(999, 1000, 1299, 1300)],
    "edge": [(500, 600, 1270, 1300)],
    "wide": [(440, 500, 100, 1200)],
    "large": [(300, 700, 400, 1000)],
    "two near": [(500, 540, 600, 660), (560, 590, 700, 730)],
    "two far": [(20, 60, 30, 80), (900, 940, 1200, 1260)],
    "many": [(y, y + 25, x, x + 25) for y in range(400, 700, 97) for x in range(500, 800, 103)],
}
GROWN = {"dilate": 5, "feather": 7}


@pytest.mark.parametrize(
    ("name", "options"),
    [*((name, {}) for name in HOLES), ("edge", GROWN), ("two near", GROWN), ("large", {"strategy": "crop"})],
    ids=str,
)
def test_a_fill_is_what_the_pipeline_makes_of_the_whole_picture(pipe, name, options):
    picture = photo(1000, 1300)
    mask = np.zeros((1000, 1300), dtype=bool)
    for top, bottom, left, right in HOLES[name]:
        mask[top:bottom, left:right] = True
    session = Session(picture, pipe)
    patch = session.fill(mask, **options)
    whole = pipe.inpaint(picture, mask, **options)
    np.testing.assert_array_equal(session.result(), whole.picture)
    assert (patch.strategy, patch.passes) == (whole.strategy, whole.passes)
    touched = np.zeros_like(mask)
    for part in patch.parts:
        touched[part.box.slices] |= part.touched
    assert touched[mask].all()
    np.testing.assert_array_equal(session.result()[~touched], picture[~touched])


@pytest.mark.parametrize("strategy", ["full", "resize", "tile", "auto"])
def test_strategies_that_see_the_whole_picture(pipe, strategy):
    picture, mask = photo(700, 900), np.zeros((700, 900), dtype=bool)
    mask[350:353, 10:890] = mask[20:680, 450:453] = True  # thin, all over: tiles
    session = Session(picture, pipe)
    assert session.fill(mask, strategy=strategy).strategy == ("tile" if strategy == "auto" else strategy)
    np.testing.assert_array_equal(session.result(), pipe(picture, mask, strategy=strategy))


def test_a_fill_sees_the_fills_before_it(pipe):
    picture, first, second = (
        photo(600, 800),
        hole(600, 800, (200, 260, 300, 360)),
        hole(600, 800, (240, 300, 340, 400)),
    )
    session = Session(picture, pipe)
    session.fill(first)
    session.fill(second)
    np.testing.assert_array_equal(session.result(), pipe(pipe(picture, first), second))


def test_a_box_with_its_place_is_the_same_mask(pipe):
    picture, mask = photo(600, 800), hole(600, 800, (200, 260, 300, 360))
    whole, box = Session(picture, pipe), Session(picture, pipe)
    whole.fill(mask, dilate=3)
    patch = box.fill(mask[190:270, 280:380], (190, 280), dilate=3)
    np.testing.assert_array_equal(box.result(), whole.result())
    assert patch.box == (197, 263, 297, 363)
    assert patch.at == (200, 300)


def test_undo_redo_and_what_is_forgotten(pipe):
    picture = photo()
    session = Session(picture, pipe)
    assert not session.undo()
    session.fill(hole())
    one = session.result()
    session.fill(hole(box=(60, 80, 10, 30)))
    two = session.result()
    assert (session.position, session.fills) == (2, 2)
    assert session.undo()
    np.testing.assert_array_equal(session.result(), one)
    assert session.undo()
    np.testing.assert_array_equal(session.result(), picture)
    assert session.redo()
    assert session.redo()
    assert not session.redo()
    np.testing.assert_array_equal(session.result(), two)
    session.go_to(1)
    session.fill(hole(box=(5, 15, 90, 110)))
    assert (session.position, session.fills) == (2, 2)
    session.fill(hole(box=(60, 80, 10, 30)), position=0)
    assert (session.position, session.fills) == (1, 1)
    with pytest.raises(ValueError, match="position: expected 0 to 1 fills, got 2"):
        session.go_to(2)


def test_what_confirm_raises_leaves_the_session_as_it_was(pipe):
    session = Session(photo(), pipe)
    session.fill(hole())
    before = session.result()

    def no() -> None:
        raise KeyError("left")

    with pytest.raises(KeyError, match="left"):
        session.fill(hole(box=(60, 80, 10, 30)), position=0, confirm=no)
    assert (session.position, session.fills) == (1, 1)
    np.testing.assert_array_equal(session.result(), before)


@pytest.mark.parametrize(
    ("mask", "at", "message"),
    [
        (np.zeros((96, 120), bool), None, "no hole pixel"),
        (np.ones((96, 120), bool), None, "100.0% of the picture is hole"),
        (np.ones((95, 120), bool), None, "expected the picture's size 120x96"),
        (np.ones((10, 10), bool), (90, 0), "expected a box inside the picture of 120x96, got 10x10 at x = 0, y = 90"),
        (np.ones((10, 10), bool), (-1, 0), "expected a box inside"),
        ("mask.png", (0, 0), "expected a PIL picture, or an array"),
    ],
)
def test_masks_that_are_refused(pipe, mask, at, message):
    session = Session(photo(), pipe)
    with pytest.raises(InvalidMaskError, match=message):
        session.fill(mask, at)
    assert session.fills == 0


@pytest.mark.parametrize("at", ["x", "xy", 3, (1,), (1, 2, 3), (1.0, 2), (True, 2), (None, 1), {1: 2, 3: 4}])
def test_places_that_are_no_pair_of_whole_numbers(pipe, at):
    session = Session(photo(), pipe)
    with pytest.raises(OptionError) as caught:
        session.fill(np.ones((10, 10), bool), at=at)
    assert str(caught.value) == f"at: expected (top, left) in whole pixels, got {at!r}"
    assert isinstance(caught.value, ValueError)
    assert session.fills == 0


def test_places_as_lists_and_arrays(pipe):
    for at in ([20, 30], np.array([20, 30]), (np.int64(20), 30)):
        assert Session(photo(), pipe).fill(np.ones((10, 10), bool), at=at).at == (20, 30)


def test_positions_as_integers_of_numpy(pipe):
    session = Session(photo(), pipe)
    session.fill(hole())
    session.go_to(np.int64(0))
    assert session.position == 0
    np.testing.assert_array_equal(session.result(np.uint8(0)), photo())
    for position in (np.int64(2), True, 1.0, None):
        with pytest.raises(OptionError, match="position: expected 0 to 1 fills, got"):
            session.go_to(position)


@pytest.mark.parametrize("context", [-1, 1.5, True, None])
def test_surroundings_of_stages_that_are_no_number_of_pixels(pipe, context):
    session = Session(photo(), pipe)
    session.fill(hole())
    with pytest.raises(OptionError, match=r"^context: expected a whole number of pixels >= 0, got "):
        session.stages(context)
    assert session.stages(0)[0] == Rect(30, 50, 40, 70)


@pytest.mark.parametrize(
    ("kind", "refused"),
    [
        ("grey", set()),
        ("grey and alpha", {"JPEG", "BMP", "GIF", "PPM"}),
        ("RGBA", {"JPEG", "BMP", "GIF", "PPM"}),
        ("uint16", {"JPEG", "WEBP", "BMP", "GIF", "TGA"}),
        ("floats", {"PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "TGA"}),
    ],
)
def test_check_format_refuses_what_encoded_refuses_of_arrays(pipe, kind, refused):
    pixels = photo(20, 30)
    arrays = {
        "grey": pixels[..., 0],
        "grey and alpha": pixels[..., :2],
        "RGBA": np.dstack([pixels, pixels[..., 0]]).transpose(2, 0, 1),
        "uint16": pixels[..., 0].astype(np.uint16),
        "floats": pixels / 255,
    }
    session = Session(arrays[kind], pipe)
    calls = {"encoded": session.encoded, "check_format": session.check_format}
    found: dict[str, set[str]] = {name: set() for name in calls}
    for name, call in calls.items():
        for format in ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "TGA"):  # which need no other package
            try:
                call(format)
            except InvalidImageError:
                found[name].add(format)
    assert found == {name: refused for name in calls}


def test_options_that_are_refused(pipe):
    session = Session(photo(), pipe)
    with pytest.raises(ValueError, match="strategy: expected one of"):
        session.fill(hole(), strategy="best")
    with pytest.raises(InvalidMaskError, match="dilate: expected a whole number"):
        session.fill(hole(), dilate=-1)
    with pytest.raises(TypeError, match="options: expected strategy, .*, got colour"):
        session.fill(hole(), colour=3)
    with pytest.raises(ValueError, match="stages: expected a session with a fill"):
        session.stages()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16"])
def test_kinds_of_pictures_come_back_as_they_are(pipe, mode):
    picture = Image.fromarray(photo()).convert("L" if mode == "I;16" else mode)
    if mode == "I;16":
        picture = Image.fromarray(np.asarray(picture).astype(np.uint16) * 257)
    if mode in ("LA", "RGBA"):
        picture.putalpha(Image.fromarray(photo(seed=2)[..., 0]))
    session = Session(picture, pipe)
    session.fill(hole())
    result = session.result()
    assert result.mode == mode
    np.testing.assert_array_equal(np.asarray(result), np.asarray(pipe(picture, hole())))
    np.testing.assert_array_equal(np.asarray(result)[~hole()], np.asarray(picture)[~hole()])


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.uint16])
def test_small_integers_as_dilate_and_feather(pipe, kind):
    picture, mask = photo(400, 420), hole(400, 420, (300, 320, 310, 330))
    session = Session(picture, pipe)
    session.fill(mask, dilate=kind(120), feather=kind(100))
    np.testing.assert_array_equal(session.result(), pipe(picture, mask, dilate=120, feather=100))


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        ("uint8", (30, 40)),
        ("uint8", (30, 40, 1)),
        ("uint8", (30, 40, 2)),
        ("uint8", (3, 30, 40)),
        ("uint8", (4, 30, 40)),
        (">u2", (30, 40)),
        (">u2", (30, 40, 4)),
        ("<u2", (2, 30, 40)),
    ],
)
def test_arrays_become_files_with_the_same_samples(pipe, dtype, shape):
    array = np.random.default_rng(0).integers(0, 256, shape).astype(dtype)
    data, format = Session(array, pipe).encoded()
    assert format == "PNG"
    read = pytest.importorskip("imagecodecs").png_decode(data)
    np.testing.assert_array_equal(read, np.squeeze(array.transpose(1, 2, 0) if shape[0] < 5 else array))


def test_floats_are_in_no_file(pipe):
    with pytest.raises(InvalidImageError, match="a file holds samples of 8 or 16 bits, got float32"):
        Session(np.zeros((30, 40), np.float32), pipe).encoded()


@pytest.mark.parametrize("given", [lambda data: Encoded("photo", data), bytes, io.BytesIO])
def test_a_file_comes_back_as_a_file_with_its_metadata(pipe, given):
    exif = Image.Exif()
    exif[271] = "maker"
    data = file_of(photo(), "JPEG", quality=90, exif=exif, icc_profile=b"profile of no use")
    session = Session(given(data), pipe)
    session.fill(hole())
    encoded, format = session.encoded()
    assert format == "JPEG"
    with Image.open(io.BytesIO(encoded)) as again, Image.open(io.BytesIO(data)) as own:
        assert again.getexif()[271] == "maker"
        assert again.info["icc_profile"] == b"profile of no use"
        assert again.quantization == own.quantization
    png, format = session.encoded("PNG")
    assert format == "PNG"
    with Image.open(io.BytesIO(png)) as again, Image.open(io.BytesIO(data)) as own:
        np.testing.assert_array_equal(np.asarray(again)[~hole()], np.asarray(own)[~hole()])


def test_a_format_that_cannot_be_written_becomes_png(pipe):
    animated = io.BytesIO()
    first = Image.fromarray(photo()).convert("RGB")
    first.save(animated, "MPO", save_all=True, append_images=[first])
    session = Session(Encoded("photo", animated.getvalue()), pipe)
    assert session.encoded()[1] == "JPEG"
    ppm = Image.new("RGBA", (40, 30))
    ppm.format = "PPM"
    assert Session(ppm, pipe).encoded()[1] == "PNG"


def test_formats_in_any_case_and_qualities(pipe):
    session = Session(Encoded("photo", file_of(photo(), "JPEG")), pipe)
    for name in ("png", "Png", "PNG"):
        data, format = session.encoded(name)
        assert format == "PNG"
        assert data.startswith(b"\x89PNG")
    with pytest.raises(InvalidImageError, match=r"^format: expected one of PNG, JPEG, .*, TGA, got 'xyz'$"):
        session.encoded("xyz")
    small, format = session.encoded(quality=1)
    assert format == "JPEG"
    assert len(small) < len(session.encoded(quality=100)[0])
    for format in (None, "JPEG", "PNG"):
        with pytest.raises(InvalidImageError, match="^quality: expected a whole number from 1 to 100, got 500$"):
            session.encoded(format, 500)


@pytest.mark.parametrize(("mode", "format"), [("CMYK", "PNG"), ("CMYK", "WEBP"), ("YCbCr", "PNG"), ("HSV", "JPEG")])
def test_colours_of_another_space_become_rgb_where_that_is_asked_for(pipe, mode, format):
    picture = Image.fromarray(photo()).convert(mode)
    session = Session(picture, pipe)
    session.fill(hole())
    with pytest.raises(InvalidImageError, match=f"format: {format} holds .*, got a picture of mode {mode}"):
        session.encoded(format)
    data, written = session.encoded(format, convert=True)
    assert written == format
    with Image.open(io.BytesIO(data)) as again:
        assert again.mode == "RGB"
        if format != "JPEG":
            np.testing.assert_array_equal(np.asarray(again), np.asarray(session.result().convert("RGB")))
    assert session.result().mode == mode
    session.check_format(format, convert=True)
    with pytest.raises(InvalidImageError, match=f"format: {format} holds .*, got a picture of mode {mode}"):
        session.check_format(format)


@pytest.mark.parametrize(
    "kind",
    ["1", "P", "YCbCr", "HSV", "CMYK", "P with alpha", "L with a transparent level", "RGB with a transparent colour"],
)
def test_fills_have_the_colours_that_the_file_holds(pipe, kind):
    """What a fill returns is in the result, and the next one reads it, as if the pipeline filled them in turn."""
    picture = Image.fromarray(photo()).convert(kind.split()[0])
    if "with" in kind:
        picture.info["transparency"] = {"P": bytes(range(0, 256, 2)), "L": 100, "RGB": (80, 90, 100)}[picture.mode]
    masks = [hole(box=(20, 60, 30, 70)), hole(box=(50, 90, 50, 110))]
    session, expected = Session(picture, pipe), picture
    for mask in masks:
        patch = session.fill(mask, feather=3)
        expected = pipe(expected, mask, feather=3)
        np.testing.assert_array_equal(np.asarray(session.result()), np.asarray(expected))
        shown = np.asarray(session.result().convert("RGB" if picture.mode != "1" else "L"))
        for part in patch.parts:
            where = shown[part.box.slices].reshape(*part.touched.shape, -1)
            np.testing.assert_array_equal(np.broadcast_to(part.samples, where.shape), where)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_a_scaled_view_has_no_colour_of_transparent_pixels(pipe, mode):
    """White on transparent black: at its edge a view is white of less alpha, not grey."""
    clear = np.zeros((90, 120, 4), np.uint8)
    clear[31:62, 40:83] = 255
    session = Session(Image.fromarray(clear).convert(mode), pipe)
    box = Rect(0, 90, 0, 120)
    shown = Display.of(session, session.result()).picture(session.region(box), box, (40, 30))
    assert (shown.mode, shown.size) == ("RGBA", (40, 30))
    colours, alpha = np.asarray(shown)[..., :3], np.asarray(shown)[..., 3]
    assert ((alpha > 20) & (alpha < 235)).sum() > 20
    assert colours[alpha > 20].min() >= 250


def test_stages_are_the_pipelines(pipe):
    picture, mask = photo(), hole()
    session = Session(picture, pipe)
    session.fill(mask)
    box, shown = session.stages(context=8)
    assert box == (22, 58, 32, 78)
    stages = pipe.stages(picture, mask)
    expected = [stages.masked, *stages.merged]
    assert len(shown) == len(expected) == 4
    for one, whole in zip(shown, expected):
        np.testing.assert_array_equal(one, whole[box.slices])
    np.testing.assert_array_equal(shown[-1], session.result()[box.slices])


def test_stages_are_those_of_the_model_that_filled(pipe):
    grey = BlurFill()
    grey.gain.data.zero_()
    session = Session(photo(), pipe)
    session.fill(hole(), inpainter=Inpainter(grey, device="cpu"))
    box, shown = session.stages(context=8)
    np.testing.assert_array_equal(shown[-1], session.result()[box.slices])
    assert shown[-1][8:28, 8:38].tolist() == [[[128, 128, 128]] * 30] * 20


class SlowFill(BlurFill):
    """Waits for `go` in the network."""

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.go = threading.Event(), threading.Event()

    def forward(self, image, mask, return_stages=False):
        self.begun.set()
        assert self.go.wait(60)
        return super().forward(image, mask, return_stages)


@pytest.mark.parametrize("box", [(0, 97, 0, 10), (-1, 10, 0, 10), (5, 5, 0, 10), (0, 10, 0, 121)])
def test_a_region_lies_inside_the_picture(pipe, box):
    session = Session(photo(), pipe)
    with pytest.raises(OptionError, match=r"^box: expected pixels inside the picture \[96, 120\], got \("):
        session.region(Rect(*box))
    assert session.region(Rect(90, 96, 0, 120)).shape == (6, 120, 3)


def test_a_picture_is_read_while_it_is_filled(pipe):
    slow = SlowFill()
    session = Session(photo(), pipe)
    session.fill(hole())
    before = session.result()
    filling = threading.Thread(
        target=session.fill,
        args=(hole(box=(60, 80, 10, 30)),),
        kwargs={"inpainter": Inpainter(slow, device="cpu")},
    )
    filling.start()
    assert slow.begun.wait(60)
    read: list[np.ndarray] = []

    def look() -> None:
        read.append(session.region(Rect(0, 96, 0, 120)))
        read.append(session.result())
        read.append(session.stages(context=200)[1][-1])

    looking = threading.Thread(target=look, daemon=True)
    looking.start()
    looking.join(20)
    stuck = looking.is_alive()
    undoing = threading.Thread(target=session.undo)  # changes of the history wait for one another
    undoing.start()
    slow.go.set()
    filling.join(60)
    undoing.join(60)
    assert not stuck
    assert len(read) == 3
    for one in read:
        np.testing.assert_array_equal(one, before)
    assert (session.position, session.fills) == (1, 2)


def test_threads_fill_one_session_without_losing_a_fill(pipe):
    picture = photo(256, 256)
    session = Session(picture, pipe)
    boxes = [(y, y + 10, x, x + 10) for y in (10, 90, 170) for x in (10, 90, 170)]
    threads = [threading.Thread(target=session.fill, args=(hole(256, 256, box),)) for box in boxes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert session.fills == len(boxes)
    expected = picture
    for patch in [session._patches[number] for number in range(session.fills)]:
        mask = np.zeros((256, 256), bool)
        mask[patch.at[0] : patch.at[0] + 10, patch.at[1] : patch.at[1] + 10] = True
        expected = pipe(expected, mask)
    np.testing.assert_array_equal(session.result(), expected)


def test_memory_grows_by_what_was_filled_only(pipe):
    session = Session(photo(1500, 2000), pipe)
    before = session.nbytes
    assert before == 1500 * 2000 * 3
    session.fill(hole(1500, 2000, (700, 800, 900, 1000)))
    assert session.nbytes - before < 8 * 100 * 100
