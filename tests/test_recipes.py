"""The recipes of docs/contributing.md: their files exist, and following them on a copy of the tree works.

tests/recipes/NAME is a change that follows a recipe: new files in their places, and `edits.json`.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from lgnet_fast.kernels import cards
from typer.testing import CliRunner

from lgnet_fast import LGNet
from lgnet_fast.cli import app
from lgnet_fast.reference import variants
from tools import house

from .native import run as native

ROOT = Path(__file__).resolve().parent.parent
RECIPES = Path(__file__).resolve().parent / "recipes"
EXAMPLES = {"operator": "masked_l1", "stage": "P", "instruction set": "sse41", "command": "holes"}
"""Recipe -> the X of its example."""


def folder_of(recipe: str) -> Path:
    return RECIPES / recipe.replace(" ", "_")


def new_files(recipe: str) -> list[str]:
    folder = folder_of(recipe)
    files = (f for f in folder.rglob("*") if f.is_file() and "__pycache__" not in f.parts)
    return sorted(f.relative_to(folder).as_posix() for f in files if f.name != "edits.json")


def edits(recipe: str) -> list[dict[str, str]]:
    return json.loads((folder_of(recipe) / "edits.json").read_text())


def follow(recipe: str, tree: Path) -> None:
    """Make the example's change in a copy of the tree."""
    for name in new_files(recipe):
        assert not (tree / name).exists(), name
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder_of(recipe) / name, tree / name)
    for edit in edits(recipe):
        file = tree / edit["file"]
        text = file.read_text()
        assert text.count(edit["replace"]) == 1, f"{edit['file']}: {edit['replace']!r} must be there once"
        file.write_text(text.replace(edit["replace"], edit["by"]))


def run(command: list[str], folder: Path, **environment: str) -> None:
    done = subprocess.run(command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-4000:]


def with_the_extension(place: Path) -> None:
    """Adds this checkout's extension, where it has one: the recipe does not change its sources."""
    for built in (ROOT / "lgnet_fast").glob("_C.*"):
        shutil.copy(built, place / "lgnet_fast")


def copy_of_the_tree(folder: Path) -> Path:
    tree = folder / "tree"
    tree.mkdir()
    for name in ("lgnet_fast", "kernels", "csrc", "tests"):
        left_out = shutil.ignore_patterns("__pycache__", "_C*", "recipes", "build")
        shutil.copytree(ROOT / name, tree / name, ignore=left_out)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, tree / name)
    return tree


def installed(tree: Path, **environment: str) -> Path:
    """A folder to run the tree's tests in: the package as it is installed, and the tests."""
    place = tree.parent / "run"
    build = ["setup.py", "-q", "build", "--build-lib", str(place), "--build-temp", str(tree.parent / "temp")]
    run([sys.executable, *build], tree, **environment)
    shutil.copytree(tree / "tests", place / "tests")
    shutil.copy(tree / "pyproject.toml", place)
    return place


def run_tests(place: Path, *files: str, **environment: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files]
    run(command, place, OMP_NUM_THREADS="1", PYTHONPATH=str(place), **environment)


def test_the_files_of_recipes_exist() -> None:
    assert set(EXAMPLES) <= set(house.recipes(ROOT)) == set(house.TASKS)
    assert house.missing_files(ROOT) == []


def test_a_network_variant_needs_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"coarse_channels": 8, "local_channels": 4, "global_channels": 8}
    monkeypatch.setitem(variants._CONFIGS, "lgnet_tiny", row)
    assert "lgnet_tiny" in variants.list_models()
    printed = CliRunner().invoke(app, ["flops", "--model", "lgnet_tiny", "--json"])
    assert printed.exit_code == 0, printed.output
    expected = sum(p.numel() for p in LGNet(**row).parameters())
    assert json.loads(printed.stdout)["total"]["parameters"] == expected


def test_a_gpu_of_a_known_generation_needs_one_card(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from lgnet_fast.kernels import aot

    card = cards.Card("new", (8, 6), 28, 13e12, 0.7e12, 0.36e12)
    monkeypatch.setitem(cards.CARDS, card.name, card)
    assert cards.card_for("sm_89", 28) == card
    case = aot.engine_case(card, "lgnet", "float16", 1, False)
    grids = [launch.grid for launch in aot.launches(case)]
    assert len(grids) > 46  # convolutions, and the launches of the attention blocks
    assert grids != [launch.grid for launch in aot.launches(case._replace(card=cards.CARDS["RTX 4090"]))]


@pytest.mark.parametrize("recipe", EXAMPLES)
def test_examples_touch_what_their_recipe_lists(recipe: str) -> None:
    listed = {entry.replace("X", EXAMPLES[recipe]) for entry in house.recipes(ROOT)[recipe]}
    touched = {f"new {name}" for name in new_files(recipe)} | {f"edit {edit['file']}" for edit in edits(recipe)}
    assert touched <= listed
    assert len(touched) >= 3


@pytest.mark.once
def test_a_command_by_its_recipe(tmp_path: Path) -> None:
    tree = copy_of_the_tree(tmp_path)
    follow("command", tree)
    run_tests(installed(tree, LGNET_FAST_NO_EXTENSION="1"), "tests/test_cli_holes.py")


@pytest.mark.once
def test_a_stage_by_its_recipe(tmp_path: Path) -> None:
    """The network, the plan, the engine on the CPU in C++ where this machine has it, and the counts."""
    tree = copy_of_the_tree(tmp_path)
    follow("stage", tree)
    place = installed(tree, LGNET_FAST_NO_EXTENSION="1")
    with_the_extension(place)
    run_tests(place, "tests/test_plan.py::test_a_stage_of_a_new_class", "tests/test_models.py::test_parameter_counts")


@pytest.mark.once
def test_an_operator_by_its_recipe(tmp_path: Path) -> None:
    pytest.importorskip("triton", minversion="3.5")
    tree = copy_of_the_tree(tmp_path)
    follow("operator", tree)
    place = installed(tree, LGNET_FAST_NO_EXTENSION="1")
    run_tests(place, "tests/interpreted/test_masked_l1.py", TRITON_INTERPRET="1")


@pytest.mark.slow(reason="builds the C++ extension anew, minutes on one core")
def test_an_operator_with_its_cpp_kernels(tmp_path: Path) -> None:
    tree = copy_of_the_tree(tmp_path)
    follow("operator", tree)
    place = installed(tree)
    assert not (place / "lgnet_fast" / "_C_unavailable.txt").exists()
    run_tests(place, "tests/test_masked_l1.py", "tests/test_ops.py")


@pytest.fixture
def instruction_set(tmp_path: Path) -> Path:
    """A copy of the tree with the example's instruction set."""
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("the example is an x86-64 instruction set")
    if shutil.which(native.host_compiler()[0]) is None:
        pytest.skip(f"{native.host_compiler()[0]} is not installed")
    tree = copy_of_the_tree(tmp_path)
    follow("instruction set", tree)
    return tree


def test_an_instruction_set_has_what_the_kernels_ask_for(instruction_set: Path) -> None:
    """The compiler reads its unit, without making code: a second."""
    command = [*native.host_compiler(), "-std=c++17", "-fsyntax-only", "csrc/isa_sse41.cpp"]
    found = subprocess.run(command, cwd=instruction_set, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr


@pytest.mark.slow(reason="half a minute of compiling; the test above reads the unit, test_native.py the table")
def test_an_instruction_set_by_its_recipe(instruction_set: Path, tmp_path: Path) -> None:
    """Every kernel against the portable ones and double precision. Not optimised: seconds instead of minutes."""
    tree = instruction_set
    program = native.build(native.host_compiler(), tmp_path / "native", tree, ("-std=c++17", "-O0"))
    listed = subprocess.run([program, "list"], capture_output=True, text=True, check=True).stdout.split()
    assert listed[:2] == ["portable", "sse41"]
    checked = subprocess.run([program, "sse41"], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    checks = re.search(r"^sse41: (\d+) checks, 0 failed$", checked.stdout, re.MULTILINE)
    assert checks is not None, checked.stdout
    assert int(checks[1]) > 100
