"""Where training data comes from: folders, categories, lists, tar shards, Hugging Face datasets; what is left out."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lgnet_fast.data.folders import pictures_in
from lgnet_fast.training import ConfigError, DataError
from lgnet_fast.training.config import DataConfig
from lgnet_fast.training.held_out import HeldOut
from lgnet_fast.training.samples import InpaintingDataset
from lgnet_fast.training.sources import open_source
from tests.training_support import dataset, write_pictures


def test_categories_and_exclusion(tmp_path):
    for name in ("abbey", "beach", "bridge"):
        write_pictures(tmp_path / "p" / name[0] / name, 2)
    (tmp_path / "list.txt").write_text("/b/beach\n/b/bridge\n")
    assert len(dataset(tmp_path / "p")) == 6
    data = dataset(tmp_path / "p", categories=("abbey",))
    assert {data[i].name for i in range(2)} == {str(tmp_path / "p" / "a" / "abbey" / f"{i}.png") for i in range(2)}
    assert len(dataset(tmp_path / "p", categories=(str(tmp_path / "list.txt"),))) == 4
    data = dataset(tmp_path / "p", categories=("beach",), exclude=("0",))
    assert [Path(data[i].name).as_posix()[-11:] for i in range(2)] == ["beach/1.png"] * 2
    with pytest.raises(DataError, match=r"data.categories: no pictures in .* for castle"):
        dataset(tmp_path / "p", categories=("abbey", "castle"))
    with pytest.raises(DataError, match="data.exclude: no picture of the name 7"):
        dataset(tmp_path / "p", exclude=("7",))
    with pytest.raises(DataError, match="data.exclude: expected names of some of the 6 pictures, got all of them"):
        dataset(tmp_path / "p", exclude=("0", "1"))
    with pytest.raises(ConfigError, match=r"data.categories: expected a text file of names, got '.*missing.txt'"):
        dataset(tmp_path / "p", categories=(str(tmp_path / "missing.txt"),))


def test_categories_are_looked_for_in_all_places_together(tmp_path):
    for name in ("abbey", "beach"):
        write_pictures(tmp_path / name[0] / name, 2)
    places = (tmp_path / "a", tmp_path / "b")
    assert len(dataset(*places, categories=("abbey", "beach"))) == 4
    assert len(dataset(*places, categories=("beach",))) == 2
    with pytest.raises(DataError, match=r"data.categories: no pictures in .*a, .*b for castle"):
        dataset(*places, categories=("abbey", "castle"))
    (tmp_path / "c").mkdir()
    with tarfile.open(tmp_path / "c" / "0.tar", "w") as tar:
        add(tar, "0.png", np.zeros((9, 9), dtype=np.uint8))
    for place in (tmp_path / "c" / "0.tar", tmp_path / "c"):  # a shard, and a folder of shards
        with pytest.raises(DataError, match=r"data.categories: expected folders of pictures to choose from, got '"):
            dataset(place, categories=("abbey",))


def test_categories_of_places365(tmp_path):
    """Several of its categories end in the same folder's name; its list has the number of each class."""
    for name in ("a/abbey", "c/cabin/outdoor", "c/church/outdoor", "c/church/indoor", "h/highway 61"):
        write_pictures(tmp_path / "p" / name, 1)
    (tmp_path / "list.txt").write_text("/a/abbey 1\n/c/church/outdoor 91\n\nhighway 61\n")

    def chosen(place, *categories):
        source = open_source([str(place)], "data.pictures", categories)
        return [Path(source.name(i)).parent.relative_to(tmp_path / "p").as_posix() for i in range(len(source))]

    assert chosen(tmp_path / "p", str(tmp_path / "list.txt")) == ["a/abbey", "c/church/outdoor", "h/highway 61"]
    assert chosen(tmp_path / "p" / "c", "church/outdoor", "/c/cabin/") == ["c/cabin/outdoor", "c/church/outdoor"]
    assert chosen(tmp_path / "p", "outdoor") == ["c/cabin/outdoor", "c/church/outdoor"]
    with pytest.raises(DataError, match="data.categories: no pictures in .*p for abbey/outdoor, door"):
        chosen(tmp_path / "p", "abbey/outdoor", "door", "outdoor")


@pytest.mark.parametrize("content", ["", "\n\n", "\udcff"])
def test_lists_of_categories_without_names(tmp_path, content):
    write_pictures(tmp_path / "p", 1)
    (tmp_path / "list.txt").write_text(content, "utf-8", "surrogateescape")
    text = r"expected a text file of names, got '.*list.txt' \(.*utf-8" if content > "z" else "got none in"
    with pytest.raises(ConfigError, match=f"data.categories: .*{text}"):
        dataset(tmp_path / "p", categories=(str(tmp_path / "list.txt"),))


def test_hidden_pictures_are_left_out_and_links_followed(tmp_path):
    """As `lgnet-fast run` does; in trees with folders that link to one above them, too."""
    write_pictures(tmp_path / "p", 2)
    write_pictures(tmp_path / "p" / ".thumbnails", 1)
    (tmp_path / "p" / ".2.png").write_bytes((tmp_path / "p" / "1.png").read_bytes())
    write_pictures(tmp_path / "elsewhere", 1)
    (tmp_path / "p" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "p" / "again").symlink_to(tmp_path / "p")
    expected = [tmp_path / "p" / name for name in ("0.png", "1.png", "more/0.png")]
    source = open_source([str(tmp_path / "p")], "data.pictures")
    assert [source.name(i) for i in range(len(source))] == [str(path) for path in expected]
    masks = dataset(tmp_path / "p", masks=str(tmp_path / "p")).masks.folder
    assert sorted(masks.files) == expected
    assert pictures_in(tmp_path, [tmp_path / "elsewhere"]) == expected[:2]  # through no link either


def test_files_that_are_left_out_are_told_of(tmp_path):
    write_pictures(tmp_path / "p", 1)
    for name in ("a.psd", "b.psd", "notes.txt"):
        (tmp_path / "p" / name).write_bytes(b"")
    with pytest.warns(UserWarning, match=r"^2 left out of '.*p', the first: .*a.psd: .* \.psd are not read"):
        assert len(dataset(tmp_path / "p")) == 1
    (tmp_path / "p" / "0.png").unlink()
    with pytest.raises(DataError, match=r"data.pictures: .*, which has none \(.*a.psd: pictures of the format"):
        dataset(tmp_path / "p")


def add(tar, name, array):
    data = io.BytesIO()
    Image.fromarray(array).save(data, "PNG")
    info = tarfile.TarInfo(name)
    info.size = len(data.getvalue())
    tar.addfile(info, io.BytesIO(data.getvalue()))


def test_tar_shards_with_their_own_masks(tmp_path):
    picture = np.full((300, 256, 3), 128, dtype=np.uint8)
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            for i in range(2):
                marked, mask = picture.copy(), np.zeros((300, 256), dtype=np.uint8)
                mask[100 + 40 * i : 160, 50:90] = 255
                marked[mask > 0] = 255
                add(tar, f"{shard}{i}.png", marked)
                add(tar, f"{shard}{i}.mask.png", mask)
    data = dataset(tmp_path, masks="paired", protocol="logo_removal")
    assert len(data) == 4
    assert len(dataset(tmp_path / "1.tar")) == 2
    for sample in (data[i] for i in range(8)):
        # The mask went through the same crop and mirroring as its picture.
        assert torch.equal(sample.mask[0] == 1, sample.image[0] == 1)
        assert sample.mask.sum().item() in (60 * 40, 20 * 40)
    with tarfile.open(tmp_path / "1.tar", "w") as tar:
        add(tar, "a.png", picture)
    text = r"data.masks: expected <key>.mask.* got none for 1 of 3 pictures, the first .*1.tar/a.png"
    with pytest.raises(DataError, match=text):  # at once, not when a run comes to it
        dataset(tmp_path, masks="paired")
    (tmp_path / "1.tar").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"data.pictures: expected an uncompressed tar file, got '.*1.tar'"):
        dataset(tmp_path / "1.tar")


def test_a_folder_of_pictures_and_shards_is_an_error(tmp_path):
    """Neither is silently left out, nor are the pictures of an archive and its extracted files used twice."""
    write_pictures(tmp_path / "p" / "extracted", 2)
    with tarfile.open(tmp_path / "p" / "a.TAR", "w") as tar:
        add(tar, "0.png", np.zeros((9, 9), dtype=np.uint8))
    text = r"data.pictures: .* with both: 2 pictures \('.*0.png', ...\) and 1 shards \('.*a.TAR', ...\); name"
    with pytest.raises(DataError, match=text):
        dataset(tmp_path / "p")
    assert len(dataset(tmp_path / "p" / "a.TAR", tmp_path / "p" / "extracted")) == 3
    (tmp_path / "shards" / "below").mkdir(parents=True)
    (tmp_path / "p" / "a.TAR").replace(tmp_path / "shards" / "below" / "b.tar")
    assert len(dataset(tmp_path / "shards")) == 1


@pytest.mark.parametrize(
    ("prepare", "text"),
    [
        (lambda place: None, "data.validation: expected folders .*, got '.*held', which is not a folder"),
        (lambda place: place.mkdir(), "data.validation: expected folders .*, got '.*held', which has none"),
        (
            lambda place: write_pictures(place, 1),
            "data.validation: none of 1 pictures in '.*held' can be read; the first: .*0.png",
        ),
    ],
)
def test_errors_of_the_validation_name_its_setting(tmp_path, prepare, text):
    prepare(tmp_path / "held")
    for file in (tmp_path / "held").glob("*.png"):
        file.write_bytes(b"no picture")
    with pytest.raises(DataError, match=f"^{text}"):
        HeldOut(str(tmp_path / "held"), 256, "photos", None)


def test_a_broken_picture_of_the_validation_is_told_of(tmp_path):
    write_pictures(tmp_path / "p", 2)
    (tmp_path / "p" / "0.png").write_bytes(b"no picture")
    with pytest.warns(UserWarning, match="data.validation: left out .*0.png: no picture"):
        assert len(HeldOut(str(tmp_path / "p"), 256, "photos", None)) == 1


def test_truncated_and_damaged_shards_are_errors(tmp_path):
    """Cut anywhere before its end: at a file, in a header, in a picture."""
    with tarfile.open(tmp_path / "whole.tar", "w") as tar:
        for i in range(3):
            add(tar, f"{i}.png", np.full((64, 64), i, dtype=np.uint8))
        end = tar.offset
    whole = (tmp_path / "whole.tar").read_bytes()
    assert len(dataset(tmp_path / "whole.tar")) == 3
    size = end // 3
    for length in range(100, end + 512, 100):
        (tmp_path / "cut.tar").write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"data.pictures: expected an uncompressed tar file, got '.*cut.tar' \("):
            dataset(tmp_path / "cut.tar")
    for length in (size, 2 * size, end):
        (tmp_path / "cut.tar").write_bytes(whole[:length])
        with pytest.raises(DataError, match=rf"\(truncated at byte {length}\)"):
            dataset(tmp_path / "cut.tar")
    (tmp_path / "cut.tar").write_bytes(whole[: 2 * size] + b"x" * 512 + whole[2 * size + 512 :])
    with pytest.raises(DataError, match=rf"\(damaged at byte {2 * size}\)"):
        dataset(tmp_path / "cut.tar")
    (tmp_path / "cut.tar").write_bytes(whole[: end + 512])  # one block of zeros marks the end
    assert len(dataset(tmp_path / "cut.tar")) == 3


def test_names_in_shards(tmp_path):
    names = [
        "./a.png",
        "b/../c.png",
        "/d.png",
        "../e.png",
        "line\nfeed.png",
        "bad\udcff.png",
        "F.PNG",
        60 * "long" + ".png",
    ]
    hidden = [".a.png", ".git/b.png", "x/.y/c.png", "__MACOSX/._d.png", ".png"]
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in [*names, *hidden, "note.txt", "noext"]:
            add(tar, name, np.zeros((9, 9), dtype=np.uint8))
    source = open_source([str(tmp_path / "a.tar")], "data.pictures")
    assert [source.name(i) for i in range(len(source))] == [f"{tmp_path / 'a.tar'}/{name}" for name in names]
    assert {source.picture(i).size for i in range(len(source))} == {(9, 9)}


def test_pictures_that_are_left_out_of_shards_are_told_of(tmp_path):
    shard = tmp_path / "a.tar"
    with tarfile.open(shard, "w") as tar:
        for name in ("taken 10.30.png", "raw.cr2"):
            add(tar, name, np.zeros((9, 9), dtype=np.uint8))
    with pytest.raises(DataError, match=r"got none in .*a.tar'\] \(.*raw.cr2: pictures of the format .cr2 are not"):
        open_source([str(shard)], "data.pictures")
    with tarfile.open(shard, "a") as tar:
        for name in ("b.png", "b.depth.png"):
            add(tar, name, np.zeros((9, 9), dtype=np.uint8))
    with pytest.warns(UserWarning, match=r"^2 left out of '.*a.tar', the first: .*raw.cr2: pictures of the format"):
        assert len(open_source([str(shard)], "data.pictures")) == 1


def test_files_that_a_tar_stores_once_under_several_names(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "a.png", np.full((9, 9), 7, dtype=np.uint8))
        link = tarfile.TarInfo("b.png")
        link.type, link.linkname = tarfile.LNKTYPE, "a.png"
        tar.addfile(link)
        link.name, link.linkname = "c.png", "missing.png"
        tar.addfile(link)
    source = open_source([str(tmp_path / "a.tar")], "data.pictures")
    assert [source.name(i)[-5:] for i in range(len(source))] == ["a.png", "b.png"]
    assert np.asarray(source.picture(1)).tolist() == np.asarray(source.picture(0)).tolist()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_pipes_in_a_folder_are_left_out(tmp_path):
    """Reading one waits for a writer."""
    write_pictures(tmp_path / "p", 1)
    os.mkfifo(tmp_path / "p" / "1.png")
    with pytest.warns(UserWarning, match=r"^1 left out of '.*p', the first: .*1.png: a pipe or a device"):
        assert len(dataset(tmp_path / "p")) == 1


def test_hugging_face_dataset(tmp_path):
    datasets = pytest.importorskip("datasets")
    folder = write_pictures(tmp_path / "p", 3, (256, 256))
    files = [str(folder / f"{i}.png") for i in range(3)]
    rows = datasets.Dataset.from_dict({"photo": files, "number": [0, 1, 2]}).cast_column("photo", datasets.Image())
    datasets.DatasetDict({"train": rows}).save_to_disk(str(tmp_path / "hf"))
    data = dataset(f"hf:{tmp_path / 'hf'}:train:photo", protocol="places2")
    assert len(data) == 3
    sample = data[0]
    index = int(sample.name[-2])
    expected = np.asarray(Image.open(files[index])).transpose(2, 0, 1)
    shown = ((sample.image + 1) * 127.5).round().byte().numpy()
    assert np.array_equal(shown, expected) or np.array_equal(shown[..., ::-1], expected)
    for rest, text in (
        (":test", "data.validation: expected 'hf:.*:test' to name a split of train"),
        ("", "data.validation: expected 'hf:.*' to name a column of photo, number"),
        (":train:number", "data.validation: the pictures of 'hf:.*' could not be loaded"),
        (":train:photo:more", r"data.validation: expected hf:NAME\[:SPLIT\[:COLUMN\]\], got 'hf:.*more'"),
        ("::photo", r"data.validation: expected hf:NAME\[:SPLIT\[:COLUMN\]\], got 'hf:.*'"),
        ("/missing", "data.validation: the pictures of 'hf:.*missing' could not be loaded"),
    ):
        with pytest.raises(DataError, match=text):
            open_source([f"hf:{tmp_path / 'hf'}{rest}"], "data.validation")


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({}, DataError, "data.pictures: expected folders .*, got none"),
        ({"pictures": ("nowhere",)}, DataError, "data.pictures: expected folders .*, got 'nowhere', which is not a"),
        ({"pictures": ("EMPTY",)}, DataError, "which has none"),
        ({"pictures": ("SOME",), "masks": "nowhere"}, DataError, "^data.masks: expected a folder of mask pictures"),
        ({"pictures": ("SOME",), "masks": "EMPTY"}, DataError, "^data.masks: expected a folder of mask pictures"),
    ],
)
def test_nothing_to_train_on(tmp_path, options, error, text):
    places = {"EMPTY": tmp_path / "empty", "SOME": write_pictures(tmp_path / "some", 1)}
    places["EMPTY"].mkdir()

    def place(value):
        return str(places.get(value, value))

    options = {
        key: tuple(map(place, value)) if isinstance(value, tuple) else place(value) for key, value in options.items()
    }
    with pytest.raises(error, match=text):
        InpaintingDataset(DataConfig(**options), 0)
