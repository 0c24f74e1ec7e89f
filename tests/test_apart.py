"""Kernels that have not run on a machine yet: another process runs them first, and the verdict is kept."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from lgnet_fast.kernels import apart, compiled_checks, processes
from lgnet_fast.kernels.apart import Outcome
from lgnet_fast.kernels.compiled_checks import FirstUse

from lgnet_fast import cache

DEVICE = torch.device("cuda", 0)
HALF = torch.float16
MARK = "lgnet_fast.apart "
READY = MARK + "ready"


def wrong(device: torch.device, dtype: torch.dtype, *more: int) -> str:
    """A function that another process can import."""
    return f"wrong on {device} in {dtype}{list(more)}"


def broken(device: torch.device, dtype: torch.dtype) -> None:
    """Ends its CUDA context: an index beyond the operand."""
    torch.zeros(4, device=device, dtype=dtype)[torch.tensor([9], device=device)]
    torch.cuda.synchronize(device)


@pytest.fixture
def gpu(fresh_cache: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An H100 is assumed, with an empty cache."""
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (64 << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(apart.limits, "memory", lambda: None)
    monkeypatch.setattr(compiled_checks, "is_capturing", lambda device: False)
    monkeypatch.setattr(cache, "key_for", lambda device, dtype: cache.Key("card", "1", "2", "3", "4", str(dtype)))


# -- the process ----------------------------------------------------------------------------------------------------


def process_of(monkeypatch: pytest.MonkeyPatch, program: str) -> list[subprocess.Popen[bytes]]:
    """Programs take the place of the process; returns those that were started."""
    started: list[subprocess.Popen[bytes]] = []
    program = f"import os, sys, time\nquestion = sys.stdin.buffer.read()\nassert question\n{program}"

    def start(module: str, alone: bool) -> subprocess.Popen[bytes]:
        assert (module, alone) == ("lgnet_fast.kernels.apart", True)
        pipe = subprocess.PIPE
        started.append(subprocess.Popen([sys.executable, "-c", program], stdin=pipe, stdout=pipe))
        return started[-1]

    monkeypatch.setattr(apart, "start", start)
    return started


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("printed", "expected"),
    [
        ([READY, MARK + '{"value": null}'], Outcome(None)),
        (["hello", READY, "hello", MARK + '{"value": [1, "2"]}'], Outcome([1, "2"])),
        ([READY, MARK + '{"problem": "RuntimeError: no"}'], Outcome(None, "RuntimeError: no")),
        ([READY, MARK + '{"memory": true}'], None),
        ([READY], Outcome(None, "its process ended with status 0")),
        ([READY, MARK + '{"rea'], Outcome(None, "its process ended with status 0")),
        ([MARK + '{"value": null}'], None),  # another GPU: nothing is known of the kernel
        ([], None),
    ],
)
def test_answers(monkeypatch, printed, expected):
    process_of(monkeypatch, f"print({chr(10).join(printed)!r})")
    assert apart.call_apart(wrong, DEVICE, HALF) == expected


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("os._exit(3)", Outcome(None, "its process ended with status 3")),
        ("os.abort()", Outcome(None, f"its process ended with status {-signal.SIGABRT}")),
        ("os._exit(1)", Outcome(None, "its process did not end within 120 s")),  # as `faulthandler` does
        ("os.kill(os.getpid(), 15)", None),  # by somebody else
        ("os.kill(os.getpid(), 9)", None),
    ],
)
def test_a_process_that_ends_early(monkeypatch, program, expected):
    process_of(monkeypatch, f"print({READY!r}, flush=True)\n{program}")
    assert apart.call_apart(wrong, DEVICE, HALF) == expected


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("status", [1, 3, -11])
def test_a_process_without_a_context(monkeypatch, status):
    end = f"os._exit({status})" if status > 0 else f"os.kill(os.getpid(), {-status})"
    process_of(monkeypatch, end)
    assert apart.call_apart(wrong, DEVICE, HALF) == Outcome(None, apart.NO_CONTEXT)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(("printed", "problem"), [(READY, "its process did not end within 120 s"), ("", None)])
def test_a_process_that_cannot_end_itself_is_ended(monkeypatch, printed, problem):
    monkeypatch.setattr(apart, "_BACKSTOP_SECONDS", 10)  # in which the process surely prints
    started = process_of(monkeypatch, f"print({printed!r}, flush=True)\ntime.sleep(100)")
    assert apart.call_apart(wrong, DEVICE, HALF) == Outcome(None, problem or apart.NO_CONTEXT)
    assert started[0].returncode == -signal.SIGKILL


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_an_interrupted_caller_ends_the_process(monkeypatch, kind):
    """Ctrl-C, and a signal handler that raises SystemExit as those of servers do."""
    started = process_of(monkeypatch, "time.sleep(100)")
    start = apart.start

    def start_and_interrupt(module: str, alone: bool) -> subprocess.Popen[bytes]:
        process = start(module, alone)
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        return process

    def handler(number: int, frame: Any) -> None:
        raise kind

    monkeypatch.setattr(apart, "start", start_and_interrupt)
    before = signal.signal(signal.SIGALRM, handler)
    try:
        begin = time.monotonic()
        with pytest.raises(kind):
            apart.call_apart(wrong, DEVICE, HALF)
        assert time.monotonic() - begin < 60
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert started[0].returncode == -signal.SIGKILL


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("lack", ["GPU", "Python", "a process", "host memory", "GPU memory", "a caller"])
def test_what_a_process_needs(monkeypatch, lack):
    def start(module: str, alone: bool) -> Any:
        if lack == "a process":
            raise BlockingIOError("fork: resource temporarily unavailable")
        pytest.fail("started")

    monkeypatch.setattr(apart, "start", start)
    if lack == "GPU":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    elif lack == "Python":
        monkeypatch.setattr(processes.sys, "executable", "/opt/editor")
    elif lack == "host memory":
        monkeypatch.setattr(apart.limits, "memory", lambda: 1 << 30)
    elif lack == "a caller":  # the process itself starts no other one
        monkeypatch.setattr(apart, "inside", True)
    elif lack == "GPU memory":
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 30, 80 << 30))
    assert (apart.unavailable(DEVICE) is None) == (lack in ("a process", "a caller"))
    assert apart.call_apart(wrong, DEVICE, HALF) is None


def asked(
    monkeypatch: pytest.MonkeyPatch, function: Callable[..., Any], key: cache.Key
) -> tuple[list[torch.device], int]:
    """`main` is asked for a function on the second GPU; returns the devices that it chooses, and its exit status."""
    chosen: list[torch.device] = []
    monkeypatch.setattr(sys.modules[__name__], "function", function, raising=False)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    question = pickle.dumps((__name__, "function", key, 1, torch.bfloat16, (5,)))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(question)))
    monkeypatch.setattr(apart.faulthandler, "dump_traceback_later", lambda seconds, exit: None)
    monkeypatch.setattr(apart, "inside", False)  # so that it is False again
    ended: list[int] = []
    monkeypatch.setattr(apart.os, "_exit", ended.append)
    with contextlib.suppress(TypeError):
        apart.main()
    assert apart.inside
    return chosen, ended[0]


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("error", "answer"),
    [
        (None, {"value": "wrong on cuda:1 in torch.bfloat16[5]"}),
        (RuntimeError("CUDA error: misaligned address"), {"problem": "RuntimeError: CUDA error: misaligned address"}),
        (torch.OutOfMemoryError("CUDA out of memory"), {"memory": True}),
        (MemoryError(), {"memory": True}),
        (RuntimeError("cuModuleLoadData: out of memory (2)"), {"memory": True}),
    ],
)
def test_the_process_answers(monkeypatch, capsys, error, answer):
    def function(*arguments: Any) -> str:
        if error is not None:
            raise error
        return wrong(*arguments)

    found = asked(monkeypatch, function, cache.key_for(DEVICE, torch.bfloat16))
    assert found == ([torch.device("cuda", 1)], 0)
    assert capsys.readouterr().out.splitlines() == [READY, MARK + json.dumps(answer)]


@pytest.mark.usefixtures("gpu")
def test_a_launch_that_fails_later_is_a_problem(monkeypatch, capsys):
    waits = iter([None, RuntimeError("CUDA error: an illegal memory access was encountered")])

    def synchronize(device: torch.device) -> None:
        if (error := next(waits)) is not None:
            raise error

    def function(*arguments: Any) -> str:
        monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
        synchronize(DEVICE)
        return "well"

    asked(monkeypatch, function, cache.key_for(DEVICE, torch.bfloat16))
    assert (
        "illegal memory access" in json.loads(capsys.readouterr().out.splitlines()[1].removeprefix(MARK))["problem"]
    )


@pytest.mark.usefixtures("gpu")
def test_an_answer_that_cannot_be_told_is_no_late_one(monkeypatch, capsys):
    assert asked(monkeypatch, lambda *arguments: object(), cache.key_for(DEVICE, torch.bfloat16))[1] == 3
    assert capsys.readouterr().out.splitlines() == [READY]


@pytest.mark.usefixtures("gpu")
def test_the_process_says_nothing_of_another_gpu(monkeypatch, capsys):
    key = cache.key_for(DEVICE, torch.bfloat16)
    asked(monkeypatch, wrong, cache.Key("another card", *list(vars(key).values())[1:]))
    assert capsys.readouterr().out == ""


def test_a_started_process_runs_main_of_the_module(tmp_path, monkeypatch):
    """With the caller's path, and not what lies in the current folder; signals to the caller's group miss it."""
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "own.py").write_text(
        "import os, sys, json\n"
        "def main():\n    import shadowed\n"
        "    print(json.dumps([sys.stdin.read(), shadowed.__file__, os.getpgrp() == os.getpid()]))\n"
    )
    (tmp_path / "package" / "shadowed.py").write_text("")
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "shadowed.py").write_text("")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.syspath_prepend(str(tmp_path / "package"))
    monkeypatch.setattr(sys, "path", [*(path for path in sys.path if path), None])  # some programs add objects
    for alone in (True, False):
        with processes.start("own", alone) as process:
            printed = json.loads(process.communicate(b"question", 60)[0])
        shadow = "here" if sys.version_info < (3, 11) else "package"
        assert printed == ["question", str(tmp_path / shadow / "shadowed.py"), alone]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
def test_a_broken_context_is_that_of_the_process():
    assert apart.call_apart(wrong, DEVICE, HALF, 7) == Outcome("wrong on cuda:0 in torch.float16[7]")
    outcome = apart.call_apart(broken, DEVICE, HALF)
    assert outcome is not None
    assert outcome.problem is not None
    assert torch.ones(2, device=DEVICE).sum().item() == 2


# -- the verdict ----------------------------------------------------------------------------------------------------


class Checked:
    """A FirstUse on a GPU that is not there. here: what the check gives in this process; apart: in another."""

    def __init__(self, here: Any = None, apart: Outcome | None = None) -> None:
        self.here, self.apart, self.ran = here, apart, [0, 0]

    def check(self, device: torch.device, dtype: torch.dtype) -> str | None:
        self.ran[0] += 1
        if isinstance(self.here, Exception):
            raise self.here
        return self.here

    def call_apart(self, check: Any, device: torch.device, dtype: torch.dtype) -> Outcome | None:
        assert (check, device, dtype) == (self.check, DEVICE, HALF)
        self.ran[1] += 1
        return self.apart

    def first_use(self, monkeypatch: pytest.MonkeyPatch) -> FirstUse:
        """As a new process has it."""
        monkeypatch.setattr(compiled_checks, "call_apart", self.call_apart)
        monkeypatch.setattr(cache, "_known", {})
        return FirstUse("a kernel", lambda capability: capability >= (8, 0), "another GPU", self.check)

    def reason(self, monkeypatch: pytest.MonkeyPatch) -> str | None:
        """As a new process finds it."""
        first_use = self.first_use(monkeypatch)
        reason = first_use.reason_against(DEVICE, HALF)
        assert first_use.reason_against(torch.device("cuda"), HALF) == reason  # known now
        return reason


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("outcome", "reason"),
    [
        (Outcome(None), None),
        (Outcome("relative error 1"), "relative error 1"),
        (Outcome(None, "its process ended with status -6"), "its process ended with status -6"),
    ],
)
def test_the_verdict_of_another_process_is_kept(monkeypatch, caplog, outcome, reason):
    """One process warns; later ones know."""
    checked = Checked(apart=outcome)
    assert checked.reason(monkeypatch) == reason
    assert [record.getMessage() for record in caplog.records] == ([f"not used: a kernel: {reason}"] if reason else [])
    caplog.clear()
    later = None if reason is None else f"{reason}; known from an earlier run, `lgnet-fast verify` tries anew"
    assert checked.reason(monkeypatch) == later
    assert not caplog.records
    assert checked.ran == [0, 1]
    (entry,) = cache.entries(cache.VERDICTS)
    assert entry.name == "a kernel"
    assert entry.value == {"passed": reason is None, "reason": reason, "otherwise": "Triton's kernels run"}


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("reason", [None, "relative error 1"])
@pytest.mark.parametrize("outcome", [None, Outcome(None, apart.NO_CONTEXT)])
def test_where_no_process_finds_out_this_one_does(monkeypatch, outcome, reason):
    checked = Checked(reason, outcome)
    assert checked.reason(monkeypatch) == reason
    assert checked.ran == [1, 1]
    checked.reason(monkeypatch)
    assert checked.ran == [1, 1]


@pytest.mark.usefixtures("gpu")
def test_an_error_here_is_not_kept(monkeypatch):
    """An earlier kernel may have broken the context."""
    checked = Checked(here=RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert "illegal memory access" in str(checked.reason(monkeypatch))
    assert list(cache.entries(cache.VERDICTS)) == []


@pytest.mark.usefixtures("gpu")
def test_a_full_gpu_rules_no_kernel_out(monkeypatch):
    """The driver's error is passed on as PyTorch's, and the next use checks again."""
    checked = Checked(here=RuntimeError("cuModuleLoadData: out of memory (2)"))
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError, match="cuModuleLoadData"):
            checked.reason(monkeypatch)
    checked.here = None
    assert checked.reason(monkeypatch) is None


@pytest.mark.usefixtures("gpu")
def test_where_nothing_can_be_kept_no_process_is_started(monkeypatch):
    monkeypatch.setattr(cache, "can_keep", lambda: False)
    checked = Checked(apart=Outcome(None))
    assert checked.reason(monkeypatch) is None
    assert checked.ran == [1, 0]


@pytest.mark.usefixtures("gpu")
def test_a_settled_verdict_waits_for_no_other_check(monkeypatch):
    """Such as that of another dtype, which takes as long as a process."""
    began, go_on = threading.Event(), threading.Event()

    def call_apart(check: Any, device: torch.device, dtype: torch.dtype) -> Outcome:
        if dtype != HALF:
            began.set()
            go_on.wait(60)
        return Outcome(None)

    monkeypatch.setattr(compiled_checks, "call_apart", call_apart)
    first_use = FirstUse("a kernel", lambda capability: True, "nothing", lambda device, dtype: None)
    assert first_use.reason_against(DEVICE, HALF) is None
    other = threading.Thread(target=first_use.reason_against, args=(DEVICE, torch.bfloat16))
    other.start()
    assert began.wait(60)
    assert first_use.reason_against(DEVICE, HALF) is None  # would wait for a minute
    assert other.is_alive()
    go_on.set()
    other.join()
