"""Rewrites kernels/conv_tables.py from measurements of `bench/gpu_contact.py` on a GPU.

    python bench/write_tables.py RESULTS...      (contact_*.jsonl files, or folders of them)

Only the measured products of that GPU generation change. A product that several steps share (with and without a
residual) gets the tile of least summed time. Without results nothing is written.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TABLES_FILE = Path(__file__).resolve().parent.parent / "kernels" / "conv_tables.py"
COMPILED = ("hopper", "picture")
"""Kernels that only the tuner on the GPU in use may choose."""
Tables = dict[str, dict[tuple[Any, ...], Any]]
CONV_MARK = "TUNED: dict[str, dict[Key, Choice]] = {"
INFERENCE_MARK = "INFERENCE: dict[tuple[str, str, int, int, int], tuple[int, ...]] = {"


def render(text: str, tables: Tables, inference: dict[tuple[Any, ...], Any]) -> str:
    """`text` of kernels/conv_tables.py with other tables; the same tables give the same text."""
    lines = [text[: text.index(CONV_MARK)] + CONV_MARK]
    for generation in sorted(tables):
        lines.append(f'    "{generation}": {{')
        for key in sorted(tables[generation]):
            choice = tables[generation][key]
            rest = ", ".join(str(part) for part in key[1:])
            value = '"cudnn"' if choice == "cudnn" else str(tuple(choice))
            lines.append(f'        ("{key[0]}", {rest}): {value},')
        lines.append("    },")
    lines += ["}", "", INFERENCE_MARK]
    for key in sorted(inference):
        rest = ", ".join(str(part) for part in key[2:])
        lines.append(f'    ("{key[0]}", "{key[1]}", {rest}): {tuple(inference[key])},')
    return "\n".join(lines) + "\n}\n"


def _choice(value: Any) -> Any:
    """A tile, or "cudnn", from a line of JSON."""
    return "cudnn" if value in ("cudnn", ["cudnn"]) else tuple(value)


def _of_triton(shapes: list[Any]) -> tuple[int, ...] | None:
    """The fields of `configs.Inference` but `hopper`; None where that kernel runs."""
    from lgnet_fast.kernels.configs import Inference

    *fields, hopper = Inference(*shapes)
    return tuple(fields) if hopper is None else None


def measured(files: Sequence[Path]) -> tuple[Tables, dict[tuple[Any, ...], Any]]:
    """Tables of the results in `files`."""
    times: dict[tuple[str, tuple[Any, ...]], list[dict[tuple[Any, ...], float]]] = defaultdict(list)
    inference: dict[tuple[Any, ...], Any] = {}
    for file in files:
        for line in file.read_text().splitlines():
            figures = json.loads(line)
            if "best" not in figures or "key" not in figures:
                continue
            if figures["section"] == "attention":
                shapes = [figures["best"], *(other[1:] for other in figures.get("others", ()))]
                inference.update({tuple(figures["key"]): one for one in map(_of_triton, shapes[::-1]) if one})
            elif figures["section"] == "convs":
                generation, kind, rows, columns, taps, channels = figures["key"]
                found = {_choice(figures["best"]): figures["best_us"]}
                found |= {_choice(other[1:]): other[0] for other in figures["others"]}
                found = {c: us for c, us in found.items() if c[0] not in COMPILED}
                weighted = {tile: us * figures["times"] for tile, us in found.items()}
                times[generation, (kind, rows, columns, tuple(taps), channels)].append(weighted)
    tables: Tables = defaultdict(dict)
    for (generation, key), measurements in times.items():
        common = set.intersection(*(set(found) for found in measurements))
        if not common:  # then the fastest tile of the most expensive step is taken
            measurements = [max(measurements, key=lambda found: min(found.values()))]
            common = set(measurements[0])
        tables[generation][key] = min(common, key=lambda tile: sum(found[tile] for found in measurements))
    return tables, inference


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the table."""
    from lgnet_fast.kernels.conv_tables import INFERENCE, TUNED

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULTS")
    given = parser.parse_args(arguments).results
    files: list[Path] = []
    for name in given:
        files += sorted(name.glob("contact_*.jsonl")) if name.is_dir() else [name]
    tables, inference = measured(files)
    if not tables and not inference:
        print("no measured tiles in", *given)
        return 1
    merged = {generation: dict(rows) for generation, rows in TUNED.items()}
    for generation, rows in tables.items():
        merged.setdefault(generation, {}).update(rows)
    TABLES_FILE.write_text(render(TABLES_FILE.read_text(), merged, {**INFERENCE, **inference}))
    print(f"{TABLES_FILE.name}: {sum(map(len, tables.values()))} convolutions, {len(inference)} attention blocks")
    return 0


if __name__ == "__main__":
    sys.exit(main())
