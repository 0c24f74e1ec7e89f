"""Fixtures that several test files share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from lgnet_fast.pipeline import Inpainter

from .pipeline_support import BlurFill


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Verdicts and choices of the tests stay among themselves."""
    monkeypatch.setenv("LGNET_FAST_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> BlurFill:
    """Every Inpainter that is loaded holds this network instead."""
    model = BlurFill()

    def load(cls, model_path=None, device="auto", dtype="auto", backend="auto", **options):
        return cls(model, device, dtype, backend, **options)

    monkeypatch.setattr(Inpainter, "from_pretrained", classmethod(load))
    return model


@pytest.fixture
def strict_float32() -> Iterator[None]:
    """Float32 products on a GPU in full precision, not in TF32."""
    # Not by monkeypatch: deleting the attribute again, which is how it restores, fails on these objects.
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [switch.allow_tf32 for switch in switches]
    for switch in switches:
        switch.allow_tf32 = False
    yield
    for switch, value in zip(switches, before):
        switch.allow_tf32 = value
