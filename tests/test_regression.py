"""Results by machine class, and that a slower op is caught: by figures, by a real op slowed, and by the command."""

from __future__ import annotations

import io
import json
import os
import platform
import re
import subprocess
import sys
import time
from contextlib import redirect_stdout

import pytest
import torch

from bench import inference_peers, regression, timing
from bench.regression import (
    Change,
    compare,
    compare_or_store,
    incomparable,
    machine_class,
    read_results,
    write_results,
)
from bench.timing import ROOT, interleave, spread, summarize
from lgnet_fast.ops.registry import OPERATORS
from lgnet_fast.reference.attention import attention_block
from tests.engine_support import needs_extension

STEM = "cpu-test-1-cores_synthetic"


def bench(spreads: float = 0.01, **slower: float) -> dict:
    """A bench's figures, each contestant so many times slower than ours."""
    rest = {name: spreads for name in slower}
    return {"times_slower_than_ours": slower, "spread": rest, "ours": "ours"}


def only(changes: list[Change]) -> Change:
    assert len(changes) == 1
    return changes[0]


@pytest.mark.parametrize(
    ("spreads", "factor", "failed"),
    [(0.01, 0.91, False), (0.01, 0.89, True), (0.01, 1.5, False), (0.08, 0.85, False), (0.08, 0.83, True)],
)
def test_ten_percent_or_twice_the_spread(spreads, factor, failed):
    stored = {"a": bench(spreads, eager=3.0, openvino=1.7)}
    now = {"a": bench(spreads, eager=3.0 * factor, openvino=1.7 * factor)}
    change = only(compare(stored, now))
    assert change.ratio == pytest.approx(factor)
    assert change.now == pytest.approx((3.0 + 1.7) / 2 * factor)
    assert change.allowed == pytest.approx(max(0.1, 2 * spreads))
    assert change.failed is failed
    # The larger spread of the two runs counts.
    quiet = {"a": bench(0.01, eager=3.0, openvino=1.7)}
    assert only(compare(quiet, now)).allowed == pytest.approx(max(0.1, 2 * spreads))


@pytest.mark.parametrize(
    ("then", "now", "allowed"),
    [
        ([40, 42], [38, 45], 0.1),
        ([40, 42], [70, 72], 0.2),  # another state than the stored run's
        ([70, 70], [70, 40], 0.2),  # changed meanwhile
        ([], [40, 42], 0.1),
    ],
)
def test_more_is_allowed_between_two_states_of_the_machine(then, now, allowed):
    stored = {"a": bench(eager=3.0) | ({"copy_gb_s": then} if then else {})}
    for factor, failed in ((1 - allowed + 0.01, False), (1 - allowed - 0.01, True)):
        change = only(compare(stored, {"a": bench(eager=3.0 * factor) | {"copy_gb_s": now}}))
        assert change.allowed == allowed
        assert change.failed is failed
    assert ("placed otherwise" in change.verdict) is (allowed == 0.2)


def test_copy_rate():
    """Rates of the same minute on the same machine are the same within a factor, and no cache's."""
    one, two = timing.copy_rate(), timing.copy_rate()
    assert 1 < one < 2000
    assert 0.3 < one / two < 3


def test_one_disturbed_rival_of_three_changes_nothing():
    stored = {"a": bench(eager=3.0, openvino=1.7, compiled=4.0)}
    now = {"a": bench(eager=3.0, openvino=1.0, compiled=4.0)}
    assert only(compare(stored, now)).ratio == 1


def test_every_contestant_of_ours_is_watched():
    stored = {"a": bench(eager=3.0, ours_hole=0.5)}
    now = {"a": bench(eager=3.0, ours_hole=0.6)}
    changes = {change.contestant: change for change in compare(stored, now)}
    assert changes["ours"].ratio == 1
    assert changes["ours_hole"].now == pytest.approx(5.0)
    assert changes["ours_hole"].ratio == pytest.approx(5 / 6)
    assert changes["ours_hole"].failed


def test_wrong_rivals_and_strangers_do_not_count():
    stored = {"a": bench(eager=3.0) | {"wrong_peers": {"frozen": 0.3}}, "b": bench(eager=1.0)}
    stored["a"]["times_slower_than_ours"]["frozen"] = 2.0
    now = {"a": bench(eager=3.0, frozen=1.0), "c": bench(eager=1.0)}
    assert only(compare(stored, now)).ratio == 1
    assert compare({"a": bench(old=2.0)}, {"a": bench(new=2.0)}) == []


def test_settle(tmp_path):
    """Unknown: stored. Known: compared, nothing overwritten; what is new in it is stored. Asked for: stored."""
    file = tmp_path / f"{STEM}.json"
    changes, notes = compare_or_store({STEM: {"a": bench(eager=3.0)}}, tmp_path)
    assert changes == []
    assert notes == [f"stored 1 benches in {file}: no stored run of this machine class"]
    slower = {"a": bench(eager=2.0), "b": bench(eager=5.0)}
    changes, notes = compare_or_store({STEM: slower}, tmp_path)
    assert only(changes).failed
    assert notes == [f"stored 1 new benches in {file}: b"]
    stored = read_results(file.read_text())["benches"]
    assert {name: b["times_slower_than_ours"]["eager"] for name, b in stored.items()} == {"a": 3.0, "b": 5.0}
    changes, notes = compare_or_store({STEM: {"a": bench(eager=2.0)}}, tmp_path, store=True)
    assert changes == []
    assert notes == [f"stored 1 benches in {file}: asked for"]
    stored = read_results(file.read_text())["benches"]
    assert {name: b["times_slower_than_ours"]["eager"] for name, b in stored.items()} == {"a": 2.0, "b": 5.0}
    assert not only(compare_or_store({STEM: {"a": bench(eager=2.0)}}, tmp_path)[0]).failed


def test_benches_without_rivals_are_named(tmp_path):
    """Only ratios to rivals are compared, so the slow-down of a bench that has none is not seen."""
    own = {"a": bench(eager=3.0), "b": bench(ours_2_threads=1.5)}
    compare_or_store({STEM: own}, tmp_path)
    changes, notes = compare_or_store({STEM: own}, tmp_path)
    assert only(changes).bench == "a"
    assert notes == [f"not compared with {tmp_path / f'{STEM}.json'}, for want of rivals: b"]


def test_settle_after_another_torch(tmp_path, monkeypatch):
    compare_or_store({STEM: {"a": bench(eager=3.0), "b": bench(eager=3.0)}}, tmp_path)
    info = regression.environment()
    monkeypatch.setattr(regression, "environment", lambda: info | {"torch": "99.1.0+cpu"})
    changes, notes = compare_or_store({STEM: {"a": bench(eager=2.0)}}, tmp_path)
    assert changes == []
    was = ".".join(torch.__version__.split(".")[:2])
    assert notes[0].endswith(f"the stored run does not compare: torch was {was}, is 99.1")
    stored = read_results((tmp_path / f"{STEM}.json").read_text())
    assert stored["environment"]["torch"] == "99.1.0+cpu"
    assert list(stored["benches"]) == ["a"]


def test_incomparable():
    here = {"torch": "2.13.0+cpu", "cpu_capability": "AVX512", "tf32": False}
    assert incomparable(here, here | {"torch": "2.13.1", "commit": "x", "cuda": "12.8"}) is None
    assert incomparable(here | {"cuda": "12.8"}, here | {"cuda": "13.0"}) == "cuda was 12.8, is 13.0"
    assert incomparable(here, here | {"cpu_capability": "AVX2"}) == "cpu_capability was AVX512, is AVX2"


def test_results_file(tmp_path):
    """Small, no host name, one line a bench; pytest-benchmark's own layout is read too."""
    file = tmp_path / "r.json"
    write_results(file, {"b": bench(eager=2.0), "a": bench(eager=1.0)}, regression.environment())
    text = file.read_text()
    assert [line[4:7] for line in text.splitlines() if line.startswith("    ")] == ['"a"', '"b"']
    assert os.uname().nodename not in text
    assert read_results(text)["benches"]["b"]["times_slower_than_ours"] == {"eager": 2.0}
    theirs = {
        "machine_info": {"lgnet_fast": {"torch": "2.13.0", "commit": "abc"}, "cpu": {"family": 26}},
        "datetime": "2026-01-02T03:04:05.678+00:00",
        "benchmarks": [{"name": "a", "extra_info": bench(eager=2.5), "stats": {"data": [1, 2]}}],
    }
    read = read_results(json.dumps(theirs))
    assert read["environment"]["date"] == "2026-01-02T03:04:05+00:00"
    assert read["benches"]["a"] == bench(eager=2.5) | {"commit": "abc", "date": "2026-01-02T03:04:05+00:00"}
    with pytest.raises(ValueError, match="expected a results file"):
        read_results("[]")


def test_every_contestants_version_is_stored(monkeypatch):
    """Also of the rivals that `make bench` installs beside the extra."""
    monkeypatch.setattr(timing, "version", lambda package: f"{package} 7")
    rivals = {name for name in ("openvino", "onnxruntime", "mnn", "ncnn") if hasattr(inference_peers, name)}
    told = {name.lower(): text for name, text in timing.environment().items() if str(text).endswith(" 7")}
    assert len(rivals) == 4
    assert set(told) == rivals | {"triton"}


@pytest.mark.parametrize(
    ("vendor", "family", "model", "name"),
    [
        ("AuthenticAMD", 0x1A, 2, "zen5"),
        ("AuthenticAMD", 0x19, 0x11, "zen4"),
        ("AuthenticAMD", 0x19, 0x01, "zen3"),
        ("GenuineIntel", 6, 0x8F, "sapphirerapids"),
        ("Some Vendor", 7, 8, "some-vendor-7-8"),
    ],
)
def test_cpu_names(vendor, family, model, name):
    assert regression._microarchitecture(vendor, family, model) == name


@pytest.mark.parametrize(
    ("cores", "kernels", "name"),
    [
        ("emeraldrapids", "amx_bf16", "emeraldrapids"),
        ("emeraldrapids", "avx512", "emeraldrapids-avx512"),  # of a virtual machine without matrix tiles
        ("zen4", "avx2", "zen4-avx2"),
        ("zen3", "avx2", "zen3"),
        ("zen3", None, "zen3-none"),
        ("some-vendor-7-8", "neon_bf16", "some-vendor-7-8-neon-bf16"),
    ],
)
def test_machine_class(monkeypatch, cores, kernels, name):
    """Our kernels count: the same cores with other instructions have other ratios to the rivals."""
    monkeypatch.setattr(regression, "cpu_name", lambda: cores)
    monkeypatch.setattr(regression.native, "unavailable_reason", lambda: None if kernels else "not built")
    monkeypatch.setattr(regression.native, "isa_name", lambda: kernels)
    assert machine_class("cpu") == f"cpu-{name}-{torch.get_num_threads()}-cores"


def test_usual_kernels():
    """They exist, of cores that have a name."""
    rows = re.findall(r"^LGNET_ROW\((\w+)", (ROOT / "csrc" / "isa.inc").read_text(), re.MULTILINE)
    assert {"avx2", "amx_bf16"} <= set(regression._USUAL.values()) <= set(rows)
    families = (("AuthenticAMD", 0x17), ("AuthenticAMD", 0x19), ("AuthenticAMD", 0x1A), ("GenuineIntel", 6))
    names = {regression._microarchitecture(*family, model) for family in families for model in range(256)}
    assert regression._USUAL.keys() <= names


def test_rounds_and_ratios():
    """A contestant that takes a second and more joins some rounds only; ratios are taken within rounds."""
    rounds = [{"ours": 1.0, "eager": 2.0, "slow": 30.0}, {"ours": 4.0, "eager": 8.0}, {"ours": 2.0, "eager": 6.0}]
    summary = summarize(rounds, "ours")
    assert summary["times_slower_than_ours"] == {"eager": 2.0, "slow": 30.0}
    assert summary["least_ms"] == {"ours": 1000.0, "eager": 2000.0, "slow": 30000.0}
    assert summary["spread"] == {"eager": 0.125, "slow": 0.0}
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(1 / 3)


def test_long_calls_join_few_rounds(monkeypatch):
    now = [0.0]  # a clock of the test's own
    monkeypatch.setattr("bench.timing.clock", lambda: now[0])
    monkeypatch.setattr("bench.timing.LONG_CALL_S", 0.02)
    monkeypatch.setattr("bench.timing.MIN_RUN_S", 1e-3)
    monkeypatch.setattr("bench.timing.MIN_CONTEST_S", 0.0)
    called = {"short": 0, "long": 0}

    def call(name, s):
        called[name] += 1
        now[0] += s

    running = {"short": lambda: call("short", 2e-3), "long": lambda: call("long", 25e-3)}
    rounds = interleave(running, "cpu", rounds=6, warmup=3, long_rounds=2)
    assert 6 <= len(rounds) <= 12
    assert ["long" in taken for taken in rounds[:6]] == [True, False, False, True, False, False]
    assert called["long"] == 1 + 2
    assert called["short"] == 3 + len(rounds)


def test_long_calls_alone_have_no_empty_rounds(monkeypatch):
    """Each takes part in every round, however unsteady the ratios are."""
    now, calls = [0.0], [0]
    monkeypatch.setattr("bench.timing.clock", lambda: now[0])

    def noisy():
        calls[0] += 1
        now[0] += 2.0 if calls[0] % 2 else 4.0

    def steady():
        now[0] += 1.5

    rounds = interleave({"ours": steady, "rival": noisy}, "cpu", rounds=12, warmup=3, long_rounds=3)
    assert rounds == [{"ours": 1.5, "rival": s} for s in (4.0, 2.0, 4.0)]
    assert summarize(rounds, "ours")["rounds"] == 3


@pytest.mark.parametrize(
    ("enough", "patience", "expected"), [(0.0, 0.0, 4), (0.0, 2.2, 6), (0.0, 1e9, 8), (4.4, 0.0, 11)]
)
def test_rounds_are_added(monkeypatch, enough, patience, expected):
    """On a clock of the test's own: a round takes 0.3 or 0.5 s, the ratio jumps between 2 and 4 and stays unknown."""
    now = [0.0]
    monkeypatch.setattr("bench.timing.clock", lambda: now[0])
    monkeypatch.setattr("bench.timing.MIN_CONTEST_S", enough)
    monkeypatch.setattr("bench.timing.MAX_CONTEST_S", patience)
    calls = [0]

    def advance(s):
        now[0] += s

    def noisy():
        calls[0] += 1
        advance(0.2 if calls[0] % 2 else 0.4)

    rounds = interleave({"steady": lambda: advance(0.1), "noisy": noisy}, "cpu", rounds=4, warmup=1)
    assert len(rounds) == expected


@needs_extension
@pytest.mark.skipif(sys.platform == "win32", reason="the clock of processes has steps of 16 ms there")
def test_a_real_op_slowed_is_caught(monkeypatch):
    """The attention block in C++ against eager; then its kernel runs twice a call."""
    monkeypatch.setattr("bench.timing.clock", time.process_time)  # independent of the load of the machine
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    features, weight, bias = torch.randn(1, 64, 32, 32), torch.randn(64, 128, 1, 1) / 8, torch.zeros(64)
    cpp = OPERATORS["attention_block"].launchers("cpp")

    def run() -> dict:
        contestants = {
            "ours": lambda: torch.ops.lgnet.attention_block(features, weight, bias, "released", backend="cpp"),
            "eager": lambda: attention_block(features, weight, bias, "released"),
        }
        with torch.no_grad():
            return {"attention": summarize(interleave(contestants, "cpu", rounds=15), "ours")}

    try:
        stored = run()
        # More than one attempt, because other processes share the caches.
        assert any(not only(compare(before, run())).failed for before in (stored, run(), run()))
        kernel = cpp.attention_block_forward

        def slowed(*args, **options):
            kernel(*args, **options)
            return kernel(*args, **options)

        monkeypatch.setattr(cpp, "attention_block_forward", slowed)
        changes = (only(compare(stored, run())) for _ in range(3))
        assert any(change.failed and change.ratio == pytest.approx(0.5, abs=0.15) for change in changes)
    finally:
        torch.set_num_threads(threads)


SYNTHETIC = """
import os, time, pytest

@pytest.fixture
def device():
    return "cpu"

def spin(ms):
    end = time.process_time() + 1e-3 * ms
    while time.process_time() < end:
        pass

def test_spin(compete):
    ours = float(os.environ["OURS_MS"])
    compete({"ours": lambda: spin(ours), "rival": lambda: spin(6)}, "ours", rounds=6)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="the clock of processes has steps of 16 ms there")
def test_command(tmp_path, monkeypatch):
    """`pytest bench/`: stores, then passes, then fails for the slower op; --benchmark-* options go on working."""
    pytest.importorskip("pytest_benchmark")
    (tmp_path / "bench_synthetic.py").write_text(SYNTHETIC)
    results = tmp_path / "results"
    monkeypatch.setattr(timing, "clock", time.process_time)
    monkeypatch.setattr("bench.conftest.SMOKE", False)
    kept = []  # later tests in this process must have the C library's defaults
    monkeypatch.setattr("bench.conftest.keep_freed_memory", lambda: kept.append(True))
    monkeypatch.setattr("bench.conftest.copy_rate", lambda: 40.0)

    def run(ours_ms: float, *options: str) -> tuple[int, str]:
        monkeypatch.setenv("OURS_MS", str(ours_ms))
        arguments = ["-p", "bench.conftest", "-p", "no:cacheprovider", "-q", "--capture=no", "--rootdir", tmp_path]
        arguments += ["-o", "python_files=bench_*.py", "--bench-results", results, *options]
        with redirect_stdout(io.StringIO()) as out:
            code = pytest.main([str(argument) for argument in (*arguments, tmp_path / "bench_synthetic.py")])
        return int(code), out.getvalue()

    code, out = run(2, "--benchmark-columns=min", f"--benchmark-json={tmp_path / 'theirs.json'}")
    assert code == 0, out
    (file,) = results.iterdir()
    assert file.name == f"{machine_class('cpu')}_synthetic.json"
    assert f"stored 1 benches in {file}: no stored run of this machine class" in out
    stored = read_results(file.read_text())["benches"]["test_spin"]
    assert stored["copy_gb_s"] == [40.0, 40.0]
    assert stored["times_slower_than_ours"]["rival"] == pytest.approx(3, rel=0.1)
    theirs = json.loads((tmp_path / "theirs.json").read_text())
    assert theirs["benchmarks"][0]["stats"]["min"] > 1.9e-3
    assert "node" not in theirs["machine_info"]

    code, out = run(2)
    assert code == 0, out
    assert "got slower" not in out
    before = file.read_bytes()
    own = tmp_path / "own"
    code, out = run(4, f"--bench-run={own}")
    assert code == 1, out
    assert "1 of 1 got slower" in out
    assert "SLOWER, -10% is allowed" in out
    assert file.read_bytes() == before
    ratio = read_results((own / file.name).read_text())["benches"]["test_spin"]["times_slower_than_ours"]["rival"]
    assert ratio == pytest.approx(1.5, rel=0.1)

    assert run(4, "--benchmark-disable")[0] == 0  # runs once, measures nothing, judges nothing
    code, out = run(4, "--bench-store")
    assert code == 0, out
    assert run(4)[0] == 0
    assert file.read_bytes() != before
    assert len(kept) == 6


COMPILED = """
import pytest, torch

def forward(x):
    return x + 1

def told(graph, examples):
    print("sizes", [[type(side).__name__, int(side)] for x in examples for side in getattr(x, "shape", [x])])
    return graph.forward

@pytest.mark.parametrize("side", range(4, 16))
def test_compiled(side):
    torch.compile(forward, backend=told)(torch.zeros(side))
"""


def test_every_bench_compiles_for_its_own_sizes(tmp_path):
    """Not for variable ones because another bench had other sizes; and more than eight times."""
    pytest.importorskip("pytest_benchmark")
    (tmp_path / "bench_compiled.py").write_text(COMPILED)
    command = [sys.executable, "-m", "pytest", "-p", "bench.conftest", "-p", "no:cacheprovider", "-q", "--capture=no"]
    command += ["--rootdir", str(tmp_path), "-o", "python_files=bench_*.py", str(tmp_path / "bench_compiled.py")]
    command += ["-p", "no:randomly"]  # a plugin of the user's, if there: the sizes are compared in order
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    sizes = [line.lstrip(".") for line in done.stdout.splitlines() if "sizes" in line]
    assert sizes == [f"sizes [['int', {side}]]" for side in range(4, 16)]


FAULTS = """
import resource, sys
import torch
from bench.timing import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()
for number in range(30):
    if number == 20:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told to keep freed memory")
def test_freed_memory_is_kept():
    """Allocate 64 MiB repeatedly: new pages every time, or only at first."""
    new = {
        how: int(subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, cwd=ROOT).stdout)
        for how in ("as it comes", "keep")
    }
    assert new["keep"] < 0.2 * new["as it comes"]
