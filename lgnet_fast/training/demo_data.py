"""The small training data of `configs/demo.yaml` and `configs/demo_gpu.yaml` (`make demo-data`).

``train-000.tar``, ...    pictures as WebP, the shorter side at most `edge`, the longer one cut to 1.5 times that
``held_out.tar``          evenly spaced pictures that are not in the other files
``vgg16_pool3.npz``       VGG-16's convolutions up to pool3, float16, layout: `reference/features.py`
``alexnet_lpips.npz``     AlexNet's and LPIPS's heads, the same
"""

from __future__ import annotations

import argparse
import io
import math
import os
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from ..data.folders import all_below
from ..errors import DataError, LGNetError, WeightsError
from ..pipeline.sources import open_image
from ..pipeline.writing import write_atomically
from ..reference.features import LPIPS, read_weights
from .crops import decode, quiet

_LONGEST = 1.5
_LONGEST_EDGE = 10_922  # WebP's longest side, 16,383, divided by 1.5
_VGG_CONVOLUTIONS = 7
_HELD_OUT_QUALITY = 90


def encode(file: Path, edge: int, quality: int) -> bytes:
    """A picture as WebP: the shorter side at most `edge`, the middle of the longer one.

    Raises:
        DataError: it cannot be read.
    """
    try:
        picture = Image.fromarray(decode(open_image(file.read_bytes())))
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error and more on bad data
        raise DataError(f"pictures: {str(file)!r} cannot be read ({error})") from error
    longest = _LONGEST * min(picture.size)
    kept = [min(side, longest) for side in picture.size]
    left, top = ((side - keep) / 2 for side, keep in zip(picture.size, kept))
    factor = min(1.0, edge / min(picture.size))
    size = (max(1, round(kept[0] * factor)), max(1, round(kept[1] * factor)))
    box = (left, top, min(left + kept[0], picture.width), min(top + kept[1], picture.height))
    stream = io.BytesIO()
    picture.resize(size, Image.Resampling.LANCZOS, box=box).save(stream, "WEBP", quality=quality, method=4)
    return stream.getvalue()


def shards_of(files: Sequence[tuple[str, bytes]], largest: float = math.inf) -> Iterator[bytes]:
    """Tar files of (name, content), of at most `largest` bytes each; a file that exceeds that has one of its own."""
    chosen: list[tuple[str, bytes]] = []
    size = 0
    for name, content in files:
        room = 512 + -(-len(content) // 512) * 512
        if chosen and size + room > largest - 2 * tarfile.RECORDSIZE:  # tar fills its last record
            yield _shard(chosen)
            chosen, size = [], 0
        chosen.append((name, content))
        size += room
    if chosen:
        yield _shard(chosen)


def _shard(files: Sequence[tuple[str, bytes]]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def write_pictures(source: Path, folder: Path, *, edge: int, quality: int, held_out: int, largest: int) -> list[Path]:
    """Shards of a folder's pictures, see the module's text.

    They replace those of an earlier call, whose other shards are removed.

    Raises:
        DataError: no pictures, not more than are held out, or one that cannot be read; then nothing is written.
    """
    files = all_below(source, "pictures: expected a folder of pictures")
    if len(files) <= held_out:
        raise DataError(
            f"pictures: expected more than the {held_out} held out (--held-out) in {str(source)!r}, got {len(files)}"
        )
    held = sorted(round((i + 0.5) * len(files) / held_out) for i in range(held_out))

    def encoded(chosen: Sequence[int], quality: int) -> list[tuple[str, bytes]]:
        with quiet(), ThreadPoolExecutor(os.cpu_count()) as pool:
            contents = pool.map(lambda i: encode(files[i], edge, quality), chosen)
            return [(f"{i:06d}.webp", content) for i, content in zip(chosen, contents, strict=True)]

    training = sorted(set(range(len(files))).difference(held))
    # Shuffled, so that a shard does not hold pictures of one source only.
    np.random.default_rng(0).shuffle(training)
    shown, kept = encoded(training, quality), encoded(held, _HELD_OUT_QUALITY)
    earlier = [file for file in folder.glob("train-*.tar") if re.fullmatch(r"train-\d{3,}", file.stem)]
    written = []
    for number, shard in enumerate(shards_of(shown, largest)):
        written.append(folder / f"train-{number:03d}.tar")
        write_atomically(written[-1], shard)
    for shard in shards_of(kept):
        written.append(folder / "held_out.tar")
        write_atomically(written[-1], shard)
    for file in {*earlier, folder / "held_out.tar"}.difference(written):
        file.unlink(missing_ok=True)
    return written


def write_weights(vgg: Path | None, lpips: Path | None, folder: Path) -> list[Path]:
    """``vgg16_pool3.npz`` and ``alexnet_lpips.npz`` of files in any layout.

    Raises:
        WeightsError: they cannot be read, or are of other networks.
    """
    written = []
    if vgg is not None:
        weights = read_weights(vgg)
        names = [f"{leaf}{i}" for i in range(_VGG_CONVOLUTIONS) for leaf in "wb"]
        if missing := [name for name in names if name not in weights]:
            raise WeightsError(
                f"weights: expected VGG-16's convolutions in {str(vgg)!r}, missing {', '.join(missing)}"
            )
        written.append(_write(folder / "vgg16_pool3.npz", {name: weights[name].half() for name in names}))
    if lpips is not None:
        net = LPIPS.from_file(lpips)
        state = net.features.state_dict()
        tensors = {
            f"{leaf[0]}{i}": state[f"convolutions.{i}.{leaf}"].half()
            for i in range(len(net.features.convolutions))
            for leaf in ("weight", "bias")
        }
        tensors |= {f"lin{i}": getattr(net, f"head{i}") for i in range(net.features.levels)}
        written.append(_write(folder / f"{net.features.network}_lpips.npz", tensors))
    return written


def _write(file: Path, tensors: Mapping[str, Tensor]) -> Path:
    arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in tensors.items()}
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    write_atomically(file, stream.getvalue())
    return file


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m lgnet_fast.training.demo_data", description=__doc__)
    parser.add_argument("pictures", type=Path, help="a folder of pictures, searched with its sub-folders")
    parser.add_argument("-o", "--output", type=Path, default=Path("demo_data"))
    parser.add_argument("--vgg", type=Path, help="VGG-16's weights")
    parser.add_argument("--lpips", type=Path, help="AlexNet's weights with LPIPS's heads")
    parser.add_argument("--edge", type=int, default=288, help="longest shorter side, in pixels")
    parser.add_argument("--quality", type=int, default=70, help="of WebP")
    parser.add_argument("--held-out", type=int, default=32, help="pictures kept for validation")
    parser.add_argument("--shard-mb", type=float, default=24.5, help="largest shard, in millions of bytes")
    given = parser.parse_args(arguments)
    for name, value, low, high in (
        ("edge", given.edge, 1, _LONGEST_EDGE),
        ("quality", given.quality, 0, 100),
        ("held-out", given.held_out, 0, math.inf),
        ("shard-mb", given.shard_mb, 0, math.inf),
    ):
        if not low <= value <= high:
            parser.error(
                f"--{name}: expected {low} or more{'' if high == math.inf else f', at most {high}'}, got {value}"
            )
    try:
        given.output.mkdir(parents=True, exist_ok=True)
        written = write_weights(given.vgg, given.lpips, given.output)
        written += write_pictures(
            given.pictures,
            given.output,
            edge=given.edge,
            quality=given.quality,
            held_out=given.held_out,
            largest=round(given.shard_mb * 1e6),
        )
    except (LGNetError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    for file in written:
        print(f"{file}: {file.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
