"""The documentation against the repository: recipes, links, variables, targets, commands; and the built site."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import typer

from lgnet_fast import cli

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"

if not (ROOT / "mkdocs.yml").is_file():
    pytest.skip("needs a checkout", allow_module_level=True)

# Recipe -> how many files it may take.
RECIPES = {
    "Add an operator": 11,
    "Add a stage": 7,
    "Add a network variant": 2,
    "Add an instruction set": 3,
    "Add a GPU": 2,
    "Add a command": 3,
}
PLACEHOLDER = re.compile(r"(?<![A-Za-z])X(?![A-Za-z])")


def recipe(title: str) -> list[tuple[str, str]]:
    """("new" or "edit", path) of every file of a recipe in docs/contributing.md."""
    text = (DOCS / "contributing.md").read_text()
    section = text.split(f"### {title}\n", 1)[1].split("\n### ", 1)[0]
    block = section.split("```files\n", 1)[1].split("```", 1)[0]
    return [(line.split()[0], line.split()[1]) for line in block.splitlines()]


@pytest.mark.parametrize("title", RECIPES)
def test_files_of_recipes(title):
    files = recipe(title)
    assert 0 < len(files) <= RECIPES[title]
    for action, path in files:
        if action == "edit":
            assert (ROOT / path).is_file(), path
        else:
            assert action == "new"
            assert PLACEHOLDER.search(path), path
            assert not (ROOT / path).exists(), path


def test_no_recipe_is_missing_here():
    titles = re.findall(r"^### (Add .*)$", (DOCS / "contributing.md").read_text(), re.MULTILINE)
    assert titles == list(RECIPES)


def sources() -> list[Path]:
    folders = ("lgnet_fast", "kernels", "csrc", "bench", "tests")
    found = [
        path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".cpp", ".h")
    ]
    return [*found, ROOT / "setup.py", ROOT / "Makefile"]


def test_every_environment_variable_is_documented():
    read = re.compile(r"""(?:environ(?:\.get)?[(\[]|getenv\()\s*["'](LGNET_\w+)["']""")
    named = re.compile(r"""["'](LGNET_(?:FAST|BENCH)_\w+)["']""")
    page = (DOCS / "environment.md").read_text()
    found = {name for path in sources() for pattern in (read, named) for name in pattern.findall(path.read_text())}
    assert {"LGNET_FAST_CACHE", "LGNET_FAST_NO_EXTENSION", "LGNET_BENCH_SMOKE"} <= found
    assert {name for name in found if f"`{name}`" not in page} == set()
    assert set(re.findall(r"`(LGNET_\w+)`", page)) <= found


def test_make_targets_that_are_named_exist_and_are_in_its_help():
    makefile = (ROOT / "Makefile").read_text()
    (phony,) = re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    targets = set(phony.split())
    helped = set(re.findall(r'^\t@echo "make ([\w-]+)', makefile, re.MULTILINE))
    assert targets - {"help", "clean"} <= helped <= targets
    for path in (ROOT / "README.md", *DOCS.glob("*.md"), *(ROOT / ".github").rglob("*.md")):
        named = re.findall(r"(?:`|^)make ([\w-]+)", path.read_text(), re.MULTILINE)
        assert set(named) <= targets, path


def test_commands_that_are_named_exist():
    commands = set(typer.main.get_command(cli.app).commands)
    for path in (ROOT / "README.md", *DOCS.glob("*.md")):
        named = re.findall(r"(?:`|^|\| )lgnet-fast ([a-z]+)", path.read_text(), re.MULTILINE)
        assert set(named) <= commands, path
    assert all(f"`lgnet-fast {name}" in (DOCS / "commands.md").read_text() for name in commands)


def test_readme_is_short_and_its_links_hold():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("http")]
    assert links
    for link in links:
        assert (ROOT / link).exists(), link


def test_files_that_the_code_cites_exist():
    for path in sources():
        cited = re.findall(r"\bdocs/[\w.-]+\.(?:md|svg|jpg|jsonl)", path.read_text())
        assert all((ROOT / name).is_file() for name in cited), (path, cited)


def test_every_page_is_in_the_navigation():
    nav = (ROOT / "mkdocs.yml").read_text().split("\nnav:\n", 1)[1]
    pages = set(re.findall(r": ([\w-]+\.md)$", nav, re.MULTILINE))
    assert {page.name for page in DOCS.glob("*.md")} == pages - {"model_card.md", "changelog.md"}


def test_examples_are_short():
    scripts = sorted((ROOT / "examples").glob("*.py"))
    assert len(scripts) >= 5
    for script in scripts:
        assert len(script.read_text().splitlines()) < 40, script
        assert script.name in (DOCS / "index.md").read_text(), script


def test_the_version_stands_in_one_place():
    import lgnet_fast

    found = subprocess.run(
        ["git", "grep", "-lF", f'"{lgnet_fast.__version__}"', "--", ".", ":!tests", ":!bench", ":!docs"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    if found.returncode == 128:
        pytest.skip("needs a clone")
    assert found.stdout.split() == ["lgnet_fast/__init__.py"]


@pytest.mark.skipif(not (ROOT / "site").is_dir(), reason="`make docs` builds the site first")
def test_the_site_asks_for_nothing_from_elsewhere():
    pages = list((ROOT / "site").rglob("*.html"))
    assert len(pages) > 15
    loaded = re.compile(r"""<(?:script|img|iframe|source)[^>]+src="?(?:https?:)?//|<link[^>]+href="?(?:https?:)?//""")
    for page in pages:
        assert not loaded.search(page.read_text()), page
    for style in (ROOT / "site").rglob("*.css"):
        assert not re.search(r"url\(['\"]?(?:https?:)?//|@import", style.read_text()), style
