"""How `lgnet-fast` starts and ends: without PyTorch for --help, quietly after Ctrl-C, and with errors told apart."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from lgnet_fast import cli
from lgnet_fast.cli import errors, interrupts
from lgnet_fast.cli.commands import ORDER
from lgnet_fast.errors import LGNetError

pytestmark = pytest.mark.once

COMMAND = [sys.executable, "-m", "lgnet_fast"]


def environment(folder: Path, torch: str) -> dict[str, str]:
    """An environment in which this text is the package torch."""
    (folder / "torch").mkdir()
    (folder / "torch" / "__init__.py").write_text(torch)
    return {**os.environ, "PYTHONPATH": str(folder)}


def test_help_does_not_wait_for_pytorch(tmp_path):
    """Also by a script of the console script's name."""
    refusing = environment(tmp_path, "raise RuntimeError('torch is imported')")
    script = tmp_path / "lgnet-fast"
    script.write_text(
        "import sys\n"
        "from lgnet_fast.cli import app\n"
        f"for command in {['', *ORDER]}:\n"
        "    app([*command.split(), '--help'], standalone_mode=False)\n"
        "assert 'torch' not in sys.modules\n"
    )
    for command in ([*COMMAND, "--help"], [*COMMAND, "run", "--help"], [sys.executable, str(script)]):
        ended = subprocess.run(command, env=refusing, capture_output=True, text=True, check=False)
        assert (ended.returncode, ended.stderr) == (0, ""), command
        assert "Usage: lgnet-fast" in ended.stdout.replace("python -m lgnet_fast", "lgnet-fast")


def test_every_other_program_gets_the_operators(tmp_path):
    script = tmp_path / "main.py"
    script.write_text("import lgnet_fast, torch\ntorch.ops.lgnet.merge\nprint('fine')")
    for name in ("module.py", "lgnet-fast.py"):
        (tmp_path / name).write_text(script.read_text())
    for arguments in (
        ["main.py"],
        ["lgnet-fast.py"],
        ["-m", "module", "-m", "lgnet_fast"],
        ["-c", script.read_text(), "lgnet-fast"],
    ):
        ended = subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert ended.stdout == "fine\n", ended.stderr


ARGUMENTS = {
    "run": ["-i", "a.png", "-m", "m.png", "-o", "o.png"],
    "eval": ["-i", "a.png", "-o", "out"],
    "train": ["config.yaml"],
    "convert": ["a", "b"],
}
PRESSED = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)\n"
SWALLOWED = f"""
try:
{textwrap.indent(PRESSED, "    ")}
except KeyboardInterrupt:
    raise ImportError("cannot load module more than once per process") from None
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no signals there")
@pytest.mark.parametrize(
    ("command", "torch"), [*((one, PRESSED) for one in ORDER), ("flops", SWALLOWED), ("run", SWALLOWED)]
)
def test_ctrl_c_while_pytorch_loads_ends_every_command_quietly(tmp_path, command, torch):
    """`SWALLOWED`: what modules in C make of it."""
    ended = subprocess.run(
        [*COMMAND, command, *ARGUMENTS.get(command, [])],
        env=environment(tmp_path, torch),
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in a shell's background
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "")


def test_an_error_after_ctrl_c_is_the_interruption(monkeypatch):
    def fail():
        raise LGNetError("scikit-image cannot be imported")

    monkeypatch.setattr("lgnet_fast.info.collect", fail)
    assert CliRunner().invoke(cli.app, ["info"]).exit_code == 2
    monkeypatch.setattr(interrupts, "_came", [signal.SIGINT])
    result = CliRunner().invoke(cli.app, ["info"])
    assert (result.exit_code, result.output) == (130, "")


def test_errors_of_the_system_are_one_line(monkeypatch):
    def fail():
        raise PermissionError(13, "Permission denied", "cache")

    monkeypatch.setattr("lgnet_fast.info.collect", fail)
    result = CliRunner().invoke(cli.app, ["info"])
    assert (result.exit_code, result.stderr) == (2, "error: [Errno 13] Permission denied: 'cache'\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["flops"], ["flops", "--json"]])
def test_a_full_standard_output_is_one_line(arguments):
    with open("/dev/full", "w") as full:
        ended = subprocess.run([*COMMAND, *arguments], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr == "error: standard output: [Errno 28] No space left on device\n"


@pytest.mark.parametrize(
    ("variables", "printed"),
    [
        ({"PYTHONIOENCODING": "ascii"}, b"PSNR \\u2193 \\udce9\n"),
        ({"PYTHONIOENCODING": "utf-8"}, b"PSNR \xe2\x86\x93 \\udce9\n"),
        ({"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}, b"PSNR \\u2193 \\udce9\n"),
    ],
)
def test_signs_that_the_terminal_lacks_are_escaped(variables, printed):
    if not torch.__file__.isascii():
        pytest.skip("PyTorch cannot be imported from its folder in an ASCII locale")
    program = """
import sys
import lgnet_fast.counting
from lgnet_fast.cli import main
lgnet_fast.counting.render = lambda report: "PSNR \\u2193 \\udce9"
sys.argv = ["lgnet-fast", "flops"]
main()
"""
    environment = {**os.environ, "PYTHONUTF8": "0", **variables}
    ended = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=False)
    lines = ended.stdout.replace(os.linesep.encode(), b"\n")
    assert (ended.returncode, lines, ended.stderr) == (0, printed, b"")


@pytest.mark.skipif(sys.platform == "win32", reason="a closed pipe has another error there")
@pytest.mark.parametrize("arguments", [["flops"], ["demo", "-o"]])
def test_a_reader_that_has_ended_ends_the_command_quietly(tmp_path, arguments):
    if arguments[-1] == "-o":
        arguments = [*arguments, str(tmp_path)]
    with subprocess.Popen(
        [*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1


def test_warnings_are_one_line():
    """Without the file and the line of code, and only while a command runs."""
    before = warnings.formatwarning
    with errors.plain_warnings():
        assert warnings.formatwarning("text", UserWarning, "a.py", 7) == "warning: text\n"
    assert warnings.formatwarning is before
    assert warnings.formatwarning("text", UserWarning, "a.py", 7).startswith("a.py:7: UserWarning: text")


def test_the_wait_for_a_gpus_kernels_is_shown(monkeypatch):
    """On stderr, while a command runs; other notes of the library are not."""
    waits = logging.getLogger("lgnet_fast.waits")

    def collect():
        waits.info("compiling the engine's kernels: %d of %d", 10, 57)
        logging.getLogger("lgnet_fast").info("a note")
        return {}

    monkeypatch.setattr("lgnet_fast.info.collect", collect)
    for _ in range(2):
        result = CliRunner().invoke(cli.app, ["info", "--json"])
        assert (result.exit_code, result.stdout) == (0, "{}\n")
        assert result.stderr == "compiling the engine's kernels: 10 of 57\n"
    assert (waits.handlers, waits.level) == ([], logging.NOTSET)
