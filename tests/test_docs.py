"""The documentation against the repository: links, variables, targets, commands; and the built site."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from PIL import ExifTags, Image

from lgnet_fast import cli
from lgnet_fast.samples import sample_paths
from lgnet_fast.training.config import config_of

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"

if not (ROOT / "mkdocs.yml").is_file():
    pytest.skip("needs a checkout", allow_module_level=True)


def sources() -> list[Path]:
    folders = ("lgnet_fast", "kernels", "csrc", "bench", "tests")
    found = [
        path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".cpp", ".h")
    ]
    return [*found, ROOT / "setup.py", ROOT / "Makefile"]


def test_every_environment_variable_is_documented():
    read = re.compile(r"""(?:environ(?:\.get)?[(\[]|getenv\()\s*["'](LGNET_\w+)["']""")
    named = re.compile(r"""["'](LGNET_(?:FAST|BENCH)_\w+)["']""")
    page = (DOCS / "environment.md").read_text(encoding="utf-8")
    found = {
        name
        for path in sources()
        for pattern in (read, named)
        for name in pattern.findall(path.read_text(encoding="utf-8"))
    }
    assert {"LGNET_FAST_CACHE", "LGNET_FAST_NO_EXTENSION", "LGNET_BENCH_SMOKE"} <= found
    assert {name for name in found if f"`{name}`" not in page} == set()
    assert set(re.findall(r"`(LGNET_\w+)`", page)) <= found


def test_every_variable_that_the_package_reads_is_documented():
    read = re.compile(
        r"""(?:environ(?:\.get)?[(\[]\s*|getenv\(\s*)["'](\w+)["']|["'](\w+)["'] (?:not )?in os\.environ"""
    )
    files = [*(ROOT / "lgnet_fast").rglob("*.py"), *(ROOT / "kernels").rglob("*.py"), ROOT / "setup.py"]
    found = {
        name for file in files for pair in read.findall(file.read_text(encoding="utf-8")) for name in pair if name
    }
    assert {"RANK", "MAX_JOBS", "XDG_CACHE_HOME", "TRITON_CACHE_DIR"} <= found
    documented = set(re.findall(r"[A-Z_]{4,}", (DOCS / "environment.md").read_text(encoding="utf-8")))
    assert found - documented == set()


def test_make_targets_that_are_named_exist_and_are_in_its_help():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (phony,) = re.findall(r"^\.PHONY: (.*)$", makefile.replace("\\\n", ""), re.MULTILINE)
    targets = set(phony.split())
    helped = set(re.findall(r'^\t@echo "make ([\w-]+)', makefile, re.MULTILINE))
    assert targets - {"help", "clean"} <= helped <= targets
    for path in (ROOT / "README.md", *DOCS.glob("*.md"), *(ROOT / ".github").rglob("*.md")):
        named = re.findall(r"(?:`|^)make ([\w-]+)", path.read_text(encoding="utf-8"), re.MULTILINE)
        assert set(named) <= targets, path


@pytest.mark.skipif(not (ROOT / ".ci").is_dir(), reason="a source distribution has no .ci")
def test_the_readme_names_what_continuous_integration_runs():
    run = re.findall(r"\bmake ([\w-]+)$", (ROOT / ".ci" / "run").read_text(encoding="utf-8"), re.MULTILINE)
    assert {"lint", "test"} <= set(run)
    assert set(run) <= set(
        re.findall(r"(?:`|^)make ([\w-]+)", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    )


def test_commands_that_are_named_exist():
    commands = set(typer.main.get_command(cli.app).commands)
    pages = {ROOT / "README.md", *DOCS.glob("*.md")} - {DOCS / "contributing.md"}  # which names an example of one
    for path in pages:
        named = re.findall(r"(?:`|^|\| )lgnet-fast ([a-z]+)", path.read_text(encoding="utf-8"), re.MULTILINE)
        assert set(named) <= commands, path
    assert all(f"`lgnet-fast {name}" in (DOCS / "commands.md").read_text(encoding="utf-8") for name in commands)


def test_readme_is_short_and_its_links_hold():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("http")]
    assert links
    for link in links:
        assert (ROOT / link).exists(), link


def test_python_of_the_pages_runs_as_it_stands(tmp_path):
    photo, mask = sample_paths()["chelsea"]
    Image.open(photo).convert("RGB").save(tmp_path / "photo.jpg")
    Image.open(mask).save(tmp_path / "mask.png")
    pages = [ROOT / "README.md", *(DOCS / f"{name}.md" for name in ("index", "engine", "operators", "pictures"))]
    found = {page: re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL) for page in pages}
    assert [page for page in pages if not found[page]] == []
    snippets = [code for page in pages for code in found[page]]
    (tmp_path / "all.py").write_text("\n".join(f"exec({code!r}, {{}})" for code in snippets), encoding="utf-8")
    done = subprocess.run([sys.executable, "-W", "error", "all.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "filled.png").size == Image.open(photo).size


def test_yaml_of_the_pages_is_a_configuration_of_training():
    yaml = pytest.importorskip("yaml")
    blocks = [
        b
        for page in DOCS.glob("*.md")
        for b in re.findall(r"^```yaml\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    ]
    assert [config_of(yaml.safe_load(block)).model.init_from for block in blocks] == ["bundled"]


def test_files_that_the_code_cites_exist():
    for path in sources():
        cited = re.findall(r"\bdocs/[\w.-]+\.(?:md|svg|jpg|jsonl)", path.read_text(encoding="utf-8"))
        assert all((ROOT / name).is_file() for name in cited), (path, cited)


def test_every_page_is_in_the_navigation():
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:\n", 1)[1]
    pages = set(re.findall(r": ([\w-]+\.md)$", nav, re.MULTILINE))
    assert {page.name for page in DOCS.glob("*.md")} == pages - {"model_card.md", "changelog.md"}


def test_examples_are_short():
    scripts = sorted((ROOT / "examples").glob("*.py"))
    assert len(scripts) >= 5
    for script in scripts:
        assert len(script.read_text(encoding="utf-8").splitlines()) < 40, script
        assert script.name in (DOCS / "index.md").read_text(encoding="utf-8"), script


def test_the_photo_example_takes_a_turned_photo_and_no_other_number_of_arguments(tmp_path):
    photo, mask = (Image.open(path) for path in sample_paths()["chelsea"])
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    photo.convert("RGB").transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.jpg", exif=exif)
    mask.save(tmp_path / "mask.png")

    def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "examples" / script), *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    done = run("fill_photo.py", "turned.jpg", "mask.png", "filled.jpg")
    assert done.returncode == 0, done.stderr
    assert "turned.jpg -> filled.jpg: the mask covers 3.8%" in done.stdout
    assert Image.open(tmp_path / "filled.jpg").size == photo.size
    for script, expected in ("fill_photo.py", "PHOTO MASK RESULT"), ("fill_folder.py", "PICTURES MASKS RESULTS"):
        done = run(script, "turned.jpg", "mask.png")
        assert done.returncode == 1
        assert f"python examples/{script} [{expected}]" in done.stderr
    assert not (tmp_path / "examples_output").exists()


def test_the_version_stands_in_one_place():
    import lgnet_fast

    found = subprocess.run(
        ["git", "grep", "-lF", f'"{lgnet_fast.__version__}"', "--", ".", ":!tests", ":!bench", ":!docs"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    if found.returncode == 128:
        pytest.skip("needs a clone")
    assert found.stdout.split() == ["lgnet_fast/version.py"]


@pytest.mark.skipif(not (ROOT / "site").is_dir(), reason="`make docs` builds the site first")
def test_the_site_asks_for_nothing_from_elsewhere():
    pages = list((ROOT / "site").rglob("*.html"))
    assert len(pages) > 15
    loaded = re.compile(r"""<(?:script|img|iframe|source)[^>]+src="?(?:https?:)?//|<link[^>]+href="?(?:https?:)?//""")
    for page in pages:
        assert not loaded.search(page.read_text(encoding="utf-8")), page
    for style in (ROOT / "site").rglob("*.css"):
        assert not re.search(r"url\(['\"]?(?:https?:)?//|@import", style.read_text(encoding="utf-8")), style
