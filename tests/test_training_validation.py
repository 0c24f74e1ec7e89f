"""Scores of held-out pictures during training."""

from __future__ import annotations

import math
import pickle
import shutil
import tarfile
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from lgnet_fast import LGNet
from lgnet_fast.evaluation.suite import SuiteMetrics, _psnr, summary
from lgnet_fast.training import Trainer
from lgnet_fast.training.validation import gradient_energy, make_validation
from tests.test_features import weights
from tests.training_support import (
    lines,
    lively_model,
    own_threads,  # noqa: F401
    tiny_config,
    write_pictures,
)


@pytest.fixture
def pictures(tmp_path):
    return write_pictures(tmp_path / "pictures")


def test_pictures_in_memory_and_scores_by_kind_of_hole(pictures, tmp_path):
    held_out = write_pictures(tmp_path / "held_out", 2, (256, 256))
    np.savez(tmp_path / "alexnet.npz", **weights("alexnet"))
    run = tmp_path / "run"
    config = tiny_config(
        pictures,
        run,
        data={"in_memory": True, "mask_bank": 2, "mask_kind": "varied", "validation": str(held_out)},
        loss={"lpips_weights": str(tmp_path / "alexnet.npz"), "lpips": 1.0},
        optim={"steps": 2},
        run={"validation_kinds": ["thin", "box"], "validation_pictures": 1, "metric": "lpips", "finite_every": 2},
    )
    trainer = Trainer(config)
    trainer.fit()
    train, scores = lines(run)[-2:]
    assert train["lpips3"] > 0
    assert {"l1", "psnr", "lpips", "sharpness", "psnr_thin", "lpips_box"} <= scores.keys()
    assert scores["psnr"] == pytest.approx((scores["psnr_thin"] + scores["psnr_box"]) / 2)
    assert trainer.best == pytest.approx(scores["lpips"])
    assert len(trainer.validation.pictures) == 1
    image, mask = trainer.validation.pictures.images(slice(None)), trainer.validation.masks["box"].float()
    truth = ((image + 1) * 127.5).round()
    with trainer.averaged(), torch.no_grad():
        error = ((trainer.network(image, mask) + 1) * 127.5).round().clamp(0, 255) - truth
    expected = 10 * math.log10(255**2 / float(error.square().mean()))
    assert scores["psnr_box"] == pytest.approx(expected, abs=1e-3)


def test_scores_by_kind_in_float64(pictures, tmp_path):
    np.savez(tmp_path / "alexnet.npz", **weights("alexnet"))
    config = tiny_config(
        pictures,
        tmp_path / "run",
        data={"validation": str(pictures)},
        loss={"lpips_weights": str(tmp_path / "alexnet.npz")},
        optim={"steps": 1, "dtype": "float64"},
        run={"validation_kinds": ["box"], "validation_pictures": 1},
    )
    Trainer(config).fit()
    assert {"psnr_box", "lpips_box"} <= lines(tmp_path / "run")[-1].keys()


@pytest.mark.parametrize("kinds", [(), ("thin", "box")])
def test_held_out_pictures_take_a_byte_a_sample(tmp_path, kinds):
    """Tens of thousands of them, as of Places2, are kept by every process."""
    places = write_pictures(tmp_path / "p", 40, (256, 256))
    options = {"validation_kinds": kinds} if kinds else {"validation_classes": (1, 2)}
    config = tiny_config(places, tmp_path, data={"validation": str(places)}, run=options)
    validation = make_validation(config)
    assert len(pickle.dumps(validation)) < (3.2 + len(kinds)) * 40 * 256**2
    assert validation.scores(Perfect(), None, ONE)["psnr"] > 77


def test_gradient_energy_by_hand():
    picture = torch.zeros(1, 3, 3, 3)
    picture[0, :, 1, 1] = 10  # grey 10
    mask = torch.ones(1, 1, 3, 3)
    assert float(gradient_energy(picture, mask)) == pytest.approx(400)
    mask[..., 0] = 0
    assert float(gradient_energy(picture, mask)) == pytest.approx(300)


class Perfect(torch.nn.Module):
    """The true pictures, plus `wrong` at every pixel."""

    def __init__(self, wrong=0.0):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.wrong = wrong

    def forward(self, image, mask):
        return image + self.wrong


ONE = SimpleNamespace(num_processes=1, process_index=0)


@pytest.mark.parametrize("kinds", [(), ("box",)])
def test_equal_pictures_have_the_suites_highest_psnr(pictures, tmp_path, kinds):
    """Not an infinite one, which would be the best for good."""
    run = {"validation_kinds": kinds, "validation_pictures": 2}
    validation = make_validation(tiny_config(pictures, tmp_path, data={"validation": str(pictures)}, run=run))
    scores = validation.scores(Perfect(), None, ONE)
    assert scores["psnr"] == pytest.approx(10 * math.log10(255**2 / 1e-3))
    assert scores["psnr"] == pytest.approx(_psnr(np.zeros((4, 4, 3))))
    assert scores["l1"] == 0


@pytest.mark.parametrize("kinds", [(), ("box",)])
def test_pictures_that_are_not_a_number_have_no_score(pictures, tmp_path, kinds):
    """In 8 bits they would be black."""
    run = {"validation_kinds": kinds, "validation_pictures": 2}
    validation = make_validation(tiny_config(pictures, tmp_path, data={"validation": str(pictures)}, run=run))
    scores = validation.scores(Perfect(math.nan), None, ONE)
    assert all(math.isnan(scores[name]) for name in ("l1", "psnr"))


def test_flat_pictures_that_are_filled_exactly_are_as_sharp_as_the_truth(tmp_path):
    """Not blurred: their gradients are 0, as the truth's."""
    (tmp_path / "p").mkdir()
    Image.new("RGB", (256, 256), (30, 90, 201)).save(tmp_path / "p" / "flat.png")
    run = {"validation_kinds": ["box"]}
    config = tiny_config(tmp_path / "p", tmp_path, data={"validation": str(tmp_path / "p")}, run=run)
    assert make_validation(config).scores(Perfect(), None, ONE)["sharpness"] == 1
    flat, hole = np.full((32, 32, 3), 90, np.uint8), np.zeros((32, 32), bool)
    hole[8:20, 8:20] = True
    own = SuiteMetrics(["l1", "psnr", "sharp"]).scores({"same": flat}, flat, hole)["same"]
    assert own["sharp"] == summary([own], ["sharp"])["sharp_all"] == 1


def test_sharpness_is_the_suites(pictures, tmp_path):
    """The median of an even number of pictures is the mean of the middle two; of all kinds, that of all pictures."""
    run = {"validation_kinds": ["thin", "box"], "validation_pictures": 2}
    validation = make_validation(tiny_config(pictures, tmp_path, data={"validation": str(pictures)}, run=run))

    class Blur(Perfect):
        def forward(self, image, mask):
            blurred = torch.nn.functional.avg_pool2d(image, 9, stride=1, padding=4, count_include_pad=False)
            return torch.where(mask > 0, blurred, image)

    blur = Blur()
    scores = validation.scores(blur, None, ONE)
    metrics = SuiteMetrics(["l1", "psnr", "sharp"])
    rows = {}
    for kind, masks in validation.masks.items():
        rows[kind] = []
        for image, mask in zip(validation.pictures.images(slice(None)), masks):
            filled, truth = (
                ((picture + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
                for picture in (blur(image[None], mask[None])[0], image)
            )
            rows[kind].append(metrics.scores({"blur": filled}, truth, mask[0].numpy() > 0)["blur"])
    for suffix, some in (("_thin", rows["thin"]), ("_box", rows["box"]), ("", rows["thin"] + rows["box"])):
        expected = summary(some, ["l1", "psnr", "sharp"])
        assert len({one["sharp"] for one in some}) == len(some)  # the two medians would differ
        assert scores[f"sharpness{suffix}"] == pytest.approx(expected["sharp"], rel=1e-5)
        assert scores[f"psnr{suffix}"] == pytest.approx(expected["psnr"], rel=1e-5)
        assert scores[f"l1{suffix}"] == pytest.approx(expected["l1"], rel=1e-5)


@pytest.mark.parametrize("kinds", [[], ["box"]])
def test_scores_are_those_of_the_exported_model_whatever_the_precision(pictures, tmp_path, kinds):
    """Autocast would change them, although the model is used without it."""
    config = tiny_config(
        pictures,
        tmp_path / "run",
        data={"validation": str(pictures)},
        optim={"precision": "bf16"},
        run={"validation_kinds": kinds, "validation_pictures": 2},
    )
    trainer = Trainer(config, lively_model())
    scores = trainer.validate()
    exported = LGNet.from_pretrained(trainer.export(tmp_path / "model")).eval().set_backend("eager")
    assert scores == trainer.validation.scores(exported, None, ONE)
    image = trainer.validation.pictures.images(slice(2)) if kinds else trainer.validation.pairs[0][0]
    mask = torch.ones_like(image[:, :1])
    with torch.no_grad():
        assert not torch.equal(trainer.network(image, mask), exported(image, mask))


@pytest.mark.parametrize("kinds", [(), ("thin", "box")])
def test_processes_share_the_pictures_and_get_the_same_scores(pictures, tmp_path, kinds):
    run = {"validation_kinds": kinds, "validation_pictures": 3}
    validation = make_validation(tiny_config(pictures, tmp_path, data={"validation": str(pictures)}, run=run))
    network = Perfect(wrong=0.1)
    expected = validation.scores(network, None, ONE)
    tables = []

    def process(index, reduce):
        def of_all(tensor, how):  # the scores, after a number that says that no process failed
            return reduce(tensor, how) if tensor.ndim else tensor

        return SimpleNamespace(num_processes=2, process_index=index, device=torch.device("cpu"), reduce=of_all)

    for index in range(2):
        validation.scores(network, None, process(index, lambda table, how: tables.append(table) or table))
    own = [table.abs().sum(dim=-1) > 0 for table in tables]
    assert not (own[0] & own[1]).any()
    assert own[0].any()
    assert own[1].any()
    for index in range(2):
        assert validation.scores(network, None, process(index, lambda table, how: tables[0] + tables[1])) == expected


@pytest.mark.parametrize("shard", [False, True])
def test_held_out_pictures_that_are_trained_on_are_told_of(tmp_path, shard):
    """Else their scores would be taken for those of unseen pictures."""
    write_pictures(tmp_path / "all" / "train", 3)
    held_out = write_pictures(tmp_path / "all" / "val", 2)
    if shard:
        for name in ("train", "val"):
            with tarfile.open(tmp_path / "all" / f"{name}.tar", "w") as tar:
                tar.add(tmp_path / "all" / name, name)
            shutil.rmtree(tmp_path / "all" / name)
        held_out = held_out.with_suffix(".tar")
    whole = str(tmp_path / "all")
    text = f"data.validation: 2 of the pictures in {str(held_out)!r} are trained on too, as part of {whole!r}"

    def told(place, **data):
        data |= {"pictures": [place], "validation": str(held_out)}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            Trainer(tiny_config(tmp_path, tmp_path / "run", data=data))
        return [str(one.message).partition(";")[0] for one in caught]

    assert told(whole) == [text]
    assert told(whole, exclude=["0", "1"]) == []
    assert told(str(held_out)) == []  # evidently
    assert told(str(held_out.with_name(held_out.name.replace("val", "train")))) == []


@pytest.mark.parametrize(("rank", "count"), [(0, 3), (1, 0)])
def test_the_first_process_alone_tells_of_what_is_left_out(pictures, tmp_path, monkeypatch, rank, count):
    (pictures / "0.png").write_bytes(b"broken")
    (pictures / "sketch.psd").write_bytes(b"of a format that is not read")

    def learner(*given):
        raise KeyError("the pictures are read before")

    monkeypatch.setattr("lgnet_fast.training.trainer.Learner", learner)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", str(rank))
    config = tiny_config(pictures, tmp_path / "run", data={"validation": str(pictures)})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(KeyError, match="the pictures are read before"):
            Trainer(config)
    told = [str(one.message) for one in caught]
    assert len(told) == count, told  # of the drawing in both folders, and of the held-out picture
    assert any("data.validation: left out" in text for text in told) == bool(count)
