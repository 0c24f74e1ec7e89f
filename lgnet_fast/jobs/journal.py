"""Work split among processes without collectives: every process keeps a journal of its part on the shared disk.

So no process waits for one that died. The journals of a job lie in a hidden folder beside the results. The same
command run again, with any number of processes, reads the finished items from them.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import threading
import time
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import files
from ..errors import JobError
from ..pipeline.writing import temporary_prefix, write_stream
from .world import World

FOLDER = ".lgnet_fast"

_HEARTBEAT = 2.0
# Seconds without a heartbeat after which a journal is that of a dead process.
_PATIENCE = 10.0
_POLL = 0.1


def fingerprint(*values: Any) -> str:
    """A short hash of values that JSON can hold."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]


def stamp(path: Path) -> list[int] | None:
    """[size, mtime in ns] of a file, to detect a replacement; None where there is no file."""
    try:
        found = path.stat()
    except OSError:
        return None
    return [found.st_size, found.st_mtime_ns]


def model_stamp(model: str | os.PathLike[str] | None) -> Any:
    """A text that identifies the weights of a model folder or hub id."""
    from ..weights import bundled_path

    folder = bundled_path() if model is None else Path(model)
    files = sorted(folder.iterdir()) if folder.is_dir() else [folder]
    return [str(model), [[file.name, stamp(file)] for file in files if not file.name.startswith(".")]]


@dataclass(frozen=True)
class Done:
    """A journal's record of one finished item."""

    record: dict[str, Any]
    written: list[int] | None


class Journal:
    """This process's part of a job, as lines of JSON in ``folder/<launch>-<rank>.jsonl``.

    Opening reads the parts of earlier launches. Every line is written by one call, so that a killed process leaves at
    most one truncated line. Lines that are no whole record are ignored: their items are done again.

    Raises JobError: an earlier launch of the job still runs on this host, or the folder cannot be written.
    """

    def __init__(self, folder: Path, world: World) -> None:
        self.folder, self.world = folder, world
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with files.lockable(folder) as descriptor:
                # Otherwise a launch that starts at the same time would not see this one's lock.
                files.lock(descriptor, wait=True)
                self._earlier = self._read_earlier()
                self._file = open(self._part(world.rank), "xb", buffering=0)  # noqa: SIM115 (closed in `close`)
                files.lock(self._file, wait=True)
        except OSError as cause:
            raise JobError(f"out: no journal can be kept in {str(folder)!r} ({cause})") from cause
        self._write({"host": socket.gethostname(), "pid": os.getpid(), "rank": world.rank, "size": world.size})
        self._stop = threading.Event()
        self._heart = threading.Thread(target=self._beat, daemon=True)
        self._heart.start()

    @property
    def has_earlier(self) -> bool:
        """Whether earlier launches finished any item."""
        return bool(self._earlier)

    def earlier(self, key: str, output: Path | None = None) -> dict[str, Any] | None:
        """The record of an item that an earlier launch finished; None where its `output` changed or is gone."""
        done = self._earlier.get(key)
        if done is None or (output is not None and stamp(output) != done.written):
            return None
        return done.record

    def writing(self, key: str, record: dict[str, Any], output: Path) -> None:
        """Record that `output` is about to be replaced. If the process dies before `done`, a changed file shows that
        the atomic replacement took place."""
        self._write({"key": key, "writing": record, "output": str(output), "before": stamp(output)})

    def done(self, key: str, record: dict[str, Any], output: Path | None = None) -> None:
        """Record that an item is finished, successfully or with an error in its record."""
        self._write({"key": key, "done": record, "written": None if output is None else stamp(output)})

    def finish(self) -> None:
        """Record that this process's part is finished."""
        self._write({"finished": True})

    def close(self) -> None:
        """Stop the heartbeat and release the file."""
        self._stop.set()
        self._heart.join()
        self._file.close()

    def collect(self, patience: float = 60.0) -> tuple[list[dict[str, Any]], list[int]]:
        """The records of all processes of this launch, once each has finished or died, and the ranks that died.

        A process counts as dead when its journal is neither finished nor locked (on this host), or when nothing was
        written to it for `patience` seconds (a heartbeat is written every 2); one that never started, after 5 times
        `patience`.
        """
        records, dead = [], []
        for rank in range(self.world.size):
            own, finished = self._await(rank, patience)
            records += own
            if not finished:
                dead.append(rank)
        return records, dead

    def remove_earlier(self) -> None:
        """Delete the journals of earlier launches; this launch's journals repeat their content."""
        for part in self.folder.glob("*.jsonl"):
            if not part.name.startswith(self.world.launch):
                files.remove(part)

    def _part(self, rank: int) -> Path:
        return self.folder / f"{self.world.launch}-{rank:05d}.jsonl"

    def _write(self, line: dict[str, Any]) -> None:
        try:
            write_stream(self._file, (json.dumps(line) + "\n").encode())
        except OSError as cause:
            raise JobError(f"out: the journal {self._file.name!r} cannot be written ({cause})") from cause

    def _beat(self) -> None:
        while not self._stop.wait(_HEARTBEAT):
            try:
                os.utime(self._file.name)
            except OSError:  # the first process has merged the report and cleared the folder
                return

    def _read_earlier(self) -> dict[str, Done]:
        found: dict[str, Done] = {}
        parts = [part for part in self.folder.glob("*.jsonl") if not part.name.startswith(self.world.launch)]
        for part in sorted(parts, key=lambda part: part.stat().st_mtime_ns):
            # Checked before the lines are read, so that lines written just before a process died are not missed.
            locked = files.is_locked(part)
            lines = _lines(part)
            if locked or (locked is None and _beats(part, lines)):
                raise JobError(f"out: another run of this job is at work (it holds {str(part)!r})")
            begun: dict[str, dict[str, Any]] = {}
            for line in lines:
                if "writing" in line:
                    begun[line["key"]] = line
                elif "done" in line:
                    begun.pop(line["key"], None)
                    if line["done"].get("error") is None:
                        found[line["key"]] = Done(line["done"], line["written"])
            for key, line in begun.items():
                output = Path(line["output"])
                for left in output.parent.glob(f"{_escaped(temporary_prefix(output))}*.tmp"):
                    files.remove(left)
                now = stamp(output)
                if now is not None and now != line["before"]:
                    found[key] = Done(line["writing"], now)
        return found

    def _await(self, rank: int, patience: float) -> tuple[list[dict[str, Any]], bool]:
        part = self._part(rank)
        last, since = stamp(part), time.monotonic()
        while True:
            # Checked before the lines are read, so that lines written just before a process died are not missed.
            locked = files.is_locked(part)
            lines = _lines(part)
            records = [line["done"] for line in lines if "done" in line]
            if any("finished" in line for line in lines):
                return records, True
            same_host = bool(lines) and lines[0].get("host") == socket.gethostname()
            now = stamp(part)
            if now != last:
                last, since = now, time.monotonic()
            silent = time.monotonic() - since > (patience if last is not None else 5 * patience)
            if silent or (same_host and locked is False):
                # Written but not recorded: the next launch finds the file.
                return records, False
            time.sleep(_POLL)


def _beats(part: Path, lines: list[dict[str, Any]]) -> bool:
    """Whether a journal without an end had a heartbeat a moment ago, for file systems without locks."""
    silent = time.time() - part.stat().st_mtime
    return silent < _PATIENCE and not any("finished" in line for line in lines)


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _lines(part: Path) -> list[dict[str, Any]]:
    lines = []
    try:
        text = part.read_bytes()
    except OSError:
        return []
    for raw in text.splitlines():
        try:
            line = json.loads(raw)
        except ValueError:  # truncated by a kill
            continue
        if isinstance(line, dict) and _is_whole(line):
            lines.append(line)
    return lines


# The field that tells what a line records -> the fields that it has, and their types.
_FIELDS: dict[str, dict[str, type | types.UnionType]] = {
    "writing": {"key": str, "writing": dict, "output": str, "before": list | None},
    "done": {"key": str, "done": dict, "written": list | None},
}


def _is_whole(line: dict[str, Any]) -> bool:
    """Whether a line has every field of what it records, of the right type."""
    fields = next((fields for kind, fields in _FIELDS.items() if kind in line), {})
    return all(name in line and isinstance(line[name], kind) for name, kind in fields.items())
