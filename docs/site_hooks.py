"""What the site needs beyond its pages: files that lie elsewhere, the commands' options, roles in docstrings."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import typer
from griffe import Extension
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from typer.testing import CliRunner

from lgnet_fast import cli

ROOT = Path(__file__).resolve().parent.parent
CARD = "lgnet_fast/weights/lgnet_small/README.md"
INSERTED = {"model_card.md": CARD, "changelog.md": "CHANGELOG.md"}
"""Page of the site -> file of the repository."""

ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod):`[~.]?([^`<]+)`")


def command_reference() -> str:
    """Every command's --help, as Markdown."""
    runner = CliRunner(env={"COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb"})
    parts = ["\n\n## Every option"]
    for name in typer.main.get_command(cli.app).commands:  # type: ignore[attr-defined]
        shown = runner.invoke(cli.app, [name, "--help"], prog_name="lgnet-fast")
        text = "\n".join(line.rstrip() for line in shown.output.strip().splitlines())
        parts.append(f"### {name}\n\n```text\n{text}\n```")
    return "\n\n".join(parts)


def instruction_sets() -> str:
    """The rows of csrc/isa.inc as a Markdown table."""
    text = (ROOT / "csrc" / "isa.inc").read_text(encoding="utf-8")
    rows = re.findall(r"^// (.+)\nLGNET_ROW\((\w+),", text, re.MULTILINE)
    return "\n".join(["| name | processors |", "|---|---|", *(f"| `{name}` | {which} |" for which, name in rows)])


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of :data:`INSERTED`."""
    for page, source in INSERTED.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links that hold in the repository, made to hold in the site."""
    markdown = markdown.replace(f"(../{CARD})", "(model_card.md)")
    if page.file.src_uri == "commands.md":
        markdown += command_reference()
    if page.file.src_uri == "instruction_sets.md":
        markdown = markdown.replace("[`csrc/isa.inc`](../csrc/isa.inc)", "`csrc/isa.inc`")
        markdown = markdown.replace("## Where things are", f"{instruction_sets()}\n\n## Where things are")
    if page.file.src_uri == "model_card.md":
        markdown = markdown.replace("(../../../docs/", "(").replace(
            "[ATTRIBUTION.tsv.gz](ATTRIBUTION.tsv.gz)", "`ATTRIBUTION.tsv.gz`"
        )
    return markdown


class Roles(Extension):
    """Sphinx's roles, :func:`name`, as plain code."""

    def on_object(self, *, obj: Any, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub(r"`\1`", obj.docstring.value)
