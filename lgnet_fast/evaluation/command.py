"""`lgnet-fast eval`: `evaluate` with a progress bar, the table on the terminal, and an exit code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ..jobs.fill import shown_text
from ..jobs.world import World
from .options import SHEET, EvaluationOptions
from .scoring import evaluate


def run(options: EvaluationOptions, draw: Callable[[Table], Any]) -> int:
    """The eval command. Returns its exit code: 0 if every picture was evaluated, 1 if some could not be.

    `draw` prints the table on standard output. Raises the errors of `evaluate`.
    """
    world = World.from_environment()
    # File names are printed without markup: rich would interpret [brackets] in them, and wrap long ones.
    console = Console(stderr=True, soft_wrap=True, markup=False, highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    shown = console.is_terminal and world.rank == 0
    with Progress(*columns, console=console, disable=not shown, transient=True) as progress:
        share = "" if world.size == 1 else f" (process 1 of {world.size})"
        task = progress.add_task(f"evaluating{share}", total=None)

        def tell(done: int, total: int, error: str | None) -> None:
            if error is not None:
                console.print(f"failed: {shown_text(error)}")
            progress.update(task, completed=done, total=total)

        try:
            result = evaluate(options, world, tell)
        except KeyboardInterrupt:
            if options.folder is not None and world.rank == 0:
                console.print("interrupted: the same command goes on from here")
            raise
    if result is None:
        return 0
    if result.scores:
        draw(result.table())
    for note in result.notes():
        console.print(f"warning: {note}")
    if options.folder is not None:
        sheet = f", {SHEET}" if (options.folder / SHEET).is_file() else ""
        console.print(f"written: {shown_text(str(options.folder / 'evaluation.json'))}, evaluation.md{sheet}")
    return 1 if result.failures or result.died or not result.scores else 0
