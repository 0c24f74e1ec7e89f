"""Shared by the training tests: small pictures, and the configuration of a very small network."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from lgnet_fast import LGNet, create_model
from lgnet_fast.training import TrainConfig
from lgnet_fast.training.config import DataConfig, config_of
from lgnet_fast.training.samples import InpaintingDataset

TINY = {"coarse_channels": 2, "local_channels": 2, "global_channels": 2}


@pytest.fixture(scope="module", autouse=True)
def own_threads() -> Iterator[None]:
    """For a module that imports it: trainers set PyTorch's number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def write_pictures(folder: Path, count: int = 5, size: tuple[int, int] = (80, 64)) -> Path:
    """Smooth pictures 0.png, 1.png, ... of (width, height) `size`, each with its own colours."""
    folder.mkdir(parents=True, exist_ok=True)
    x, y = np.meshgrid(np.linspace(0, 1, size[0]), np.linspace(0, 1, size[1]))
    for i in range(count):
        rng = np.random.default_rng(i)
        planes = [np.sin(rng.uniform(2, 9) * x + rng.uniform(2, 9) * y + rng.uniform(0, 6)) for _ in range(3)]
        Image.fromarray(np.uint8(127.5 + 120 * np.stack(planes, axis=2))).save(folder / f"{i}.png")
    return folder


def dataset(*places: object, seed: int = 0, **options: Any) -> InpaintingDataset:
    """Samples of these places, read by the caller itself; `options`: fields of DataConfig."""
    return InpaintingDataset(DataConfig(**{"pictures": tuple(map(str, places)), "workers": 0, **options}), seed)


def tiny_settings(pictures: Path, run: Path) -> dict[str, Any]:
    """A run of 2-channel networks without workers and TensorBoard."""
    return {
        "model": {"name": "lgnet_demo", "overrides": dict(TINY), "backend": "eager"},
        "discriminator": {"channels": 2},
        "data": {"pictures": [str(pictures)], "workers": 0},
        "loss": {"features": None, "edge": 1.0},
        "optim": {"batch_size": 1, "steps": 4},
        "run": {
            "directory": str(run),
            "device": "cpu",
            "threads": 1,
            "tensorboard": False,
            "log_every": 1,
            "picture_every": 0,
        },
    }


def tiny_config(pictures: Path, directory: Path, **changes: dict[str, Any]) -> TrainConfig:
    """:func:`tiny_settings` with sections updated by `changes`."""
    settings = tiny_settings(pictures, directory)
    for section, values in changes.items():
        settings[section].update(values)
    return config_of(settings)


def batch(count: int = 2, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """A batch of smooth 256x256 pictures with a box as hole, as collate makes it."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 8, 8, generator=generator, dtype=dtype) * 2 - 1
    image = nn.functional.interpolate(coarse, 256, mode="bilinear")
    mask = torch.zeros(count, 1, 256, 256, dtype=dtype)
    mask[:, :, 60:180, 90:200] = 1
    return {"image": image, "mask": mask, "name": [f"{seed}-{i}" for i in range(count)], "broken": []}


def lines(run: Path) -> list[dict[str, Any]]:
    """The log of a run."""
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


class Features(nn.Module):
    """A feature network with two levels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=4)

    def forward(self, picture: Tensor) -> list[Tensor]:
        first = torch.relu(self.conv(picture))
        return [first, nn.functional.max_pool2d(first, 2)]


def lively_model() -> LGNet:
    """A tiny network with activations of constant size, without BatchNorm."""
    model = create_model("lgnet_demo", **TINY, backend="eager")
    for module in model.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.ConvTranspose2d)):
            torch.nn.init.kaiming_normal_(module.weight, a=0.2)
    return model


def assert_same(a: Any, b: Any, where: str = "") -> None:
    """Equal bit by bit: nested dicts and lists of tensors and plain values."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, where
        assert torch.equal(a, b), where
    else:
        assert a == b, where
