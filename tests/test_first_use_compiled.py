"""The first use of a compiled kernel on a machine: another process runs it, and the verdict is kept."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from lgnet_fast.kernels import compiled_checks, processes, trial
from lgnet_fast.kernels.compiled_checks import FirstUse

from lgnet_fast import cache

DEVICE = torch.device("cuda", 0)
HALF = torch.float16
READY, PREFIX = "lgnet_fast.trial ready", "lgnet_fast.trial "


def wrong(device: torch.device, dtype: torch.dtype) -> str | None:
    """A check, which another process can import."""
    return f"wrong on {device} in {dtype}"


def broken(device: torch.device, dtype: torch.dtype) -> str | None:
    """A check that ends its CUDA context: an index beyond the operand."""
    torch.zeros(4, device=device, dtype=dtype)[torch.tensor([9], device=device)]
    torch.cuda.synchronize(device)
    return None


# -- the process ----------------------------------------------------------------------------------------------------


def answers(monkeypatch: pytest.MonkeyPatch, program: str) -> Any:
    """What `try_apart` makes of a process that runs `program`; and that it was asked for the check."""
    asked = ["tests.test_first_use_compiled", "wrong", 0, "float16"]
    program = f"import json, os, sys, time\nassert json.load(sys.stdin) == {asked}\n{program}"

    def start(module: str) -> subprocess.Popen[bytes]:
        assert module == "lgnet_fast.kernels.trial"
        pipe = subprocess.PIPE
        return subprocess.Popen([sys.executable, "-c", program], stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL)

    monkeypatch.setattr(trial, "start", start)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    check = wrong
    monkeypatch.setattr(check, "__module__", "tests.test_first_use_compiled")
    return trial.try_apart(check, 0, HALF)


@pytest.mark.parametrize(
    ("printed", "expected"),
    [
        ([READY, PREFIX + '{"reason": null}'], {"passed": True, "reason": None}),
        (["hello", READY, "hello", PREFIX + '{"reason": "wrong"}'], {"passed": False, "reason": "wrong"}),
        ([READY, PREFIX + '{"memory": true}'], None),
        ([READY], {"passed": False, "reason": "its process ended with status 0"}),
        ([READY, PREFIX + '{"rea'], {"passed": False, "reason": "its process ended with status 0"}),
        ([PREFIX + '{"reason": null}'], None),  # no context: nothing is known of the kernel
        ([], None),
    ],
)  # fmt: skip
def test_answers(monkeypatch, printed, expected):
    assert answers(monkeypatch, f"print({chr(10).join(printed)!r})") == expected


def test_a_kernel_that_ends_the_process_or_does_not_end_is_ruled_out(monkeypatch):
    found = answers(monkeypatch, f"print({READY!r}, flush=True)\nos._exit(3)")
    assert found == {"passed": False, "reason": "its process ended with status 3"}
    monkeypatch.setattr(trial, "SECONDS", 2)
    found = answers(monkeypatch, f"print({READY!r}, flush=True)\ntime.sleep(60)")
    assert found == {"passed": False, "reason": "its process did not end within 2 s"}


def test_without_a_gpu_or_python_nothing_is_started(monkeypatch):
    monkeypatch.setattr(trial, "start", lambda module: pytest.fail("started"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert trial.try_apart(wrong, 0, HALF) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(processes.sys, "executable", "/opt/editor")
    assert trial.try_apart(wrong, 0, HALF) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU gives a context")
def test_a_process_without_a_context_says_nothing():
    """The real process, which ends where it finds no GPU."""
    with processes.start(trial.__name__) as process:
        question = json.dumps([wrong.__module__, wrong.__name__, 0, "float16"])
        assert process.communicate(question.encode(), 120)[0] == b""
    assert process.returncode == 1


@pytest.mark.parametrize(
    ("error", "answer"),
    [
        (None, {"reason": "wrong on cuda:1 in torch.bfloat16"}),
        (RuntimeError("CUDA error: misaligned address"), {"reason": "RuntimeError: CUDA error: misaligned address"}),
        (torch.OutOfMemoryError("CUDA out of memory"), {"memory": True}),
        (RuntimeError("cuModuleLoadData: out of memory (2)"), {"memory": True}),
    ],
)
def test_the_process_answers(monkeypatch, capsys, error, answer):
    def check(device: torch.device, dtype: torch.dtype) -> str | None:
        if error is not None:
            raise error
        return wrong(device, dtype)

    monkeypatch.setattr(sys.modules[__name__], "check", check, raising=False)
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps([__name__, "check", 1, "bfloat16"])))
    trial.main()
    assert chosen == [torch.device("cuda", 1)]
    assert capsys.readouterr().out.splitlines() == [READY, PREFIX + json.dumps(answer)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
def test_a_broken_context_is_that_of_the_process():
    assert trial.try_apart(wrong, 0, HALF) == {"passed": False, "reason": "wrong on cuda:0 in torch.float16"}
    verdict = trial.try_apart(broken, 0, HALF)
    assert verdict is not None
    assert not verdict["passed"]
    assert torch.ones(2, device=DEVICE).sum().item() == 2


# -- the verdict ----------------------------------------------------------------------------------------------------


class Checked:
    """A FirstUse on a GPU that is not there. here: what the check gives in this process; apart: in another."""

    def __init__(self, here: Any = None, apart: Any = None) -> None:
        self.here, self.apart, self.ran = here, apart, [0, 0]

    def check(self, device: torch.device, dtype: torch.dtype) -> str | None:
        self.ran[0] += 1
        if isinstance(self.here, Exception):
            raise self.here
        return self.here

    def try_apart(self, check: Any, device: int, dtype: torch.dtype) -> Any:
        assert (check, device, dtype) == (self.check, 0, HALF)
        self.ran[1] += 1
        return self.apart

    def reason(self, monkeypatch: pytest.MonkeyPatch) -> str | None:
        """As a new process finds it."""
        monkeypatch.setattr(compiled_checks, "try_apart", self.try_apart)
        monkeypatch.setattr(cache, "_known", {})
        first_use = FirstUse("a kernel", lambda capability: capability >= (8, 0), "another GPU", self.check)
        reason = first_use.reason_against(DEVICE, HALF)
        assert first_use.reason_against(DEVICE, HALF) == reason  # known now
        return reason


@pytest.fixture(autouse=True)
def gpu(fresh_cache, monkeypatch):
    """An H100 is assumed."""
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(compiled_checks, "is_capturing", lambda device: False)
    monkeypatch.setattr(cache, "key_for", lambda device, dtype: cache.Key("card", "1", "2", "3", "4", str(dtype)))


@pytest.mark.parametrize("reason", [None, "its process ended with status -6"])
def test_the_verdict_of_another_process_is_kept(monkeypatch, caplog, reason):
    checked = Checked(apart={"passed": reason is None, "reason": reason})
    assert checked.reason(monkeypatch) == reason
    assert [record.getMessage() for record in caplog.records] == (
        [f"a kernel is not used: {reason}"] if reason else []
    )
    later = checked.reason(monkeypatch)
    assert later == reason or "known from an earlier run" in later
    assert checked.ran == [0, 1]
    (entry,) = cache.entries(cache.VERDICTS)
    assert (entry.name, entry.value) == ("a kernel", {"passed": reason is None, "reason": reason})


@pytest.mark.parametrize("reason", [None, "relative error 1"])
def test_where_no_process_finds_out_this_one_does(monkeypatch, reason):
    checked = Checked(here=reason)
    assert checked.reason(monkeypatch) == reason
    assert checked.ran == [1, 1]
    checked.reason(monkeypatch)
    assert checked.ran == [1, 1]


def test_an_error_here_is_not_kept(monkeypatch):
    """An earlier kernel may have broken the context."""
    checked = Checked(here=RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert "illegal memory access" in checked.reason(monkeypatch)
    assert list(cache.entries(cache.VERDICTS)) == []


def test_a_full_gpu_rules_no_kernel_out(monkeypatch):
    """The driver's error is passed on as PyTorch's, and the next use checks again."""
    checked = Checked(here=RuntimeError("cuModuleLoadData: out of memory (2)"))
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError, match="cuModuleLoadData"):
            checked.reason(monkeypatch)
    checked.here = None
    assert checked.reason(monkeypatch) is None


def test_where_nothing_can_be_kept_no_process_is_started(monkeypatch):
    monkeypatch.setattr(cache, "can_keep", lambda: False)
    checked = Checked(apart={"passed": True, "reason": None})
    assert checked.reason(monkeypatch) is None
    assert checked.ran == [1, 0]
