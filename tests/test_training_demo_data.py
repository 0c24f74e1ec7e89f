"""Shards and weights of `make demo-data`."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from lgnet_fast.data.shards import read_shard
from lgnet_fast.errors import DataError, WeightsError
from lgnet_fast.reference.features import LPIPS
from lgnet_fast.reference.vgg import VGG16Features
from lgnet_fast.training.demo_data import encode, main, shards_of, write_weights
from lgnet_fast.training.demo_data import write_pictures as write_demo_pictures
from lgnet_fast.training.sources import open_source
from tests.test_features import weights
from tests.training_support import write_pictures


def test_pictures_are_scaled_and_cut_and_never_enlarged(tmp_path):
    for size, expected in (((400, 200), (150, 100)), ((200, 220), (100, 110)), ((60, 50), (60, 50))):
        write_pictures(tmp_path / "p", 1, size)
        picture = Image.open(io.BytesIO(encode(tmp_path / "p" / "0.png", 100, 80)))
        assert picture.format == "WEBP"
        assert picture.size == expected
    column = np.zeros((50, 200, 3), np.uint8)
    column[:, 100:] = 255
    Image.fromarray(column).save(tmp_path / "half.png")
    middle = np.asarray(Image.open(io.BytesIO(encode(tmp_path / "half.png", 50, 95))))
    assert middle.shape == (50, 75, 3)
    assert middle[:, :36].mean() < 5
    assert middle[:, 39:].mean() > 250


def test_shards_stay_below_their_limit(tmp_path):
    content = bytes(range(256)) * 40
    files = [(f"{i}.webp", content) for i in range(20)]
    shards = list(shards_of(files, 100_000))
    assert len(shards) == 3
    assert max(map(len, shards)) <= 100_000
    found = []
    for number, shard in enumerate(shards):
        (tmp_path / f"{number}.tar").write_bytes(shard)
        found += [
            (one.pictures[0].name, one.pictures[0].read().data)
            for one in read_shard(tmp_path / f"{number}.tar").samples
        ]
    assert found == files
    assert len(list(shards_of(files, 5_000))) == 20  # less than one file


def test_shards_of_an_earlier_call_are_replaced(tmp_path):
    """Another training shard would be trained on, too, and a held-out picture with it."""
    pictures, out = write_pictures(tmp_path / "p", 6, (90, 70)), tmp_path / "out"
    options = {"edge": 64, "quality": 70, "largest": 1}
    assert len(write_demo_pictures(pictures, out, held_out=2, **options)) == 5
    (out / "train-notes.tar").write_bytes(b"of the user")
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    (pictures / "5.png").rename(tmp_path / "5.png")
    (pictures / "3.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"pictures: '.*3\.png' cannot be read"):
        write_demo_pictures(pictures, out, held_out=0, **options)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    (pictures / "3.png").unlink()
    (pictures / "4.png").unlink()
    write_demo_pictures(pictures, out, held_out=0, **options)
    assert sorted(file.name for file in out.iterdir()) == [*(f"train-00{i}.tar" for i in range(3)), "train-notes.tar"]


@pytest.mark.parametrize(
    ("option", "text"),
    [
        (["--edge", "0"], "--edge: expected 1 or more, at most 10922, got 0"),
        (["--edge", "20000"], "--edge: expected 1 or more, at most 10922, got 20000"),
        (["--quality", "101"], "--quality: expected 0 or more, at most 100, got 101"),
        (["--held-out", "-1"], "--held-out: expected 0 or more, got -1"),
        (["--shard-mb", "nan"], "--shard-mb: expected 0 or more, got nan"),
    ],
)
def test_wrong_options(tmp_path, capsys, option, text):
    with pytest.raises(SystemExit):
        main([str(tmp_path), "-o", str(tmp_path / "out"), *option])
    assert text in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_command(tmp_path, capsys):
    write_pictures(tmp_path / "p", 6, (90, 70))
    np.savez(tmp_path / "vgg.npz", **{k: v for k, v in weights("vgg16", 8).items()})
    np.savez(tmp_path / "alex.npz", **weights("alexnet"))
    files = ["--vgg", str(tmp_path / "vgg.npz"), "--lpips", str(tmp_path / "alex.npz")]
    main([str(tmp_path / "p"), "-o", str(tmp_path / "out"), "--edge", "64", "--held-out", "2", *files])
    assert len(open_source([str(tmp_path / "out" / "train-000.tar")], "data.pictures")) == 4
    held_out = open_source([str(tmp_path / "out" / "held_out.tar")], "data.pictures")
    assert held_out.picture(1).size == (82, 64)
    names = {
        open_source([str(tmp_path / "out" / f)], "data.pictures").name(i)[-11:]
        for f, n in (("train-000.tar", 4), ("held_out.tar", 2))
        for i in range(n)
    }
    assert names == {f"{i:06d}.webp" for i in range(6)}
    assert VGG16Features.from_file(tmp_path / "out" / "vgg16_pool3.npz")[14].weight.shape == (256, 256, 3, 3)
    assert LPIPS.from_file(tmp_path / "out" / "alexnet_lpips.npz").features.network == "alexnet"
    assert capsys.readouterr().out.count(" MB") == 4


def test_what_cannot_be_made(tmp_path, capsys):
    write_pictures(tmp_path / "p", 2)
    with pytest.raises(SystemExit):
        main([str(tmp_path / "p"), "-o", str(tmp_path / "out"), "--held-out", "2"])
    assert "error: pictures: expected more than the 2 held out" in capsys.readouterr().err
    (tmp_path / "p" / "1.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"pictures: '.*1\.png' cannot be read"):
        encode(tmp_path / "p" / "1.png", 64, 70)
    np.savez(tmp_path / "vgg.npz", **weights("vgg16", 3))
    with pytest.raises(WeightsError, match="expected VGG-16's convolutions .* missing w3"):
        write_weights(tmp_path / "vgg.npz", None, tmp_path)
