"""Masks of every kind, thresholds, warnings, dilation and feathering."""

from __future__ import annotations

import io
import re

import numpy as np
import pytest
import torch
from PIL import Image

from lgnet_fast.errors import InvalidMaskError
from lgnet_fast.pipeline.masks import masks_for, read_hole, soft_edge

from .pipeline_support import box_mask

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


def test_grey_levels_are_thresholded_at_half_by_default():
    levels = np.array([[0, 1, 126, 127, 128, 129, 255]], np.uint8)
    assert read_hole(levels, 1, 7).tolist() == [[False, False, False, False, True, True, True]]
    assert read_hole(levels, 1, 7, threshold=0.0).tolist() == [[False] + [True] * 6]
    assert read_hole(levels, 1, 7, threshold=0.505).tolist() == [[False] * 5 + [True] * 2]
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
        (np.zeros((3, 4), np.int64), "int64"),
        (np.zeros((3, 4, 3), np.uint8), r"\[3, 4, 3\]"),
        (torch.zeros(3, 4), r"\[1, 1, H, W\]"),
        (torch.full((1, 1, 3, 4), float("nan")), "finite"),
        (None, "NoneType"),
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
    for wrong in (["a", "b", "c"], masks):
        with pytest.raises(InvalidMaskError, match="2"):
            masks_for(wrong, 2)


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
