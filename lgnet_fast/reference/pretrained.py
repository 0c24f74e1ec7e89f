"""Reading and writing model.safetensors, strictly; errors list all mismatches."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.utils import EntryNotFoundError  # type: ignore[attr-defined]
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import LGNetError, WeightsError
from .file_sets import MANIFEST, complete_set, remains_of_saves

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
TORCHVISION_URL = "https://download.pytorch.org/models/"

MODEL_CARD = """---
{{ card_data }}
---

# {{ repo_id | default("LGNet", true) }}

LGNet image inpainting (Quan et al., "Image Inpainting with Local and Global Refinement", IEEE TIP 31, 2022), for
the Python package lgnet_fast.

```python
from lgnet_fast import Inpainter

picture = Inpainter.from_pretrained("{{ repo_id | default("this directory", true) }}")(picture, mask)
```
"""
"""Template of the model card that :meth:`LGNet.save_pretrained` writes besides the weights."""


def find_weights(source: str | os.PathLike[str]) -> None:
    """Raise WeightsError early where `source` is neither a model directory nor a possible hub id.

    Raises TypeError where it is no path at all.
    """
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"weights: expected a model directory or a hub id, got {source!r:.80}")
    path = Path(source)
    if not str(source):
        raise WeightsError("weights: expected a model directory or a hub id, got an empty name")
    try:
        path.stat()
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:  # too long, not allowed to look, a NUL in it
        raise WeightsError(f"weights: {str(source)!r} could not be looked at: {error}") from error
    if path.is_dir():
        missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if not (path / name).is_file()]
        # Beside a manifest, files may be missing because a save was killed: `complete_set` finds them or says so.
        if missing and not (path / MANIFEST).is_file():
            wanted = f"weights: expected {CONFIG_FILE} and {WEIGHTS_FILE} in {path}, missing {missing}"
            if remains_of_saves(path):
                wanted += "; a save to this folder runs, or was killed before its files were complete: save again"
            elif any(path.glob("*_net_G1.pth")):
                wanted += "; the authors' files there are read by LGNet.from_released and `lgnet-fast convert`"
            raise WeightsError(wanted)
    elif path.exists():
        raise WeightsError(f"weights: expected a model directory or a hub id, got the file {path}")
    elif path.is_absolute() or str(source).count("/") != 1:
        raise WeightsError(f"weights: expected a model directory or a hub id 'owner/name', got {str(source)!r}")
    elif str(source).startswith(".") or path.parent.is_dir():
        # The hub would be asked for many seconds, and its error says nothing about folders.
        raise WeightsError(
            f"weights: expected a model directory or a hub id, got {str(source)!r}, which does not exist"
        )


def of_revision(source: str | Path, given: str | None) -> tuple[str | Path, str | None]:
    """("owner/name", "revision") of the hub id "owner/name@revision"; (source, given) of any other, and of a path
    that exists.

    Raises WeightsError: no revision after the @, or another one than `given`.
    """
    if not isinstance(source, str) or os.path.exists(source):
        return source, given
    name, mark, revision = source.partition("@")
    if not mark or name.count("/") != 1:
        return source, given
    if not revision:
        raise WeightsError(f"weights: expected a branch, tag or commit after the @, got {source!r}")
    if given is not None and given != revision:
        raise WeightsError(f"weights: expected one revision, got {revision!r} and {given!r}")
    return name, revision


def torchvision_file(name: str, missing: str, advice: str, *, progress: bool = False) -> Path:
    """Torchvision's file `name` in torch's hub cache; downloaded if it is missing.

    Args:
        name: "<network>-<start of its SHA-256>.pth".
        missing, advice: start and end of the error's message, around the path and the cause.
        progress: show a bar on stderr while downloading.

    Raises:
        WeightsError: the file is missing and cannot be downloaded.
    """
    file = Path(torch.hub.get_dir()) / "checkpoints" / name
    if not file.is_file():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            # Writes a temporary file beside it, checks the hash, renames.
            torch.hub.download_url_to_file(
                TORCHVISION_URL + name, str(file), hash_prefix=file.stem.rpartition("-")[2], progress=progress
            )
        except (OSError, RuntimeError) as error:  # URLError is an OSError; a wrong hash is a RuntimeError
            raise WeightsError(f"{missing} not at {file} and could not be downloaded ({error}){advice}") from error
    return file


@contextmanager
def weights_errors(source: str | os.PathLike[str]) -> Iterator[None]:
    """Turn any error while `source` is fetched and parsed into one WeightsError."""
    try:
        yield
    except (LGNetError, MemoryError):
        raise
    except Exception as error:  # JSON, safetensors, the hub and PyTorch raise many types for a damaged file
        raise WeightsError(
            f"weights: {str(source)!r} could not be loaded: {str(error) or type(error).__name__}"
        ) from error


def check_config(path: Path, known: Collection[str]) -> None:
    """Raise WeightsError where the file `path` is not a JSON object; warn of names beyond `known`, which may be
    misspelt. Those that begin with "_" are the hub's."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # the latter: thousands of brackets
        raise WeightsError(f"{path}: expected a JSON object, got a file that is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise WeightsError(f"{path}: expected a JSON object, got {json.dumps(found):.80}")
    if unknown := sorted(name for name in found.keys() - known if not name.startswith("_")):
        warnings.warn(f"{path}: ignored {', '.join(unknown)}, which LGNet does not have", stacklevel=3)


def check_hub_config(source: str, known: Collection[str], cache_dir: str | Path | None, revision: str | None) -> None:
    """`check_config` of the file that the hub's cache holds for the id `source`, if there is one."""
    found = try_to_load_from_cache(source, CONFIG_FILE, cache_dir=cache_dir, revision=revision)
    if isinstance(found, str):
        check_config(Path(found), known)


@contextmanager
def config_errors(path: str, names: Collection[str], others: Collection[str]) -> Iterator[None]:
    """Turn errors about the arguments `names`, which the file `path` gives, into WeightsErrors that name the file.

    Errors about the `others`, the caller's own, stay as they are, and so do those that may be about either.
    """
    try:
        yield
    except (LGNetError, MemoryError):
        raise
    except Exception as error:  # PyTorch raises several types for sizes that no tensor has
        text = (str(error) or type(error).__name__).partition("\n")[0]
        if others and text.partition(":")[0] not in names:
            raise
        raise WeightsError(f"{path}: {text}") from error


def upcast(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Floating tensors of 16 or fewer bits as float32, the networks' default dtype; others unchanged."""
    return {k: v.float() if v.is_floating_point() and v.element_size() < 4 else v for k, v in tensors.items()}


def check_names_and_shapes(found: Mapping[str, Any], expected: Mapping[str, tuple[int, ...]], what: str) -> None:
    """Raise WeightsError that lists missing, unexpected and wrong-shaped names, unless all agree."""
    missing = sorted(expected.keys() - found.keys())
    unexpected = sorted(found.keys() - expected.keys())
    wrong = [
        f"{name}: expected {list(expected[name])}, got {list(found[name].shape)}"
        for name in sorted(expected.keys() & found.keys())
        if tuple(found[name].shape) != tuple(expected[name])
    ]
    if missing or unexpected or wrong:
        parts = [
            f"{label} ({len(names)}): " + "; ".join(names)
            for label, names in (("missing", missing), ("unexpected", unexpected), ("wrong shape", wrong))
            if names
        ]
        raise WeightsError(f"{what}: names and shapes do not fit. " + " | ".join(parts))


def check_map_location(map_location: object) -> None:
    """Raise TypeError or ValueError unless it is a device that tensors can be loaded to on this machine."""
    if not isinstance(map_location, (str, torch.device)):
        raise TypeError(f"map_location: expected a torch.device or its name, got {map_location!r:.80}")
    try:
        usable = not torch.empty(0, device=map_location).is_meta
        reason = "it has no memory"
    except (RuntimeError, AssertionError) as error:
        usable, reason = False, (str(error) or type(error).__name__).partition("\n")[0]
    if not usable:
        raise ValueError(f"map_location: expected a device of this machine, got {str(map_location)!r} ({reason})")


def read_safetensors(
    source: str, expected: Mapping[str, Tensor], map_location: str | torch.device, **hub: Any
) -> dict[str, Tensor]:
    """Tensors of `source` (directory or hub id), checked against `expected`; 16-bit floats become float32.

    Of a hub id the file is compared with the hash in ``manifest.json``, if the repository has one.
    """
    if os.path.isdir(source):
        file = os.path.join(source, WEIGHTS_FILE)
    else:
        file = hf_hub_download(repo_id=source, filename=WEIGHTS_FILE, **hub)
        with suppress(EntryNotFoundError):  # the repository has none, or only the other files are in the cache
            hf_hub_download(repo_id=source, filename=MANIFEST, **hub)
        complete_set(Path(file).parent, (WEIGHTS_FILE,))
    refuse_impostor(Path(file))
    return fitting(load_file(file, device=str(map_location)), expected, str(file))


def fitting(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    """The tensors of a file, 16-bit floats as float32. WeightsError unless they fit the model of `expected`."""
    check_names_and_shapes(tensors, {k: tuple(v.shape) for k, v in expected.items()}, what)
    check_kinds(tensors, expected, what)
    upcasted = upcast(tensors)
    kinds = {str(tensor.dtype) for tensor in upcasted.values() if tensor.is_floating_point()}
    if len(kinds) > 1:
        raise WeightsError(f"{what}: expected weights of one dtype, got {' and '.join(sorted(kinds))}")
    return upcasted


def impostor(path: Path) -> str | None:
    """Description of a file that is often saved in place of a checkpoint (web page, LFS pointer); None: neither."""
    try:
        with open(path, "rb") as file:
            start = file.read(1024).lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    except OSError:
        return None
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file it stands for; `git lfs pull` fetches that"
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<?xml", b"<!--")):
        return "a web page (HTML or XML), as a failed download leaves it, not a checkpoint"
    return None


def refuse_impostor(path: Path) -> None:
    """Raise WeightsError where `path` is a web page or a Git LFS pointer."""
    if (what := impostor(path)) is not None:
        raise WeightsError(f"weights: {path} is {what}")


def check_kinds(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str) -> None:
    """Raise a WeightsError that lists tensors that are floating but must not be, or must be but are not."""
    wrong = [
        f"{name}: {found[name].dtype}"
        for name, tensor in expected.items()
        if found[name].is_floating_point() != tensor.is_floating_point()
    ]
    if wrong:
        raise WeightsError(f"{what}: expected floating weights and integer counters, got {'; '.join(wrong)}")


def write_safetensors(tensors: Mapping[str, Tensor], directory: Path, dtype: torch.dtype | None) -> None:
    """Write ``model.safetensors`` in `directory`, floating tensors in `dtype` (None: as they are)."""
    out: dict[str, Tensor] = {}
    written: set[int] = set()
    for name, t in tensors.items():
        stored = (t.to(dtype) if dtype is not None and t.is_floating_point() else t).detach().cpu().contiguous()
        place = stored.untyped_storage().data_ptr()
        out[name] = stored.clone() if place in written else stored  # safetensors refuses tensors that share memory
        written.add(place)
    path = directory / WEIGHTS_FILE
    path.touch()
    rights = path.stat().st_mode  # by the user's umask; safetensors makes files that only their owner can read
    save_file(out, path, metadata={"format": "pt"})
    os.chmod(path, rights)
