"""The comparison of two trees' kernels: counts, verdicts, and output."""

from __future__ import annotations

from typing import Any

import pytest

from bench import compare_kernels
from bench.compare_kernels import Kernel, Tree, compare, faults, opcodes, programs_resident

PTX = """
.visible .entry kernel(
	.param .u64 .ptr .global .align 1 kernel_param_0
)
{
	.reg .pred 	%p<2>;
	ld.param.b64 	%rd1, [kernel_param_0];
$L__BB0_1:
	@%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
	// begin inline asm
	@!%p1 bra 	$L__BB0_1;
	mov.b32 	%r5, {%rs1, %rs2};
	mov.b32 	%r6, %r5;
	ret;
}
"""
KERNEL = Kernel("k", "first", "m=16", {"add.s32": 6, "ret": 1}, 1024, 60, 0, 8, None)


def test_instructions_are_counted_by_opcode() -> None:
    assert opcodes(PTX) == {"bra": 1, "ld.global.v4.b32": 1, "ld.param.b64": 1, "mov.b32": 2, "ret": 1}


@pytest.mark.parametrize(
    ("shared", "registers", "warps", "programs"),
    [
        (0, 32, 4, 16),  # threads, as 65536 registers hold as many
        (0, 33, 4, 12),  # 40 registers a thread are allotted
        (100_000, 32, 4, 2),  # shared memory
        (0, 32, 1, 32),
    ],
)
def test_programs_on_a_multiprocessor(shared: int, registers: int, warps: int, programs: int) -> None:
    assert programs_resident((9, 0), 232448, shared, registers, warps) == programs


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({}, []),
        ({"opcodes": {"add.s32": 5, "ret": 1}, "shared": 512, "registers": 40}, []),
        ({"opcodes": {"add.s32": 6, "ret": 2}}, ["more instructions"]),
        ({"shared": 1040}, ["more shared memory"]),
        ({"stack": 8}, ["more stack"]),
        ({"registers": 66}, []),  # 60 are allotted 64
        ({"registers": 67}, ["more registers"]),
        ({"programs": 7}, []),  # the same instructions
        ({"opcodes": {"add.s32": 6}, "programs": 7}, ["7 programs a multiprocessor, not 8"]),
        ({"error": "CompilationError: x"}, ["CompilationError: x"]),
    ],
)
def test_what_is_worse(changes: dict[str, Any], found: list[str]) -> None:
    assert faults(KERNEL, KERNEL._replace(**changes)) == found


def test_fewer_spills_may_cost_registers() -> None:
    assert faults(KERNEL._replace(stack=24), KERNEL._replace(registers=80, programs=6)) == []


def test_launches_are_paired_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    worse = KERNEL._replace(name="worse", opcodes={"add.s32": 8, "ret": 1})
    base = Tree({"a": [0, 1, 0], "b": [0]}, [KERNEL, KERNEL])
    assert compare(base, Tree({"a": [0, 1, 0], "b": [0]}, [KERNEL, worse])) == 1
    printed = capsys.readouterr().out
    assert "WORSE: more instructions; +2 add.s32" in printed
    assert "2 kernels, 1 of the same instructions, 1 worse" in printed
    assert compare(base, Tree({"a": [0, 1]}, [KERNEL, KERNEL])) == 2
    printed = capsys.readouterr().out
    assert "a: 3 launches before, 2 launches now" in printed
    assert "b: 1 launches before, not there now" in printed


def test_a_comparison_of_nothing_does_not_pass(capsys: pytest.CaptureFixture[str]) -> None:
    """A pattern that no name matches leaves cases without launches."""
    assert compare(Tree({"a": []}, []), Tree({"a": []}, [])) == 1
    assert capsys.readouterr().out.endswith("no kernel matches --case and --kernel: nothing is compared\n")


def test_the_commit_is_needed() -> None:
    with pytest.raises(SystemExit):
        compare_kernels.main([])
