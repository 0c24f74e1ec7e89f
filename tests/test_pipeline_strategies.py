"""Windows, tiles, padding and blending: inputs of the network, and every hole pixel is filled."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from lgnet_fast.engine.regions import Rect
from lgnet_fast.pipeline import strategies
from lgnet_fast.pipeline.strategies import (
    Window,
    _is_thick,
    choose,
    crop_windows,
    network_size,
    patches,
    reflection,
    tile_windows,
    windows_for,
)

from .pipeline_support import box_mask


def _box(window):
    return Rect(window.rows.start, window.rows.stop, window.columns.start, window.columns.stop)


def _filled(windows, shape):
    total = np.zeros(shape, np.float32)
    for window in windows:
        weight = 1 if window.weight is None else window.weight(_box(window))
        total[window.rows, window.columns] += weight
    return total


def test_reflection_repeats_and_replicates():
    assert reflection(5, 12).tolist() == [0, 1, 2, 3, 4, 3, 2, 1, 0, 1, 2, 3]
    assert reflection(1, 4).tolist() == [0, 0, 0, 0]
    assert reflection(2, 5).tolist() == [0, 1, 0, 1, 0]
    assert reflection(256, 256).tolist() == list(range(256))
    for length in (2, 3, 17, 100):
        expected = np.pad(np.arange(length), (0, length - 1), mode="reflect")
        assert reflection(length, 2 * length - 1).tolist() == expected.tolist()


@pytest.mark.parametrize("strategy", ["full", "crop", "resize", "tile"])
@pytest.mark.parametrize("shape", [(1, 1), (17, 933), (255, 257), (700, 1300)])
def test_every_hole_pixel_is_covered_and_every_window_fits_the_network(strategy, shape):
    rng = np.random.default_rng(shape[0])
    hole = rng.random(shape) > 0.999
    hole[-1, -1] = hole[0, 0] = True
    hole[shape[0] // 3 : shape[0] // 2, shape[1] // 4 : shape[1] // 2] = True
    windows = windows_for(strategy, hole, 256, 512)
    assert (_filled(windows, shape)[hole] > 0).all()
    for window in windows:
        assert window.rows.start >= 0
        assert window.columns.start >= 0
        assert window.rows.stop <= shape[0]
        assert window.columns.stop <= shape[1]
        assert window.reduced[0] <= window.size[0]
        assert window.reduced[1] <= window.size[1]
        height, width = network_size(window, 256)
        assert strategy == "full" or height * width <= 512 * 512


def test_a_small_hole_gets_one_native_window_with_context():
    hole = box_mask(1000, 1500, (480, 700, 560, 790))
    (window,) = crop_windows(hole, 256, 512)
    assert window.size == window.reduced == (256, 256)
    assert (window.rows.start, window.columns.start) == ((480 + 560 - 256) // 2, (700 + 790 - 256) // 2)
    assert window.weight(Rect(480, 560, 700, 790)).shape == (80, 90)
    assert (window.weight(Rect(480, 560, 700, 790)) == 1).all()


def test_a_window_at_the_border_is_moved_inside():
    (window,) = crop_windows(box_mask(600, 600, (0, 590, 20, 600)), 256, 512)
    assert (window.rows, window.columns) == (slice(0, 256), slice(344, 600))


def test_a_long_scratch_keeps_native_scale_in_an_oblong_window():
    (window,) = crop_windows(box_mask(1000, 2000, (500, 400, 506, 1200)), 256, 512)
    assert window.size == window.reduced == (256, 1024)


def test_a_large_hole_is_seen_at_reduced_scale_with_context():
    hole = box_mask(2000, 3000, (500, 900, 1300, 1900))
    (window,) = crop_windows(hole, 256, 512)
    assert network_size(window, 256) == window.reduced == (512, 512)
    # context: half the square root of 800 * 1000 on either side
    assert window.size[1] == pytest.approx(1000 + 2 * 447, abs=1)
    assert window.size[0] == window.size[1]


@pytest.mark.parametrize("multiple", [1, 7, 8, 256])
def test_a_window_is_the_smallest_of_the_largest_scale(multiple):
    """As found by trying every shape; small networks have many."""
    rng = np.random.default_rng(multiple)
    for _ in range(300):
        cells = int(rng.choice([1, 2, 4, 9, 36, 100]))
        height, width = (int(multiple * rng.uniform(0.1, 12)) + 1 for _ in range(2))
        shapes = [(a, b) for a in range(1, cells + 1) for b in range(1, cells // a + 1)]
        scales = [min(1.0, a * multiple / height, b * multiple / width) for a, b in shapes]
        scale, _, _, down, across = max((s, -a * b, -a, a, b) for s, (a, b) in zip(scales, shapes, strict=True))
        assert strategies._shape([height, width], multiple, cells) == (scale, down, across)


def test_rounding_takes_no_cell_more():
    assert strategies._shape([25, 50], 7, 4) == (7 / 25, 1, 2)  # 7 / 25 * 50 / 7 is more than 2


def test_groups_near_each_other_merge_and_distant_ones_do_not():
    near = box_mask(1024, 1024, (100, 100, 110, 110), (100, 180, 110, 190))
    assert len(crop_windows(near, 256, 512)) == 1
    touching = box_mask(1024, 1024, (100, 100, 110, 110), (100, 115, 110, 120))
    assert len(crop_windows(touching, 256, 512)) == 1
    distant = box_mask(1024, 1024, (100, 100, 110, 110), (900, 900, 910, 910))
    assert len(crop_windows(distant, 256, 512)) == 2
    rings = box_mask(900, 1200, (200, 200, 500, 500), (200, 540, 500, 840))
    rings &= ~box_mask(900, 1200, (204, 204, 496, 496), (204, 544, 496, 836))
    windows = crop_windows(rings, 256, 512)  # together they would be seen at two thirds of the scale
    assert [window.reduced for window in windows] == [window.size for window in windows] == [(512, 512)] * 2


def test_a_groups_context_does_not_grow_with_other_groups():
    windows = crop_windows(box_mask(2000, 2000, (100, 100, 500, 500), (1500, 1500, 1516, 1516)), 256, 512)
    assert [network_size(window, 256) for window in windows] == [(512, 512), (256, 256)]


def test_a_picture_of_one_row_keeps_it():
    row = np.ones((1, 9000), bool)
    for strategy, reduced in (("crop", (1, 1024)), ("resize", (1, 512))):
        assert [window.reduced for window in windows_for(strategy, row, 256, 512)] == [reduced]


def test_overlapping_windows_fill_only_their_own_group():
    # Too far apart for one 256 window, and one of 512 would cost more than two of 256; yet the windows overlap.
    hole = box_mask(1024, 1024, (400, 300, 500, 400), (520, 460, 620, 560))
    windows = crop_windows(hole, 256, 512)
    assert len(windows) == 2
    first, second = windows
    assert first.rows.stop > second.rows.start
    assert first.columns.stop > second.columns.start
    assert set(np.unique(_filled(windows, hole.shape)[hole])) == {1.0}


def test_a_network_of_any_size_gets_its_windows_at_once():
    hole = np.zeros((1200, 1200), bool)
    hole[::300, ::300] = True
    windows = crop_windows(hole, 1, 512)  # 2^18 cells, in 3.4 million shapes
    assert (_filled(windows, hole.shape)[hole] > 0).all()
    assert {max(window.reduced) for window in windows} <= {*range(129, 140)}


def test_many_specks_take_few_windows():
    hole = np.zeros((1024, 1024), bool)
    hole[::64, ::64] = True
    windows = crop_windows(hole, 256, 512)
    assert len(windows) <= 32
    assert (_filled(windows, hole.shape)[hole] == 1).all()


def test_tiles_without_holes_are_left_out_and_weights_are_smooth():
    hole = box_mask(2000, 3000, (990, 0, 1000, 3000))
    windows = tile_windows(hole, 512, 128)
    everything = tile_windows(np.ones_like(hole), 512, 128)
    assert 0 < len(windows) < len(everything) / 2
    total = _filled(everything, hole.shape)
    assert total.min() > 0
    for window in everything:
        assert window.size == (512, 512)
        share = window.weight(_box(window)) / total[window.rows, window.columns]
        # At an inner edge a tile's share starts near nothing, and it changes by little from pixel to pixel.
        assert np.abs(np.diff(share, axis=0)).max() < 0.02
        assert np.abs(np.diff(share, axis=1)).max() < 0.02
        if window.columns.start > 0:
            assert share[:, 0].max() < 1e-3


def _chosen(hole):
    name, windows = choose(hole, 256, 512)
    expected = windows_for(name, hole, 256, 512)
    assert [(w.rows, w.columns, w.reduced) for w in windows] == [(w.rows, w.columns, w.reduced) for w in expected]
    return name


def test_auto_chooses_by_size_and_hole_geometry():
    assert _chosen(box_mask(100, 200, (10, 10, 20, 20))) == "full"
    assert _chosen(box_mask(512, 512, (0, 0, 300, 300))) == "full"
    # one 256 window does it
    assert _chosen(box_mask(512, 512, (200, 200, 250, 250))) == "crop"
    assert _chosen(box_mask(2000, 3000, (200, 200, 250, 250))) == "crop"
    # a thick large hole: reduced scale
    assert _chosen(box_mask(2000, 3000, (200, 200, 1250, 1250))) == "crop"
    # a thin grid of lines over everything: native scale in tiles
    lines = np.zeros((2000, 3000), bool)
    lines[::200] = lines[:, ::200] = True
    assert _chosen(lines) == "tile"


@pytest.mark.parametrize(("across", "thick"), [((128, 128), True), ((127, 400), False), ((400, 127), False)])
def test_thick_is_a_square_of_128(across, thick):
    hole = box_mask(700, 900, (30, 50, 30 + across[0], 50 + across[1]))
    hole[600:603] = hole[:, 800:803] = True
    assert _is_thick(hole) == thick
    speckled = hole.copy()
    speckled[30 + across[0] // 2, 50 + across[1] // 2] = False
    assert not _is_thick(speckled)
    corner = box_mask(200, 200, (0, 0, 120, 120), (190, 0, 200, 200), (0, 190, 200, 200))
    assert not _is_thick(corner)  # what lies beyond the group is no hole


@pytest.mark.parametrize("seed", [2, 3])
def test_patches_hold_each_box_and_nothing_twice(seed):
    """With seed 2, boxes around parts that do not touch overlap."""
    rng = np.random.default_rng(seed)
    boxes = []
    for _ in range(30):
        top, left, height, width = rng.integers(0, 500), rng.integers(0, 700), *rng.integers(1, 90, 2)
        boxes.append(Rect(int(top), int(min(600, top + height)), int(left), int(min(777, left + width))))
    apart, owner = patches(boxes, (600, 777))
    assert 1 < len(apart) < len(boxes)
    covered = np.zeros((600, 777), int)
    for box in apart:
        covered[box.slices] += 1
    assert covered.max() == 1
    for box in boxes:
        own = apart[owner[box.top // 16, box.left // 16]]
        assert own.union(box) == own


def test_reduced_scale_averages_known_pixels_only():
    region = np.zeros((4, 4, 3), np.float32)
    region[:2] = 0.5
    hole = np.zeros((4, 4), bool)
    hole[0, :2] = hole[2:, 2:] = True  # a half of a reduced pixel, which is known then, and a whole one
    poisoned = region.copy()
    poisoned[hole] = -1
    for content in (region, poisoned):
        reduced, small_hole = strategies.reduce_region(content.__getitem__, hole, (2, 2))
        assert small_hole.tolist() == [[False, False], [False, True]]
        np.testing.assert_allclose(reduced[0], 0.5, atol=1e-6)
        assert (reduced[1] == 0).all()


def _at_once(plane, size, filter):
    return np.asarray(Image.fromarray(plane).resize((size[1], size[0]), filter))


def test_strips_reduce_as_one_call_of_pillow(monkeypatch):
    rng = np.random.default_rng(0)
    region, hole = rng.random((67, 131, 3)).astype(np.float32), rng.random((67, 131)) > 0.5
    monkeypatch.setattr(strategies, "_STRIP_PIXELS", 1000)
    reduced, small_hole = strategies.reduce_region(region.__getitem__, hole, (20, 33))
    known = (~hole).astype(np.float32)
    share = _at_once(known, (20, 33), Image.Resampling.BOX)
    np.testing.assert_array_equal(small_hole, share < 0.5)
    for channel in range(3):
        expected = _at_once(region[..., channel] * known, (20, 33), Image.Resampling.BOX) / np.maximum(share, 1e-6)
        np.testing.assert_array_equal(reduced[..., channel], np.where(small_hole, 0, expected))


def test_strips_enlarge_as_one_call_of_pillow_within_range(monkeypatch):
    fill = np.ones((4, 4, 3), np.float32)
    fill[:, 2:] = -1
    fill[1, 1] = 0.25
    window = Window(slice(10, 50), slice(20, 61), (4, 4))
    monkeypatch.setattr(strategies, "_STRIP_PIXELS", 200)
    box, parts, large = Rect(15, 45, 22, 60), [], np.full((30, 38, 3), np.nan, np.float32)
    for part, strip in strategies.enlarged(fill, window, box):
        parts.append(part)
        large[part.moved(-15, -22).slices] = strip
    assert len(parts) == 8
    for channel in range(3):
        expected = _at_once(np.ascontiguousarray(fill[..., channel]), (40, 41), Image.Resampling.LANCZOS)
        np.testing.assert_array_equal(large[..., channel], np.clip(expected, -1, 1)[5:35, 2:40])
    assert large.min() == -1
    assert large.max() == 1
