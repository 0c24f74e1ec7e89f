"""The build: optional extension, recorded reason, contents of sdist and wheel. Runs in a copy of the sources."""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import shutil
import stat
import subprocess
import sys
import sysconfig
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from lgnet_fast import cpp_sources, native

ROOT = Path(__file__).resolve().parent.parent

if not (ROOT / "setup.py").is_file():
    pytest.skip("needs a checkout", allow_module_level=True)
setuptools = pytest.importorskip("setuptools")


@pytest.fixture
def sources(tmp_path):
    """A copy without build products and without big files."""
    tree = tmp_path / "sources"
    tree.mkdir()
    products = ("__pycache__", "*.so", "*.pyd", "_C_unavailable.txt")
    skip = shutil.ignore_patterns(*products, "*.safetensors", "*.png", "*.jpg")
    for name in ("csrc", "kernels", "lgnet_fast"):
        shutil.copytree(ROOT / name, tree / name, ignore=skip)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md"):
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, tree / name)
    if not (tree / "README.md").exists():
        (tree / "README.md").write_text("")
    for path in tree.rglob("*"):  # copies of a checkout that cannot be written
        path.chmod(path.stat().st_mode | stat.S_IWUSR)
    return tree


def run(arguments, cwd, **env):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )


def backend(hook, tree, **env):
    """Calls a PEP 517 hook and returns the archive that it makes."""
    out = tree.parent / "dist"
    out.mkdir(exist_ok=True)
    run(["-c", f"from setuptools import build_meta; build_meta.{hook}({str(out)!r})"], tree, **env)
    (archive,) = out.iterdir()
    return archive


def reason_after_build(tree, **env):
    lib = tree.parent / "lib"
    arguments = ["setup.py", "-q", "build", "--build-lib", str(lib), "--build-temp", str(tree.parent / "temp")]
    run(arguments, tree, **env)
    assert (lib / "lgnet_fast" / "kernels" / "__init__.py").is_file()
    assert (lib / "lgnet_fast" / "py.typed").is_file()
    assert not list((lib / "lgnet_fast").glob("_C.*"))
    # The finder of an editable install would find the extension of the checkout.
    code = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]; "
        "from lgnet_fast import native; print(native.__file__); print(native.unavailable_reason())"
    )
    file, reason = run(["-c", code], tree.parent, PYTHONPATH=str(lib)).stdout.splitlines()
    assert Path(file).is_relative_to(lib)
    return reason


@pytest.mark.skipif(os.name == "nt", reason="MSVC is found without CC and CXX")
def test_without_a_compiler(sources):
    reason = reason_after_build(sources, CC="/nonexistent/cc", CXX="/nonexistent/c++")
    assert reason.startswith("the C++ extension lgnet_fast._C is not installed: ")
    assert "/nonexistent/c++" in reason


@pytest.mark.skipif(os.name == "nt", reason="the stand-in compiler is a shell script")
def test_with_a_compiler_that_fails(sources, tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'fatal error: no such thing' >&2\nexit 1\n")
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    command = shlex.quote(str(compiler))
    # Debian's and Ubuntu's Python has such a flag; ninja prints the command before the error.
    reason = reason_after_build(sources, CC=command, CXX=command, CFLAGS="-Werror=format-security")
    assert reason == "the C++ extension lgnet_fast._C is not installed: fatal error: no such thing"


def test_without_pybind11(sources, tmp_path):
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "pybind11.py").write_text("raise ImportError\n")
    assert "pybind11 was not installed" in reason_after_build(sources, PYTHONPATH=str(hidden))


@pytest.mark.parametrize("where", ["checkout", "build folder"])
def test_what_an_earlier_build_left_is_removed(sources, where):
    """Old machine code under new Python would be handed addresses that it reads in another order."""
    name = "_C" + sysconfig.get_config_var("EXT_SUFFIX")
    if where == "checkout":
        stale = sources / "lgnet_fast" / name
        stale.write_bytes(b"of an earlier build")
        run(["setup.py", "-q", "build_ext", "--inplace"], sources, LGNET_FAST_NO_EXTENSION="1")
        assert "LGNET_FAST_NO_EXTENSION" in (sources / "lgnet_fast" / "_C_unavailable.txt").read_text()
    else:
        stale = sources.parent / "lib" / "lgnet_fast" / name
        stale.parent.mkdir(parents=True)
        stale.write_bytes(b"of an earlier build")
        removed = stale.parent / "cli" / "commands" / "removed.py"  # every file there is a command
        removed.parent.mkdir(parents=True)
        removed.write_text("from ..gone import what_it_needed\n")
        assert "LGNET_FAST_NO_EXTENSION" in reason_after_build(sources, LGNET_FAST_NO_EXTENSION="1")
        assert not removed.exists()
    assert not stale.exists()


@pytest.mark.skipif(os.name == "nt", reason="the stand-in for ninja is a shell script")
def test_commands_of_ninja(sources, tmp_path):
    """Flags are quoted for the shell, the linker is $CXX with all its words, and MAX_JOBS must be a number."""
    stand_in = tmp_path / "bin" / "ninja"
    stand_in.parent.mkdir()
    folder = shlex.quote(str(tmp_path))
    stand_in.write_text(f'#!/bin/sh\ncp "$2" {folder}/build.ninja\necho "$4" > {folder}/jobs\nexit 1\n')
    stand_in.chmod(0o755)
    (tmp_path / "ninja.py").write_text(f"BIN_DIR = {str(stand_in.parent)!r}\n")
    settings = {"CC": "cc-of-mine", "CXX": "ccache c++-of-mine", "CXXFLAGS": "-Ofast -DBAR=(x)", "MAX_JOBS": "many"}
    run(["setup.py", "-q", "build_ext", "--inplace"], sources, PYTHONPATH=str(tmp_path), **settings)
    build = (tmp_path / "build.ninja").read_text()
    rules = dict(re.findall(r"rule (\w+)\n  command = (.*)", build))
    for rule in ("compile", "link"):
        words = shlex.split(rules[rule])
        assert words[:2] == ["ccache", "c++-of-mine"]
        assert words.count("c++-of-mine") == 1
        # The last one counts. With -Ofast GCC's linker makes the whole process flush subnormal numbers.
        assert [word for word in words if word.startswith("-O")][-1] == "-O3"
        assert words.index("-fno-fast-math") > words.index("-Ofast")
    assert "-DBAR=(x)" in shlex.split(rules["compile"])
    assert "'-DBAR=(x)'" in rules["compile"]
    assert int((tmp_path / "jobs").read_text()) >= 1
    # In one object only, so that a change of another source compiles that and no third.
    defined = re.findall(r"compile (.*)\n  defined = -DLGNET_SOURCES=(\d+)ULL$", build, re.MULTILINE)
    source = str(sources / "csrc" / "module.cpp").replace(" ", "$ ")  # as ninja reads blanks
    assert defined == [(source, str(cpp_sources.digest(sources)))]
    assert build.count("LGNET_SOURCES") == 1
    assert " $defined " in rules["compile"]


def test_an_extension_of_other_sources_is_noticed(sources, caplog):
    """In a checkout; beside an installed package there are no sources."""
    digest = cpp_sources.digest(sources)
    assert digest == cpp_sources.digest(ROOT)
    source = sources / "csrc" / "simd" / "plain.h"
    source.write_text(source.read_text() + "// changed\n")
    assert cpp_sources.digest(sources) not in (None, digest)
    assert cpp_sources.digest(sources / "lgnet_fast") is None

    native._notice_other_sources(SimpleNamespace(__file__="_C.so", sources=digest))
    assert not caplog.records
    for older in (SimpleNamespace(__file__="_C.so", sources=digest + 1), SimpleNamespace(__file__="_C.so")):
        native._notice_other_sources(older)
        (record,) = caplog.records
        assert record.levelname == "WARNING"
        assert re.search(r"^_C\.so was built from other sources than .*csrc; build it again: ", record.getMessage())
        caplog.clear()


def test_windows_takes_clang_cl_where_it_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    namespace = runpy.run_path(str(ROOT / "setup.py"))
    compiler = SimpleNamespace(initialized=False, cc="cl.exe")
    compiler.initialize = lambda: setattr(compiler, "initialized", True)
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("VCINSTALLDIR", "PROGRAMFILES"):
        monkeypatch.delenv(name, raising=False)
    assert not [a for a in namespace["msvc_arguments"](compiler) if "clang" in a]
    assert (compiler.initialized, compiler.cc) == (False, "cl.exe")
    studio = tmp_path / "Tools" / "Llvm" / "x64" / "bin" / ("clang-cl.exe" if os.name == "nt" else "clang-cl")
    studio.parent.mkdir(parents=True)
    studio.write_text("")
    studio.chmod(0o755)
    monkeypatch.setenv("VCINSTALLDIR", str(tmp_path))
    assert "/clang:-O3" in namespace["msvc_arguments"](compiler)
    assert (compiler.initialized, Path(compiler.cc)) == (True, studio)


def test_the_sdist_builds(sources, tmp_path):
    archive = backend("build_sdist", sources)
    with tarfile.open(archive) as tar:
        names = {name.split("/", 1)[1] for name in tar.getnames() if "/" in name}
        unpacked = tmp_path / "unpacked"
        for member in tar.getmembers():
            if member.isfile():
                path = unpacked / member.name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(tar.extractfile(member).read())
    wanted = {p.relative_to(sources).as_posix() for p in (sources / "csrc").rglob("*") if p.is_file()}
    wanted |= {p.relative_to(sources).as_posix() for p in (sources / "kernels").glob("*.py")}
    wanted |= {p.relative_to(sources).as_posix() for p in (sources / "lgnet_fast").rglob("*.py")}
    wanted |= {"setup.py", "pyproject.toml", "LICENSE", "lgnet_fast/py.typed"}
    assert wanted <= names
    assert not [name for name in names if name.endswith((".so", ".pyd", ".pyc"))]
    (tree,) = unpacked.iterdir()
    archive.unlink()
    shutil.move(tree, tmp_path / "again")
    wheel = backend("build_wheel", tmp_path / "again", LGNET_FAST_NO_EXTENSION="1")
    with zipfile.ZipFile(wheel) as file:
        packed = set(file.namelist())
    assert "lgnet_fast/_C_unavailable.txt" in packed
    for path in (sources / "kernels").glob("*.py"):
        assert f"lgnet_fast/kernels/{path.name}" in packed
    for path in (sources / "kernels" / "machine_code").iterdir():
        assert f"lgnet_fast/kernels/machine_code/{path.name}" in packed
    top = {name.split("/")[0] for name in packed if ".dist-info/" not in name}
    assert top == {"lgnet_fast"}


def test_data_files_are_packed(sources):
    for folder in ("weights", "samples"):
        nested = sources / "lgnet_fast" / folder / "nested"
        nested.mkdir(parents=True)
        (nested / "data.bin").write_bytes(b"x")
    (sources / "lgnet_fast" / "_C_unavailable.txt").write_text("of this checkout only")
    wheel = backend("build_wheel", sources, LGNET_FAST_NO_EXTENSION="1")
    with zipfile.ZipFile(wheel) as file:
        page = {f"lgnet_fast/serve/static/{name}" for name in ("index.html", "main.js", "vendor/konva.min.js")}
        assert page <= set(file.namelist())
        licences = {name.split(".dist-info/licenses/")[1] for name in file.namelist() if "/licenses/" in name}
        assert licences == {"LICENSE", "lgnet_fast/serve/static/vendor/LICENSES.txt"}
        assert {"lgnet_fast/weights/nested/data.bin", "lgnet_fast/samples/nested/data.bin"} <= set(file.namelist())
        assert b"LGNET_FAST_NO_EXTENSION" in file.read("lgnet_fast/_C_unavailable.txt")


@pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1)])
def test_the_health_check_of_the_image_asks_the_server_and_no_proxy(status, code):
    class Server(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status if self.path == "/v2/health/ready" else 404)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    program, *arguments = json.loads(re.search(r"^HEALTHCHECK .*CMD (\[.*\])$", dockerfile, re.MULTILINE)[1])
    assert program == "python"
    with HTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        arguments = [word.replace("8080", str(server.server_port)) for word in arguments]
        # Docker passes the proxy of its configuration on to containers.
        environment = {**os.environ, "http_proxy": "http://127.0.0.1:9", "no_proxy": ""}
        done = subprocess.run([sys.executable, *arguments], env=environment, timeout=60)
        server.shutdown()
    assert done.returncode == code
