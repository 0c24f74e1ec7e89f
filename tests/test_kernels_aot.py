"""The kernels compiled for GPUs that this machine lacks: a part of `make aot`, and its report."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", minversion="3.5")

from lgnet_fast.kernels import (
    aot,
    attention_backward,
    attention_forward,
    attention_inference,
    cards,
    configs,
    conv_kernels,
    merge_concat,
)
from lgnet_fast.kernels.aot import machine_code, verdicts
from lgnet_fast.kernels.cards import CARDS
from lgnet_fast.kernels.launch import OPTIONS, is_interpreted, record
from lgnet_fast.kernels.precompile import distinct
from lgnet_fast.kernels.tables import TABLES
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from bench import aot_report
from lgnet_fast import kernels
from lgnet_fast.engine.regions import Rect

pytestmark = pytest.mark.skipif(is_interpreted(), reason="Triton runs interpreted: nothing is compiled")


def network_jobs() -> list[aot.Job]:
    """A run of LGNet in float16 on an H100."""
    return aot.jobs([aot.engine_case(CARDS["H100"], "lgnet", "float16", 1, False)])


def training_jobs() -> list[aot.Job]:
    """The largest blocks of LGNet, and the merges."""
    return aot.jobs(
        [
            aot.attention_case(CARDS["H100"], "float16", 1, 128, 64, "released"),
            aot.attention_case(CARDS["H100"], "bfloat16", 16, 128, 64, "paper"),
            aot.attention_case(CARDS["H100"], "float16", 16, 512, 16, "released"),
            aot.attention_case(CARDS["A100"], "float16", 16, 128, 64, "released"),
            aot.attention_case(CARDS["RTX 4090"], "float16", 1, 128, 64, "released"),
            aot.merge_case(CARDS["H100"], "float16", 1, True),
        ]
    )


def split_jobs() -> list[aot.Job]:
    """The kernels that add partial results: more multiprocessors mean more splits, in limited shared memory."""
    names = ("RTX 4090", "L40S", "RTX 5090", "RTX PRO 6000")
    works = [(CARDS[name], dtype) for name in names for dtype in ("float16", "tf32")]
    cases = [aot.attention_case(card, dtype, 1, 128, 64, "released") for card, dtype in works]
    cases += [aot.inference_case(CARDS[name], "float16", 1, 128, 64, "released") for name in names]
    wanted = ("_attn_merge_kernel", "_attn_weigh_kernel", "_attn_sum_kernel")
    return [job for job in aot.jobs(cases) if job.kernel in wanted]


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (network_jobs, {"_conv_kernel", "_attn_project_kernel", "_attn_weigh_kernel", "_attn_sum_kernel"}),
        pytest.param(
            training_jobs,
            {"_attn_prep_kernel", "_attn_fwd_kernel", "_attn_bwd_dq_kernel", "_attn_bwd_dkv_kernel"},
            marks=pytest.mark.slow(reason="`make aot` compiles these too"),
        ),
        (split_jobs, {"_attn_merge_kernel", "_attn_weigh_kernel", "_attn_sum_kernel"}),
    ],
)
def test_kernels_compile_within_each_card(make: Any, wanted: set[str]) -> None:
    reports = list(aot.compile_all(make()))
    assert wanted <= {report.job.kernel for report in reports}
    broken = [
        f"{report.job.card.name} {report.job.kernel} {report.job.label} {report.job.config}: {violation}"
        for report in reports
        for violation in report.violations()
    ]
    assert not broken, "\n".join(broken)
    assert all(0 < report.registers <= 255 for report in reports)
    if make is network_jobs:  # the reader of the machine code finds what it counts
        assert sum(report.code.wgmma > 0 for report in reports) >= 10


class DriverOfAnH100:
    """The driver interface that Triton uses to bind arguments and compile; nothing is launched."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def test_launches_bind_as_triton_binds_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """One launch of every kernel through Triton's call, which handles nested tuples differently from `aot`."""
    card = CARDS["H100"]
    cases = [aot.engine_case(card, "lgnet_demo", "float16", 1, restricted) for restricted in (False, True)]
    cases += [aot.inference_case(card, "float16", 1, 128, 64, variant) for variant in ("released", "paper")]
    cases += [aot.attention_case(card, "float16", 1, 64, 32, variant) for variant in ("released", "paper")]
    cases.append(aot.merge_case(card, "float16", 1, True))
    bound = set()
    monkeypatch.setattr(driver, "_active", DriverOfAnH100())
    for launch in (launch for case in cases for launch in aot.launches(case)):
        absent = tuple(arg is None for arg in launch.args)
        if (launch.kernel, absent) not in bound:
            bound.add((launch.kernel, absent))
            launch.kernel.run(*launch.args, grid=launch.grid, warmup=True, **launch.meta, **OPTIONS)
    names = {kernel.__name__ for kernel, _ in bound}
    assert names >= {"_conv_kernel", "_paint_kernel", "_attn_weigh_kernel", "_attn_sum_kernel", "_attn_fwd_kernel"}
    assert names >= {"_attn_merge_kernel", "_attn_bwd_dq_kernel", "_attn_bwd_dkv_kernel", "_attn_bwd_finish_kernel"}


def test_too_much_shared_memory_is_reported() -> None:
    card = CARDS["RTX 4090"]
    case = aot.inference_case(card, "float16", 1, 128, 64, "released")
    with configs.assume_generation(card.generation, card.num_sms):
        config = configs.pick_inference(card.generation, "half", 128, 4096, 1, card.num_sms)
    with configs.override("inference", config._replace(block_n=64, num_stages=4)):
        (job,) = (job for job in aot.jobs([case]) if job.kernel == "_attn_weigh_kernel")
    report = aot.compile_job(job)
    assert report.shared > 101376
    assert report.violations() == [f"shared memory {report.shared} > 101376"]


SERIALISED = """
.L_x_1:
        /*0100*/                   LDGSTS.E.BYPASS.128 [R2], desc[UR4][R4.64] ;
        /*0110*/                   HGMMA.64x128x16.F32 R24, gdesc[UR8], R24, gsb0 ;
        /*0120*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0130*/                   LDG.E.U16 R3, desc[UR4][R6.64] ;
        /*0140*/                   STG.E.128 desc[UR4][R6.64], R8 ;
        /*0150*/              @!P0 BRA `(.L_x_1) ;
        /*0160*/                   STG.E.U16 desc[UR4][R6.64], R3 ;
        /*0170*/                   STL.64 [R1], R2 ;
.L_x_2:
        /*0180*/                   BRA `(.L_x_2) ;
"""


def test_what_the_machine_code_shows() -> None:
    code = aot.read_code(SERIALISED)
    assert code == aot.Code(local=1, wgmma=1, waits=1, narrow=1)
    (job, *_) = aot.jobs([aot.merge_case(CARDS["H100"], "float16", 1, True)])
    assert aot.Report(job, stack=8, code=code).violations() == [
        "serialised: 1 waits for 1 matrix products",
        "1 accesses of local memory, 8 bytes of stack (spills)",
        "1 loads or stores of 16 bits in a main loop",
    ]
    assert aot.Report(job, stack=8).violations() == []
    assert aot.Report(job, error="CompilationError: x").violations() == ["CompilationError: x"]
    assert aot.Report(job, code=aot.Code(0, 4, 2, 0)).violations() == []
    # float32 may spill, as its products run without tensor cores
    assert aot.Report(job._replace(dtype="float32"), stack=8, code=aot.Code(1, 0, 0, 0)).violations() == []


def test_the_machine_code_is_read_where_it_can_have_a_fault() -> None:
    (job, *_) = aot.jobs([aot.merge_case(CARDS["H100"], "float16", 1, True)])
    single = job._replace(dtype="float32")
    wide, narrow, product = "ld.global.v4.b32", "st.global.b16 [%rd1], %rs1;", "wgmma.mma_async.sync.aligned"
    asked = [
        machine_code._faults_possible(one, ptx, stack)
        for one in (job, single)
        for ptx in (wide, narrow, product)
        for stack in (0, 8)
    ]
    assert asked == [False, True, True, True, True, True, False, False, False, False, True, True]
    for one in aot.jobs([aot.attention_case(CARDS["A100"], "float16", 1, 64, 32, "released")])[:3]:
        assert aot.compile_job(one).code == aot.Code(0, 0, 0, 0)


def test_cards_of_capability_8_share_all_but_the_assembler() -> None:
    """A group has the reports that its kernels have alone."""
    cases = [aot.attention_case(CARDS[name], "bfloat16", 1, 64, 32, "released") for name in ("RTX 3090", "RTX 4080")]
    cases.append(cases[0]._replace(card=CARDS["RTX 5080"]))
    grouped = aot.groups(aot.jobs(cases))
    pairs = [group for group in grouped if len(group) > 1]
    assert pairs
    assert {job.card.name for group in pairs for job in group} == {"RTX 3090", "RTX 4080"}
    assert all(
        [job.card.name for job in group] == ["RTX 5080"] for group in grouped if group[0].card.capability[0] == 12
    )
    products = next(group for group in pairs if group[0].kernel == "_attn_bwd_dq_kernel")
    reports = aot.compile_group(products)
    assert reports == [aot.compile_job(job) for job in products]
    assert all(report.error is None and report.registers > 100 for report in reports)


def test_shards_are_parts_of_the_whole() -> None:
    cases = [aot.attention_case(CARDS[name], "float16", 1, 64, 32, "released") for name in ("A100", "L4")]
    jobs = aot.jobs(cases)
    parts = [aot.shard(jobs, number, 3) for number in (1, 2, 3)]
    assert sorted(map(repr, jobs)) == sorted(repr(job) for part in parts for job in part)
    assert max(map(len, parts)) < len(jobs)
    # whatever else is compiled
    assert aot.shard(aot.jobs(cases[:1]), 2, 3) == [job for job in parts[1] if job.card.name == "A100"]
    for number, count in ((0, 3), (4, 3)):
        with pytest.raises(ValueError, match=f"shard: expected a number from 1 to 3, got {number}"):
            aot.shard(jobs, number, count)


def test_the_report_of_float16_holds_for_bfloat16_far_from_the_limits() -> None:
    cases = [
        aot.attention_case(CARDS["A100"], dtype, 1, 64, 32, "released") for dtype in ("float16", "bfloat16", "tf32")
    ]
    jobs = aot.jobs(cases)
    rest, pairs = aot.twins(jobs)
    assert sorted(map(repr, jobs)) == sorted(map(repr, [*rest, *(one for one, _ in pairs)]))
    assert {one.kernel for one, _ in pairs} == {one.kernel for one in rest if one.dtype == "float16"}
    for one, other in pairs:
        assert (one.dtype, other.dtype, one.config) == ("bfloat16", "float16", other.config)
        assert aot.shard([one], 1, 2) == ([one] if aot.shard([other], 1, 2) else [])
    assert aot.twins(aot.jobs(cases[1:]))[1] == []
    first, second = next(pair for pair in pairs if pair[0].kernel == "_attn_bwd_delta_kernel")
    single, half = aot.compile_job(second), aot.compile_job(first)
    single = single._replace(registers=30)
    assert aot.holds_for_twin(single)
    assert not aot.holds_for_twin(single._replace(registers=80))
    assert (half.shared, half.stack, half.code) == (single.shared, single.stack, single.code)
    assert not aot.holds_for_twin(single._replace(registers=242))
    assert not aot.holds_for_twin(single._replace(stack=8))
    assert not aot.holds_for_twin(single._replace(code=aot.Code(0, 8, 1, 0)))


def test_a_kernels_digest_is_of_its_code(monkeypatch: pytest.MonkeyPatch) -> None:
    (job, *_) = aot.jobs([aot.attention_case(CARDS["A100"], "float16", 1, 64, 32, "released")])
    kernel = getattr(attention_forward, job.kernel)
    digest = aot.digest(job)

    def changed(source: str, **more: Any) -> str:
        verdicts._code_of.cache_clear()
        monkeypatch.setattr(kernel, "_src", source)
        return aot.digest(job._replace(**more))

    source = kernel.src
    docstring = source.split('"""')[1]
    assert changed(source.replace(docstring, "Another docstring.").replace("\n", "  # a comment\n", 1)) == digest
    assert (
        changed(source.replace("+ 1e-7", "+ 2e-7").replace("1e-12", "2e-12") + "\n    tl.debug_barrier()") != digest
    )
    assert changed(source) == digest
    assert changed(source, card=CARDS["L4"]) != digest
    assert changed(source, options={**job.options, "num_warps": 8}) != digest
    helper = attention_forward.load_tiles
    monkeypatch.setattr(helper, "_src", helper.src + "\n    tl.debug_barrier()")
    (forward,) = [one for one in aot.jobs([aot.attention_case(CARDS["A100"], "float16", 1, 64, 32, "released")])
                  if one.kernel == "_attn_fwd_kernel"]  # fmt: skip
    with_helper = aot.digest(forward)
    verdicts._code_of.cache_clear()
    monkeypatch.undo()
    assert aot.digest(forward) != with_helper
    verdicts._code_of.cache_clear()


def test_verdicts_survive_an_interrupted_run(tmp_path: Path) -> None:
    jobs = aot.jobs([aot.merge_case(CARDS["A100"], "float16", 1, True)])
    path = tmp_path / "new" / "verdicts.jsonl"
    ledger = aot_report.Ledger(path)
    reports = [aot.Report(job, 1024, 30 + i, 8, 0, aot.Code(1, 2, 3, 4)) for i, job in enumerate(jobs[:3])]
    for report in reports:
        ledger.add(report)
    ledger.add(aot.Report(jobs[3], error="RuntimeError: no memory"))
    with path.open("a") as file:
        file.write('{"kernel": "cut of')
    later = aot_report.Ledger(path, tmp_path / "stored.xz")
    assert [later.get(job) for job in jobs[:4]] == [*reports, None]
    assert later.store(jobs[1:]) == 2
    stored = aot_report.Ledger(tmp_path / "none", tmp_path / "stored.xz")
    assert [stored.get(job) for job in jobs[:4]] == [None, *reports[1:], None]


def test_the_report_compiles_what_is_not_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(aot_report, "CACHE", tmp_path)
    monkeypatch.setattr(aot_report, "STORED", tmp_path)
    compiled: list[aot.Job] = []

    def compile_all(work: Any, processes: Any, keep: bool) -> Any:
        assert not keep
        for job in work:
            compiled.append(job)
            spills = job.kernel == "_merge_bwd_kernel"
            yield aot.Report(job, 1024, 30, 8 if spills else 0, code=aot.Code(2 if spills else 0, 0, 0, 0))

    monkeypatch.setattr(aot, "compile_all", compile_all)
    only = ["--here", "--card", "A100", "--dtype", "float16", "--model", "lgnet_demo", "--batch", "1"]
    assert aot_report.main([*only, "--count"]) == 0
    assert "_attn_bwd_dq_kernel" in capsys.readouterr().out
    assert not compiled
    codes = [aot_report.main([*only, "--shard", f"{number}/2"]) for number in (1, 2)]
    assert max(codes) == 1  # the kernels with spills
    first = len(compiled)
    capsys.readouterr()
    assert aot_report.main(only) == 1
    assert len(compiled) == first == len({repr(job) for job in compiled}) > 20
    printed = capsys.readouterr().out
    assert f"{first} known, 0 to compile" in printed
    assert (
        printed.count("8 bytes of stack (spills)") == sum(job.kernel == "_merge_bwd_kernel" for job in compiled) > 0
    )
    assert aot_report.main([*only, "--anew"]) == 1
    assert len(compiled) == 2 * first
    # bfloat16 is compiled where the report of float16 does not hold for it: the kernels with spills
    capsys.readouterr()
    assert aot_report.main([*only, "--dtype", "bfloat16", "--twins"]) == 1
    extra = compiled[2 * first :]
    assert extra
    assert {job.kernel for job in extra if job.dtype == "bfloat16"} == {"_merge_bwd_kernel"}
    assert {job.dtype for job in extra} == {"bfloat16"}
    assert "by their twins in float16" in capsys.readouterr().out
    assert aot_report.main([*only, "--dtype", "bfloat16"]) == 1
    assert {job.kernel for job in compiled[2 * first :]} == {job.kernel for job in compiled[:first]}
    with pytest.raises(SystemExit):
        aot_report.main([*only, "--shard", "3/2"])
    assert "expected I/N with I from 1 to N, got '3/2'" in capsys.readouterr().err


@pytest.mark.parametrize("codes", [(0, 0), (0, 1), (1, 0)])
def test_the_report_fails_where_one_triton_fails(monkeypatch: pytest.MonkeyPatch, codes: tuple[int, int]) -> None:
    calls: list[tuple[Any, str]] = []

    def run(command: list[str], *, env: str, check: bool) -> subprocess.CompletedProcess[bytes]:
        calls.append((command[2:], env))
        return subprocess.CompletedProcess(command, codes[len(calls) - 1])

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(aot_report, "environment", lambda version: version)
    assert aot_report.main(["--card", "L4"]) == max(codes)
    assert calls == [(["--here", "--card", "L4"], version) for version in ("3.6.0", "newest")]


def test_older_triton_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels.missing() is None
    monkeypatch.setattr("triton.__version__", "3.4.0")
    assert kernels.missing() == "triton 3.4.0 is installed, 3.5 or newer is needed"


def test_a_kernel_that_does_not_compile_is_reported() -> None:
    (job, *_) = aot.jobs([aot.merge_case(CARDS["A100"], "float16", 1, True)])
    report = aot.compile_job(job._replace(signature={**job.signature, "height": "nonsense"}))
    assert report.error is not None
    assert report.violations() == [report.error]


def test_jobs_have_no_duplicates() -> None:
    one = aot.engine_case(CARDS["H100"], "lgnet", "float16", 1, False)
    jobs = aot.jobs([one])
    assert 30 < len(jobs) < len(aot.launches(one))
    # the same multiprocessors, the same kernels
    assert aot.jobs([one, one._replace(card=CARDS["H200"])]) == jobs
    # more multiprocessors of the same kind: some kernels are shared
    single, both = (
        {
            (job.kernel, str(job.constants), str(job.options))
            for job in aot.jobs([one._replace(card=CARDS[name]) for name in names])
        }
        for names in (("L4",), ("L4", "RTX 4090"))
    )
    assert single < both


def test_kernels_have_few_parameters() -> None:
    modules = (attention_forward, attention_backward, attention_inference, conv_kernels, merge_concat)
    found = [value for module in modules for value in vars(module).values() if isinstance(value, JITFunction)]
    longest = max(found, key=lambda kernel: len(kernel.arg_names))
    assert len({kernel.__name__ for kernel in found}) > 15
    assert len(longest.arg_names) <= 35, longest.__name__


def test_what_tuples_hold_is_in_the_signature() -> None:
    """A map in NHWC: the unit channel stride is a constant, the stride of rows is None."""
    case = aot.attention_case(CARDS["H100"], "float16", 2, 128, 64, "released", True)
    (job,) = {job.kernel: job for job in aot.jobs([case]) if job.kernel == "_attn_prep_kernel"}.values()
    pointer, *strides = job.signature["features"]
    assert pointer == "*fp16"
    assert strides == ["i32", "constexpr", "constexpr", "i32"]
    assert (job.constants[0, 2], job.constants[0, 3]) == (1, None)
    assert {(0, 0), (0, 1), (0, 4)} <= job.attributes.keys()


def test_shapes_specialised_to_one_compile() -> None:
    """Sizes of 1 become constants in Triton."""
    cases = [aot.attention_case(CARDS["H100"], "float16", 1, 1, 1, variant) for variant in ("released", "paper")]
    for job in aot.jobs(cases):
        report = aot.compile_job(job)
        assert report.error is None
        assert report.stack == 0


@pytest.mark.parametrize("most_holes", [1, 4])
def test_random_holes_share_their_kernels(most_holes: int) -> None:
    card = CARDS["H100"]
    rng = random.Random(0)
    with configs.assume_generation(card.generation, card.num_sms), record() as recorded:
        executor = aot.executor("lgnet", "float16", 1)
        executor.launch_all(None)
        for _ in range(40):
            holes = []
            for _ in range(rng.randint(1, most_holes)):
                height, width = rng.randint(16, 128 // most_holes), rng.randint(16, 128 // most_holes)
                top, left = rng.randint(0, 256 - height), rng.randint(0, 256 - width)
                holes.append(Rect(top, top + height, left, left + width))
            executor.launch_all(holes)
    assert 40 * 37 < len(recorded) < 40 * 65  # each time the whole network, but no launch for each hole
    assert 40 < len(distinct(recorded)) <= 120


def test_every_configuration_is_there() -> None:
    assert set(TABLES) == {"interpreted", *cards.GENERATIONS}
    for card in CARDS.values():
        assert card.generation in cards.GENERATIONS
        for op in ("forward", "merge", "backward_dq", "backward_dkv"):
            for kind in ("half", "tf32", "ieee"):
                for channels in (1, 64, 65, 128, 200, 512):
                    for positions in (1, 10**7):
                        configs.pick(op, card.generation, kind, channels, positions)
        configs.pick("rows", card.generation, "any", 512, 1)


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
    assert cards.generation_of(*capability) == generation


def test_nearest_card() -> None:
    assert cards.card_for("sm_89", 60).name == "L4"
    assert cards.card_for("sm_89", 188).name == "RTX PRO 6000"
    assert cards.card_for("sm_90", 114).name == "H100"
    assert cards.card_for("interpreted", 4).name == "H100"
