"""Masks of every kind, thresholds, warnings, dilation and feathering."""

from __future__ import annotations

import io
import os
import re

import numpy as np
import pytest
import torch
from PIL import Image

from lgnet_fast.errors import InvalidMaskError
from lgnet_fast.pipeline.masks import masks_for, read_hole, soft_edge
from lgnet_fast.pipeline.pictures import picture_of

from .pipeline_support import box_mask, noise

HOLE = box_mask(6, 5, (1, 2, 4, 4))


def _kinds(tmp_path):
    grey = Image.fromarray(HOLE.astype(np.uint8) * 255)
    file = tmp_path / "mask.png"
    grey.save(file)
    rgba = np.zeros((6, 5, 4), np.uint8)
    rgba[HOLE] = 255
    return {
        "bool": HOLE,
        "uint8": HOLE.astype(np.uint8) * 255,
        "uint8 of 0 and 1": HOLE.astype(np.uint8),
        "[H, W, 1]": HOLE.astype(np.uint8)[..., None] * 255,
        "float32": HOLE.astype(np.float32),
        "float64": HOLE.astype(np.float64),
        "tensor": torch.from_numpy(HOLE)[None, None],
        "float tensor": torch.from_numpy(HOLE)[None, None].to(torch.bfloat16),
        "uint8 tensor": torch.from_numpy(HOLE)[None, None].to(torch.uint8),
        "L": grey,
        "L of 0 and 1": Image.fromarray(HOLE.astype(np.uint8)),
        "1": grey.convert("1"),
        "P": grey.convert("P"),
        "int64 of 0 and 1": HOLE.astype(np.int64),
        "int16 of 0 and 255": HOLE.astype(np.int16) * 255,
        "int32 of 0 and 255": HOLE.astype(np.int32) * 255,
        "uint16": HOLE.astype(np.uint16) * 65535,
        "three channels, as OpenCV reads": np.stack([HOLE.astype(np.uint8) * 255] * 3, axis=2),
        "three channels of 0 and 1": np.stack([HOLE.astype(np.uint8)] * 3, axis=2),
        "float [H, W, 3]": np.stack([HOLE.astype(np.float32)] * 3, axis=2),
        "opaque RGBA array": np.stack([*[HOLE.astype(np.uint8) * 255] * 3, np.full((6, 5), 255, np.uint8)], axis=2),
        "[3, H, W]": np.stack([HOLE.astype(np.uint8) * 255] * 3),
        "tensor [H, W]": torch.from_numpy(HOLE),
        "tensor [1, H, W]": torch.from_numpy(HOLE)[None].double(),
        "uint8 tensor [3, H, W]": torch.from_numpy(HOLE).to(torch.uint8).mul(255).expand(3, 6, 5),
        "tensor [H, W, 3]": torch.from_numpy(HOLE)[..., None].float().expand(6, 5, 3),
        "tensor [1, 3, H, W]": torch.from_numpy(HOLE)[None, None].float().expand(1, 3, 6, 5),
        "more than 1 by rounding": HOLE.astype(np.float64) * (1 + 1e-7),
        "float16 more than 1 by rounding": HOLE.astype(np.float16) * np.float16(1.001),
        "LA": grey.convert("LA"),
        "RGB": grey.convert("RGB"),
        "white on transparent": Image.fromarray(rgba),
        "I;16": Image.fromarray(HOLE.astype(np.uint16) * 65535),
        "I of 0 and 255": grey.convert("I"),
        "F": Image.fromarray(HOLE.astype(np.float32)),
        "path": file,
        "str": str(file),
    }


def test_every_kind_of_mask_gives_the_same_hole(tmp_path):
    for name, mask in _kinds(tmp_path).items():
        np.testing.assert_array_equal(read_hole(mask, 6, 5), HOLE, err_msg=name)
        np.testing.assert_array_equal(read_hole(mask, 6, 5, invert=True), ~HOLE, err_msg=name)


@pytest.mark.parametrize(
    ("shape", "size", "tensor", "hole"),
    [
        # [3, 4, 3] can be a picture of 3 rows or of three channels: the picture's size decides, else the kind.
        ((3, 4, 3), (3, 4), True, (slice(None), 0)),
        ((3, 4, 3), (4, 3), False, (slice(None), 0)),
        ((3, 3, 3), (3, 3), True, (slice(None), 0)),
        ((3, 3, 3), (3, 3), False, (0, slice(None))),
    ],
)
def test_the_order_of_axes_where_a_shape_allows_two(shape, size, tensor, hole):
    levels = np.zeros(shape, np.uint8)
    rows_first = size == shape[:2] and not (tensor and size == shape[1:])
    if rows_first:
        levels[hole] = 255
    else:
        levels[(slice(None), *hole)] = 255
    expected = np.zeros(size, bool)
    expected[hole] = True
    np.testing.assert_array_equal(read_hole(torch.from_numpy(levels) if tensor else levels, *size), expected)


# -- where the hole is not white on black ---------------------------------------------------------------------------

SIZE = (48, 64)
STROKE = box_mask(*SIZE, (6, 8, 14, 50), (20, 30, 40, 36))
PHOTO = noise(*SIZE, seed=3)


def _layer(colour, below=(0, 0, 0), hole=STROKE):
    """A layer with `colour` opaque in the hole, and `below` transparent around it."""
    pixels = np.zeros((*SIZE, 4), np.uint8)
    pixels[..., :3] = below
    pixels[hole] = (*colour, 255)
    return Image.fromarray(pixels)


def _erased(pixels, left=0):
    """A picture with the hole rubbed out; `left`: whether its colour stays under alpha 0."""
    alpha = np.where(STROKE, 0, 255).astype(np.uint8)
    kept = pixels if left else np.where(STROKE[..., None], 0, pixels).astype(np.uint8)
    return Image.fromarray(np.dstack([kept, alpha]))


def _painted(colour, background, quality=None):
    background = np.broadcast_to(np.asarray(background, np.uint8), (*SIZE, 3))
    picture = Image.fromarray(np.where(STROKE[..., None], np.uint8(colour), background))
    if quality is None:
        return picture
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality, subsampling=0)
    return Image.open(file)


def _palette(transparent):
    """Index 1 in the hole, 0 around it; `transparent`: the index that is."""
    picture = Image.fromarray(STROKE.astype(np.uint8), "P")
    picture.putpalette([90, 120, 30, 200, 40, 60])
    picture.info["transparency"] = transparent
    return picture


def _labels():
    """Person and bus of the VOC palette, on black."""
    picture = _painted((192, 128, 128), 0)
    picture.paste((128, 128, 128), (0, 42, 10, 48))
    return picture


CERTAIN = {
    "white strokes on a layer": _layer((255, 255, 255)),
    "white strokes on a layer, white below": _layer((255, 255, 255), below=(255, 255, 255)),
    "green strokes on a layer over a photograph's colours": _layer((30, 220, 90), below=(200, 10, 10)),
    "LA, white strokes": _layer((255, 255, 255)).convert("LA"),
    "La, white strokes": _layer((255, 255, 255)).convert("LA").convert("La"),
    "palette, saturated strokes, the rest transparent": _palette(0),
    "palette of colours with alphas, white strokes": _layer((255, 255, 255), below=(255, 255, 255)).quantize(4),
    "red on black": _painted((255, 0, 0), 0),
    "magenta on black": _painted((255, 0, 255), (8, 8, 8)),
    "dark blue on black": _painted((0, 0, 128), 0),
    "red on black, mostly opaque": Image.fromarray(
        np.dstack([_painted((255, 0, 0), 0), np.full(SIZE, 200, np.uint8)])
    ),
    "red on black array": np.asarray(_painted((255, 0, 0), 0)),
    "blue on black as OpenCV has it": np.asarray(_painted((0, 0, 255), 0))[..., ::-1],
    "float tensor, green on black": torch.from_numpy(np.asarray(_painted((0, 255, 0), 0)) / 255).permute(2, 0, 1),
    "one label": _painted((64, 0, 128), 0),
    "magenta on a copy of the picture": _painted((255, 0, 255), PHOTO),
}
UNCERTAIN = {
    "rubbed out": _erased(PHOTO),
    "rubbed out, colours left": _erased(PHOTO, left=1),
    "grey picture rubbed out": _erased(PHOTO).convert("LA"),
    "white canvas rubbed out": _erased(np.full((*SIZE, 3), 255, np.uint8)),
    "black canvas rubbed out": _erased(np.zeros((*SIZE, 3), np.uint8)),
    "black strokes on a layer": _layer((0, 0, 0)),
    "grey strokes on a layer": _layer((128, 128, 128)),
    "LA, black strokes": _layer((0, 0, 0), below=(255, 255, 255)).convert("LA"),
    "an object cut out": Image.fromarray(np.dstack([PHOTO, np.where(STROKE, 255, 0).astype(np.uint8)])),
    "a layer without strokes": _layer((255, 0, 0), hole=np.zeros(SIZE, bool)),
    "strokes over most of a layer": _layer((255, 0, 0), hole=~STROKE),
    "palette, most of it opaque": _palette(1),
    "palette of colours with alphas, black strokes": _layer((0, 0, 0), below=(255, 255, 255)).quantize(4),
    "RGBA array": np.asarray(_erased(PHOTO)),
    "RGBA tensor": torch.from_numpy(np.array(_erased(PHOTO))).permute(2, 0, 1),
    "red on white": _painted((255, 0, 0), 255),
    "red on grey": _painted((255, 0, 0), 128),
    "red and white on black": _painted((255, 0, 0), np.where(PHOTO[..., :1] > 250, 255, 0)),
    "black on red": _painted((0, 0, 0), (255, 0, 0)),
    "dark red on as dark a grey": _painted((40, 0, 0), (40, 40, 40)),
    "labels": _labels(),
    "labels as a palette": _labels().quantize(8),
    "two labels, one dark": _painted((192, 0, 0), np.where(np.arange(64)[:, None] < 4, (0, 64, 0), (0, 0, 0))),
    "a photograph": Image.fromarray(noise(*SIZE, seed=8)),
    "red on another photograph": _painted((255, 0, 0), noise(*SIZE, seed=8)),
    "white on a copy of the picture": _painted((255, 255, 255), PHOTO),
    "magenta on most of a copy of the picture": Image.fromarray(
        np.where(STROKE[..., None], PHOTO, (255, 0, 255)).astype(np.uint8)
    ),
    "brush of the picture's own colour": _painted(PHOTO[0, 0], PHOTO),
}


@pytest.mark.parametrize("kind", CERTAIN)
def test_auto_takes_what_can_mean_one_thing_only(kind):
    np.testing.assert_array_equal(read_hole(CERTAIN[kind], *SIZE, picture=picture_of(PHOTO)), STROKE)


@pytest.mark.parametrize("kind", UNCERTAIN)
def test_auto_refuses_what_can_mean_two_things_and_names_the_choices(kind):
    with pytest.raises(InvalidMaskError, match=r"mask_channel.*luma.*alpha.*inverse_alpha.*colour"):
        read_hole(UNCERTAIN[kind], *SIZE, picture=picture_of(PHOTO))


@pytest.mark.parametrize(
    ("channel", "mask"),
    [
        ("inverse_alpha", _erased(PHOTO)),
        ("inverse_alpha", _erased(PHOTO).convert("LA")),
        ("inverse_alpha", np.asarray(_erased(PHOTO, left=1))),
        ("inverse_alpha", torch.from_numpy(np.asarray(_erased(PHOTO)) / 255).permute(2, 0, 1)),
        ("inverse_alpha", _palette(1)),
        ("alpha", _layer((0, 0, 0))),
        ("alpha", _layer((0, 0, 0)).convert("LA")),
        ("alpha", _palette(0)),
        ("alpha", UNCERTAIN["an object cut out"]),
        ("luma", _layer((255, 255, 255), below=(255, 255, 255))),
        ("luma", _painted((255, 255, 0), (255, 0, 0))),
        ("colour", _painted((255, 0, 0), 255)),
        ("colour", _painted((255, 0, 255), PHOTO)),
        ("colour", _painted((255, 0, 255), PHOTO // 4, quality=95)),
        ("colour", _layer((200, 0, 0), below=(0, 200, 0))),
        ("colour", _layer((200, 0, 0), below=np.where(np.arange(64)[:, None] < 4, (200, 0, 0), 0))),
        ("colour", _painted((192, 128, 128), 0)),
    ],
)
def test_a_channel_that_was_asked_for(channel, mask):
    own = PHOTO // 4 if getattr(mask, "format", None) == "JPEG" else PHOTO
    hole = read_hole(mask, *SIZE, channel=channel, picture=picture_of(own))
    # Next to a stroke a JPEG may lend its colour to a pixel of the picture.
    assert (hole != STROKE).mean() <= (0.01 if own is not PHOTO else 0)
    np.testing.assert_array_equal(
        read_hole(mask, *SIZE, channel=channel, picture=picture_of(own), invert=True), ~hole
    )


def test_half_opaque_is_where_alpha_begins():
    alpha = np.array([[0, 100, 127, 128, 255]], np.uint8)
    mask = np.dstack([np.zeros((1, 5, 3), np.uint8), alpha])
    assert read_hole(mask, 1, 5, channel="alpha").tolist() == [[False, False, False, True, True]]
    assert read_hole(mask, 1, 5, channel="inverse_alpha").tolist() == [[True, True, True, False, False]]
    assert read_hole(mask, 1, 5, channel="alpha", threshold=0.3).tolist() == [[False, True, True, True, True]]


@pytest.mark.parametrize(
    ("channel", "mask", "words"),
    [
        ("alpha", _painted((255, 0, 0), 0), "'alpha' needs a mask with transparency, got a picture of mode RGB"),
        ("inverse_alpha", np.zeros(SIZE, np.uint8), "'inverse_alpha' needs.*array .* of uint8"),
        ("colour", np.zeros(SIZE, bool), "'colour' needs a mask in colour"),
        ("green", np.zeros(SIZE, bool), "mask_channel: expected one of auto, luma.*'green'"),
    ],
)
def test_a_channel_that_is_not_there(channel, mask, words):
    with pytest.raises(InvalidMaskError, match=words):
        read_hole(mask, *SIZE, channel=channel)


def test_soft_strokes_and_lossy_ones_are_one_colour():
    soft = np.clip(np.abs(np.arange(64) - 32) - 8, 0, 8)[None].repeat(48, axis=0) * 31
    brush = np.zeros((*SIZE, 3), np.uint8)
    brush[..., 0] = brush[..., 2] = np.where(np.arange(64) < 40, 248 - soft, 0)
    np.testing.assert_array_equal(read_hole(Image.fromarray(brush), *SIZE), brush[..., 0] >= 32)
    hole = read_hole(_painted((255, 0, 0), 0, quality=90), *SIZE)
    assert (hole != STROKE).mean() < 0.02


def test_grey_levels_are_thresholded_at_half_by_default():
    levels = np.array([[0, 1, 126, 127, 128, 129, 255]], np.uint8)
    assert read_hole(levels, 1, 7).tolist() == [[False, False, False, False, True, True, True]]
    assert read_hole(levels, 1, 7, threshold=0.0).tolist() == [[False] + [True] * 6]
    assert read_hole(levels, 1, 7, threshold=0.505).tolist() == [[False] * 5 + [True] * 2]
    assert read_hole(levels, 1, 7, threshold=1 - 1e-9).tolist() == [[False] * 6 + [True]]
    assert read_hole(np.array([[0.5, 0.51]]), 1, 2).tolist() == [[False, True]]


def test_jpeg_masks_keep_their_shape_and_black_ones_stay_empty():
    hole = box_mask(64, 64, (16, 16, 48, 48))
    file = io.BytesIO()
    Image.fromarray(hole.astype(np.uint8) * 255).save(file, "JPEG", quality=30)
    np.testing.assert_array_equal(read_hole(Image.open(file), 64, 64), hole)

    # Coding noise of level 1 in a black JPEG is not a mask of 0 and 1.
    file = io.BytesIO()
    almost_black = np.zeros((16, 16), np.uint8)
    almost_black[:8] = 1
    Image.fromarray(almost_black).save(file, "JPEG", quality=100)
    assert np.asarray(Image.open(file)).max() == 1
    assert not read_hole(Image.open(file), 16, 16).any()


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (np.zeros((3, 4), np.float32) + np.nan, "finite"),
        (np.full((3, 4), np.inf), "finite"),
        (np.full((3, 4), 1.5), r"\[0, 1\], got 1.5"),
        (np.full((3, 4), -0.25), "got -0.25"),
        (np.full((3, 4), 1 + 1e-4), r"got 1.0001 to 1.0001"),
        (np.full((3, 4), 200.0), "divide"),
        (np.full((3, 4), -1, np.int64), "int64, got -1"),
        (np.zeros((3, 4), complex), "complex128"),
        (np.zeros((5, 3, 5), np.uint8), r"\[5, 3, 5\]"),
        (torch.zeros(2, 1, 3, 4), r"\[1, C, H, W\]"),
        (torch.full((1, 1, 3, 4), float("nan")), "finite"),
        (None, "NoneType"),
        (np.zeros((0, 4), np.uint8), "got 4x0"),
        (Image.fromarray(np.full((3, 4), 70000, np.int32)), "70000"),
    ],
)
def test_masks_that_cannot_be_used_are_named(mask, words):
    with pytest.raises(InvalidMaskError, match=words):
        read_hole(mask, 3, 4)


def test_wrong_size_names_both_sizes():
    with pytest.raises(InvalidMaskError, match=re.escape("20x10 (width x height), got 10x20")):
        read_hole(np.zeros((20, 10), bool), 10, 20)


@pytest.mark.parametrize("threshold", [-0.1, 1.0, float("nan")])
def test_threshold_out_of_range(threshold):
    with pytest.raises(InvalidMaskError, match="mask_threshold"):
        read_hole(HOLE, 6, 5, threshold=threshold)


def test_unreadable_mask_file_names_its_path(tmp_path):
    file = tmp_path / "broken.png"
    file.write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    for path in (file, tmp_path / "missing.png"):
        with pytest.raises(InvalidMaskError, match=path.name):
            read_hole(path, 3, 4)


def test_masks_for_a_batch():
    masks = torch.arange(3).view(3, 1, 1, 1)
    assert [int(mask) for mask in masks_for(masks, 3)] == [0, 1, 2]
    assert masks_for("a.png", 2) == ["a.png", "a.png"]
    unread, write = os.pipe()
    os.write(write, b"a mask")
    os.close(write)
    with open(unread, "rb") as pipe:  # can be read only once
        assert [mask.data for mask in masks_for(pipe, 2)] == [b"a mask"] * 2
    for wrong in (["a", "b", "c"], masks):
        with pytest.raises(InvalidMaskError, match="2"):
            masks_for(wrong, 2)


@pytest.mark.parametrize("make", [torch.zeros, np.zeros])
def test_a_mask_for_each_picture_or_one_of_three_channels_is_an_error(make):
    shown = r"mask: expected .* \[3, 1, H, W\], or \[1, 3, H, W\] .*, got \[3, 100, 120\]"
    with pytest.raises(InvalidMaskError, match=shown):
        masks_for(make((3, 100, 120)), 3)
    assert len(masks_for(make((3, 100, 120)), 2)) == 2  # no mask for each
    assert len(masks_for(make((1, 100, 120)), 1)) == 1


@pytest.mark.parametrize(("dilate", "feather"), [(0, 0), (1, 0), (5, 0), (0, 4), (3, 6), (40, 30)])
def test_soft_edge_is_the_euclidean_distance(dilate, feather):
    hole = np.random.default_rng(1).random((37, 53)) > 0.995
    assert 1 <= hole.sum() <= 30
    ys, xs = np.nonzero(hole)
    grid_y, grid_x = np.mgrid[:37, :53]
    distance = np.sqrt(((grid_y[..., None] - ys) ** 2 + (grid_x[..., None] - xs) ** 2).min(axis=2))
    alpha = soft_edge(hole, dilate, feather)
    assert alpha.dtype == np.float32
    np.testing.assert_array_equal(alpha == 1, distance <= dilate)
    np.testing.assert_array_equal(alpha > 0, distance <= dilate + feather)
    ramp = (distance > dilate) & (distance <= dilate + feather)
    np.testing.assert_allclose(alpha[ramp], 1 - (distance[ramp] - dilate) / (feather + 1), atol=1e-5)


@pytest.mark.parametrize("pixels", [100, 46340, 2**31, 10**30])
def test_dilation_and_feather_beyond_the_picture_saturate(pixels):
    hole = box_mask(30, 50, (3, 4, 5, 6))
    assert (soft_edge(hole, dilate=pixels) == 1).all()
    alpha = soft_edge(hole, dilate=2, feather=pixels)
    assert (alpha > 0).all()
    farthest = np.hypot(29 - 4, 49 - 5)
    assert alpha.min() == pytest.approx(1 - (farthest - 2) / (pixels + 1), abs=1e-6)
    assert not soft_edge(np.zeros_like(hole), pixels, pixels).any()


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.uint16])
def test_dilation_and_feather_of_small_integers_do_not_overflow(kind):
    hole = box_mask(300, 500, (150, 200, 152, 204))
    for dilate, feather in ((100, 100), (127, 1), (64, 64)):
        np.testing.assert_array_equal(soft_edge(hole, kind(dilate), kind(feather)), soft_edge(hole, dilate, feather))
    whole = np.uint8(128)
    np.testing.assert_array_equal(soft_edge(hole, whole, whole), soft_edge(hole, 128, 128))


def test_far_apart_holes_are_measured_apart(monkeypatch):
    """Boxes that dilation does not join are measured alone, with the same result as the whole picture at once."""
    from scipy import ndimage

    hole = box_mask(600, 700, (20, 30, 40, 60), (33, 90, 50, 99), (300, 500, 310, 505), (580, 10, 600, 12))
    distance = ndimage.distance_transform_edt(~hole)
    seen = []
    original = ndimage.distance_transform_edt
    monkeypatch.setattr(
        ndimage, "distance_transform_edt", lambda part, **options: seen.append(part.size) or original(part, **options)
    )
    alpha = soft_edge(hole, 10, 20)
    expected = np.where(distance <= 10, 1, np.where(distance <= 30, 1 - (distance - 10) / 21, 0))
    np.testing.assert_allclose(alpha, expected, atol=1e-6)
    assert len(seen) == 3
    assert sum(seen) < 0.15 * hole.size


def test_dilation_reaches_exactly_as_far_as_asked():
    hole = box_mask(41, 41, (20, 20, 21, 21))
    for dilate in (1, 2, 7):
        grown = soft_edge(hole, dilate) > 0
        assert grown[20].sum() == grown[:, 20].sum() == 2 * dilate + 1
    assert soft_edge(hole, 1).sum() == 5
    assert (soft_edge(hole, 0, 3)[20, 20:25] == np.float32([1, 0.75, 0.5, 0.25, 0])).all()


@pytest.mark.parametrize("name", ["dilate", "feather"])
@pytest.mark.parametrize("value", [-1, 1.5, True, "3"])
def test_dilate_and_feather_are_whole_pixels(name, value):
    with pytest.raises(InvalidMaskError, match=name):
        soft_edge(HOLE, **{name: value})
