"""`make wheel`: the wheel and the sdist, installed into a separate environment, fill a picture."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.slow(reason="compiles the extension twice")

if not (ROOT / "tools" / "build_wheel.py").is_file():
    pytest.skip("needs a checkout", allow_module_level=True)
pytest.importorskip("build.env")  # of the package; a checkout has a folder build/

# Which backend the operators would take, and what one picture takes.
CHECK = """
import json, sys
import torch
import lgnet_fast
from lgnet_fast import info
from lgnet_fast.samples import sample_paths
picture, mask = sample_paths()["chelsea"]
filled = lgnet_fast.Inpainter.from_pretrained(None, device="cpu")(picture, mask)
print(json.dumps({
    "file": lgnet_fast.__file__, "version": lgnet_fast.__version__, "size": filled.size,
    "cpp": info.collect()["backends"]["cpu"]["cpp"],
}))
"""


def run(*command: object, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "tools/build_wheel.py", out, cwd=ROOT)
    return out


def clean_environment(folder: Path) -> Path:
    """An environment with this one's packages, except lgnet_fast; returns its Python.

    Python searches the folders that a .pth file names, but does not read .pth files inside them, such as that of an
    editable install.
    """
    venv.create(folder, with_pip=False, symlinks=os.name != "nt")
    scripts = "Scripts" if os.name == "nt" else "bin"
    python = folder / scripts / ("python.exe" if os.name == "nt" else "python")
    (site,) = json.loads(
        run(python, "-c", "import site, json; print(json.dumps(site.getsitepackages()[-1:]))", cwd=folder)
    )
    packages = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    Path(site, "packages.pth").write_text("".join(f"{path}\n" for path in packages))
    return python


@pytest.mark.parametrize("pattern", ["*.whl", "*.tar.gz"])
def test_installed_it_fills_a_picture(dist: Path, pattern: str, tmp_path: Path) -> None:
    (file,) = dist.glob(pattern)
    python = clean_environment(tmp_path / "env")
    pip = (python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index")
    run(*pip, "--ignore-installed", file, cwd=tmp_path)
    shown = json.loads(run(python, "-c", CHECK, cwd=tmp_path, PYTHONPATH="").splitlines()[-1])
    assert Path(shown["file"]).is_relative_to(tmp_path / "env")
    assert shown["size"] == [451, 300]
    here = run(sys.executable, "-c", "import lgnet_fast; print(lgnet_fast.__version__)", cwd=ROOT).strip()
    assert shown["version"] == here
    assert f"-{here}" in file.name
    from lgnet_fast.info import collect

    # The kernels run there if they run here: both come from the same compiler.
    assert shown["cpp"] == collect()["backends"]["cpu"]["cpp"]
    assert "lgnet-fast" in run(python.with_name("lgnet-fast"), "--help", cwd=tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="platform tags of Linux")
def test_the_wheel_has_a_platform_tag_that_pip_takes_elsewhere(dist: Path) -> None:
    pytest.importorskip("auditwheel")
    (wheel,) = dist.glob("*.whl")
    assert "manylinux" in wheel.name
    assert wheel.stat().st_size < 24e6  # the weights are 19.6 MB of it
