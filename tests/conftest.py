"""Fixtures that several test files share."""

from __future__ import annotations

import pytest

from lgnet_fast.pipeline import Inpainter

from .pipeline_support import BlurFill


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> BlurFill:
    """Every Inpainter that is loaded holds this network instead."""
    model = BlurFill()

    def load(cls, model_path=None, device="auto", dtype="auto", backend="auto", **options):
        return cls(model, device, dtype, backend, **options)

    monkeypatch.setattr(Inpainter, "from_pretrained", classmethod(load))
    return model
