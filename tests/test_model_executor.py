"""The model as an executor: used by `optimize` where no executor of the plan is faster."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lgnet_fast import LGNet, LocalGlobalRefinement, create_model, optimize
from lgnet_fast.engine import making
from lgnet_fast.engine.cuda import tuning as cuda_tuning
from lgnet_fast.engine.cuda.executor import CudaExecutor
from lgnet_fast.engine.making import fast_executor_reason
from lgnet_fast.engine.model_executor import ModelExecutor
from tests.support import assert_accurate, case
from tests.test_plan import NARROW, lively

CPU = torch.device("cpu")


class Grey(nn.Module):
    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        return image.mean(dim=(2, 3), keepdim=True).expand_as(image)


def narrow(name: str) -> LGNet:
    torch.manual_seed(0)
    widths = NARROW | ({"coarse_channels": 6} if name == "lgnet_share" else {})
    return lively(create_model(name, **widths, backend="eager")).float()


@pytest.mark.parametrize("name", ["lgnet", "lgnet_share", "C+G_att"])
def test_stages_are_those_of_the_model(name: str) -> None:
    model = narrow(name)
    image, mask = case("gen256", 1, 256, 256, torch.float32)
    with torch.no_grad():
        expected = model(image, mask, return_stages=True)
    result, raw = ModelExecutor(model, CPU, torch.float32).run(image, mask)
    assert_accurate("result", result, expected.merged[-1], roundings=2**10)
    for ours, theirs in zip(raw, expected.raw, strict=True):
        assert_accurate("raw", ours, theirs, roundings=2**10)
    alone, none = ModelExecutor(model, CPU, torch.float32).run(image, mask, stages=False)
    assert torch.equal(alone, result)
    assert none == []


def test_the_callers_autocast_does_not_replace_the_engines_dtype() -> None:
    model = narrow("C+G_att")
    image, mask = case("gen256", 1, 256, 256, torch.float32)
    engine = optimize(model, device="cpu", dtype="float16")
    with torch.autocast("cpu", torch.bfloat16):
        same = optimize(model, device="cpu", dtype="float16")
        results = [engine(image, mask), same(image, mask)]
    assert all(torch.equal(result, engine(image, mask)) for result in results)


def test_too_little_memory_for_tuning_is_no_obstacle(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*args: object) -> None:
        raise torch.OutOfMemoryError("90 GiB")

    monkeypatch.setattr(cuda_tuning, "tune", full)
    monkeypatch.setattr(CudaExecutor, "unavailable_reason", staticmethod(lambda *args: None))
    monkeypatch.setattr(making, "fast_executor_reason", lambda *args: None)
    monkeypatch.setattr(making, "resolve_device", torch.device)
    monkeypatch.setattr(making, "verified", lambda model, *args: (ModelExecutor(model, *args[1:]), None))
    optimize(narrow("C+G_att"), device="meta", dtype="float16", tune=1)
    (warning,) = caplog.messages
    assert warning == "kernels are not tuned: OutOfMemoryError: 90 GiB"


def test_x_lg_keeps_its_first_stage_to_itself() -> None:
    torch.manual_seed(0)
    model = lively(LocalGlobalRefinement(Grey(), local_channels=4, global_channels=4, backend="eager")).float()
    image, mask = case("gen256", 1, 256, 256, torch.float32)
    with torch.no_grad():
        expected = model(image, mask)
    executor = ModelExecutor(model, CPU, torch.float32)
    result, raw = executor.run(image, mask, model.first_stage(image, mask))
    assert len(raw) == 2
    assert_accurate("result", result, expected, roundings=2**10)
    assert executor._model.first_stage is None
    assert isinstance(model.first_stage, Grey)


def test_half_precision_leaves_known_pixels_and_the_model_alone() -> None:
    model = narrow("lgnet").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fast = optimize(model, device="cpu", dtype="float16")
    assert isinstance(fast._first.executor, ModelExecutor)
    assert "float16" in (fast_executor_reason(CPU, torch.float16) or "")
    image, mask = case("gen256", 1, 256, 256, torch.float32)
    result = fast(image, mask)
    assert result.dtype == torch.float32
    known = (mask == 0).expand_as(image)
    assert torch.equal(result[known], image[known])
    with torch.no_grad():
        exact = model.eval()(image, mask)
    error, scale = (x[~known].square().mean().sqrt() for x in (result - exact, exact))
    assert error < 16 * torch.finfo(torch.float16).eps * scale
    model.train()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_other_sizes_and_float64() -> None:
    model = narrow("C+G_att").double()
    fast = optimize(model, device="cpu", dtype="float64")
    image, mask = case("gen512", 1, 512, 256, torch.float64)
    with torch.no_grad():
        exact = model(image, mask)
    assert_accurate("result", fast(image, mask), exact)


@pytest.mark.parametrize(
    ("device", "layout"),
    [("cuda", torch.channels_last), ("xpu", torch.channels_last), ("mps", torch.contiguous_format)],
)
def test_a_gpus_layout(device: str, layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory formats of weights and of every stage's input, which depend on the device."""
    moved: list[torch.device] = []

    def to(self: nn.Module, *args: object, **options: object) -> nn.Module:
        moved.extend(a for a in args if isinstance(a, torch.device))
        return original(self, *(a for a in args if not isinstance(a, torch.device)), **options)

    original = nn.Module.to
    monkeypatch.setattr(nn.Module, "to", to)
    executor = ModelExecutor(narrow("C+G_att"), torch.device(device), torch.float32)
    assert moved == [torch.device(device)]
    assert executor._model.net_c.encoder["e2"].conv.weight.is_contiguous(memory_format=layout)
    inputs: list[Tensor] = []
    executor._model.net_g.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    executor.run(*case("gen256", 1, 256, 256, torch.float32))
    assert inputs[0].is_contiguous(memory_format=layout)
