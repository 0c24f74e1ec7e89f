"""How easy it is to change the code, in numbers: ``python tools/house.py [--root TREE] [--json]``.

Counted in a checkout, nothing is imported:

* files that a task touches, as its recipe in docs/contributing.md lists them;
* the longest signature and the longest function, of Triton kernels and of all other Python in the package, bench/ and
  tools/;
* circles of imports (also of imports for annotations only), and imports that go upwards;
* lines of Python and C++.

A function's lines are those from ``def`` to its end without its docstring. tests/test_house.py asserts the limits.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACKAGE = "lgnet_fast"

FLOORS: tuple[tuple[str, ...], ...] = (
    ("limits",),
    ("version", "cpp_sources", "errors", "files", "lazy", "forks", "samples", "weights"),
    ("cache", "native"),
    ("reference",),
    ("ops",),
    ("engine.regions",),
    ("engine.geometry",),
    ("kernels",),
    ("engine",),
    ("kernels.aot",),
    ("pipeline",),
    ("data",),
    ("jobs",),
    ("training", "evaluation", "serve"),
    ("counting", "info", "demo"),
    ("__init__",),
    ("cli",),
    ("__main__",),
)
"""The layers of the package, called floors, the lowest first, and the rooms on each.

A room is a subpackage or a top-level module. It imports from itself and from rooms on lower floors. Some modules of a
subpackage are rooms by themselves: the kernels also need "engine.regions" and "engine.geometry", and "kernels.aot"
compiles the launches of the engine.
"""

TASKS = (
    "operator",
    "stage",
    "network variant",
    "activation",
    "instruction set",
    "GPU",
    "metric",
    "setting of training",
    "route of the server",
    "command",
)
"""The recipes of docs/contributing.md: "Add an operator", and so on."""

SCRIPTS = ("bench", "tools")
"""Folders of scripts, whose functions are counted too."""

COMMANDS = "commands"
"""The folder of the commands' declarations, which are counted separately: Typer needs a parameter for each option."""


@dataclass(frozen=True)
class Function:
    """A function of the tree: where it is, the number of its parameters and of its lines."""

    place: str
    parameters: int
    lines: int
    kind: str
    """"triton", "command" or "python"."""


def modules(root: Path) -> dict[str, Path]:
    """{"lgnet_fast.engine.plan": file}; kernels/ is installed as lgnet_fast.kernels."""
    found = {}
    for base, name in ((root / PACKAGE, PACKAGE), (root / "kernels", f"{PACKAGE}.kernels")):
        for file in sorted(base.rglob("*.py")):
            parts = file.relative_to(base).with_suffix("").parts
            found[".".join((name, *(part for part in parts if part != "__init__")))] = file
    return found


# -- functions ---------------------------------------------------------------------------------------------------


def functions(root: Path) -> list[Function]:
    """Every function and method of the package and of bench/ and tools/, nested ones too."""
    scripts = [file for folder in SCRIPTS for file in sorted((root / folder).rglob("*.py"))]
    found = []
    for file in (*modules(root).values(), *scripts):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                found.append(_function(node, file, root))
    return found


def _function(node: ast.FunctionDef | ast.AsyncFunctionDef, file: Path, root: Path) -> Function:
    arguments = node.args
    names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    if names[:1] in (["self"], ["cls"]):
        names = names[1:]
    extra = sum(a is not None for a in (arguments.vararg, arguments.kwarg))
    lines = (node.end_lineno or node.lineno) - node.lineno + 1
    first = node.body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        lines -= (first.end_lineno or first.lineno) - first.lineno + 1
    decorators = [ast.unparse(d) for d in node.decorator_list]
    kind = "python"
    if any(re.match(r"(triton\.)?jit\b", d) for d in decorators):
        kind = "triton"
    elif file.parent.name == COMMANDS and any(re.match(r"command\b", d) for d in decorators):
        kind = "command"
    return Function(f"{file.relative_to(root).as_posix()}:{node.lineno} {node.name}", len(names) + extra, lines, kind)


def micro_kernels(root: Path) -> set[Path]:
    """The headers that are compiled for each instruction set: those of simd/, ``*_kernels.h``, and what these
    include, except what a .cpp file includes too."""
    csrc = root / "csrc"
    elsewhere = {header for file in csrc.glob("*.cpp") for header in _included(file)}
    found: set[Path] = set()
    new = {*csrc.glob("simd/*.h"), *csrc.glob("*_kernels.h")}
    while new:
        found |= new
        new = {header for file in new for header in _included(file)} - found - elsewhere
    return found


def _included(file: Path) -> list[Path]:
    """The headers of csrc/ that a file of that folder names."""
    names = re.findall(r'^#include "([\w./]+)"', _text(file), re.MULTILINE)
    return [header for header in (file.parent / name for name in names) if header.is_file()]


def cpp_functions(root: Path) -> list[Function]:
    """Functions of csrc/ outside the micro-kernels, recognised by clang-format's layout."""
    found, inner = [], micro_kernels(root)
    for file in sorted((root / "csrc").rglob("*.*")):
        if file.suffix not in (".cpp", ".h") or file in inner:
            continue
        opened: dict[str, tuple[int, str]] = {}
        for number, line in enumerate(_text(file).splitlines(), 1):
            indent = line[: len(line) - len(line.lstrip())]
            if re.match(r"\}", line.strip()) and indent in opened:
                start, name = opened.pop(indent)
                found.append(
                    Function(f"{file.relative_to(root).as_posix()}:{start} {name}", 0, number - start + 1, "c++")
                )
            elif len(indent) <= 2 and (begun := _opens(line.strip())) is not None:
                opened[indent] = (number, begun)
    return found


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8")


def _opens(line: str) -> str | None:
    """The name of the function whose body a line opens."""
    if not line.endswith("{") or re.match(
        r"(namespace|struct|class|enum|union|extern|if|for|while|switch|do|else)\b", line
    ):
        return None
    names = re.findall(r"([\w~]+)\(", line)
    return names[0] if names else None


# -- imports -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Import:
    """One module of the package that another imports, anywhere in it."""

    importer: str
    imported: str
    line: int


def imports(root: Path) -> list[Import]:
    """Every import inside the package: at the top, in functions, for annotations."""
    known = modules(root)
    found = []
    for name, file in known.items():
        package = name if file.name == "__init__.py" else name.rpartition(".")[0]
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            for target in _targets(node, package, known):
                if target != name:
                    found.append(Import(name, target, node.lineno))  # type: ignore[attr-defined]
    return found


def _targets(node: ast.AST, package: str, known: dict[str, Path]) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name in known)
    if isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            parts = package.split(".")
            base = ".".join([*parts[: len(parts) - node.level + 1], *([base] if base else [])])
        if base in known:
            yield from sorted({f"{base}.{a.name}" if f"{base}.{a.name}" in known else base for a in node.names})


def circles(found: list[Import]) -> list[list[str]]:
    """Groups of modules that import one another, directly or through others."""
    edges: dict[str, set[str]] = {}
    for one in found:
        edges.setdefault(one.importer, set()).add(one.imported)

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            for following in edges.get(waiting.pop(), ()):
                if following not in seen:
                    seen.add(following)
                    waiting.append(following)
        return seen

    reach = {name: reached(name) for name in edges}
    groups = {
        tuple(sorted(other for other in reach[name] if name in reach.get(other, ())))
        for name in edges
        if name in reach[name]
    }
    return [list(group) for group in sorted(groups)]


def room(module: str) -> str:
    """The room of a module: the first name below the package, or two where FLOORS names them."""
    parts = module.split(".")[1:]
    if ".".join(parts[:2]) in {name for names in FLOORS for name in names}:
        return ".".join(parts[:2])
    return parts[0] if parts else "__init__"


def upward(found: list[Import]) -> list[str]:
    """Imports from a room that is not on a lower floor, and imports of or by a room that FLOORS does not name."""
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    wrong = []
    for one in found:
        importer, imported = room(one.importer), room(one.imported)
        if importer == imported:
            continue
        if importer not in floor or imported not in floor or floor[imported] >= floor[importer]:
            wrong.append(f"{one.importer}:{one.line} imports {one.imported}")
    return sorted(wrong)


# -- recipes -----------------------------------------------------------------------------------------------------


def recipes(root: Path) -> dict[str, list[str]]:
    """Task -> files of its recipe in docs/contributing.md.

    Under a heading "Add a ..." the first fenced block lists a file a line, "new" or "edit" before it. In the names of
    new files X stands for the name of what is added.
    """
    page = root / "docs" / "contributing.md"
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    found = {}
    for task in TASKS:
        section = re.search(
            rf"^#+ Add an? {task}\s*$(.*?)(?=^#+ |\Z)", text, re.MULTILINE | re.DOTALL | re.IGNORECASE
        )
        block = section and re.search(r"^```\w*\n(.*?)^```", section[1], re.MULTILINE | re.DOTALL)
        if block:
            lines = (line.split("#")[0].split() for line in block[1].splitlines())
            found[task] = [" ".join(words[:2]) for words in lines if words]
    return found


def missing_files(root: Path) -> list[str]:
    """Files that recipes edit and that do not exist, and new files whose folder does not exist."""
    wrong = []
    for task, files in recipes(root).items():
        for entry in files:
            action, _, name = entry.partition(" ")
            there = (root / name).is_file() if action == "edit" else (root / name).parent.is_dir()
            if action not in ("new", "edit") or not there:
                wrong.append(f"{task}: {entry}")
    return wrong


# -- the report --------------------------------------------------------------------------------------------------


def report(root: Path) -> dict[str, Any]:
    """All numbers of a tree."""
    found, called = functions(root), imports(root)
    by_kind = {kind: [f for f in found if f.kind == kind] for kind in ("python", "triton", "command")}

    def longest(some: list[Function], what: str) -> dict[str, Any]:
        top = max(some, key=lambda f: getattr(f, what), default=None)
        return {} if top is None else {"count": getattr(top, what), "where": top.place}

    kernels = [f for f in by_kind["python"] if f.place.startswith("kernels/")]
    others = [f for f in by_kind["python"] if not f.place.startswith("kernels/")]
    return {
        "files of a task": {task: len(files) for task, files in recipes(root).items()},
        "files of recipes that are not there": missing_files(root),
        "longest signature outside kernels": longest(others, "parameters"),
        "longest signature of a launcher": longest(kernels, "parameters"),
        "longest signature of a Triton kernel": longest(by_kind["triton"], "parameters"),
        "options of the largest command": longest(by_kind["command"], "parameters"),
        "longest function": longest(by_kind["python"], "lines"),
        "functions over 60 lines": sorted(f"{f.lines} {f.place}" for f in by_kind["python"] if f.lines > 60),
        "longest Triton kernel": longest(by_kind["triton"], "lines"),
        "longest C++ function": longest(cpp_functions(root), "lines"),
        "circles of imports": circles(called),
        "imports upwards": upward(called),
        "lines": {name: _lines(root, name) for name in (PACKAGE, "kernels", "csrc", "tests", "bench", "tools")},
    }


def _lines(root: Path, folder: str) -> int:
    files = [f for f in (root / folder).rglob("*") if f.suffix in (".py", ".cpp", ".h", ".inc") and f.is_file()]
    return sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)


def main() -> int:
    """Print the report; the exit code is 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parents[1], help="a checkout")
    parser.add_argument("--json", action="store_true", help="machine-readable")
    arguments = parser.parse_args()
    found = report(arguments.root)
    if arguments.json:
        print(json.dumps(found, indent=2))
        return 0
    for name, value in found.items():
        print(f"{name}:")
        for line in [f"{k}: {v}" for k, v in value.items()] if isinstance(value, dict) else [str(v) for v in value]:
            print(f"  {line}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
