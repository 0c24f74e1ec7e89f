"""A cache on disk of facts about this machine: verdicts of checks, and kernel choices.

Each entry is a small JSON file, named by its key (:class:`Key`), its section and its name. The folder is
``$LGNET_FAST_CACHE``, or ``lgnet_fast`` in the user's cache folder. An entry is written to a temporary file and
renamed, so readers never see a partial file and processes need no lock; the last writer wins. A file that cannot be
read, or has another version of the schema, is ignored. An entry that cannot be written is kept for this process only,
which is logged once at INFO.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import platform
import re
import sys
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from . import files, forks

logger = logging.getLogger("lgnet_fast")

ENVIRONMENT = "LGNET_FAST_CACHE"
"""Environment variable that names the folder."""
SCHEMA = 1
"""Version of the files' layout: {"schema", "key", "section", "name", "value", "hash"}; older ones have no hash."""
VERDICTS = "verdicts"
"""Section of the checks: the path that runs, and why no faster one does."""
CHOICES = "choices"
"""Section of tuning results."""

_lock = forks.Lock()
# Values this process wrote or read, by (folder, key, section, name). Needed where the folder cannot be written.
_known: dict[tuple[Path | None, Key, str, str], Any] = {}
_complained: set[str] = set()


@dataclass(frozen=True)
class Key:
    """The properties of the machine and the software on which an entry depends."""

    card: str
    driver: str
    torch: str
    triton: str
    lgnet_fast: str
    dtype: str

    @property
    def digest(self) -> str:
        """Short name for files."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Entry:
    """The content of one file."""

    key: Key
    section: str
    name: str
    value: Any


def key_for(device: torch.device, dtype: torch.dtype) -> Key:
    """The key of a device (an NVIDIA GPU, or a device type) and the dtype of the computation."""
    return Key(*_machine(device.type, device.index), str(dtype).removeprefix("torch."))


def cpu_key(dtype: torch.dtype, isa: str, threads: int) -> Key:
    """The key of this CPU with an instruction set and a number of threads, and the dtype that is computed in."""
    card = f"{processor()}, {isa}, {threads} thread{'s' if threads > 1 else ''}"
    return Key(card, "none", torch.__version__, "none", _extension(), str(dtype).removeprefix("torch."))


@cache
def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Model of the processor, as precisely as the system reports it.

    Family and model number are part of it, because virtual machines on different processors give one name.
    """
    with contextlib.suppress(OSError):
        first = cpuinfo.read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
        pairs = (line.partition(":") for line in first.splitlines())
        told = {name.strip(): " ".join(value.split()) for name, _, value in pairs}
        model = told.get("model name") or "/".join(told[n] for n in ("CPU implementer", "CPU part") if n in told)
        numbers = ", ".join(f"{name} {told[name]}" for name in ("cpu family", "model") if told.get(name))
        if model:
            return f"{model} ({numbers})" if numbers else model
    return platform.processor() or platform.machine()


@cache
def _extension() -> str:
    """This package's version and a hash of its extension, which in a checkout changes between versions."""
    from .version import __version__

    spec = find_spec("lgnet_fast._C")
    if spec is None or spec.origin is None:
        return f"{__version__}, no extension"
    return f"{__version__}, extension {hashlib.sha256(Path(spec.origin).read_bytes()).hexdigest()[:12]}"


@cache
def _machine(kind: str, index: int | None) -> tuple[str, str, str, str, str]:
    card, driver = f"{kind} {platform.machine()}", "none"
    if kind == "cuda":
        p = torch.cuda.get_device_properties(torch.cuda.current_device() if index is None else index)
        # a MIG slice has the name of its GPU, but fewer multiprocessors
        card, driver = f"{p.name}, sm_{p.major}{p.minor}, {p.multi_processor_count} SMs", _driver()
    return card, driver, torch.__version__, _triton(), _package()


def _triton() -> str:
    for name in ("triton", "pytorch-triton", "triton-windows"):
        with contextlib.suppress(PackageNotFoundError):
            return version(name)
    return "none"


def _package() -> str:
    """This package's version and a hash of its kernels, which in a checkout change between versions: the sources of
    Triton's and the machine code of the others."""
    from .version import __version__

    spec = find_spec("lgnet_fast.kernels")
    digest = hashlib.sha256()
    for directory in (spec.submodule_search_locations if spec else None) or ():
        for pattern in ("*.py", "machine_code/*"):
            for path in sorted(Path(directory).glob(pattern)):
                digest.update(path.read_bytes())
    return f"{__version__}, kernels {digest.hexdigest()[:12]}"


def _driver() -> str:
    """The driver's version (Linux only) and the CUDA version that it supports."""
    supports = getattr(torch._C, "_cuda_getDriverVersion", lambda: 0)()
    with contextlib.suppress(OSError):
        found = re.search(r"\s(\d+(?:\.\d+)+)\s", Path("/proc/driver/nvidia/version").read_text())
        if found:
            return f"{found[1]}, CUDA {supports}"
    return f"CUDA {supports}"


def folder() -> Path | None:
    """The folder of the entries, a leading "~" replaced by the home; None where there is no such home folder."""
    try:
        if named := os.environ.get(ENVIRONMENT):
            return Path(named).expanduser()
        if sys.platform == "win32":
            base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
        elif sys.platform == "darwin":
            base = Path.home() / "Library" / "Caches"
        else:
            # expanded as PyTorch and huggingface_hub do: container files and units hand over "~" as it is
            base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    except RuntimeError:  # no home
        return None
    return base / "lgnet_fast"


def _path(where: Path, key: Key, section: str, name: str) -> Path:
    return where / f"{section}-{key.digest}-{hashlib.sha256(name.encode()).hexdigest()[:16]}.json"


def get(key: Key, section: str, name: str) -> Any | None:
    """The value of an entry; None where it is missing or cannot be read."""
    where = folder()
    known = (where, key, section, name)
    with _lock:
        if known in _known:
            return _known[known]
    kept = _kept(key, section, name)
    if kept is None:
        return None
    with _lock:
        return _known.setdefault(known, kept.value)


def put(key: Key, section: str, name: str, value: Any) -> bool:
    """Store a JSON value, replacing an earlier one. Returns False where it could not be written to the folder."""
    return _store(key, section, name, value, True)


def _store(key: Key, section: str, name: str, value: Any, replace: bool) -> bool:
    """:func:`put`; without `replace` a file that exists stays, which returns False."""
    where = folder()
    with _lock:
        _known[where, key, section, name] = value
    if where is None:
        return False
    content = {"schema": SCHEMA, "key": asdict(key), "section": section, "name": name, "value": value}
    content["hash"] = _hash_of(content)
    try:
        return _write(_path(where, key, section, name), json.dumps(content, indent=1), replace)
    except OSError as error:
        _say_once(f"what was found out about this machine is not kept: {error}")
        return False


def _write(path: Path, text: str, replace: bool) -> bool:
    """Write a file as a whole, in place of an existing one only if `replace`. Returns whether it was written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not by `tempfile`: its files can be read by their owner only, and users may share the folder.
    temporary = path.with_name(f".writing-{uuid.uuid4().hex}")
    try:
        with open(temporary, "x", encoding="utf-8") as file:
            file.write(text)
        if not replace:
            try:
                os.link(temporary, path)  # which one process alone can do
                return True
            except FileExistsError:
                return False
            except OSError:  # a file system without hard links
                pass
        files.replace(temporary, path)
        return True
    finally:
        with contextlib.suppress(OSError):  # it has been renamed
            os.unlink(temporary)


def can_keep() -> bool:
    """Whether entries are kept for later processes."""
    where = folder()
    if where is None:
        return False
    try:
        where.mkdir(parents=True, exist_ok=True)
        files.check_writable(where, b"{}")  # a full disk takes empty files
        return True
    except OSError:
        return False


def put_first(key: Key, section: str, name: str, value: Any) -> Any:
    """Store a value unless another process was first. Returns the stored one, so that all processes agree."""
    kept = _kept(key, section, name)
    if kept is None and not _store(key, section, name, value, replace=False):
        kept = _kept(key, section, name)  # of a process that was faster
        if kept is None:  # a file that cannot be read
            put(key, section, name, value)
    if kept is None:
        return value
    with _lock:
        _known[folder(), key, section, name] = kept.value
    return kept.value


def _kept(key: Key, section: str, name: str) -> Entry | None:
    """The entry in the folder."""
    where = folder()
    kept = None if where is None else _read(_path(where, key, section, name))
    return kept if kept is not None and (kept.key, kept.section, kept.name) == (key, section, name) else None


def drop(key: Key, section: str) -> None:
    """Delete a section's entries of this key; they are then computed again."""
    where = folder()
    with _lock:
        for known in [k for k in _known if k[:3] == (where, key, section)]:
            del _known[known]
    if where is not None:
        with contextlib.suppress(OSError):
            for path in where.glob(f"{section}-{key.digest}-*.json"):
                path.unlink(missing_ok=True)


def entries(section: str) -> Iterator[Entry]:
    """Every entry of a section that can be read, of all keys, in the order of the files' names."""
    where = folder()
    if where is None:
        return
    try:
        paths = sorted(where.glob(f"{section}-*.json"))
    except OSError:
        return
    for path in paths:
        entry = _read(path)
        if entry is not None:
            yield entry


def _hash_of(content: dict[str, Any]) -> str:
    # The order of a file's keys is that in which they were written; sorted, numbers would move when they become text.
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _read(path: Path) -> Entry | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["schema"] != SCHEMA:
            return None
        if content.pop("hash", None) not in (None, _hash_of(content)):
            raise ValueError("damaged, the hash is not the stated one")
        key = Key(**{field.name: str(content["key"][field.name]) for field in fields(Key)})
        return Entry(key, str(content["section"]), str(content["name"]), content["value"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        _say_once(f"{path} is not read: {type(error).__name__}: {error}")
        return None


def _say_once(message: str) -> None:
    if message not in _complained:
        _complained.add(message)
        logger.info("%s", message)
