"""Steps by CUDA graphs, with an emulation of capture and replay on CPU tensors."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import spectral_norm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from bench.one_device import OneDevice
from lgnet_fast import LGNet
from lgnet_fast.errors import ConfigError
from lgnet_fast.reference.losses import LossWeights
from lgnet_fast.training import graphed
from lgnet_fast.training.config import config_of
from lgnet_fast.training.graphed import GraphedStep
from lgnet_fast.training.setup import step_class
from lgnet_fast.training.steps import Objective, Step, Terms, Trained


class Recorded(TorchDispatchMode):
    """Operations of a function, which `replay` repeats on the same memory, as a CUDA graph does."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:  # a view's memory is written by others
            self.calls.append((func, args, kwargs or {}, [x for x in tree_leaves(result) if isinstance(x, Tensor)]))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, results in self.calls:
            again = [x for x in tree_leaves(func(*args, **kwargs)) if isinstance(x, Tensor)]
            for old, new in zip(results, again, strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def record(launches: Callable[[], None], device: Any, pool: Any, warm_up: Callable[[], None]) -> Recorded:
    warm_up()
    recorded = Recorded()
    with recorded:
        launches()
    return recorded


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphed, "DIRECT", 1)


def by_emulation(monkeypatch: pytest.MonkeyPatch, capture: Callable[..., Any] = record) -> None:
    """Captures on the CPU."""
    monkeypatch.setattr(graphed, "capture", capture)
    monkeypatch.setattr(graphed, "Pool", lambda device: None)


def step_of(kind: type[Step], device: str = "cpu", **options: Any) -> tuple[Step, nn.Module, nn.Module]:
    torch.manual_seed(1)
    network = LGNet(stages="C+L", coarse_channels=4, local_channels=4, backend="eager").to(device).double().train()
    # As the package's own: power iterations, whose vectors each run changes in place.
    discriminator = nn.Sequential(
        spectral_norm(nn.Conv2d(3, 4, 16, 16)), nn.LeakyReLU(0.2), spectral_norm(nn.Conv2d(4, 1, 3))
    )
    discriminator.to(device).double().train()
    optimisers = [
        torch.optim.Adam(network.parameters(), 2e-4, (0.5, 0.999)),
        torch.optim.Adam(discriminator.parameters(), 2e-4, (0.5, 0.999)),
    ]
    nets = Trained(network, discriminator, network, discriminator, network)
    return (
        kind(nets, optimisers, Objective(LossWeights()), OneDevice(contextlib.nullcontext), **options),
        network,
        discriminator,
    )


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    made = []
    for number in range(count):
        mask = torch.zeros(1, 1, 256, 256, dtype=torch.float64)
        mask[..., 40 + number : 120, 60 : 150 - number] = 1
        made.append((torch.rand(1, 3, 256, 256, generator=generator, dtype=torch.float64) * 2 - 1, mask))
    return made


def trained(
    kind: type[Step], batch_lists: list[list[tuple[Tensor, Tensor]]], **options: Any
) -> tuple[Any, list[Any]]:
    step, network, discriminator = step_of(kind, **options)
    found = []
    device = next(network.parameters()).device
    for number, own in enumerate(batch_lists):
        terms = step([(image.to(device), mask.to(device)) for image, mask in own], adversarial=number != 1)
        found.append(None if terms is None else {name: float(term) for name, term in terms.items()})
    return copy.deepcopy([network.state_dict(), discriminator.state_dict()]), found


def assert_equal(own: Any, expected: Any, tolerance: float = 1e-9) -> None:
    for state, exact in zip(own[0], expected[0], strict=True):
        for name, value in exact.items():
            torch.testing.assert_close(
                state[name], value, rtol=tolerance, atol=tolerance / 1e3, msg=lambda m, n=name: f"{n}: {m}"
            )
    assert len(own[1]) == len(expected[1])
    for terms, exact in zip(own[1], expected[1], strict=True):
        assert terms == (None if exact is None else pytest.approx(exact, rel=tolerance))


def test_graphed_steps_train_as_others(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    by_emulation(monkeypatch)
    replays = []
    monkeypatch.setattr(Recorded, "replay", lambda self, own=Recorded.replay: (replays.append(1), own(self)))
    lists = [[batch] for batch in batches(5)]
    with caplog.at_level(logging.WARNING, "lgnet_fast"):
        own = trained(GraphedStep, lists)
    assert caplog.messages == []
    # The step without the discriminator came once. One check, then three steps, of two graphs.
    assert len(replays) == 2 * (1 + 3)
    assert_equal(own, trained(Step, lists))


def test_gradients_of_several_batches_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    by_emulation(monkeypatch)
    several = batches(6)
    lists = [several[number : number + 2] for number in range(0, 6, 2)]
    assert_equal(trained(GraphedStep, lists), trained(Step, lists))


def test_no_autograd_graph_of_an_earlier_run_is_alive_at_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a batch or of the warm-up. Its nodes that add up gradients are on the stream of that run, which a capture on
    another may not involve."""
    networks: list[nn.Module] = []
    marked: list[int] = []
    old: list[bool] = []

    def nodes() -> list[Any]:
        """Those of the weights: the nodes of a living graph, else new ones."""
        weights = (p for network in networks for p in network.parameters() if p.requires_grad)
        return [p.view_as(p).grad_fn.next_functions[0][0] for p in weights]

    def mark(*args: Any) -> bool:
        for node in nodes():
            node.metadata["of an earlier run"] = True
        marked.append(len(nodes()))
        return False

    def warmed(step: GraphedStep, part: Any) -> Terms:
        terms = gradients_of(step, part)
        mark()
        return terms

    def spied(launches: Callable[[], None], device: Any, pool: Any, warm_up: Callable[[], None]) -> Recorded:
        warm_up()
        if not old:  # before the first of the two graphs, which are captured together
            old.extend("of an earlier run" in node.metadata for node in nodes())
        return record(launches, device, pool, lambda: None)

    gradients_of = GraphedStep._gradients_of
    by_emulation(monkeypatch, spied)
    monkeypatch.setattr(GraphedStep, "_gradients_of", warmed)
    step, *networks[:] = step_of(GraphedStep, on_nonfinite=mark)
    step(batches(2))  # the first without graphs
    assert len(marked) == 6  # two totals of each batch, the warm-up, the check
    assert len(old) == marked[0] > 0
    assert not any(old)
    assert isinstance(step, GraphedStep)
    assert step.uses_graphs


def test_a_step_is_skipped_in_graphs_too(monkeypatch: pytest.MonkeyPatch) -> None:
    by_emulation(monkeypatch)
    lists = [[batch] for batch in batches(4)]

    def skipping() -> Callable[[str, Terms, int], bool]:
        calls = iter(range(1000))
        return lambda total, terms, number: total == "G" and next(calls) == 2

    own = trained(GraphedStep, lists, on_nonfinite=skipping())
    assert own[1].count(None) == 1
    assert_equal(own, trained(Step, lists, on_nonfinite=skipping()))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
def test_graphs_of_a_gpu_train_as_a_step_without_them(caplog: pytest.LogCaptureFixture) -> None:
    lists = [[batch] for batch in batches(5)]
    with caplog.at_level(logging.WARNING, "lgnet_fast"):
        own = trained(GraphedStep, lists, device="cuda")
    assert caplog.messages == []  # no path without graphs
    # Its sums are in an order that changes.
    assert_equal(own, trained(Step, lists, device="cuda"), 1e-5)


@pytest.mark.parametrize("fault", ["weights", "picture", "raises"])
def test_what_cannot_be_captured_runs_without_graphs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    class Stale(Recorded):
        """Its operations read copies: weights that autocast has cast before, a picture that was copied."""

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            wanted = "convolution.default" if fault == "weights" else "cat.default"
            if not func.is_view:
                own = tree_map_only(Tensor, torch.clone, args) if wanted in str(func) else args
                leaves = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
                self.calls.append((func, own, kwargs or {}, leaves))
            return result

    def faulty(launches: Callable[[], None], device: Any, pool: Any, warm_up: Callable[[], None]) -> Recorded:
        warm_up()
        recorded = Stale()
        with recorded:
            launches()
        if fault == "raises":
            raise graphed_error
        return recorded

    graphed_error = RuntimeError("operation not permitted when stream is capturing")
    by_emulation(monkeypatch, faulty)
    lists = [[batch] for batch in batches(3)]
    with caplog.at_level(logging.WARNING, "lgnet_fast"):
        own = trained(GraphedStep, lists)
    (message,) = caplog.messages
    assert message.startswith("optim.cuda_graphs: steps run without CUDA graphs (")
    assert ("not permitted" if fault == "raises" else "differ from a step without them") in message
    assert_equal(own, trained(Step, lists))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"optim": {"compile": True}}, "optim.compile: true"),
        ({"optim": {"precision": "fp16"}}, "optim.precision: fp16"),
        ({"loss": {"feature_crop": 128}}, "loss.feature_crop"),
        ({"discriminator": {"crop": 128}}, "discriminator.crop"),
    ],
)
def test_settings_that_graphs_cannot_follow_are_refused(settings: dict[str, Any], reason: str) -> None:
    settings.setdefault("optim", {})["cuda_graphs"] = True
    settings["data"] = {"pictures": ["photos"]}
    with pytest.raises(ConfigError, match=f"optim.cuda_graphs: expected false with {reason}, got True"):
        config_of(settings)


@pytest.mark.parametrize(
    ("device", "processes", "message"),
    [("cpu", 1, "with the device cpu"), ("cuda", 2, "with 2 processes")],
)
def test_graphs_are_for_one_process_on_a_gpu(device: str, processes: int, message: str) -> None:
    config = SimpleNamespace(optim=SimpleNamespace(cuda_graphs=True))
    accelerator = SimpleNamespace(device=torch.device(device), num_processes=processes)
    with pytest.raises(ConfigError, match=f"optim.cuda_graphs: expected false {message}"):
        step_class(config, accelerator)  # type: ignore[arg-type]
    accelerator = SimpleNamespace(device=torch.device("cuda"), num_processes=1)
    assert step_class(config, accelerator) is GraphedStep  # type: ignore[arg-type]
