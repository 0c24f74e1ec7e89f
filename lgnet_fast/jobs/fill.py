"""`lgnet-fast run`: a picture, a folder or tar shards, masks paired by name, results written atomically, a report."""

from __future__ import annotations

import contextlib
import platform
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..errors import UsageError
from ..pipeline.inpainter import Inpainter
from ..pipeline.writing import is_any_stream, remove_leftovers
from ..version import __version__
from .entries import Entry, run_items
from .items import CONTROL, plan_items, refuse_report_clash
from .journal import FOLDER, Journal, fingerprint, model_stamp
from .options import FillOptions
from .report import ReportFile
from .world import STOP_SIGNALS, World


def fill(options: FillOptions, world: World | None = None) -> int:
    """The run command. Returns its exit code: 0 all done, 1 some failed or were left out, 130 after Ctrl-C, 143 after
    SIGTERM.

    The report is rewritten during the run, so that a killed run leaves one too, with `complete` false.

    With `resume`, and under `accelerate launch` unless the result goes to a stream, journals in the hidden folder
    ``.lgnet_fast`` of the output folder record finished items: the same command run again does only the rest, and its
    report covers all. Of several processes the first one waits for the others, merges the report and returns the exit
    code of the whole job; the others return 0 once their failures are in the report, because launchers end all
    processes after another code.

    Raises UsageError, WeightsError, BackendError, JobError before or instead of running.
    """
    run = _Run(options, world or World.from_environment())
    with contextlib.closing(run):
        run.work()
        if not run.interrupted and not run.merge():
            return 0
        written = run.finish()
    if run.interrupted and run.world.rank > 0:
        return run.interrupted_code
    run.say_what_was_done()
    if run.interrupted:
        return run.interrupted_code
    bad = any(entry.status in ("failed", "left_out") for entry in run.entries)
    return 1 if bad or run.dead or not written else 0


class _Run:
    """This process's part of a run: items, entries, journal, report, and the output on the terminal."""

    def __init__(self, options: FillOptions, world: World) -> None:
        self.started = time.perf_counter()
        self.options, self.world = options, world
        self.items = plan_items(options, world)
        keeps_journal = options.resume or (world.launched and not is_any_stream(options.result))
        folder = options.journal_folder if keeps_journal else None
        self.settings = options.settings
        self.report = self._open_report()
        self.journal: Journal | None = None
        if folder is not None:
            job = fingerprint(options.settings, model_stamp(options.model), __version__)
            self.journal = Journal(folder / FOLDER / f"run-{job}", world)
        self.entries: list[Entry] = []
        self.dead: list[int] = []
        self.came: list[int] = []
        self.told: set[str] = set()  # why the report could not be written
        self.interrupted = self.finished = False
        # While they run, the report covers this process alone: its pictures, and how many are planned for it.
        running = {"count": world.size, "counted": 1}
        self.processes: dict[str, Any] | None = None if self.journal is None else running
        # File names are printed without markup: rich would interpret [brackets] in them, and wrap long ones.
        self.console = Console(stderr=True, soft_wrap=True, markup=False, highlight=False)
        if options.resume and not options.skip_existing and self.world.rank == 0:
            self._warn_without_earlier()

    def _warn_without_earlier(self) -> None:
        """Say that --resume finds results but no journal: the run that made them kept none."""
        if self.journal is None or self.journal.has_earlier:
            return
        if any(file.exists() for file in self._files()):
            self.console.print(
                "warning: --resume: no run with --resume and these settings was here before, so pictures that are "
                "there are filled again; --skip-existing leaves them"
            )

    def _files(self) -> list[Path]:
        """The results that are files."""
        outputs = [item.output for item in self.items if item.problem is None]
        return [output for output in outputs if not is_any_stream(output)]

    def _open_report(self) -> ReportFile | None:
        path = self.options.report
        if path is None or self.world.rank > 0:
            return None
        try:
            refuse_report_clash(path, self.items, self.options.result)
            return ReportFile(path)
        except OSError as cause:
            raise UsageError(f"report: expected a file that can be written, got {str(path)!r} ({cause})") from cause

    @property
    def interrupted_code(self) -> int:
        """The exit code after a signal, as in shells: 130 after Ctrl-C, 143 after SIGTERM."""
        return 128 + (self.came[0] if self.came else signal.SIGINT)

    def work(self) -> None:
        """Fill the items of this process until a signal arrives."""
        options, world = self.options, self.world
        if world.rank == 0:
            remove_leftovers((file.parent for file in self._files()), age=0 if world.size == 1 else 600)
        self._update_report()  # until the first picture is done, the file would be the report of an earlier run
        inpainter = Inpainter.from_pretrained(
            options.model, device=world.device(options.device), dtype=options.dtype, backend=options.backend
        )
        self.settings |= {"device": str(inpainter.device), "dtype": str(inpainter.dtype).removeprefix("torch.")}
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        shown = self.console.is_terminal and world.rank == 0
        with Progress(*columns, console=self.console, disable=not shown, transient=True) as progress:
            share = "" if world.size == 1 else f" (process 1 of {world.size})"
            task = progress.add_task(f"filling{share}", total=len(self.items))

            def tell(entry: Entry) -> None:
                self._note(entry)
                progress.advance(task)
                self._update_report()
                if self.came:
                    raise KeyboardInterrupt

            try:
                with _signals_told(self.came):
                    run_items(
                        self.items,
                        inpainter,
                        quality=options.quality,
                        skip_existing=options.skip_existing,
                        call=options.call,
                        journal=self.journal,
                        tell=tell,
                    )
            except KeyboardInterrupt:
                self.interrupted = True

    def _note(self, entry: Entry) -> None:
        self.entries.append(entry)
        if not entry.earlier:
            for text in entry.warnings:
                self.console.print(f"warning: {shown_text(entry.input)}: {shown_text(text)}")
        if entry.error is not None:
            what = "left out" if entry.status == "left_out" else "failed"
            self.console.print(f"{what}: {shown_text(entry.input)}: {shown_text(entry.error)}")

    def merge(self) -> bool:
        """Merge the entries of all processes; False in a process that leaves this to the first one."""
        if self.journal is None:
            return True
        self.journal.finish()
        if self.world.rank > 0:
            return False
        if self.world.size > 1:
            records, self.dead = self.journal.collect()
            self.entries = sorted((Entry(**record) for record in records), key=lambda entry: entry.input)
        self.processes = {"count": self.world.size, "died": self.dead}
        if not self.dead:
            self.journal.remove_earlier()
        return True

    def finish(self) -> bool:
        """Write the last report; returns whether it could be written."""
        self.finished = True
        return self._write_report(len(self.items) if self.interrupted else None)

    def _update_report(self) -> None:
        """Write the report of a run that goes on, if it is time to."""
        if self.report is not None and self.report.due:
            self._write_report(len(self.items))

    def _write_report(self, planned: int | None) -> bool:
        if self.report is None:
            return True
        seconds = time.perf_counter() - self.started
        try:
            self.report.write(report_of(self.entries, self.settings, seconds, self.processes, planned))
        except OSError as cause:
            reason = cause.strerror or str(cause)
            if reason not in self.told:
                self.told.add(reason)
                self.console.print(f"failed: the report {str(self.options.report)!r} could not be written ({reason})")
            return False
        return True

    def close(self) -> None:
        """Close journal and report; after an error, the report is updated first."""
        if self.journal is not None:
            self.journal.close()
        if self.report is not None:
            if not self.finished and self.entries:
                self._write_report(len(self.items))
            self.report.close()

    def say_what_was_done(self) -> None:
        """The last lines on the terminal."""
        seconds = time.perf_counter() - self.started
        counts = Counter(entry.status for entry in self.entries)
        earlier = sum(entry.earlier for entry in self.entries)
        note = f" ({earlier} by an earlier run)" if earlier else ""
        left = f", {counts['left_out']} left out" if counts["left_out"] else ""
        total = len(self.items) if self.interrupted else len(self.entries)
        self.console.print(
            f"{'interrupted: ' if self.interrupted else ''}{counts['ok']} filled{note}, {counts['skipped']} skipped, "
            f"{counts['failed']} failed{left} of {total} in {seconds:.1f} s"
        )
        for rank in self.dead:
            self.console.print(
                f"failed: process {rank} of {self.world.size} ended before its part; run the same command again"
            )


def report_of(
    entries: Sequence[Entry],
    settings: dict[str, Any],
    seconds: float,
    processes: dict[str, Any] | None = None,
    planned: int | None = None,
) -> dict[str, Any]:
    """The report as JSON: `items`, `totals`, `settings`, `versions`; for a job with a journal also `processes` and
    the items of earlier launches. `processes`: their "count", and the ranks that "died"; before the parts of all are
    merged, how many are "counted" in the report. `complete`: whether these are all of the `planned` items (None: they
    are)."""
    counts = Counter(entry.status for entry in entries)
    items = [asdict(entry) for entry in entries]
    if processes is None:
        for item in items:
            del item["earlier"]
    return {
        "complete": planned is None,
        **({} if planned is None else {"planned": planned}),
        "items": items,
        "totals": {
            "items": len(entries),
            **{status: counts[status] for status in ("ok", "failed", "skipped", "left_out")},
            **({} if processes is None else {"earlier": sum(entry.earlier for entry in entries)}),
            "seconds": round(seconds, 4),
        },
        "settings": settings,
        **({} if processes is None else {"processes": processes}),
        "versions": {
            "lgnet_fast": __version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "pillow": PIL.__version__,
            "python": platform.python_version(),
        },
    }


@contextlib.contextmanager
def _signals_told(came: list[int]) -> Iterator[None]:
    """In this context, Ctrl-C and SIGTERM raise KeyboardInterrupt and are appended to `came`.

    `came` is needed because Python drops exceptions that are raised in a destructor.
    """

    def handle(number: int, frame: Any) -> None:
        came.append(number)
        raise KeyboardInterrupt

    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in STOP_SIGNALS:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):  # ignored, as in background jobs of a shell
                before[number] = signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def shown_text(text: str) -> str:
    """`text` for a terminal: control characters and bytes of names that are not UTF-8 escaped."""
    text = CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)
    return text.encode("utf-8", "backslashreplace").decode()
