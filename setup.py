"""Build script: the Python packages, and the optional C++ extension ``lgnet_fast._C``.

The extension needs a C++17 compiler and pybind11, and nothing of PyTorch: it takes raw pointers, so that one binary
serves every torch. It is optional. Whatever stops it (no compiler, no pybind11, a compile error) leaves one line in
``lgnet_fast/_C_unavailable.txt`` beside the package, the installation continues, and ``lgnet-fast info`` prints that
line.

Where ninja is found, the objects are compiled in parallel and only when a source or header changed; otherwise
setuptools compiles them one by one. ``LGNET_FAST_NO_EXTENSION=1`` skips the extension, ``MAX_JOBS`` bounds the jobs.

The kernels for one instruction set need GCC's or Clang's builtins. On Windows clang-cl is used where it is found;
MSVC alone compiles the portable kernels.
"""

from __future__ import annotations

import itertools
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
REASON_FILE = "_C_unavailable.txt"
# Relative to this file: setuptools refuses absolute paths in an sdist. The instruction sets are chosen inside
# csrc/isa_*.cpp by target pragmas, so that the same flags serve every file and every build path.
SOURCES = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").glob("*.cpp"))
HEADERS = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".inc"))
# In the extension, so that an editable install notices one that was built from other sources than it has.
DIGEST = runpy.run_path(str(ROOT / "lgnet_fast" / "cpp_sources.py"))["digest"](ROOT)
DEFINED = ("csrc/module.cpp", "LGNET_SOURCES", f"{DIGEST}ULL")


def ninja_executable() -> str | None:
    """The ninja to build with: that of the ``ninja`` wheel, else one on PATH."""
    try:
        import ninja

        candidate = Path(ninja.BIN_DIR) / ("ninja.exe" if os.name == "nt" else "ninja")
        if candidate.is_file():
            return str(candidate)
    except (ImportError, AttributeError):
        pass
    return shutil.which("ninja")


def clang_cl() -> str | None:
    """The clang-cl of PATH, of Visual Studio or of LLVM: it compiles the vector kernels, MSVC does not."""
    folders = [os.environ.get("PATH", "")]
    if studio := os.environ.get("VCINSTALLDIR"):
        folders.append(str(Path(studio) / "Tools" / "Llvm" / "x64" / "bin"))
    if programs := os.environ.get("PROGRAMFILES"):
        folders.append(str(Path(programs) / "LLVM" / "bin"))
    return shutil.which("clang-cl", path=os.pathsep.join(folders))


def msvc_arguments(compiler: Any) -> list[str]:
    """Arguments for MSVC, or for clang-cl where there is one: the compiler object is then made to call that."""
    arguments = ["/std:c++17", "/O2", "/EHsc"]
    if (clang := clang_cl()) is not None:
        if not compiler.initialized:
            compiler.initialize()  # finds MSVC's headers, libraries and linker, which clang-cl uses too
        compiler.cc = clang
        arguments += ["/clang:-O3", "/clang:-fno-math-errno", "-Wno-unused-command-line-argument"]
    return arguments


def number_of_jobs() -> int:
    """``MAX_JOBS``, or as many as there are processors for this process."""
    given = os.environ.get("MAX_JOBS", "")
    if given.isdigit() and int(given) > 0:
        return int(given)
    if given:
        print(f"lgnet_fast: MAX_JOBS: expected a positive number, got {given!r}", file=sys.stderr)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def one_line(error: BaseException) -> str:
    """The most telling line of a build error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # Not the command: some systems compile with -Werror=format-security.
    telling = [line for line in lines if re.search(r"(?<!-w)error|not found", line.lower())]
    return ((telling or lines or [type(error).__name__])[0])[:300]


class BuildExtension(build_ext):
    """``build_ext`` with pybind11's include path, ninja where there is one, and a recorded reason for failure."""

    def run(self) -> None:
        self.in_checkout = bool(self.inplace or self.editable_mode)  # super().run() changes `inplace` on its way
        # What an earlier build left must neither be loaded nor packed if this one fails or is skipped.
        for ext in self.extensions:
            built = Path(self.build_lib_path(ext))
            built.unlink(missing_ok=True)
            if self.in_checkout:
                (ROOT / built.relative_to(self.build_lib)).unlink(missing_ok=True)
        # Its compiler set-up can raise, and a missing compiler must not stop the installation.
        try:
            super().run()
        except Exception as error:
            self.record(one_line(error))

    def build_extensions(self) -> None:
        if os.environ.get("LGNET_FAST_NO_EXTENSION", "0") not in ("", "0"):
            self.record("skipped at build time by LGNET_FAST_NO_EXTENSION")
            return
        try:
            import pybind11
        except ImportError:
            self.record("pybind11 was not installed at build time")
            return
        for ext in self.extensions:
            ext.include_dirs.append(pybind11.get_include())
            if self.compiler.compiler_type == "msvc":
                ext.extra_compile_args += msvc_arguments(self.compiler)
            else:
                # -fno-fast-math, after flags of $CXXFLAGS, because the kernels tell NaN and infinity from numbers.
                ext.extra_compile_args += ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden"]
                ext.extra_compile_args += ["-fno-fast-math", "-fno-math-errno"]
                # Never libgomp: csrc/parallel.cpp uses the OpenMP runtime that torch has loaded.
                # With -ffast-math or -Ofast of $CXXFLAGS the linker would add code that makes the whole process treat
                # subnormal numbers as zero.
                ext.extra_link_args += ["-pthread", "-O3", "-fno-fast-math"]
        try:
            ninja = ninja_executable()
            if ninja is None or self.compiler.compiler_type != "unix":
                for ext in self.extensions:
                    ext.define_macros.append(DEFINED[1:])
                super().build_extensions()
            else:
                for ext in self.extensions:
                    self.build_with_ninja(ninja, ext)
        except Exception as error:
            self.record(one_line(error))
            return
        self.reason_path().unlink(missing_ok=True)

    def copy_extensions_to_source(self) -> None:
        # Editable installs: setuptools copies what was built; there may be nothing.
        self.extensions = [e for e in self.extensions if Path(self.build_lib_path(e)).is_file()]
        super().copy_extensions_to_source()

    def build_lib_path(self, ext: Extension) -> str:
        return os.path.join(self.build_lib, self.get_ext_filename(self.get_ext_fullname(ext.name)))

    def build_with_ninja(self, ninja: str, ext: Extension) -> None:
        compiler = self.compiler
        cxx = getattr(compiler, "compiler_so_cxx", None) or [*compiler.compiler_cxx, "-fPIC"]
        linker = getattr(compiler, "linker_so_cxx", None) or compiler.linker_so
        # By $CXX with all its words, such as "ccache g++", where Python's own linker may be missing.
        options = itertools.dropwhile(lambda word: not word.startswith("-"), linker)
        link = [*compiler.compiler_cxx, *options]
        includes = [f"-I{path}" for path in [*ext.include_dirs, *compiler.include_dirs]]
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        temp = Path(self.build_temp).resolve()
        temp.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)

        def escape(path: object) -> str:
            return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

        def command(words: list[str]) -> str:
            return shlex.join(words).replace("$", "$$")

        objects = [temp / (Path(source).stem + ".o") for source in ext.sources]
        lines = [
            "ninja_required_version = 1.5",
            f"rule compile\n  command = {command([*cxx, *includes, *ext.extra_compile_args])} "
            "$defined -MMD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
            f"rule link\n  command = {command(link)} $in {command(ext.extra_link_args)} -o $out",
        ]
        for source, obj in zip(ext.sources, objects, strict=True):
            lines.append(f"build {escape(obj)}: compile {escape(Path(source).resolve())}")
            if source == DEFINED[0]:  # of the others, those are compiled again that have changed
                lines.append(f"  defined = -D{DEFINED[1]}={DEFINED[2]}")
        lines.append(f"build {escape(target)}: link {' '.join(escape(o) for o in objects)}")
        build_file = temp / "build.ninja"
        build_file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        jobs = number_of_jobs()
        done = subprocess.run(
            [ninja, "-f", str(build_file), "-j", str(jobs)], cwd=temp, capture_output=True, text=True, check=False
        )
        sys.stdout.write(done.stdout)
        if done.returncode:
            raise RuntimeError(done.stdout + done.stderr)

    def reason_path(self) -> Path:
        base = ROOT if self.in_checkout else Path(self.build_lib)
        return base / "lgnet_fast" / REASON_FILE

    def record(self, reason: str) -> None:
        """Note why there is no extension, where ``lgnet_fast.native`` looks for it."""
        print(f"lgnet_fast: building without the C++ extension: {reason}", file=sys.stderr)
        path = self.reason_path()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(reason + "\n", encoding="utf-8")

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).is_file()]


class BuildPython(build_py):
    """``build_py`` that packs neither what an earlier build left nor a checkout's note of a failed in-place build."""

    def run(self) -> None:
        # setuptools keeps build/lib*/; a command that the sources no longer have would still be loaded.
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib, "lgnet_fast"), ignore_errors=True)
        super().run()

    def find_data_files(self, package: str, src_dir: str) -> list[str]:
        return [f for f in super().find_data_files(package, src_dir) if Path(f).name != REASON_FILE]


# Folders beside the package may shadow it: no news in a checkout, but the first thing that a newcomer would read.
warnings.filterwarnings("ignore", message="Editable installation")

packages = {"lgnet_fast", *find_packages(include=["lgnet_fast", "lgnet_fast.*"])}
packages |= {"lgnet_fast.kernels", *(f"lgnet_fast.kernels.{name}" for name in find_packages("kernels"))}

setup(
    packages=sorted(packages),
    package_dir={"lgnet_fast.kernels": "kernels"},
    package_data={
        "lgnet_fast": ["py.typed", "weights/**", "samples/**", "serve/static/**"],
        "lgnet_fast.kernels": ["machine_code/*"],
    },
    include_package_data=False,
    ext_modules=[Extension("lgnet_fast._C", SOURCES, language="c++", depends=HEADERS)],
    cmdclass={"build_ext": BuildExtension, "build_py": BuildPython},
    zip_safe=False,
)
