"""Folders whose files are saved and read as one set.

``manifest.json`` holds the size and hash of every file of the set. A save writes all files into a sub-folder, then
replaces the manifest, which makes the new set valid, then moves the files into place. A save that is killed before
the manifest is replaced leaves the old set; one that is killed later leaves the new set complete in the sub-folder
that the manifest names, and it is read from there. The next save removes the remains of a killed one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .. import files
from ..errors import LGNetError, WeightsError

MANIFEST = "manifest.json"
MODEL_CARD_FILE = "README.md"
_STAGING = ".saving-"
_CHUNK = 1 << 22
_PATIENCE = 300.0
"""Seconds that a save waits for another save to the same folder."""


def file_hash(path: Path) -> str:
    """BLAKE2b of the BLAKE2b hashes of the file's chunks of 4 MiB, which several threads can take; 32 digits."""

    def of_chunk(offset: int) -> bytes:
        with open(path, "rb") as file:
            file.seek(offset)
            return hashlib.blake2b(file.read(_CHUNK), digest_size=16).digest()

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        digests = pool.map(of_chunk, range(0, os.path.getsize(path), _CHUNK))
        return hashlib.blake2b(b"".join(digests), digest_size=16).hexdigest()


def complete_set(directory: Path, names: Sequence[str], *, manifest_needed: bool = False) -> Path:
    """The folder that holds the files `names` of a save: `directory`, or where a killed save left the complete set.

    A folder without a manifest, such as one from another program, is read unchecked.

    Args:
        manifest_needed: a folder without one is an error, and no error advises to delete it.

    Raises:
        WeightsError: a file is missing, or differs from the manifest's hash; the manifest is damaged, of other files,
            or missing where it is needed.
    """
    advice = "save again" if manifest_needed else f"save again, or delete {MANIFEST} to take the files unchecked"
    if not (directory / MANIFEST).is_file():
        if manifest_needed:
            raise WeightsError(f"{directory}: {_incomplete(directory, names)}")
        return directory
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        held = manifest["files"]
        foreign = isinstance(held, dict) and len(held) > 0 and held.keys().isdisjoint(names)
        wanted = {name: (int(held[name]["bytes"]), str(held[name]["hash"])) for name in names if not foreign}
        staging = directory / str(manifest["staging"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(
            f"{directory / MANIFEST} is damaged ({type(error).__name__}: {error}); {advice}"
        ) from error
    if foreign:  # a model's folder in place of an engine's
        raise WeightsError(
            f"{directory}: expected the files {_listed(names)}, got a {MANIFEST} of {_listed([*held])}"
        )

    def wrong(folder: Path) -> list[str]:
        return [
            name
            for name, (size, digest) in wanted.items()
            if not (folder / name).is_file()
            or os.path.getsize(folder / name) != size
            or file_hash(folder / name) != digest
        ]

    differing = wrong(directory)
    if not differing:
        return directory
    if staging.parent == directory and staging.name.startswith(_STAGING) and not wrong(staging):
        return staging
    if missing := [name for name in differing if not (directory / name).is_file()]:
        raise WeightsError(f"{directory}: missing {_listed(missing)}; save again")  # no deletion brings them back
    raise WeightsError(
        f"{directory}: {_listed(differing)}: damaged or of another save, size or hash is not what {MANIFEST} says; "
        f"{advice}"
    )


def _incomplete(directory: Path, names: Sequence[str]) -> str:
    """What a folder that needs a manifest and has none lacks."""
    wanted = (*names, MANIFEST)
    missing = [name for name in wanted if not (directory / name).is_file()]
    if missing == [MANIFEST]:
        return f"expected a {MANIFEST} beside {_listed(names)}; save again"
    if len(missing) < len(wanted):
        return f"missing {_listed(missing)}; save again"
    got = "none of them" if directory.is_dir() else "a file" if directory.exists() else "nothing of that name"
    return f"expected a folder with {_listed(wanted)}, got {got}"


def _listed(names: Sequence[str]) -> str:
    """ "a, b and c"."""
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


@contextlib.contextmanager
def _alone(directory: Path) -> Iterator[bool]:
    """Wait until no other save to this folder runs; yields whether the file system has locks."""
    with files.lockable(directory) as descriptor:
        begin = time.monotonic()
        while (locked := files.lock(descriptor)) is False:
            if time.monotonic() - begin > _PATIENCE:
                raise LGNetError(f"save: another process has been saving to {directory} for {_PATIENCE:.0f} seconds")
            time.sleep(0.05)
        try:
            yield bool(locked)
        finally:
            if locked:
                files.unlock(descriptor)


def _sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk, where the system allows it."""
    try:
        descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)  # there only what can be written
    except OSError:  # folders on Windows
        return
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put(file: Path, target: Path) -> None:
    """Replace `target` by `file`, which stays where it is."""
    copy = file.with_name(file.name + ".copy")
    try:
        os.link(file, copy)
    except OSError:  # a file system without links
        shutil.copyfile(file, copy)
        _sync(copy)
    try:
        files.replace(copy, target)
    except OSError:
        copy.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def staged(directory: Path) -> Iterator[Path]:
    """A context with a folder to write into; its files then replace those of `directory`, all or none.

    An existing model card stays; it is not part of the set.

    Raises:
        LGNetError: it cannot be written. The old files stay until all new ones are written.
    """
    staging: Path | None = None
    committed = False
    if "\0" in str(directory):  # a ValueError of the system's functions
        raise LGNetError(f"save: expected a folder's name, got {str(directory)!r}")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with _alone(directory) as alone:
            # Remains of killed saves; one of them may hold the valid set.
            left = remains_of_saves(directory) if alone else []
            counts = _named_staging(directory)
            for folder in left:
                if folder.name != counts:
                    shutil.rmtree(folder, ignore_errors=True)
            staging = directory / f"{_STAGING}{uuid.uuid4().hex}"
            # Windows turns the mode into a list of users, which files keep when they are moved.
            staging.mkdir(0o777 if os.name == "nt" else 0o700)
            yield staging
            # Largest files first, so that the small description comes last.
            written = sorted(staging.iterdir(), key=lambda file: (-file.stat().st_size, file.name))
            members: dict[str, Any] = {}
            for file in written:
                _sync(file)
                if file.name != MODEL_CARD_FILE:
                    members[file.name] = {"bytes": file.stat().st_size, "hash": file_hash(file)}
            manifest = staging / MANIFEST
            manifest.write_text(
                json.dumps({"files": members, "staging": staging.name}, indent=2) + "\n", encoding="utf-8"
            )
            _sync(manifest)
            readers = manifest.stat().st_mode & 0o044  # those to whom the user's umask gives files
            os.chmod(staging, 0o700 | readers | readers >> 2)
            files.replace(manifest, directory / MANIFEST)
            committed = True
            _sync(directory)
            try:
                for file in written:
                    if file.name in members or not (directory / file.name).exists():
                        _put(file, directory / file.name)
            except OSError as error:
                if not files.is_in_use(error):
                    raise
                return  # an old file is in use, by a loaded model for instance: the set is read from the sub-folder
            _sync(directory)
            committed = False  # the sub-folder is no longer needed
            for folder in left:
                shutil.rmtree(folder, ignore_errors=True)
    except (OSError, SafetensorError, UnicodeError) as error:  # the last: a name that is not UTF-8
        raise LGNetError(f"save: {directory} could not be written: {error}") from error
    finally:
        if staging is not None and not committed:
            shutil.rmtree(staging, ignore_errors=True)


def remains_of_saves(directory: Path) -> list[Path]:
    """Sub-folders that saves have written into: of a killed save, or of one that runs."""
    return list(directory.glob(_STAGING + "*"))


def _named_staging(directory: Path) -> str | None:
    """Name of the sub-folder that the manifest of `directory` names."""
    try:
        return str(json.loads((directory / MANIFEST).read_text(encoding="utf-8"))["staging"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
