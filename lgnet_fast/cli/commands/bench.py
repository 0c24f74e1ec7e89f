"""`lgnet-fast bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..application import command
from ..checkout import from_checkout
from ..options import refuse_file
from ..output import say


@command()
def bench(
    report: Annotated[Path | None, typer.Option(help="Folder for report.html, report.md and their pictures.")] = None,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Write the report from stored results; run nothing.")
    ] = False,
    store: Annotated[
        bool, typer.Option("--store", help="Make this run the one that later runs are compared with.")
    ] = False,
) -> None:
    """Run the benchmarks beside the stored ones of this kind of machine, and report; in a checkout only.

    Exit code: 0 fine, 1 something failed or got slower, 2 the run could not start.
    """
    if report_only and (report is None or store):
        raise typer.BadParameter("needs --report, and excludes --store", param_hint="--report-only")
    refuse_file("report", report)
    suite = from_checkout("bench.report")
    own = None if report is None else report / "results"
    code = 0 if report_only else suite.run_suite(own, store)
    if report is not None:
        folders = [suite.RESULTS, *([] if report_only else [own])]
        for file in suite.write_report(report, folders):
            say(file)
    raise typer.Exit(min(code, 2))
