"""`optimize` of a model whose layers were changed: the same results, or one error."""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from lgnet_fast import Engine, Inpainter, LGNet, LocalGlobalRefinement, create_model, optimize
from lgnet_fast.engine.making import fast_executor_reason
from lgnet_fast.engine.model_executor import ModelExecutor
from lgnet_fast.engine.structure import plain_stages, reason_against_engine, reason_against_plan
from tests.support import case
from tests.test_plan import NARROW, lively

needs_the_executor = pytest.mark.skipif(
    fast_executor_reason(torch.device("cpu"), torch.float32) is not None, reason="no C++ executor here"
)


@pytest.fixture
def model() -> LGNet:
    torch.manual_seed(0)
    return lively(create_model("lgnet", **NARROW, backend="eager")).float()


def assert_runs_as(engine: Engine, model: LGNet, before: LGNet) -> None:
    """The engine gives the results of the model, which the change made others than `before`."""
    image, mask = case("gen256", 1, 256, 256, torch.float32)
    with torch.no_grad():
        result, expected, old = (one(image, mask) for one in (engine, model, before.eval()))
    hole = (mask != 0).expand_as(image)
    error, change = ((one - expected)[hole].norm() / expected[hole].norm() for one in (result, old))
    assert error < 1e-3  # bf16x3 leaves 2^-16 of each product out, which deep networks amplify
    assert error < 0.01 * change


class Halved(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return 0.5 * super().forward(input)


def halve(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return 0.5 * output


def hooked(model: LGNet) -> None:
    model.net_l.down1.register_forward_hook(halve)


def pre_hooked(model: LGNet) -> None:
    model.net_l.down1.register_forward_pre_hook(lambda module, inputs: (0.5 * inputs[0],))


def other_activation(model: LGNet) -> None:
    model.net_l.down1.activation = nn.GELU()


def other_slope(model: LGNet) -> None:
    model.net_c.encoder["e3"].activation.negative_slope = 0.01


def replaced(model: LGNet, kind: type[nn.Conv2d] = nn.Conv2d, **settings: Any) -> None:
    conv = model.net_l.down1.conv
    channels = conv.in_channels, conv.out_channels
    model.net_l.down1.conv = kind(*channels, 3, **{"stride": 2, "padding": 1, "bias": False, **settings})


def dilated(model: LGNet) -> None:
    replaced(model, dilation=2, padding=2)


def grouped(model: LGNet) -> None:
    replaced(model, groups=NARROW["local_channels"])


def own_class(model: LGNet) -> None:
    replaced(model, Halved)


def norm(module: nn.Module) -> Callable[[LGNet], None]:
    def change(model: LGNet) -> None:
        model.net_l.down1.norm = module

    return change


def without_bias(model: LGNet) -> None:
    model.net_l.down1.norm = nn.BatchNorm2d(WIDTH)
    model.net_l.down1.norm.bias = None


def without_statistics(model: LGNet) -> None:
    model.net_l.down1.norm.running_mean = model.net_l.down1.norm.running_var = None


class Scaled(nn.Module):
    """A wrapper without the attributes of what it wraps, as adapters of other packages are."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input: Tensor) -> Tensor:
        return 0.5 * self.inner(input)


def wrapped(path: str) -> Callable[[LGNet], None]:
    def change(model: LGNet) -> None:
        owner, _, name = path.rpartition(".")
        setattr(model.get_submodule(owner), name, Scaled(model.get_submodule(path)))

    return change


def without_attention(model: LGNet) -> None:
    for level in list(model.net_g.attention):
        model.net_g.attention[level] = Scaled(nn.Identity())


def own_attention(model: LGNet) -> None:
    model.net_g.attention["d4"].run = lambda features, weight, bias, variant: 0.5 * features


def more(model: LGNet) -> None:
    model.net_l.blocks.append(copy.deepcopy(model.net_l.blocks[0]))


WIDTH = 2 * NARROW["local_channels"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (hooked, "net_l.down1 has a forward hook"),
        (pre_hooked, "net_l.down1 has a forward pre-hook"),
        (other_activation, "net_l.down1.activation is not ReLU but GELU"),
        (other_slope, "net_c.encoder.e3.activation has negative_slope = 0.01, not 0.2"),
        (dilated, "net_l.down1.conv has padding = (2, 2), not (1, 1)"),
        (grouped, "net_l.down1.conv has groups = "),
        (own_class, "net_l.down1.conv is not Conv2d but Halved, which has a forward of its own"),
        (norm(nn.BatchNorm2d(WIDTH, affine=False)), "net_l.down1.norm has affine = False, not True"),
        (norm(nn.BatchNorm2d(WIDTH, track_running_stats=False)), "net_l.down1.norm has track_running_stats = False"),
        (norm(nn.Identity()), "net_l.down1.norm is not BatchNorm2d but Identity"),
        (norm(nn.GroupNorm(1, WIDTH)), "net_l.down1.norm is not BatchNorm2d but GroupNorm"),
        (without_bias, "net_l.down1.norm has no bias"),
        (without_statistics, "net_l.down1.norm has no running_mean"),
        (wrapped("net_c.encoder.e1.conv"), "net_c.encoder.e1.conv is not Conv2d but Scaled"),
        (wrapped("net_g.encoder.e8"), "net_g.encoder.e8 is not Down but Scaled"),
        (wrapped("net_l.stem"), "net_l.stem is not ConvBlock but Scaled"),
        (wrapped("net_l"), "net_l is not LocalNet but Scaled"),
        (without_attention, "is not AttentionBlock but Scaled"),
        (own_attention, "net_g.attention.d4 has an attention of its own"),
        (more, "net_l.blocks.4 is no layer of LGNet"),
    ],
)
def test_a_changed_layer_runs_as_the_model_does(
    model: LGNet, change: Callable[[LGNet], None], words: str, caplog: pytest.LogCaptureFixture
) -> None:
    before = copy.deepcopy(model)
    change(model.eval())
    model.eval()
    with caplog.at_level(logging.WARNING, "lgnet_fast"):
        engine = optimize(model, device="cpu")
    (record,) = caplog.records
    assert words in record.getMessage()
    assert isinstance(engine._first.executor, ModelExecutor)
    assert_runs_as(engine, model, before)


def by_hook(model: LGNet) -> None:
    nn.utils.weight_norm(model.net_l.down1.conv)
    model.net_l.down1.conv.weight_g.data.mul_(2)


def by_parametrization(model: LGNet) -> None:
    parametrizations.spectral_norm(model.net_l.down1.conv)


def by_spectral_hook(model: LGNet) -> None:
    """No forward has divided `weight` by its norm yet."""
    nn.utils.spectral_norm(model.net_l.down1.conv)


def pruned(model: LGNet) -> None:
    """`weight` is computed by the next forward; the plan must not read the old one."""
    prune.random_unstructured(model.net_l.down1.conv, "weight", 0.5)
    model.net_l.down1.conv.weight_orig.data.mul_(2)


def one_convolution_twice(model: LGNet) -> None:
    """Two layers with the same convolution, each with its own normalisation."""
    model.net_l.blocks[1].first.conv = model.net_l.blocks[0].first.conv


def attention_in_net_c(model: LGNet) -> None:
    torch.manual_seed(1)
    model.net_c = lively(create_model("lgnet", variant="paper", **NARROW, backend="eager")).float().net_g


def no_attention_in_net_g(model: LGNet) -> None:
    torch.manual_seed(1)
    model.net_g = lively(create_model("C", **NARROW, backend="eager")).float().net_c


def one_network_twice(model: LGNet) -> None:
    """Not LGNet_share: its attention runs in both stages."""
    model.net_c = model.net_g


OTHER_WEIGHTS = [by_hook, by_parametrization, by_spectral_hook, pruned, one_convolution_twice]
OTHER_NETWORKS = [attention_in_net_c, no_attention_in_net_g, one_network_twice]


@needs_the_executor
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("change", OTHER_WEIGHTS + OTHER_NETWORKS)
def test_other_weights_of_the_same_layers_are_planned(model: LGNet, change: Callable[[LGNet], None]) -> None:
    before = copy.deepcopy(model)
    change(model.eval())
    model.eval()
    assert reason_against_plan(model) is None
    engine = optimize(model, device="cpu", dtype="float32")
    assert_runs_as(engine, model, before)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("change", [by_hook, by_spectral_hook, pruned])
def test_a_changed_model_that_was_trained_is_copied(model: LGNet, change: Callable[[LGNet], None]) -> None:
    """A training step leaves a computed weight that is part of a graph, which PyTorch does not copy."""
    before = copy.deepcopy(model)
    change(model)
    hooked(model)
    model.train()
    image, mask = case("gen256", 1, 256, 256, torch.float32)
    model(image, mask).sum().backward()
    engine = optimize(model, device="cpu", dtype="float32")
    assert isinstance(engine._first.executor, ModelExecutor)
    assert_runs_as(engine, model.eval(), before)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("change", [by_parametrization, by_spectral_hook])
def test_a_model_in_training_is_left_as_it_is(model: LGNet, change: Callable[[LGNet], None]) -> None:
    """Reading a weight with spectral normalisation must not improve its singular vectors; the results are those of
    evaluation mode."""
    before = copy.deepcopy(model)
    change(model.train())
    state = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    engine = optimize(model, device="cpu", dtype="float32")
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert_runs_as(engine, model.eval(), before)


class Forgotten(nn.Module):
    def forward(self, image: Tensor, mask: Tensor) -> None:
        pass


class Locked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


def test_first_stages_that_do_not_fit() -> None:
    narrow = {"local_channels": 1, "global_channels": 1}
    image, mask = case("gen256", 1, 256, 256, torch.float32)
    with pytest.raises(ValueError, match=r"^first_stage: expected a picture \[1, 3, 256, 256\] .*, got NoneType$"):
        optimize(LocalGlobalRefinement(Forgotten(), **narrow).eval())(image, mask)
    with pytest.raises(TypeError, match="^first_stage: expected a module that can be copied .*lock"):
        optimize(LocalGlobalRefinement(Locked(), **narrow).eval())
    with pytest.raises(ValueError, match="^local_channels: expected a positive integer, got 0"):
        LocalGlobalRefinement(Forgotten(), local_channels=0)


class Own(LGNet):
    def forward(self, *args: Any, **options: Any) -> Any:
        return 0.5 * super().forward(*args, **options)


def test_a_model_with_code_of_its_own_is_refused(model: LGNet) -> None:
    own = Own(**NARROW)
    with pytest.raises(TypeError, match=r"^model: expected .* the model is not LGNet but Own, which has a forward"):
        optimize(own)
    model.register_forward_hook(halve)
    with pytest.raises(TypeError, match=r"^model: expected .* the model has a forward hook"):
        optimize(model)
    assert Inpainter(model)._network.model is model
    with pytest.raises(ValueError, match=r"^model: expected weights with values, got a model on the meta device"):
        optimize(LGNet(**NARROW).to("meta"))


def test_a_synchronised_norm_is_a_norm(model: LGNet) -> None:
    assert reason_against_plan(nn.SyncBatchNorm.convert_sync_batchnorm(model)) is None


@pytest.mark.parametrize("name", ["lgnet", "lgnet_share", "lgnet_light", "lgnet_small", "C", "C+L+G"])
def test_every_model_of_the_package_is_plain(name: str) -> None:
    with torch.device("meta"):
        models: list[Any] = [create_model(name, backend="eager")]
        models.append(LocalGlobalRefinement(nn.Identity(), "paper", 8, 16, backend="eager"))
    for one in models:
        assert reason_against_engine(one) is None
        assert reason_against_plan(one) is None
        assert all(p.is_meta for _, net, _ in plain_stages(one) for p in net.parameters())
