"""Generated holes are within their class and follow their seed; folders of masks in common layouts."""

from __future__ import annotations

import hashlib
import io

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from lgnet_fast import InvalidMaskError
from lgnet_fast.data import mask_files, masks, strokes
from lgnet_fast.pipeline.masks import read_hole
from lgnet_fast.training import HOLE_CLASSES, DataError, MaskFolder, generate_mask, hole_class, hole_ratio
from lgnet_fast.training.config import DataConfig, TrainConfig
from lgnet_fast.training.holes import HoleSource
from lgnet_fast.training.sources import JoinedSource


def test_a_kind_in_the_table_is_a_setting_of_training(monkeypatch):
    def left_half(height, width, *, seed):
        return np.indices((height, width))[1] < width // 2

    monkeypatch.setitem(masks.FREE_KINDS, "left", left_half)
    for kind in masks.FREE_KINDS:
        holes = HoleSource(TrainConfig(data=DataConfig(mask_kind=kind)).data, JoinedSource([]))
        mask = holes.draw(64, (1, 2), [])
        assert mask.shape == (64, 64)
        assert 0 < mask.mean() < 1
    assert mask.mean() == 0.5


@pytest.mark.parametrize("kind", masks.KINDS)
@pytest.mark.parametrize("chosen", range(len(HOLE_CLASSES)))
def test_ratio_lies_in_the_class(kind, chosen):
    low, high = HOLE_CLASSES[chosen]
    ratios = []
    for seed in range(25):
        mask = generate_mask(128, 160, hole_class=chosen, kind=kind, seed=(seed, chosen))
        assert mask.shape == (128, 160)
        assert mask.dtype == np.bool_
        ratios.append(hole_ratio(mask))
        assert low < ratios[-1] <= high
        assert hole_class(mask) == chosen
    assert max(ratios) - min(ratios) > 0.02  # spread over the class, not at one bound


@pytest.mark.parametrize(("height", "width"), [(1, 40), (7, 5), (8, 8), (16, 200), (300, 256)])
@pytest.mark.parametrize("kind", masks.KINDS)
def test_any_size_keeps_the_class_or_says_why_not(kind, height, width):
    for chosen, (low, high) in enumerate(HOLE_CLASSES):
        counts = [n for n in range(height * width + 1) if low < n / (height * width) <= high]
        assert counts
        for seed in range(5):
            assert generate_mask(height, width, hole_class=chosen, kind=kind, seed=seed).sum() in counts
    with pytest.raises(ValueError, match="3x3 has no pixel count"):
        generate_mask(3, 3, hole_class=0, kind=kind, seed=0)


def test_a_hole_grows_by_exactly_what_is_missing():
    hole, rng = np.zeros((4, 5), dtype=bool), np.random.default_rng(0)
    for missing, count in ((3, 3), (4, 7), (13, 20)):
        strokes._grow(hole, rng, missing)
        assert hole.sum() == count


def test_any_ratio_without_a_class():
    ratios = [hole_ratio(generate_mask(64, 64, hole_class=None, kind="strokes", seed=s)) for s in range(60)]
    assert 0.01 < min(ratios) < 0.12
    assert 0.45 < max(ratios) <= 0.6


def test_same_seed_same_mask_on_every_platform():
    digest = hashlib.sha256()
    seen = set()
    for kind in masks.KINDS:
        for seed in ((3, 1, 4), (3, 1, 5)):
            mask = generate_mask(64, 96, hole_class=2, kind=kind, seed=seed)
            assert np.array_equal(mask, generate_mask(64, 96, hole_class=2, kind=kind, seed=list(seed)))
            seen.add(mask.tobytes())
            digest.update(np.packbits(mask).tobytes())
    assert len(seen) == 6
    # Masks are drawn again for every evaluation: a change here makes earlier tables incomparable.
    assert digest.hexdigest()[:16] == "6db705ec8815530d"


def test_strokes_are_thick_and_rounded():
    """Every hole pixel of a stroke belongs to a disc of at least the thinnest brush."""
    mask = generate_mask(256, 256, hole_class=3, kind="strokes", seed=11)
    thinnest = max(1, round(0.075 * 256) // 4)
    disc = strokes._disc(thinnest - 1)
    padded = np.pad(mask, thinnest, mode="edge")
    eroded = np.ones_like(padded)
    opened = np.zeros_like(padded)
    offsets = np.argwhere(disc) - (thinnest - 1)
    for dy, dx in offsets:
        eroded &= np.roll(padded, (dy, dx), (0, 1))
    for dy, dx in offsets:
        opened |= np.roll(eroded, (dy, dx), (0, 1))
    kept = (opened[thinnest:-thinnest, thinnest:-thinnest] & mask).sum() / mask.sum()
    assert kept > 0.97


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"kind": "dots"}, "kind: expected one of"),
        ({"hole_class": 6}, "hole_class: expected None or 0 to 5, got 6"),
        ({"seed": (1, -2)}, "seed: expected non-negative"),
        ({"height": 0}, "height, width: expected positive"),
    ],
)
def test_wrong_arguments(changes, text):
    with pytest.raises(ValueError, match=text):
        generate_mask(**{"height": 32, "width": 32, "hole_class": 1, "kind": "boxes", "seed": 0, **changes})


@pytest.mark.parametrize("seed", [1.5, None, (1, 2.5), "12", (None,)])
def test_seeds_that_are_no_integers(seed):
    with pytest.raises(TypeError, match="seed: expected a non-negative integer or several, got "):
        generate_mask(32, 32, hole_class=1, kind="boxes", seed=seed)


def test_classes_are_closed_above():
    mask = np.zeros((10, 10), dtype=bool)
    found = []
    for count in (0, 1, 2, 10, 11, 20, 50, 60, 61):
        mask.flat[:count] = True
        found.append(hole_class(mask))
    assert found == [None, None, 0, 0, 1, 1, 4, 5, None]


def test_a_hole_reaches_the_border_at_any_side():
    inner = np.zeros((5, 7), bool)
    inner[1:-1, 1:-1] = True
    assert not masks.reaches_border(inner)
    for row, column in ((0, 3), (4, 3), (2, 0), (2, 6)):
        one = np.zeros((5, 7), bool)
        one[row, column] = True
        assert masks.reaches_border(one)


# -- the suite's kinds ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(256, 256), (100, 300), (64, 64), (16, 16)])
def test_suite_kinds_keep_their_shares(size):
    pixels = size[0] * size[1]
    for seed in range(10):
        thin, thick, box, blob = (masks.suite_mask(*size, kind=kind, seed=(seed, 7)) for kind in masks.SUITE_KINDS)
        assert 0.1 < hole_ratio(thin) <= 0.2
        assert 0.2 < hole_ratio(thick) <= 0.3
        rows, columns = np.flatnonzero(box.any(axis=1)), np.flatnonzero(box.any(axis=0))
        side = min(size) // 4
        assert len(rows) == len(columns) == side
        assert box.sum() == side**2
        assert not masks.reaches_border(box)
        assert blob.sum() == round(0.15 * pixels)
        assert _is_connected(blob)


def _is_connected(hole: np.ndarray) -> bool:
    """Whether steps up, down, left and right within the hole lead from one pixel to all others."""
    reached = np.zeros_like(hole)
    reached.flat[np.flatnonzero(hole)[0]] = True
    while True:
        wider = np.pad(reached, 1)
        wider = wider[1:-1, 1:-1] | wider[:-2, 1:-1] | wider[2:, 1:-1] | wider[1:-1, :-2] | wider[1:-1, 2:]
        wider &= hole
        if (wider == reached).all():
            return bool((reached == hole).all())
        reached = wider


def test_suite_strokes_are_thin_and_thick():
    """The largest square inside the strokes of one brush lies between the bounds of the brush."""
    for kind, low, high in (("thin", 2, 9), ("thick", 12, 31)):
        for seed in range(5):
            hole = masks.suite_mask(256, 256, kind=kind, seed=seed)
            crossing = 3  # where strokes cross, a square is wider than any of them
            for side in (low, crossing * high):
                windows = np.lib.stride_tricks.sliding_window_view(hole, (side, side)).all(axis=(2, 3))
                assert windows.any() == (side == low)


def test_suite_masks_are_the_same_on_every_platform():
    digest = hashlib.sha256()
    for kind in masks.SUITE_KINDS:
        mask = masks.suite_mask(256, 192, kind=kind, seed=(0, 3))
        assert np.array_equal(mask, masks.suite_mask(256, 192, kind=kind, seed=[0, 3]))
        assert not np.array_equal(mask, masks.suite_mask(256, 192, kind=kind, seed=[0, 4]))
        digest.update(np.packbits(mask).tobytes())
    # As above: a change makes earlier tables incomparable.
    assert digest.hexdigest()[:16] == "30bf818cd1aecd37"


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"kind": "strokes"}, "kind: expected one of"),
        ({"height": 15}, "height, width: expected at least 16 each, got 15x32"),
        ({"seed": -1}, "seed: expected non-negative"),
    ],
)
def test_wrong_arguments_of_suite_masks(changes, text):
    with pytest.raises(ValueError, match=text):
        masks.suite_mask(**{"height": 32, "width": 32, "kind": "box", "seed": 0, **changes})


@pytest.mark.parametrize(
    ("draw", "expected"), [(masks.varied_mask, "773db4e577a0dd6a"), (masks.fine_mask, "9bfae1e9ca1a694a")]
)
def test_masks_of_training_are_the_same_on_every_platform(draw, expected):
    """A change makes a run that is resumed another one."""
    digest = hashlib.sha256()
    for seed in range(40):  # every kind is among them
        digest.update(np.packbits(draw(96, 128, seed=(5, seed))).tobytes())
    assert digest.hexdigest()[:16] == expected


@pytest.mark.parametrize("draw", [masks.varied_mask, masks.fine_mask])
def test_masks_of_training_have_a_least_size(draw):
    assert draw(24, 30, seed=0).shape == (24, 30)
    for seed in range(20):
        draw(24, 24, seed=seed)
        with pytest.raises(ValueError, match="height, width: expected at least 24 each, got 100x23"):
            draw(100, 23, seed=seed)


# -- folders ----------------------------------------------------------------------------------------------------


def write_masks(folder, ratios, mode="L"):
    folder.mkdir(parents=True, exist_ok=True)
    for i, ratio in enumerate(ratios):
        mask = np.zeros((20, 20), dtype=np.uint8)
        mask.flat[: round(ratio * 400)] = 255
        Image.fromarray(mask).convert(mode).save(folder / f"{i}.png")
    return folder


@pytest.mark.parametrize("mode", ["L", "RGB", "1"])
def test_folder_by_number_polarity_and_measured_class(tmp_path, mode):
    ratios = [0.05, 0.15, 0.25, 0.35, 0.45, 0.55, 0.95, 0.06, 0.16, 0.26, 0.36]
    folder = MaskFolder(write_masks(tmp_path / "m", ratios, mode))
    assert [f.stem for f in folder.files] == [str(i) for i in range(11)]  # 2 before 10
    assert folder.ratios() == pytest.approx(ratios)
    assert folder.indices(0) == [0, 7]
    assert folder.indices(3) == [3, 10]
    assert folder.indices(None) == [6]
    inverted = MaskFolder(tmp_path / "m", polarity="black")
    assert np.array_equal(inverted[1], ~folder[1])
    assert inverted.indices(0) == [6]


def test_resizing_is_nearest_neighbour(tmp_path):
    folder = MaskFolder(write_masks(tmp_path / "m", [0.5725]))
    assert np.array_equal(folder.mask(0, 40, 40), np.kron(folder[0], np.ones((2, 2), dtype=bool)))
    assert np.array_equal(folder.mask(0, 10, 10), folder[0][1::2, 1::2])


def test_liu_layout(tmp_path, monkeypatch):
    monkeypatch.setattr(mask_files, "_LIU_COUNT", 12)
    monkeypatch.setattr(mask_files, "_LIU_PER_CLASS", 2)
    folder = write_masks(tmp_path / "m", [0.05] * 12)
    inner = np.zeros((20, 20), dtype=np.uint8)
    inner[5:9, 5:10] = 255
    Image.fromarray(inner).save(folder / "3.png")
    masks_ = MaskFolder(folder)
    assert masks_.is_liu
    assert masks_.liu_group(2) == (1, True)
    assert masks_.liu_group(3) == (1, False)
    (folder / "11.png").unlink()
    with pytest.raises(ValueError, match="got 11 files"):
        MaskFolder(folder).liu_group(0)


def test_qd_imd_layout_is_searched_with_its_folders(tmp_path):
    write_masks(tmp_path / "m" / "train", [0.1, 0.2])
    write_masks(tmp_path / "m" / "test", [0.3, 0.4])
    (tmp_path / "m" / "train" / "0.png").rename(tmp_path / "m" / "train" / "2_0.png")  # the last number counts
    folder = MaskFolder(tmp_path / "m")
    assert [f.relative_to(tmp_path / "m").as_posix() for f in folder.files] == [
        "test/0.png",
        "test/1.png",
        "train/2_0.png",
        "train/1.png",
    ]


def test_missing_empty_and_broken(tmp_path):
    with pytest.raises(DataError, match="which is not a folder"):
        MaskFolder(tmp_path / "none")
    with pytest.raises(DataError, match="which has none"):
        MaskFolder(tmp_path)
    with pytest.raises(ValueError, match="polarity: expected one of"):
        MaskFolder(tmp_path, polarity="grey")
    (tmp_path / "0.png").write_bytes(b"no picture")
    with pytest.raises(InvalidMaskError, match="0.png"):
        MaskFolder(tmp_path)[0]


@pytest.mark.parametrize("mode", ["L", "P", "RGB", "RGBA", "LA", "1", "I;16", "I", "0/1"])
def test_masks_of_every_mode(tmp_path, mode):
    """White in every mode; in layers white strokes on transparent white; levels 0 and 1 are bool."""
    hole = np.zeros((20, 30), dtype=bool)
    hole[3:9, 5:17] = True
    levels = np.where(hole, 255, 0).astype(np.uint8)
    if mode in ("RGBA", "LA"):
        white = Image.new(mode[:-1], (30, 20), "white")
        white.putalpha(Image.fromarray(levels))
        picture = white
    elif mode == "0/1":
        picture = Image.fromarray(hole.astype(np.uint8))
    elif mode == "I;16":
        picture = Image.fromarray(levels.astype(np.uint16) * 257)
    elif mode == "I":
        picture = Image.fromarray(levels.astype(np.int32) * 257)
    else:
        picture = Image.fromarray(levels).convert(mode)
    picture.save(tmp_path / ("0.tif" if mode == "I" else "0.png"))
    for polarity, expected in (("white", hole), ("black", ~hole)):
        assert np.array_equal(MaskFolder(tmp_path, polarity=polarity)[0], expected)


def test_masks_of_pictures_are_turned_upright():
    hole = np.zeros((20, 30), dtype=np.uint8)
    hole[3:9, 5:17] = 255
    stored, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # stored turned by a quarter
    Image.fromarray(np.rot90(hole)).save(stored, "PNG", exif=exif)
    assert np.array_equal(masks.hole_levels(Image.open(stored)), hole > 0)


# -- docs/masks.md ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["JPEG", "WEBP"])
def test_brushes_on_black_in_lossy_files(format):
    """With full chroma and high quality the hole is exact; halved chroma makes it at most 2 pixels wider."""
    hole = masks.suite_mask(256, 256, kind="thick", seed=3)
    near = ndimage.distance_transform_edt(~hole) <= 2
    for colour in ("red", "lime", "blue", "magenta", "yellow"):
        brush = Image.composite(
            Image.new("RGB", (256, 256), colour), Image.new("RGB", (256, 256)), Image.fromarray(hole)
        )
        halved, full = io.BytesIO(), io.BytesIO()
        brush.save(full, format, **({"quality": 95, "subsampling": 0} if format == "JPEG" else {"lossless": True}))
        assert np.array_equal(read_hole(full.getvalue(), 256, 256), hole)
        brush.save(halved, format, quality=90)
        wider = read_hole(halved.getvalue(), 256, 256)
        assert wider[hole].all()
        assert not wider[~near].any()
        assert np.array_equal(read_hole(halved.getvalue(), 256, 256, channel="colour"), wider)
