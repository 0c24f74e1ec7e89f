"""The machine code in kernels/ is that of csrc/cuda/."""

from __future__ import annotations

import pytest

from tests.cubins import build


@pytest.mark.parametrize("name", build.NAMES)
def test_machine_code_is_that_of_the_sources(name):
    assert build.source_hash(name).encode() in (build.CUBINS / f"{name}.cubin").read_bytes(), "run `make cubin`"


def test_every_cubin_has_a_source():
    assert {path.stem for path in build.CUBINS.glob("*.cubin")} == set(build.NAMES)
