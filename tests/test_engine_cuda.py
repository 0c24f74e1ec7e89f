"""The CUDA executor on a real GPU: accuracy at the network's size, and the rules of CUDA graphs, one test each."""

from __future__ import annotations

import json
import logging
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from lgnet_fast.kernels.conv_configs import Work, pick_tile

from bench import write_tables
from lgnet_fast import cache
from lgnet_fast.engine.build import build_plan, plan_stages
from lgnet_fast.engine.cuda import executor as cuda_executor
from lgnet_fast.engine.cuda import graph_executor, graphs
from lgnet_fast.engine.cuda.checks import check_steps, make_example
from lgnet_fast.engine.cuda.executor import CudaExecutor
from lgnet_fast.engine.cuda.graph_executor import GraphExecutor
from lgnet_fast.engine.cuda.graphs import Pool, Program, capture
from lgnet_fast.engine.cuda.guarded import Guarded
from lgnet_fast.engine.cuda.measure import Found, product_key
from lgnet_fast.engine.cuda.memory import Memory
from lgnet_fast.engine.cuda.operator_executor import OperatorExecutor
from lgnet_fast.engine.cuda.verified import verified
from lgnet_fast.engine.cuda.weights import work_of
from lgnet_fast.engine.making import optimize
from lgnet_fast.engine.plan import ConvStep, Plan
from lgnet_fast.engine.recent import Recent
from lgnet_fast.engine.regions import Rect, rounded
from lgnet_fast.engine.torch_executor import TorchExecutor
from lgnet_fast.reference.lgnet import LGNet
from tests.interpreted.rules import DTYPES, normal
from tests.support import assert_accurate

pytestmark = pytest.mark.usefixtures("strict_float32")
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")]
HOLE = Rect(70, 130, 60, 150)


# -- without a GPU ---------------------------------------------------------------------------------------------------


def test_recent_drops_the_least_recently_used() -> None:
    dropped: list[str] = []
    recent: Recent[str] = Recent(2, dropped.append)
    recent.get(1, lambda: "one")
    recent.get(2, lambda: "two")
    assert recent.get(1, lambda: "made again") == "one"
    recent.get(3, lambda: "three")
    assert dropped == ["two"]
    assert 1 in recent
    assert len(recent) == 2
    recent.put(1, "one again")
    recent.get(4, lambda: "four")
    assert dropped == ["two", "three"]


def test_programs_without_a_pool_launch_directly() -> None:
    calls: list[int] = []
    program = Program(lambda: calls.append(1), torch.device("cpu"))
    program()
    program()
    assert len(calls) == 2
    assert program.graph is None
    assert program.reason == "graphs are switched off"


def test_measured_tiles_become_the_table(tmp_path: Path) -> None:
    """Steps of one product share the tile of least sum; what was not measured stays. The table has no tiles of the
    kernel for Hopper, which only tuning chooses."""
    work, fast, slow = (
        ["sm_90", "half", 4096, 256, [9], 256],
        [64, 128, 64, 1, 4, 5, False],
        [64, 64, 64, 2, 4, 5, True],
    )
    compiled = ["hopper", 16, 1, 8, 4]
    block = ["sm_90", "half", 128, 4096, 1]
    walk = [128, 64, 128, 8, 3, 32, 64, 128, 4, 4]
    lines = [
        {
            "section": "convs",
            "key": work,
            "times": 4,
            "best": slow,
            "best_us": 9.0,
            "others": [[9.5, *compiled], [10.0, *fast]],
        },
        {
            "section": "convs",
            "key": work,
            "times": 4,
            "best": compiled,
            "best_us": 8.0,
            "others": [[9.0, *fast], [12.0, *slow]],
        },
        {
            "section": "attention",
            "key": block,
            "best": [64, 64, 128, 8, 3, 32, 64, 128, 4, 4, [128, 3]],
            "others": [[9.0, *walk, None], [9.5, *walk[:9], 8, None]],
        },
        {"section": "attention", "key": block, "best": [64, 64, 128, 8, 3, 32, 64, 128, 4, 4, [128, 3]]},
        {"section": "convs", "cut_off": "net_g.d1"},
    ]
    file = tmp_path / "contact_lgnet_float16_b1.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    tables, inference = write_tables.measured([file])
    assert tables == {"sm_90": {("half", 4096, 256, (9,), 256): tuple(fast)}}
    assert inference == {tuple(block): tuple(walk)}
    kept = {"sm_80": {("tf32", 16, 512, (4, 4, 4, 4), 1024): "cudnn"}}
    text = write_tables.TABLES_FILE.read_text()
    namespace: dict[str, object] = {}
    exec(write_tables.render(text, {**tables, **kept}, inference), namespace)
    assert namespace["TUNED"] == {**tables, **kept}
    assert namespace["INFERENCE"] == inference
    shipped: dict[str, Any] = {}
    exec(text, shipped)
    assert write_tables.render(text, shipped["TUNED"], shipped["INFERENCE"]) == text


def test_tiles_exist_for_every_kind_of_step() -> None:
    for generation in ("interpreted", "sm_80", "sm_89", "sm_90", "sm_100"):
        for kind in ("half", "tf32", "ieee"):
            for columns in (3, 5, 48, 64, 512):
                for rows in (1, 7, 4096, 10**6):
                    for channels in (4, 5, 48, 100, 512):
                        for merges in (False, True):
                            tap_row = 1 << (4 * channels - 1).bit_length() if channels < 16 else 0
                            work = Work(rows, columns, (16,), channels, tap_row, (4,), merges)
                            tile = pick_tile(work, kind, generation, 132)
                            assert tile.splits == 1 or tile.splits <= max(work.steps(tile.block_k))


# -- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> LGNet:
    """A narrow network with weights that keep features nonzero through all layers."""
    torch.manual_seed(0)
    model = LGNet(coarse_channels=16, local_channels=16, global_channels=16).eval().double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 4:
                transposed = "deconv" in name or name.split(".")[1].startswith("up")
                fan = parameter.shape[0 if transposed else 1] * parameter.shape[2] * parameter.shape[3]
                parameter.normal_(0, (2 / fan) ** 0.5)
    return model


def planned(model: LGNet, batch: int = 1) -> Plan:
    return build_plan(plan_stages(model), batch, 256, 256)


@pytest.fixture(scope="module")
def executor(model: LGNet) -> CudaExecutor:
    return CudaExecutor.of(planned(model), torch.float16, device=torch.device("cuda"))


def inputs(seed: int = 0, batch: int = 1) -> tuple[Tensor, Tensor]:
    image = normal(batch, 3, 256, 256, seed=seed, device="cuda").clamp(-1, 1)
    mask = torch.zeros(batch, 1, 256, 256, device="cuda")
    mask[..., HOLE.top : HOLE.bottom, HOLE.left : HOLE.right] = 1
    return image, mask


def regions(plan: Plan, hole: Rect = HOLE) -> list[tuple[Rect, ...]]:
    holes = rounded([hole], CudaExecutor.granularity, plan.height, plan.width)
    return [step.regions for step in plan.restricted(holes).steps]


def check(model: LGNet, executor: GraphExecutor, batch: int, where: list[tuple[Rect, ...]] | None = None) -> None:
    """By twice the error of eager autocast, against float64 on the CPU."""
    image, mask = inputs(batch=batch)
    result, _ = executor.run(image, mask, None, where)
    exact = TorchExecutor(planned(model, batch)).run(image.cpu().double(), mask.cpu().double())[0].cuda()
    eager_model = LGNet(coarse_channels=16, local_channels=16, global_channels=16).eval().cuda()
    eager_model.load_state_dict(model.state_dict())
    half = executor.dtype != torch.float32
    with torch.no_grad(), torch.autocast("cuda", executor.dtype, enabled=half):
        eager = eager_model(image, mask)
    hole = (mask != 0).expand_as(image)
    dtype = executor.dtype
    assert_accurate("merged", result[hole].to(dtype), exact[hole], eager[hole].to(dtype))
    assert torch.equal(result[~hole], image[~hole])


class TestOnGpu:
    pytestmark = gpu

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("batch", [1, 2])
    def test_dense(self, model: LGNet, dtype: torch.dtype, batch: int) -> None:
        executor = CudaExecutor.of(planned(model, batch), dtype, device=torch.device("cuda"))
        check(model, executor, batch)

    def test_tf32(self, model: LGNet) -> None:
        executor = CudaExecutor.of(planned(model), torch.float32, device=torch.device("cuda"))
        image, mask = inputs()
        strict = executor.run(image, mask)[0]
        torch.backends.cuda.matmul.allow_tf32 = True
        loose = executor.run(image, mask)[0]
        assert len(executor._programs) == 2
        assert 0 < (strict - loose).abs().max().item() < 5e-2

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_regions(self, model: LGNet, dtype: torch.dtype) -> None:
        plan = planned(model)
        executor = CudaExecutor.of(plan, dtype, device=torch.device("cuda"))
        image, mask = inputs()
        executor.run(image, mask)
        where = regions(plan)
        executor.run(image, mask, None, where)  # directly
        for _ in range(2):  # captured, replayed
            executor.memory.arena.fill_(torch.nan)
            check(model, executor, 1, where)

    def test_capture_takes_the_lock_of_the_process(self, executor: CudaExecutor) -> None:
        x = torch.zeros(8, device="cuda")
        device = torch.device("cuda", torch.cuda.current_device())
        locked: list[bool] = []

        def launches() -> None:
            locked.append(graphs._CAPTURE_LOCK.locked())
            x.add_(1)

        graph = capture(launches, device, Pool(device))
        assert locked == [True, True]
        assert not graphs._CAPTURE_LOCK.locked()
        graph.replay()
        assert x.eq(2).all()  # the run that warms up, and the replay; capturing runs nothing

    def test_one_graph_a_shape_dtype_and_bucket(self, model: LGNet) -> None:
        executor = CudaExecutor.of(planned(model), torch.float16, device=torch.device("cuda"))
        image, mask = inputs()
        for _ in range(3):
            executor.run(image, mask)
        assert len(executor._programs) == 1
        for hole in (HOLE, Rect(65, 128, 64, 160), Rect(70, 128, 70, 150)):
            executor.run(image, mask, None, regions(executor.plan, hole))
        captured = [p.graph is not None for p in executor._programs.values()]
        assert len(captured) == 3  # everywhere, rows to 160, rows to 128 (twice)
        assert sum(captured) == 2  # a bucket gets its graph when it comes again

    def test_graphs_are_bounded(self, model: LGNet, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(graph_executor, "GRAPHS_KEPT", 2)
        executor = CudaExecutor.of(planned(model), torch.float16, device=torch.device("cuda"))
        image, mask = inputs()
        for top in range(0, 192, 32):
            for _ in range(2):
                executor.run(image, mask, None, regions(executor.plan, Rect(top, top + 32, 0, 32)))
        assert len(executor._programs) == 2
        expected = CudaExecutor.of(planned(model), torch.float16, device=torch.device("cuda"), graphs=False)
        assert torch.equal(executor.run(image, mask)[0], expected.run(image, mask)[0])

    def test_results_survive_the_next_call(self, executor: CudaExecutor) -> None:
        image, mask = inputs()
        first, raw = executor.run(image, mask)
        kept = [x.clone() for x in (first, *raw)]
        executor.run(-image, mask)
        assert all(torch.equal(a, b) for a, b in zip((first, *raw), kept))

    def test_inputs_are_copied(self, executor: CudaExecutor) -> None:
        """Fresh tensors each call, freed before the next, in any float dtype and any strides."""
        image, mask = inputs()
        expected = executor.run(image, mask)[0]
        for view in (image.clone(), image.transpose(2, 3).contiguous().transpose(2, 3), image.double()):
            before = view.clone()
            assert torch.equal(executor.run(view, mask.to(view.dtype))[0], expected)
            assert torch.equal(view, before)

    def test_graph_and_direct_launches_agree(self, model: LGNet, executor: CudaExecutor) -> None:
        direct = CudaExecutor.of(planned(model), torch.float16, device=torch.device("cuda"), graphs=False)
        image, mask = inputs(3)
        assert torch.equal(executor.run(image, mask)[0], direct.run(image, mask)[0])
        assert all(p.graph is not None for p in executor._programs.values())

    def test_threads_and_streams(self, executor: CudaExecutor) -> None:
        images = [inputs(seed)[0] for seed in range(4)]
        mask = inputs()[1]
        expected = [executor.run(x, mask)[0] for x in images]
        torch.cuda.synchronize()
        wrong: list[int] = []

        def work(index: int) -> None:
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                for _ in range(20):
                    if not torch.equal(executor.run(images[index], mask)[0], expected[index]):
                        wrong.append(index)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong

    def test_calls_do_not_wait_for_the_device(self, executor: CudaExecutor) -> None:
        image, mask = inputs()
        executor.run(image, mask)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            executor.run(image, mask)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_failed_capture_still_computes(
        self, model: LGNet, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        image, mask = inputs()
        expected = CudaExecutor.of(planned(model), torch.float16, device=torch.device("cuda")).run(image, mask)[0]
        attend = cuda_executor.attend

        def synchronising(*args: Any) -> None:
            attend(*args)
            torch.cuda.current_stream().synchronize()

        monkeypatch.setattr(cuda_executor, "attend", synchronising)
        executor = CudaExecutor.of(planned(model), torch.float16, device=torch.device("cuda"))
        with caplog.at_level(logging.INFO, logger="lgnet_fast"):
            for _ in range(2):
                assert torch.equal(executor.run(image, mask)[0], expected)
        assert sum("no CUDA graph" in record.message for record in caplog.records) == 1
        torch.rand(1, device="cuda")  # raises where the random generator is left in capture mode

    def test_overlapping_launches(self, model: LGNet) -> None:
        if torch.cuda.get_device_capability() < (9, 0):
            with pytest.raises(RuntimeError, match="capability"):
                CudaExecutor.of(planned(model), device=torch.device("cuda"), overlap="plain")
            return
        image, mask = inputs()
        expected = CudaExecutor.of(planned(model), device=torch.device("cuda")).run(image, mask)[0]
        for how, use_graphs in (("plain", False), ("plain", True), ("spread", True)):
            executor = CudaExecutor.of(planned(model), device=torch.device("cuda"), overlap=how, graphs=use_graphs)
            for _ in range(50):  # a missing wait fails only sometimes
                executor.memory.arena.zero_()  # the run before has left the right values
                assert torch.equal(executor.run(image, mask)[0], expected)
            assert executor.graph_reason is None

    def test_steps_by_cudnn(self, model: LGNet) -> None:
        plan = planned(model)
        choices = {step.name: "cudnn" for step in plan.steps if step.kind != "attention"}
        executor = CudaExecutor.of(plan, torch.float16, device=torch.device("cuda"), choices=choices)
        for _ in range(2):
            check(model, executor, 1)

    def test_the_whole_check_passes_on_this_card(self, model: LGNet) -> None:
        """Kernels and graph run, every step alone is right, and the verdict is kept for later processes."""
        device = torch.device("cuda", torch.cuda.current_device())
        plan = planned(model).to(device, torch.float32)
        for dtype in DTYPES:
            executor, verdict = verified(model, plan, device, dtype, anew=True)
            assert (verdict.runs, verdict.reason) == ("graph", None)
            assert isinstance(executor, Guarded)
            assert all(program.graph is not None for program in executor.executor._programs.values())
            checks = check_steps(executor.executor, plan, make_example(plan, device, dtype))
            assert [str(c) for c in checks if not c.passed] == []
            assert verified(model, plan, device, dtype)[1] == verdict

    @pytest.mark.usefixtures("fresh_cache")
    def test_the_first_use_measures_the_layers_at_the_picture(self) -> None:
        """Kept for later processes, and the engine that has them is right."""
        device, dtype = torch.device("cuda", torch.cuda.current_device()), torch.float16
        wide = LGNet().eval()
        plan = build_plan(plan_stages(wide), 1, 256, 256).to(device, torch.float32)
        executor, verdict = verified(wide, plan, device, dtype)
        assert (verdict.runs, verdict.reason) == ("graph", None)
        (entry,) = cache.entries(cache.CHOICES)
        found = Found.from_dict(entry.value)
        assert found is not None
        assert len(found.tiles) == 4  # NetL's first and last layer, those of the U-Nets
        assert all(result.us <= result.default_us for result in found.tiles.values())
        faster = {step.name for step in plan.steps if executor.choices[step.name].startswith("picture")}
        kept = [found.tiles.get(product_key(work_of(plan, s), "half")) for s in plan.steps if isinstance(s, ConvStep)]
        assert len(faster) == sum(result is not None and result.choice[0] == "picture" for result in kept)
        assert isinstance(executor, Guarded)
        checks = check_steps(executor.executor, plan, make_example(plan, device, dtype))
        assert [str(c) for c in checks if not c.passed] == []

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_operators_alone(self, model: LGNet, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
        """As where our kernels cannot run: PyTorch's operators in one graph."""
        monkeypatch.setattr(CudaExecutor, "unavailable_reason", staticmethod(lambda *args: "no Triton here"))
        device = torch.device("cuda", torch.cuda.current_device())
        plan = planned(model).to(device, torch.float32)
        executor, verdict = verified(model, plan, device, dtype, anew=True)
        assert (verdict.runs, verdict.reason) == ("graph", None)
        assert isinstance(executor, Guarded)
        assert isinstance(executor.executor, OperatorExecutor)
        assert all(program.graph is not None for program in executor.executor._programs.values())
        for _ in range(2):
            check(model, executor.executor, 1)
        checks = check_steps(executor.executor, plan, make_example(plan, device, dtype))
        assert [str(c) for c in checks if not c.passed] == []

    def test_masks_on_the_gpu_are_searched_for_holes(self, model: LGNet) -> None:
        fast = optimize(model, device="cuda")
        image, mask = inputs()
        dense = optimize(model, device="cuda", hole_aware=False)(image, mask)
        for _ in range(3):
            torch.cuda.synchronize()
            assert fast._device_holes.find(mask) == (Rect(64, 160, 32, 160),)
            assert (fast(image, mask) - dense).abs().max() < 0.05
        assert torch.equal(fast(image, torch.zeros_like(mask)), image)

    def test_inside_the_callers_capture(self, executor: CudaExecutor) -> None:
        image, mask = inputs()
        expected = executor.run(image, mask)[0]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result, _ = executor.run(image, mask)
        executor.run(-image, mask)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(result, expected)

    def test_made_and_used_inside_and_outside_inference_mode(self, model: LGNet) -> None:
        image, mask = inputs()
        with torch.inference_mode():
            executor = CudaExecutor.of(planned(model), torch.float16, device=torch.device("cuda"))
            first = executor.run(image, mask)[0]
        assert torch.equal(executor.run(image, mask)[0], first)


def test_outgrown_workspaces_are_kept(model: LGNet) -> None:
    """A kernel on another stream may still use them."""
    memory = Memory(planned(model), torch.float32, torch.device("cpu"))
    earlier = [weakref.ref(memory.partial(10)), weakref.ref(memory.counters(10))]
    assert memory.partial(20).numel() == memory.counters(20).numel() == 20
    assert all(tensor() is not None for tensor in earlier)
