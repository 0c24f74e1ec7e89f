"""`lgnet-fast info`: installed versions, devices, and which backends can run, or why not."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text

from lgnet_fast.kernels.tuned import Training

from . import cache, forks, native
from .engine.cpu.path import Path
from .engine.cpu.tuning import Measured
from .engine.cuda.measure import Found
from .engine.cuda.verdicts import Verdict
from .ops.dispatch import FUSED, reason_against
from .ops.registry import OPERATORS
from .version import __version__

_PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "pillow",
    "scipy",
    "imagecodecs",
    "tifffile",
    "pillow-heif",
    "safetensors",
    "huggingface_hub",
    "onnxruntime",
    "openvino",
)
_CHOICE_HEADS = ("card", "dtype", "what", "found")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _openmp() -> str:
    """File name of the OpenMP runtime on whose threads the C++ kernels run; "none": on a pool of their own."""
    found = "" if native.unavailable_reason() else native.library().parallel_backend()
    return os.path.basename(found[len("openmp (") : -1]) if found.startswith("openmp (") else "none"


def _devices() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [
        {
            "device": "cpu",
            "name": cache.processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "kernel_threads": forks.kernel_threads(),
            "kernels": "none" if native.unavailable_reason() else native.isa_name(),
            "openmp": _openmp(),
            "capability": torch.backends.cpu.get_cpu_capability(),
        }
    ]
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        found.append(
            {
                "device": f"cuda:{i}",
                "name": properties.name,
                "capability": f"sm_{properties.major}{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
            }
        )
    return found


def _backends(device: str) -> dict[str, dict[str, str | None]]:
    return {
        backend: {name: reason_against(name, backend, op.examples(device)) for name, op in OPERATORS.items()}
        for backend in FUSED
    }


def collect() -> dict[str, Any]:
    """Everything `lgnet-fast info` prints, as plain data.

    ``backends[device][backend][operator]`` is None where the backend can run, else the reason why not.
    """
    devices = _devices()
    return {
        "lgnet_fast": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {p: _version(p) for p in _PACKAGES} | {"torch": torch.__version__},  # with its build
        "cuda": torch.version.cuda,
        "devices": devices,
        "backends": {d["device"]: _backends(d["device"]) for d in devices},
        "cache": str(cache.folder() or "none"),
        "verdicts": [
            asdict(e.key) | {"check": e.name, "found": _found(e.value)} for e in cache.entries(cache.VERDICTS)
        ],
        "choices": [
            asdict(e.key) | {"what": e.name, "found": _chosen(e.value)} for e in cache.entries(cache.CHOICES)
        ],
    }


def _found(value: Any) -> str:
    """A verdict as text: of an operator's first use, or of the engine."""
    if isinstance(value, dict) and "passed" in value:
        otherwise = value.get("otherwise", "eager PyTorch runs")
        return "passed" if value["passed"] else f"{otherwise}: {value.get('reason')}"
    verdict = Verdict.from_dict(value)
    return "not readable" if verdict is None else str(verdict)


def _chosen(value: Any) -> str:
    """A measurement as text: the path of a network on a CPU, the kernels of its steps, or attention in training."""
    found = Path.from_dict(value) or Measured.from_dict(value) or Found.from_dict(value) or Training.from_dict(value)
    return "not readable" if found is None else str(found)


def render(info: dict[str, Any]) -> Group:
    """The report as tables for a terminal."""
    versions = _table(f"lgnet_fast {info['lgnet_fast']}", "package", "version")
    for name, number in {"python": info["python"], **info["packages"], "CUDA of PyTorch": info["cuda"]}.items():
        _add(versions, name, number or "none")
    devices = _table(info["platform"], "device", "what")
    for device in info["devices"]:
        _add(devices, device["device"], ", ".join(f"{k} {v}" for k, v in device.items() if k != "device"))
    backends = _table("backends", "device", "backend", "operator", "runs")
    for device_name, by_backend in info["backends"].items():
        for backend, by_operator in by_backend.items():
            for operator, reason in by_operator.items():
                _add(backends, device_name, backend, operator, "yes" if reason is None else f"no: {reason}")
        _add(backends, device_name, "eager", "all", "yes")
    verdicts = _table(f"verdicts kept in {info['cache']}", "card", "dtype", "check", "found")
    for v in info["verdicts"]:
        _add(verdicts, v["card"], v["dtype"], v["check"], v["found"])
    choices = _table(f"measured choices kept in {info['cache']}; kernels of others follow a model", *_CHOICE_HEADS)
    for c in info["choices"]:
        _add(choices, c["card"], c["dtype"], c["what"], c["found"])
    kept = [*([verdicts] if info["verdicts"] else []), *([choices] if info["choices"] else [])]
    return Group(versions, devices, backends, *kept)


def _table(title: str, *heads: str) -> Table:
    return Table(*heads, title=Text(title))


def _add(table: Table, *cells: str) -> None:
    # As Text, because rich would read brackets, such as the extra of a package, as markup.
    table.add_row(*(Text(cell) for cell in cells))
