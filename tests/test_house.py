"""Limits on how the code is built, counted by tools/house.py, and the counting itself on a small tree."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import write_files
from tools import house

ROOT = Path(__file__).resolve().parent.parent
FILES_OF_A_TASK = {"operator": 11, "instruction set": 3, "GPU": 2, "command": 4}


@pytest.fixture(scope="module")
def found() -> dict:
    return house.report(ROOT)


def test_signatures_and_functions_are_short(found: dict) -> None:
    assert found["longest signature outside kernels"]["count"] <= 10, found["longest signature outside kernels"]
    assert found["longest signature of a Triton kernel"]["count"] <= 35, found["longest signature of a Triton kernel"]
    assert found["functions over 60 lines"] == []
    assert found["longest C++ function"]["count"] <= 60, found["longest C++ function"]


def test_rooms_import_downwards_only_and_in_no_circle(found: dict) -> None:
    assert found["circles of imports"] == []
    assert found["imports upwards"] == []


def test_a_task_touches_few_files(found: dict) -> None:
    for task, count in found["files of a task"].items():
        assert count <= FILES_OF_A_TASK.get(task, 99), task


def test_circles_and_upward_imports_are_seen(tmp_path: Path) -> None:
    root = write_files(
        tmp_path,
        {
            "lgnet_fast/__init__.py": "",
            "lgnet_fast/errors.py": "",
            "lgnet_fast/reference/__init__.py": "",
            "lgnet_fast/reference/a.py": "if TYPE_CHECKING:\n    from .b import B\n",
            "lgnet_fast/reference/b.py": "from . import a\nfrom ..errors import E\n",
            "lgnet_fast/ops/__init__.py": "from ..reference import a\n",
            "lgnet_fast/native.py": "def load():\n    from .ops import x\n",
            "kernels/__init__.py": "",
        },
    )
    imports = house.imports(root)
    assert house.circles(imports) == [["lgnet_fast.reference.a", "lgnet_fast.reference.b"]]
    assert house.upward(imports) == ["lgnet_fast.native:2 imports lgnet_fast.ops"]


def test_functions_are_counted_without_their_docstrings(tmp_path: Path) -> None:
    text = 'class A:\n    def f(self, a, *b, c, **d):\n        """One.\n\n        Two."""\n        return a\n'
    kernel, script = "@triton.jit\ndef k(a, b): pass\n", "def main():\n    pass\n"
    root = write_files(tmp_path, {"lgnet_fast/a.py": text, "kernels/k.py": kernel, "bench/b.py": script})
    found = {f.place.split()[1]: f for f in house.functions(root)}
    assert (found["f"].parameters, found["f"].lines, found["f"].kind) == (4, 2, "python")
    assert (found["k"].parameters, found["k"].kind) == (2, "triton")
    assert (found["main"].place, found["main"].lines) == ("bench/b.py:1 main", 2)


def test_functions_of_micro_kernels_are_not_counted(tmp_path: Path) -> None:
    body = "int f() {\n" + "  g();\n" * 70 + "}\n"
    root = write_files(
        tmp_path,
        {
            "csrc/a_kernels.h": '#include "b.h"\n#include "c.h"\n' + body,
            "csrc/b.h": body,
            "csrc/simd/d.h": body,
            "csrc/c.h": "int c() {\n  return 1;\n}\n",
            "csrc/c.cpp": '#include "c.h"\n\nint g() {\n  return 1;\n}\n',
        },
    )
    assert [(f.place, f.lines) for f in house.cpp_functions(root)] == [("csrc/c.cpp:3 g", 3), ("csrc/c.h:1 c", 3)]
    write_files(tmp_path, {"csrc/e.cpp": body})
    assert max(f.lines for f in house.cpp_functions(root)) == 72


def test_recipes_are_read_from_fenced_lists(tmp_path: Path) -> None:
    page = "# C\n\n### Add an operator\n\n```files\nnew  a/X.py  what\nedit a/b.py\n```\n\n### Add a GPU\n\ntext\n"
    root = write_files(tmp_path, {"docs/contributing.md": page, "a/c.py": ""})
    assert house.recipes(root) == {"operator": ["new a/X.py", "edit a/b.py"]}
    assert house.missing_files(root) == ["operator: edit a/b.py"]
