"""The machine code in kernels/ is that of csrc/cuda/."""

from __future__ import annotations

import pytest

from tests.compiled_kernels import build


@pytest.mark.parametrize("name", build.NAMES)
def test_machine_code_is_that_of_the_sources(name):
    assert build.source_hash(name).encode() in build.machine_code(name).read_bytes(), "run `make cubin`"


def test_all_machine_code_has_a_source():
    found = {path for suffix in ("cubin", "fatbin") for path in build.KERNELS.glob(f"*.{suffix}")}
    assert found == {build.machine_code(name) for name in build.NAMES}
