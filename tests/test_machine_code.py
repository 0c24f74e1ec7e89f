"""The machine code in kernels/machine_code/ is that of csrc/cuda/, and every GPU gets the code that it can run."""

from __future__ import annotations

import re

import pytest
from lgnet_fast.kernels import cuda_driver

from tests.compiled_kernels import build

ALL = [(name, target) for name in build.NAMES for target in build.TARGETS[name]]


@pytest.mark.parametrize(("name", "target"), ALL)
def test_machine_code_is_that_of_the_sources(name, target):
    path = build.machine_code(name, target)
    digest = build.source_hash(name).encode()
    if path.suffix == ".ptx":
        digest = ", ".join(map(str, digest)).encode()
    assert digest in path.read_bytes(), "run `make cubin`"


def test_all_machine_code_has_a_source():
    assert set(build.MACHINE_CODE.iterdir()) == {build.machine_code(*one) for one in ALL}


@pytest.mark.parametrize(
    ("capability", "target"),
    [
        ((8, 0), "sm_80"),
        ((8, 6), "sm_80"),
        ((8, 7), "sm_87"),
        ((8, 9), "sm_80"),
        ((9, 0), "sm_90"),
        ((10, 0), "sm_100"),
        ((10, 3), "sm_100"),
        ((11, 0), "compute_90"),
        ((12, 0), "sm_120"),
        ((12, 1), "sm_120"),
        ((13, 0), "compute_90"),
    ],
)
def test_a_gpu_gets_code_that_it_runs(capability, target):
    assert cuda_driver.machine_code("picture_conv", capability) == build.machine_code("picture_conv", target)


@pytest.mark.parametrize("name", ["deep", "hopper_attention", "hopper_chain", "hopper_conv"])
def test_code_of_one_gpu_alone(name):
    assert cuda_driver.machine_code(name, (9, 0)) == build.machine_code(name, "sm_90a")
    for other in ((8, 9), (10, 0)):
        with pytest.raises(
            FileNotFoundError, match=rf"no code of {name} for compute capability {other[0]}.{other[1]}"
        ):
            cuda_driver.machine_code(name, other)


def test_no_code_for_old_gpus():
    with pytest.raises(FileNotFoundError, match="no code of picture_conv for compute capability 7.5"):
        cuda_driver.machine_code("picture_conv", (7, 5))


@pytest.mark.parametrize(("name", "target"), [one for one in ALL if one[1].startswith("sm_")])
def test_old_drivers_accept_the_code(name, target):
    """A driver accepts machine code of its CUDA's ABI or an older one: 7 is CUDA 12's, and 8 is Blackwell's there."""
    abi = build.machine_code(name, target).read_bytes()[8]  # EI_ABIVERSION of ELF
    assert abi == (8 if target in ("sm_100", "sm_120") else 7)


def test_ptx_of_cuda_12():
    text = build.machine_code("picture_conv", "compute_90").read_text()
    assert re.search(r"^\.version 8\.7$", text, re.M)
    assert re.search(r"^\.target sm_90$", text, re.M)
    assert text.endswith("\0"), "the driver needs a text that ends with zero"
