"""The threads of the C++ kernels: OpenMP's and the pool's, callers at once, forks, the end of the process."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
import time

import pytest
import torch

from lgnet_fast import native
from lgnet_fast.ops.cpu import attention as cpu
from tests.test_cpp_kernels import make

pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(native.unavailable_reason() is not None, reason=str(native.unavailable_reason())),
]


def test_eight_python_threads_at_once():
    cases = [make((1, 32, 16, 11 + i), seed=i)[:3] for i in range(8)]
    expected = [cpu.attention_block_forward(*case, "released")[0] for case in cases]
    wrong: list[int] = []

    def work(i):
        for _ in range(20):
            if not torch.equal(cpu.attention_block_forward(*cases[i], "released")[0], expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_gil_is_released():
    features, weight, bias, _ = make((2, 128, 64, 64))

    def longest_wait() -> float:
        """Of this thread while the kernel runs in another, as a share of the run."""
        running = threading.Thread(target=lambda: cpu.attention_block_forward(features, weight, bias, "released"))
        start = time.perf_counter()
        running.start()
        longest, last = 0.0, start
        while running.is_alive():
            now = time.perf_counter()
            longest, last = max(longest, now - last), now
        return longest / (time.perf_counter() - start)

    assert any(longest_wait() < 0.6 for _ in range(30))  # a busy machine makes some of them wait


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.skipif(sys.platform == "darwin", reason="macOS's libraries do not work after fork()")
@pytest.mark.parametrize("loaded", [True, False], ids=["loaded before", "loaded in the child"])
def test_after_fork(loaded):
    code = f"""
        import os, signal, torch
        from lgnet_fast import native
        from lgnet_fast.ops.cpu import attention as cpu
        torch.set_num_threads(4)
        features = torch.randn(1, 16, 32, 32)
        torch.mm(torch.randn(500, 500), torch.randn(500, 500)); torch.randn(10**6).exp_()  # starts OpenMP's pool
        if {loaded}:
            expected = cpu.attention_forward(features, "released")[0]
        child = os.fork()
        if child == 0:
            signal.alarm(120)
            out = cpu.attention_forward(features, "released")[0]
            assert native.library().parallel_backend() == "threads"
            os._exit(0 if not {loaded} or torch.equal(out, expected) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert cpu.attention_forward(features, "released")[0].isfinite().all()
    """
    subprocess.run([sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)], timeout=300, check=True)


def test_a_daemon_thread_in_a_kernel_does_not_abort_the_end_of_the_process():
    # The thread runs the kernel alone: PyTorch's own operators abort the process where they end a daemon thread.
    code = """
        import threading, torch
        from lgnet_fast import forks
        from lgnet_fast.native import library, optional_arg, tensor_arg
        started = threading.Event()
        def work():
            features = torch.randn(1, 64, 32, 32)
            attended, stats = torch.empty_like(features), torch.empty(1, 2, 1, 1024)
            absent = optional_arg(None)
            operands = [tensor_arg(features), absent, absent, True, absent, tensor_arg(attended), tensor_arg(stats)]
            function, threads = library().attention_forward, forks.kernel_threads()
            while True:
                function(*operands, threads)
                started.set()
        threading.Thread(target=work, daemon=True).start()
        started.wait()
        print("done")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], timeout=300, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


@pytest.mark.skipif(sys.platform != "linux", reason="torch bundles libgomp on Linux")
def test_one_openmp_runtime():
    code = """
        import os, torch, threadpoolctl
        from lgnet_fast import native
        from lgnet_fast.ops.cpu import attention as cpu
        cpu.attention_forward(torch.randn(1, 16, 32, 32), "released")
        runtimes = [lib["filepath"] for lib in threadpoolctl.threadpool_info() if lib["user_api"] == "openmp"]
        assert len(runtimes) == 1, runtimes
        backend = native.library().parallel_backend()
        assert os.path.realpath(backend[len("openmp ("):-1]) == os.path.realpath(runtimes[0]), backend
    """
    pytest.importorskip("threadpoolctl")
    own = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}  # which may load a second one
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=own, timeout=300, check=True)


POOL = """
    import os, signal, threading, torch
    from lgnet_fast import forks, native
    from lgnet_fast.ops.cpu import attention as cpu

    torch.set_num_threads(4)
    library = native.library()
    inputs = [torch.randn(1, 16, 32, 32) for _ in range(4)]
    expected = [cpu.attention_forward(features, "released")[0] for features in inputs]
    library.mark_forked()  # no OpenMP from here on

    def run(number):
        return torch.equal(cpu.attention_forward(inputs[number], "released")[0], expected[number])

    def tasks():
        return set(os.listdir("/proc/self/task"))
"""


def run_with_the_pool(code):
    source = textwrap.dedent(POOL) + textwrap.dedent(code)
    subprocess.run([sys.executable, "-W", "ignore", "-c", source], timeout=600, check=True)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_threads_of_the_pool_stay_and_leave_signals_alone():
    run_with_the_pool("""
        before = tasks()
        assert run(0)
        own = tasks() - before
        assert len(own) == forks.kernel_threads() - 1, own  # 3, or fewer in a container with fewer processors
        assert all(run(0) for _ in range(50)) and tasks() == before | own
        for task in own:
            with open(f"/proc/self/task/{task}/status") as status:
                blocked = next(int(line.split()[1], 16) for line in status if line.startswith("SigBlk"))
            assert all(blocked >> number - 1 & 1 for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM))
            assert not blocked >> signal.SIGSEGV - 1 & 1
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()
    """)


def test_the_pool_serves_several_callers():
    run_with_the_pool("""
        wrong = []
        def work(number):
            wrong.extend(number for _ in range(50) if not run(number))
        callers = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
        assert not wrong, wrong
    """)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.skipif(sys.platform == "darwin", reason="macOS's libraries do not work after fork()")
def test_a_fork_has_a_pool_of_its_own():
    run_with_the_pool("""
        def in_child(body):
            child = os.fork()
            if child == 0:
                signal.alarm(120)
                os._exit(0 if body() else 1)
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

        assert run(0)
        assert in_child(lambda: run(1) and in_child(lambda: run(2)) and run(3))
        assert run(0)
    """)
