"""`make test-lowest`: the tests with the lowest version of each direct dependency that pyproject.toml allows.

    python tests/run_lowest.py FOLDER [PYTEST OPTION ...]

uv resolves these versions into a virtual environment in FOLDER, which takes a copy of this tree and an extension
built against that PyTorch; both are made anew by the next run, the environment is kept. Triton is the one that the
lowest PyTorch brings, if any, older than what the kernels need: the tests then show that nothing but the Triton
kernels is missing. UV_TORCH_BACKEND=cpu takes PyTorch's small build, where its index can be reached.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ["setuptools>=77", "pybind11>=2.12", "ninja>=1.10"]
MARKS = "not gpu and not slow and not page"


def environment(folder: Path) -> Path:
    """The Python of a virtual environment with the lowest versions."""
    if not (folder / "pyvenv.cfg").exists():
        venv.create(folder, with_pip=True)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    subprocess.run([python, "-m", "pip", "install", "--quiet", "uv"], check=True)
    command = [python, "-m", "uv", "pip", "install", "--quiet", "--python", python, "--resolution", "lowest-direct"]
    subprocess.run([*command, *BUILD, "-r", ROOT / "pyproject.toml", "--extra", "test"], check=True)
    return python


def copy_of_the_tree(folder: Path) -> Path:
    """The files that git knows or does not ignore, in `folder`."""
    shutil.rmtree(folder, ignore_errors=True)
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, check=True, text=True,
        capture_output=True,
    ).stdout  # fmt: skip
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)
    return folder


def main() -> int:
    """Install, build, test; pytest's exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    arguments, options = parser.parse_known_args()
    folder = arguments.folder.resolve()
    python = environment(folder)
    tree = copy_of_the_tree(folder / "tree")
    own = os.environ | {"PATH": os.pathsep.join((str(python.parent), os.environ.get("PATH", "")))}
    install = ["install", "--quiet", "--no-build-isolation", "--no-deps", "--editable", tree]
    subprocess.run([python, "-m", "pip", *install], env=own, check=True)
    return subprocess.run([python, "-m", "pytest", "-m", MARKS, *options], cwd=tree, env=own).returncode


if __name__ == "__main__":
    sys.exit(main())
