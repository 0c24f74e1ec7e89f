"""Portable kernels or plain PyTorch: the faster one runs, and all processes choose the same."""

from __future__ import annotations

from pathlib import Path as File

import pytest
import torch

from lgnet_fast import cache, create_model, native, optimize
from lgnet_fast.engine import build
from lgnet_fast.engine.build import build_plan, plan_stages
from lgnet_fast.engine.cpu import path as cpu_path
from lgnet_fast.engine.cpu.executor import CpuExecutor
from lgnet_fast.engine.cpu.path import Path, choose_path, measured
from lgnet_fast.engine.model_executor import ModelExecutor
from lgnet_fast.reference.lgnet import LGNet
from tests.support import assert_accurate, case

pytestmark = [
    pytest.mark.skipif(CpuExecutor.unavailable_reason() is not None, reason=str(CpuExecutor.unavailable_reason())),
    pytest.mark.usefixtures("fresh_cache"),
]

SINGLE = torch.float32


@pytest.fixture
def portable():
    """The extension has portable kernels only; PyTorch is unchanged."""
    native.library().set_isa("portable")
    yield
    native.library().set_isa("auto")


@pytest.fixture
def ran(monkeypatch) -> list[str]:
    """Which executors ran, in order."""
    names: list[str] = []
    for cls in (CpuExecutor, ModelExecutor):

        def run(self, *args, own=cls.run, name=cls.__name__, **options):
            names.append(name)
            return own(self, *args, **options)

        monkeypatch.setattr(cls, "run", run)
    return names


@pytest.fixture(scope="module")
def model() -> LGNet:
    torch.manual_seed(0)
    return create_model("lgnet", coarse_channels=4, local_channels=5, global_channels=6).eval()


def times(engine: float, eager: float):
    def compare(*args):
        compare.calls += 1
        return engine, eager

    compare.calls = 0
    return compare


@pytest.mark.parametrize(("engine", "eager", "expected"), [(1.06, 0.72, "ModelExecutor"), (0.5, 0.72, "CpuExecutor")])
def test_the_faster_one_runs_and_is_measured_once(portable, model, ran, monkeypatch, engine, eager, expected):
    compare = times(engine, eager)
    monkeypatch.setattr(cpu_path, "measured", compare)
    image, mask = case("gen256", 1, 256, 256, SINGLE)
    result = optimize(model, device="cpu")(image, mask)
    assert ran == [expected]
    with torch.no_grad():
        assert_accurate("result", result, model(image, mask), roundings=2**13)
    monkeypatch.setattr(cache, "_known", {})  # another process
    monkeypatch.setattr(cpu_path, "measured", times(eager, engine))  # which would find the contrary
    optimize(model, device="cpu")(image, mask)
    assert ran == [expected] * 2
    assert compare.calls == 1
    (entry,) = cache.entries(cache.CHOICES)
    assert entry.key.card.endswith(f"portable, {torch.get_num_threads()} threads") or "1 thread" in entry.key.card
    assert str(Path.from_dict(entry.value)).endswith(
        f"({1e3 * engine:.0f} ms by the C++ executor, 720 ms by PyTorch)"
    )


def test_where_nothing_can_be_kept_a_rule_decides(portable, model, ran, monkeypatch, tmp_path):
    file = tmp_path / "a file"
    file.write_text("")
    monkeypatch.setenv(cache.ENVIRONMENT, str(file))
    compare = times(0.1, 0.7)
    monkeypatch.setattr(cpu_path, "measured", compare)
    optimize(model, device="cpu")(*case("gen256", 1, 256, 256, SINGLE))
    assert ran == ["ModelExecutor"]
    assert compare.calls == 0


def test_vector_kernels_need_no_measurement(model, ran, monkeypatch):
    if native.isa_name() == "portable":
        pytest.skip("this CPU has no other kernels")
    compare = times(9.0, 0.1)
    monkeypatch.setattr(cpu_path, "measured", compare)
    optimize(model, device="cpu")(*case("gen256", 1, 256, 256, SINGLE))
    assert ran == ["CpuExecutor"]
    assert compare.calls == 0
    assert not list(cache.entries(cache.CHOICES))


def test_what_tuning_found_holds_for_vector_kernels_too(model, ran):
    plan = build_plan(plan_stages(model), 1, 256, 256)
    cpu_path.keep_path(plan, SINGLE, 0.8, 0.7)
    optimize(model, device="cpu")(*case("gen256", 1, 256, 256, SINGLE))
    assert ran == ["ModelExecutor"]


def test_the_first_of_two_processes_decides(portable, model, monkeypatch):
    plan = build_plan(plan_stages(model), 1, 256, 256)

    def compare(*args):
        """Another process ends its measurement first."""
        known = dict(cache._known)
        cpu_path.keep_path(plan, SINGLE, 0.5, 0.7)
        monkeypatch.setattr(cache, "_known", known)
        return 0.7, 0.5

    assert choose_path(model, plan, SINGLE, compare).runs == "engine"


@pytest.mark.parametrize("value", [None, 1, {}, {"runs": "fast", "reason": ""}, {"runs": "eager"}], ids=str)
def test_a_spoilt_entry_is_measured_anew(portable, model, value):
    plan = build_plan(plan_stages(model), 1, 256, 256)
    key = cpu_path.cpu_tuning.key(SINGLE)
    cache.put(key, cache.CHOICES, cpu_path.entry_name(plan), value)
    assert choose_path(model, plan, SINGLE, times(0.2, 0.3)).runs == "engine"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_real_measurement(portable, model, dtype):
    """Positive, within its time, and the model is left as it was."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plan = build_plan(plan_stages(model), 1, 512, 256)
    engine, eager = measured(model.train(), plan, dtype)
    assert model.training
    model.eval()
    assert 0 < engine < cpu_path.SECONDS
    assert 0 < eager < cpu_path.SECONDS
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_stages_that_would_take_too_long_are_not_timed(portable, model, monkeypatch):
    """Each call takes two seconds by this clock: the first stage has four calls, and there is no time for another."""
    now = iter(range(0, 1000, 2))
    stages: list[object] = []
    of = CpuExecutor.of
    monkeypatch.setattr(
        CpuExecutor, "of", classmethod(lambda cls, plan, dtype: stages.append(plan) or of(plan, dtype))
    )
    plan = build_plan(plan_stages(model), 1, 256, 256)
    engine, eager = measured(model, plan, SINGLE, clock=lambda: float(next(now)))
    assert len(stages) == 1
    assert (engine, eager) == (2.0, 2.0)


@pytest.mark.parametrize("name", ["lgnet", "lgnet_share", "C+L", "C+G+G_att"])
def test_both_sides_run_the_same_stages_and_no_weight_is_folded_again(portable, name, monkeypatch):
    """Folding LGNet's weights takes longer than the runs that are timed."""
    torch.manual_seed(0)
    widths = {"coarse_channels": 4, "local_channels": 5, "global_channels": 6}
    model = create_model(name, **widths | ({"coarse_channels": 6} if name == "lgnet_share" else {})).eval()
    plan = build_plan(plan_stages(model), 1, 256, 512)
    folded: list[object] = []
    monkeypatch.setattr(build, "fold", lambda *modules: folded.append(modules))
    results: list[torch.Tensor] = []
    monkeypatch.setattr(cpu_path, "_seconds", lambda call, clock: results.append(call()) or 0.1)
    measured(model, plan, SINGLE)
    assert folded == []
    assert len(results) == 2 * len(plan_stages(model))
    for (merged, (raw,)), ours in zip(results[::2], results[1::2], strict=True):
        assert_accurate("stage", raw, ours, roundings=2**13)
        assert_accurate("merged", merged, raw, roundings=1)  # all is hole


def test_can_keep(tmp_path: File, monkeypatch):
    assert cache.can_keep()
    assert not [f for f in (tmp_path / "cache").iterdir()]
    monkeypatch.setenv(cache.ENVIRONMENT, str(tmp_path / "new" / "cache"))
    assert cache.can_keep()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(cache.ENVIRONMENT, str(tmp_path / "file"))
    assert not cache.can_keep()
