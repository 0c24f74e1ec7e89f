"""Masks of a coloured brush in lossy files, on black and on a copy of the picture, against the strokes they show."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageDraw
from scipy import ndimage

from lgnet_fast.errors import InvalidMaskError
from lgnet_fast.pipeline.brushes import black, brush_hole
from lgnet_fast.pipeline.masks import read_hole
from lgnet_fast.pipeline.pictures import picture_of
from lgnet_fast.samples import sample_paths

from .pipeline_support import noise

SIDE = 192
COLOURS = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "magenta": (255, 0, 255),
    "orange": (255, 128, 0),
    "purple": (128, 0, 255),
    "dark red": (128, 0, 0),
}


def _strokes():
    """Strokes of 9 and 5 pixels and a blob, bool [SIDE, SIDE]."""
    sheet = Image.new("L", (SIDE, SIDE))
    draw = ImageDraw.Draw(sheet)
    draw.line([(20, 30), (90, 77), (160, 41)], fill=255, width=9, joint="curve")
    draw.line([(31, 150), (140, 171)], fill=255, width=5)
    draw.ellipse((101, 91, 150, 133), fill=255)
    return np.asarray(sheet) > 0


STROKES = _strokes()


def _coded(pixels, kind, quality=75, subsampling=2):
    file = io.BytesIO()
    options = {"quality": quality, **({"subsampling": subsampling} if kind == "JPEG" else {})}
    Image.fromarray(pixels).save(file, kind, **options)
    return Image.open(file)


def _painted(colour, background, where=STROKES):
    share = np.asarray(where, np.float32)[..., None]
    return np.rint(np.float32(colour) * share + background * (1 - share)).astype(np.uint8)


def _photo():
    with Image.open(sample_paths()["chelsea"][0]) as picture:
        return np.array(picture.convert("RGB").resize((SIDE, SIDE)))


def _assert_near(hole, strokes, wider):
    """Every pixel of the strokes but one in a thousand is hole, and none farther than `wider` pixels from them."""
    assert np.count_nonzero(strokes & ~hole) <= 1e-3 * np.count_nonzero(strokes)
    assert ndimage.distance_transform_edt(~strokes)[hole].max() <= wider


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize(("quality", "subsampling"), [(60, 2), (75, 2), (75, 0), (90, 2), (95, 0)])
def test_a_brush_on_black_in_a_jpeg(colour, quality, subsampling):
    mask = _coded(_painted(COLOURS[colour], 0), "JPEG", quality, subsampling)
    for channel in ("auto", "colour"):
        _assert_near(read_hole(mask, SIDE, SIDE, channel=channel), STROKES, 2.3)


@pytest.mark.parametrize("colour", COLOURS)
def test_a_brush_on_black_in_a_webp(colour):
    _assert_near(read_hole(_coded(_painted(COLOURS[colour], 0), "WEBP"), SIDE, SIDE), STROKES, 2.3)


@pytest.mark.parametrize("colour", ["green", "blue", "magenta"])
@pytest.mark.parametrize(("quality", "subsampling"), [(60, 2), (75, 2), (75, 0), (95, 2)])
def test_a_brush_on_a_copy_of_the_picture_in_a_jpeg(colour, quality, subsampling):
    photo = _photo()
    mask = _coded(_painted(COLOURS[colour], photo), "JPEG", quality, subsampling)
    for channel in ("auto", "colour"):
        hole = read_hole(mask, SIDE, SIDE, channel=channel, picture=picture_of(photo))
        _assert_near(hole, STROKES, 3.2)


def test_soft_strokes_on_a_copy_of_the_picture():
    """Of an exact copy all that differs is hole, of a JPEG what is mostly brush."""
    photo = _photo()
    share = ndimage.gaussian_filter(STROKES.astype(np.float32), 0.8)
    mask = _painted(COLOURS["magenta"], photo, share)
    exact = read_hole(mask, SIDE, SIDE, picture=picture_of(photo))
    np.testing.assert_array_equal(exact, (mask != photo).any(axis=2))
    hole = read_hole(_coded(mask, "JPEG", 90), SIDE, SIDE, picture=picture_of(photo))
    assert np.count_nonzero((share > 0.5) & ~hole) == 0
    assert np.count_nonzero(hole & (share < 0.02)) == 0


def test_noise_of_the_coding_is_no_hole_where_most_of_a_copy_is_exact():
    photo = _photo()
    photo[:150] = 0  # which JPEG keeps
    where = STROKES & (np.arange(SIDE)[:, None] < 140)
    mask = _coded(_painted(COLOURS["magenta"], photo, where), "JPEG", 75)
    assert (np.asarray(mask) == photo).all(axis=2).mean() > 0.5
    _assert_near(read_hole(mask, SIDE, SIDE, picture=picture_of(photo)), where, 3.2)


def test_a_picture_of_sixteen_bits_is_compared_in_levels_of_eight():
    photo = _photo()
    deep = picture_of(photo[..., 1].astype(np.uint16) * 257)
    grey = np.repeat(photo[..., 1:2], 3, axis=2)
    mask = _coded(_painted(COLOURS["green"], grey), "JPEG", 90)
    _assert_near(read_hole(mask, SIDE, SIDE, picture=deep), STROKES, 2.3)


def _gradient(photo):
    return _painted(np.linspace((255, 0, 0), (0, 0, 255), SIDE)[None], photo)


def _two_colours(photo):
    where = STROKES & (np.arange(SIDE) < 100)
    return _painted(COLOURS["green"], _painted(COLOURS["magenta"], photo), where)


@pytest.mark.parametrize(
    "change",
    [
        lambda photo: photo,
        lambda photo: photo[::-1],
        lambda photo: np.clip(photo * 1.3, 0, 255).astype(np.uint8),
        lambda photo: photo[..., [2, 0, 1]],
        lambda photo: _painted((255, 255, 255), photo),
        lambda photo: _painted((90, 90, 90), photo),
        lambda photo: _painted(photo[:, ::-1], photo),
        _gradient,
        _two_colours,
        lambda photo: _painted(COLOURS["magenta"], photo, ~STROKES),
        lambda photo: _painted(COLOURS["green"], photo[::-1]),
        lambda photo: np.where(STROKES[..., None], photo, 0),
        lambda photo: _painted(COLOURS["red"], _painted((255, 255, 255), 0, STROKES[::-1])),
    ],
    ids=[
        "no brush",
        "upside down",
        "brighter",
        "other colours",
        "white",
        "grey",
        "another part of it",
        "a gradient",
        "two colours",
        "more than half",
        "on another picture",
        "an object on black",
        "red and white on black",
    ],
)
def test_auto_refuses_what_is_no_brush_of_one_colour(change):
    photo = _photo()
    mask = _coded(np.ascontiguousarray(change(photo)), "JPEG", 85)
    with pytest.raises(InvalidMaskError, match="mask_channel"):
        read_hole(mask, SIDE, SIDE, picture=picture_of(photo))


def test_a_brush_of_a_colour_of_the_picture_is_refused():
    photo = _photo()
    photo[100:, :60] = (250, 10, 245)
    where = STROKES & (np.arange(SIDE) > 70)
    mask = _coded(_painted(COLOURS["magenta"], photo, where), "JPEG", 85)
    with pytest.raises(InvalidMaskError, match="mask_channel"):
        read_hole(mask, SIDE, SIDE, picture=picture_of(photo))


def test_a_few_pixels_of_the_picture_in_the_brush_colour_do_not_pierce_a_stroke():
    photo = _photo()
    photo[110:112, 120:122] = COLOURS["magenta"]  # under the blob
    photo[60:62, 20:22] = COLOURS["magenta"]  # under nothing
    mask = _coded(_painted(COLOURS["magenta"], photo), "JPEG", 90)
    hole = read_hole(mask, SIDE, SIDE, picture=picture_of(photo))
    assert hole[110:112, 120:122].all()
    assert not hole[58:64, 18:24].any()


def test_strips_give_the_same_hole(monkeypatch):
    mask = np.asarray(_coded(_painted(COLOURS["purple"], 0), "JPEG"))
    whole = brush_hole(mask, black)
    monkeypatch.setattr("lgnet_fast.pipeline.brushes._STRIP_PIXELS", 7 * SIDE)
    np.testing.assert_array_equal(brush_hole(mask, black), whole)


def test_no_brush_no_hole():
    assert brush_hole(np.zeros((5, 7, 3), np.uint8), black) is None
    assert brush_hole(np.full((5, 7, 3), 255, np.uint8), black) is None
    assert brush_hole(noise(64, 64, seed=1), black) is None
    assert brush_hole(np.zeros((0, 7, 3), np.uint8), black) is None
