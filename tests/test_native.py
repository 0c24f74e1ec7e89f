"""The kernels without Python: `tests/native/run.py`, and its counts of a disassembly."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from .native import run

ARM = """
0000000000000000 <lgnet::neon::F32::conv_block<6>(float const*)>:
   0:	ldp	q7, q4, [x1]
   4:	fmla	v8.4s, v7.4s, v0.s[0]
   8:	fmla	v9.4s, v4.4s, v0.s[0]
   c:	str	q8, [sp]
  10:	subs	x2, x2, #0x1
  14:	b.ne	0 <lgnet::neon::F32::conv_block<6>(float const*)>  // b.any
  18:	cbz	x2, 0 <lgnet::neon::F32::conv_block<6>(float const*)>
  1c:	ret

0000000000000020 <other()>:
  20:	fmla	v8.4s, v7.4s, v0.s[0]
  24:	ret
"""
X86 = """
0000000000000000 <void lgnet::avx2::ConvProducts<lgnet::avx2::F32>::rows_of_blocks<2>(lgnet::Product const&)>:
   0:	vmovups (%rsi),%ymm0
   4:	vbroadcastss -0x10(%rcx,%r12,1),%ymm2
   8:	vfmadd231ps %ymm0,%ymm2,%ymm3
   c:	vfmadd213ps 0x88(%rsp),%ymm1,%ymm4
  10:	mov    0x40(%rsp),%rdi
  14:	vmovaps %ymm3,0x68(%rsp)
  18:	jne    0 <void lgnet::avx2::ConvProducts<lgnet::avx2::F32>::rows_of_blocks<2>(lgnet::Product const&)>
  1c:	ret
"""


def test_an_instruction_set_is_a_header_a_unit_and_a_row():
    csrc = run.ROOT / "csrc"
    table = (csrc / "isa.inc").read_text()
    rows = re.findall(r"^LGNET_ROW\((\w+),", table, re.MULTILINE)
    assert rows[0] == "portable"
    assert sorted(rows) == sorted(path.stem.removeprefix("isa_") for path in csrc.glob("isa_*.cpp"))
    for name in rows:
        unit = (csrc / f"isa_{name}.cpp").read_text()
        assert f"#define LGNET_ISA {name}\n" in unit
        assert f'#define LGNET_SIMD "simd/{name}.h"\n' in unit
        assert len(unit.splitlines()) <= 18
        assert (csrc / "simd" / f"{name}.h").is_file()
        assert re.search(rf"^// .+\nLGNET_ROW\({name},", table, re.MULTILINE), f"{name}: which processors?"


def test_a_set_is_chosen_only_where_the_processor_has_all_that_its_unit_is_compiled_for():
    csrc = run.ROOT / "csrc"
    rows = dict(re.findall(r"^LGNET_ROW\((\w+), cpu_has\((.*?)\)", (csrc / "isa.inc").read_text(), re.M | re.S))
    assert set(rows) == {"avx2", "avx512", "avx512_bf16", "amx_bf16"}
    for name, row in rows.items():
        target = re.search(r'LGNET_TARGET "(.+)"', (csrc / f"isa_{name}.cpp").read_text())
        compiled = {re.sub(r"\W", "", feature) for feature in target[1].split(",")}
        assert compiled == {feature.lower() for feature in re.findall(r"\bk(\w+)", row)}, name


def test_inner_loops_are_counted():
    (loop,) = run.inner_loops(ARM, run.ARM)
    assert loop.function == "lgnet::neon::F32::conv_block<6>(float const*)"
    assert (loop.instructions, loop.products, loop.registers, loop.stack) == (6, 2, 5, 1)
    assert loop.part == pytest.approx(1 / 3)
    (loop,) = run.inner_loops(X86, run.X86)  # reading a pointer from the stack is no spill
    assert (loop.instructions, loop.products, loop.registers, loop.stack) == (7, 2, 5, 2)


@pytest.mark.parametrize(
    ("target", "text", "message"),
    [
        (run.ARM, ARM, r"FAIL .*block<6>: 2 products of 6 instructions \(33.3%\).* 1 spills"),
        (run.X86, X86, r"FAIL .*blocks<2>: 2 products of 7 instructions \(28.6%\).* 2 spills"),
    ],
    ids=["arm", "x86"],
)
def test_a_block_that_falls_short_is_named(target, text, message):
    first, *others = target.blocks
    with pytest.raises(SystemExit, match=f"F32::{re.escape(others[0])}: not found"):
        run.check_blocks(text, target, ("F32",))
    one = text.split("\n\n")[0]
    all_blocks = "\n\n".join(one.replace(first, block) for block in target.blocks)
    with pytest.raises(SystemExit, match=message):
        run.check_blocks(all_blocks, target, ("F32",))


def test_missing_tools_are_named(monkeypatch):
    monkeypatch.setattr(run.shutil, "which", lambda tool: None if "qemu" in tool else tool)
    assert run.missing_tools("--arm") == "--arm needs: apt-get install qemu-user"
    assert run.missing_tools("--cross") is None
    monkeypatch.setattr(run.shutil, "which", lambda tool: tool)
    assert run.missing_tools("--arm") is None


@pytest.mark.slow(reason="compiles every kernel anew: minutes")
@pytest.mark.parametrize("arguments", [[], ["--arm"], ["--sanitized"]], ids=["host", "arm", "sanitized"])
def test_kernels_without_python(arguments):
    if arguments and (missing := run.missing_tools(arguments[0])) is not None:
        pytest.skip(missing)
    subprocess.run([sys.executable, run.__file__, *arguments], env=os.environ, timeout=1800, check=True)
