"""Results by machine class, and whether a run is slower than the stored one.

One file for each machine class and bench module: ``bench/results/cpu-zen5-2-cores_inference.json``. In it, for each
bench, the figures of :func:`bench.timing.summarize` and the bench's other figures.

A machine's speed changes from run to run, so times are not compared, but speed-ups: how many times longer the rivals
in the same run take than each contestant whose name begins with "ours". If our code gets slower, all these ratios
fall alike; if one rival is disturbed, the median over the rivals stays. The change is therefore the median over the
rivals of (ratio now / ratio stored). It fails when it falls by more than 10 %, or by twice the measured spread (the
larger of the two runs') if that is more. 20 % are allowed where the copy bandwidth around the bench shows that the
machine was in another state (:func:`bench.timing.copy_rate`).
"""

from __future__ import annotations

import json
import platform
import re
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.timing import ROOT, environment
from lgnet_fast import native
from lgnet_fast.pipeline.writing import write_atomically

RESULTS = ROOT / "bench" / "results"

ALLOWED = 0.10
"""A ratio may fall by this share, or by twice the spread if that is more."""

ALLOWED_MOVED = 0.20
"""The same between two states of the machine."""
MOVED = 1.4
"""Copy bandwidths that differ by this factor mean two states of the machine. The two observed ones copy 35 to 44 and
65 to 75 GB a second."""

Bench = dict[str, Any]


def slug(text: str) -> str:
    """Lower case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _microarchitecture(vendor: str, family: int, model: int) -> str:
    """The common name of a CPU's cores, or its numbers."""
    if vendor == "AuthenticAMD":
        if family == 0x1A:
            return "zen5"
        if family == 0x19:
            return "zen3" if model < 0x10 or 0x20 <= model < 0x60 else "zen4"
        if family == 0x17:
            return "zen2" if model >= 0x30 else "zen"
    if vendor == "GenuineIntel" and family == 6:
        known = {
            (0x3F, 0x3C, 0x45, 0x46): "haswell",
            (0x3D, 0x47, 0x4F, 0x56): "broadwell",
            (0x4E, 0x55, 0x5E, 0x8E, 0x9E): "skylake",
            (0x6A, 0x6C, 0x7D, 0x7E): "icelake",
            (0x8F,): "sapphirerapids",
            (0xCF,): "emeraldrapids",
            (0xAD, 0xAE): "graniterapids",
        }
        for models, name in known.items():
            if model in models:
                return name
    return f"{slug(vendor)}-{family}-{model}"


def cpu_name() -> str:
    """Microarchitecture of the cores, or the machine type where the system does not report it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        first = cpuinfo.read_text().split("\n\n")[0]
        fields = dict(re.findall(r"^([^\t:]+?)\s*:\s*(.*)$", first, re.MULTILINE))
        if {"vendor_id", "cpu family", "model"} <= fields.keys():
            return _microarchitecture(fields["vendor_id"], int(fields["cpu family"]), int(fields["model"]))
    return slug(platform.processor() or platform.machine())


_USUAL = {
    "haswell": "avx2",
    "broadwell": "avx2",
    "zen": "avx2",
    "zen2": "avx2",
    "zen3": "avx2",
    "zen4": "avx512_bf16",
    "zen5": "avx512_bf16",
    "icelake": "avx512",
    "sapphirerapids": "amx_bf16",
    "emeraldrapids": "amx_bf16",
    "graniterapids": "amx_bf16",
}
"""Microarchitecture -> the kernels that such cores get. A virtual machine may hide instructions from its guests."""


def machine_class(device: str) -> str:
    """Name of a class of comparable machines: the GPU, or the cores of the CPU and how many are used; the instruction
    set of our kernels too, where it is not the usual one of such cores."""
    if device == "cuda":
        return slug(torch.cuda.get_device_name())
    cores = cpu_name()
    kernels = "none" if native.unavailable_reason() else native.isa_name()
    if kernels != _USUAL.get(cores):
        cores = f"{cores}-{slug(kernels)}"
    return f"cpu-{cores}-{torch.get_num_threads()}-cores"


def read_results(text: str) -> dict[str, Any]:
    """A results file: {"environment": ..., "benches": {name: figures}}.

    Files in pytest-benchmark's layout, from early commits of this repository, are read too.

    Raises:
        ValueError: neither.
    """
    data = json.loads(text)
    if isinstance(data, dict) and isinstance(data.get("benches"), dict):
        return data
    if isinstance(data, dict) and "machine_info" in data:
        info = data["machine_info"]["lgnet_fast"] | {"date": data["datetime"][:19] + "+00:00"}
        stamp = {key: info[key] for key in ("commit", "date")}
        benches = {b["name"]: b["extra_info"] | stamp for b in data["benchmarks"]}
        return {"environment": info, "benches": benches}
    raise ValueError("expected a results file: a JSON object with 'benches'")


def write_results(file: Path, benches: Mapping[str, Bench], info: Mapping[str, Any], before: Any = None) -> None:
    """Write `benches`, beside those of `before` (a results file's content) that are not among them."""
    merged = {**(before["benches"] if before else {}), **benches}
    content = {"environment": dict(info), "benches": {name: merged[name] for name in sorted(merged)}}
    file.parent.mkdir(parents=True, exist_ok=True)
    # One line for each bench: small, and a changed figure shows in a diff.
    lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(bench)}" for name, bench in content["benches"].items())
    text = f'{{\n  "environment": {json.dumps(content["environment"])},\n  "benches": {{\n{lines}\n  }}\n}}\n'
    write_atomically(file, text.encode())


def incomparable(stored: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Why a run in environment `now` cannot be measured by one in `stored`; None where it can.

    PyTorch's minor version counts: the rivals are made of its kernels.
    """
    for key, shown in (("torch", _minor), ("cuda", _minor), ("cpu_capability", str), ("tf32", str)):
        then, here = (shown(info[key]) if info.get(key) is not None else None for info in (stored, now))
        if then != here and not (key == "cuda" and None in (then, here)):
            return f"{key} was {then}, is {here}"
    return None


def _minor(version: str) -> str:
    return ".".join(version.split("+")[0].split(".")[:2])


@dataclass(frozen=True)
class Change:
    """The change of one of our contestants in one bench."""

    bench: str
    contestant: str
    now: float
    """Median over the rivals of (their time / ours)."""
    ratio: float
    """Median over the rivals of (ratio now / ratio stored); below 1 is slower."""
    allowed: float
    """By how much `ratio` may be below 1."""
    moved: bool = False
    """Whether the machine was in another state, or changed its state during the run."""

    @property
    def failed(self) -> bool:
        return self.ratio < 1 - self.allowed

    @property
    def verdict(self) -> str:
        if self.failed:
            why = ", for the machine's cores and memory are placed otherwise" if self.moved else ""
            return f"SLOWER, -{self.allowed:.0%} is allowed{why}"
        return "fine" if self.allowed <= 0.3 else f"too noisy to judge: -{self.allowed:.0%} is allowed"


def _own(bench: Bench) -> dict[str, float]:
    """Contestants of ours -> times slower than the bench's own unit, which is 1."""
    slower = bench["times_slower_than_ours"]
    return {bench.get("ours", "ours"): 1.0} | {name: t for name, t in slower.items() if name.startswith("ours")}


def rivals(bench: Bench) -> dict[str, float]:
    """The other contestants with a correct result -> times slower than the bench's unit."""
    wrong = bench.get("wrong_peers", {})
    slower = bench["times_slower_than_ours"]
    return {name: t for name, t in slower.items() if not name.startswith("ours") and name not in wrong}


def bench_spread(bench: Bench) -> float:
    """The median contestant's spread."""
    values = list(bench.get("spread", {}).values())
    return statistics.median(values) if values else 0.0


def moved(then: Bench, now: Bench) -> bool:
    """Whether two runs of a bench met different states of the machine (:data:`MOVED`)."""
    rates = [*then.get("copy_gb_s", []), *now.get("copy_gb_s", [])]
    return bool(rates) and max(rates) > MOVED * min(rates)


def compare(stored: Mapping[str, Bench], now: Mapping[str, Bench]) -> list[Change]:
    """The change of each of our contestants that both runs have, over the rivals that both have."""
    changes = []
    for name in sorted(now.keys() & stored.keys()):
        then, here = stored[name], now[name]
        common = rivals(then).keys() & rivals(here).keys()
        if not common:
            continue
        elsewhere = moved(then, here)
        least = ALLOWED_MOVED if elsewhere else ALLOWED
        allowed = max(least, 2 * max(bench_spread(then), bench_spread(here)))
        before, after = _own(then), _own(here)
        for contestant in after:
            if contestant not in before:
                continue
            ratios_now = {rival: rivals(here)[rival] / after[contestant] for rival in common}
            ratios_then = {rival: rivals(then)[rival] / before[contestant] for rival in common}
            change = statistics.median(ratios_now[rival] / ratios_then[rival] for rival in common)
            changes.append(
                Change(name, contestant, statistics.median(ratios_now.values()), change, allowed, elsewhere)
            )
    return changes


def compare_or_store(
    benches: Mapping[str, Mapping[str, Bench]], folder: Path = RESULTS, store: bool = False
) -> tuple[list[Change], list[str]]:
    """Compare a run with the stored one of its machine class, and store what is new.

    Args:
        benches: results file's stem (machine class, "_", module) -> bench -> figures.
        folder: of results files.
        store: store everything instead of comparing.

    Returns:
        The changes, and sentences that say what was stored and why.
    """
    info = environment()
    changes: list[Change] = []
    notes = []
    for stem, own in benches.items():
        file = folder / f"{stem}.json"
        before = read_results(file.read_text()) if file.exists() else None
        reason = "asked for" if store else "no stored run of this machine class"
        differs = incomparable(before["environment"], info) if before else None
        if before and differs:
            before, reason = None, f"the stored run does not compare: {differs}"
        if before and not store:
            changes += compare(before["benches"], own)
            # A bench with renamed contestants cannot be compared, like a new one.
            compared = {change.bench for change in changes}
            fresh = {name: bench for name, bench in own.items() if name not in compared}
            fresh = {name: bench for name, bench in fresh.items() if rivals(bench) or name not in before["benches"]}
            if fresh:
                write_results(file, fresh, before["environment"], before)
                notes.append(f"stored {len(fresh)} new benches in {file}: {', '.join(sorted(fresh))}")
            if alone := sorted(own.keys() - compared - fresh.keys()):
                notes.append(f"not compared with {file}, for want of rivals: {', '.join(alone)}")
            continue
        write_results(file, own, info, before)
        notes.append(f"stored {len(own)} benches in {file}: {reason}")
    return changes, notes
