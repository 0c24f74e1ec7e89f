"""Default configurations compile for GPUs that are not here: shared memory within the limit, no spills in 16 bit."""

from __future__ import annotations

import functools

import pytest

pytest.importorskip("triton")

from lgnet_fast.kernels import aot, configs
from lgnet_fast.kernels.launch import is_interpreted

pytestmark = pytest.mark.skipif(is_interpreted(), reason="Triton runs interpreted: nothing is compiled")

TARGETS = ("sm_80", "sm_90")
SIXTEEN_BIT = functools.partial(aot.network_cases, TARGETS, (("float16", "released", 1),), (128, 256, 512), convs=())
# whole batches take the path without splits
OTHERS = functools.partial(
    aot.network_cases,
    TARGETS[1:],
    (("float16", "released", 16), ("bfloat16", "paper", 16), ("float32", "released", 16)),
    (128,),
    convs=(),
)
CONVS = functools.partial(aot.network_cases, TARGETS[1:], (("float16", "released", 1),), ())


ALSO_IN_AOT = pytest.mark.slow(reason="`make aot` compiles these too")


@pytest.mark.parametrize(
    ("cases", "targets", "kernels"),
    [
        (SIXTEEN_BIT, TARGETS, {"_attn_prep_kernel", "_attn_fwd_kernel", "_attn_merge_kernel", "_merge_fwd_kernel"}),
        pytest.param(
            OTHERS,
            TARGETS[1:],
            {"_attn_fwd_kernel", "_attn_bwd_dq_kernel", "_attn_bwd_dkv_kernel"},
            marks=ALSO_IN_AOT,
        ),
        pytest.param(CONVS, TARGETS[1:], {"_conv_kernel"}, marks=ALSO_IN_AOT),
    ],
    ids=["float16", "others", "convs"],
)
def test_default_configurations_compile(
    cases: functools.partial[list[aot.Case]], targets: tuple[str, ...], kernels: set[str]
) -> None:
    reports = list(aot.compile_all(cases))
    assert {report.target for report in reports} == set(targets)
    assert kernels <= {report.kernel for report in reports}
    broken = [f"{report}: {report.violation()}" for report in reports if report.violation() is not None]
    assert not broken, "\n".join(broken)
    assert all(0 < report.registers <= 255 for report in reports)


def test_shapes_specialised_to_one_compile() -> None:
    """Sizes of 1 become constants in Triton."""
    for variant in ("released", "paper"):
        case = aot.attention_case("sm_90", "float16", 1, 1, 1, variant)
        for launch in aot.launches(case):
            report = aot.compile_launch(case, launch)
            assert report.violation() is None, report


def test_every_configuration_is_there() -> None:
    for generation in ("sm_80", "sm_89", "sm_90", "sm_100"):
        with configs.assume_generation(generation):
            for op in ("forward", "merge", "backward_dq", "backward_dkv"):
                for kind in ("half", "tf32", "ieee"):
                    for channels in (1, 64, 65, 128, 200, 512):
                        for positions in (1, 10**7):
                            configs.pick(op, generation, kind, channels, positions)
            configs.pick("rows", generation, "any", 512, 1)


@pytest.mark.parametrize(
    ("capability", "generation"),
    [
        ((7, 5), "sm_89"),
        ((8, 0), "sm_80"),
        ((8, 6), "sm_89"),
        ((8, 9), "sm_89"),
        ((9, 0), "sm_90"),
        ((10, 0), "sm_100"),
        ((12, 0), "sm_89"),
        ((13, 0), "sm_89"),
    ],
)
def test_generation_of_capability(capability: tuple[int, int], generation: str) -> None:
    assert configs.generation_of(*capability) == generation
