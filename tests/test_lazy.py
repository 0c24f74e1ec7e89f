"""Names that load at first use, from several threads at once."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

PROGRAM = """
import importlib, sys, threading
import lgnet_fast

barrier, failed = threading.Barrier(2), []

def load(where):
    package, _, name = where.partition(":")
    barrier.wait()
    try:
        getattr(importlib.import_module(package), name)
    except BaseException as error:
        failed.append(f"{where}: {type(error).__name__}: {error}")

threads = [threading.Thread(target=load, args=(where,)) for where in sys.argv[1:]]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(failed)
"""


@pytest.mark.once
@pytest.mark.parametrize(
    "names",
    [
        ("lgnet_fast:Inpainter", "lgnet_fast:Session"),
        ("lgnet_fast:Inpainter", "lgnet_fast.evaluation:evaluate"),
        ("lgnet_fast:Inpainter", "lgnet_fast.training:Trainer"),
        ("lgnet_fast.training:Trainer", "lgnet_fast.evaluation:evaluate"),
        ("lgnet_fast.serve:create_app", "lgnet_fast:Inpainter"),
        ("lgnet_fast.serve:create_app", "lgnet_fast.evaluation:evaluate"),
    ],
)
def test_first_imports_by_two_threads(names: tuple[str, str]) -> None:
    ended = subprocess.run([sys.executable, "-c", PROGRAM, *names], capture_output=True, text=True, check=False)
    assert ended.stdout == "[]\n", ended.stdout + ended.stderr


@pytest.mark.parametrize("package", ["", ".cli", ".engine", ".evaluation", ".pipeline", ".reference", ".training"])
def test_completion_offers_every_public_name(package: str) -> None:
    """What `dir` returns is what IPython completes."""
    module = importlib.import_module(f"lgnet_fast{package}")
    assert {*module.__all__, "__doc__", "__file__"} <= set(dir(module))
