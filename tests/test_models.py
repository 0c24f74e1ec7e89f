"""Variants, ablations, X_LG: structure, parameter counts, contracts and input checks."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from lgnet_fast import BackendError, LGNet, LocalGlobalRefinement, create_model, list_models
from lgnet_fast.reference import LocalNet, UNet
from lgnet_fast.reference.attention import VARIANTS, attention_block, query_key_value
from tests.support import assert_accurate, case

ABLATIONS = ["C", "C+L", "C+G_att", "C+G+G_att", "C+L+G", "C+L+G_att"]
NARROW = {"coarse_channels": 4, "local_channels": 4, "global_channels": 4}


def narrow(name: str = "lgnet", **overrides) -> LGNet:
    torch.manual_seed(0)
    model = create_model(name, **(NARROW | overrides)).eval()
    with torch.no_grad():  # statistics that make every stage's output vary
        for p in model.parameters():
            if p.dim() == 4:
                p.mul_(8)
    return model


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_list_models():
    assert list_models() == ["lgnet", "lgnet_share", "lgnet_light", "lgnet_demo", "lgnet_small", *ABLATIONS]
    with pytest.raises(ValueError, match="name: expected one of .*got 'lgnet_huge'"):
        create_model("lgnet_huge")
    with pytest.raises(ValueError, match=r"name: expected one of .*got \['lgnet'\]"):
        create_model(["lgnet"])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lgnet", 115_002_185),
        ("lgnet_share", 60_587_206),
        ("lgnet_light", 67_095_337),
        ("lgnet_small", 9_790_761),
        ("C", 54_414_979),
        ("C+L", 54_414_979 + 5_483_203),
        ("C+G_att", 54_414_979 + 55_104_003),
        ("C+G+G_att", 2 * 54_414_979 + 55_104_003),
        ("C+L+G", 2 * 54_414_979 + 5_483_203),
    ],
)
@pytest.mark.parametrize("variant", ["released", "paper"])
def test_parameter_counts(name, expected, variant):
    with torch.device("meta"):
        assert parameters(create_model(name, variant=variant)) == expected


def test_x_lg_parameter_counts():
    with torch.device("meta"):
        extra = parameters(LocalGlobalRefinement(nn.Identity()))
    assert extra == 70_818_744 - 10_231_538  # PEN_LG without PEN
    assert extra == 190_903_276 - 130_316_070  # MEDFE_LG without MEDFE


@pytest.mark.parametrize("name", ABLATIONS)
@pytest.mark.parametrize("variant", ["released", "paper"])
def test_every_ablation_runs_and_keeps_known_pixels(name, variant):
    model = narrow(name, variant=variant)
    image, mask = case("gen256", 1, 256, 256, torch.float32)
    with torch.no_grad():
        stages = model(image, mask, return_stages=True)
        assert torch.equal(model(image, mask), stages.merged[-1])
    assert len(stages.raw) == len(stages.merged) == len(name.split("+"))
    assert (stages.local is not None) == ("L" in name)
    assert (stages.refined is not None) == ("G" in name)
    for raw, merged in zip(stages.raw, stages.merged, strict=True):
        assert raw.abs().max() <= 1
        assert raw.std() > 1e-3
        assert torch.equal(torch.where(mask.bool(), raw, image), merged)
    if "G" in name:
        assert torch.equal(stages.refined, stages.raw[-1])


def test_attention_changes_the_result_and_variants_differ():
    image, mask = case("gen256", 1, 256, 256, torch.float32)
    released = narrow("C+L+G_att")
    paper = narrow("C+L+G_att", variant="paper")
    paper.load_state_dict(released.state_dict())
    plain = narrow("C+L+G")
    plain.load_state_dict(
        {k.replace("net_g.", "net_g_plain."): v for k, v in released.state_dict().items() if "attention" not in k}
    )
    with torch.no_grad():
        results = [m(image, mask) for m in (released, paper, plain)]
    assert (results[0] - results[1]).abs().max() > 1e-3
    assert (results[0] - results[2]).abs().max() > 1e-3


def test_share_runs_net_g_without_attention_as_the_coarse_network():
    model = narrow("lgnet_share")
    image, mask = case("gen256", 1, 256, 256, torch.float32)
    with torch.no_grad():
        coarse = model(image, mask, return_stages=True).coarse
        net_c = UNet(4).eval()
        state = {k: v for k, v in model.net_g.state_dict().items() if "attention" not in k}
        net_c.load_state_dict(state)
        expected = net_c(torch.cat((image * (1 - mask) + mask, mask), 1))
    assert_accurate("coarse", coarse, expected, roundings=64)
    model.train()
    before = model.net_g.encoder["e2"].norm.num_batches_tracked.clone()
    model(image, mask)
    assert model.net_g.encoder["e2"].norm.num_batches_tracked == before + 2  # both uses feed one set of statistics


def test_x_lg_is_lgnet_when_the_first_stage_is_net_c():
    model = narrow()

    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model.net_c

        def forward(self, image, mask):
            return self.net(torch.cat((image * (1 - mask) + mask, mask), dim=1))

    x_lg = LocalGlobalRefinement(First(), local_channels=4, global_channels=4).eval()
    assert all(torch.equal(a, b) for a, b in zip(x_lg.first_stage.parameters(), model.net_c.parameters()))
    x_lg.net_l.load_state_dict(model.net_l.state_dict())
    x_lg.net_g.load_state_dict(model.net_g.state_dict())
    image, mask = case("gen256", 2, 256, 256, torch.float32)
    with torch.no_grad():
        a, b = model(image, mask, return_stages=True), x_lg(image, mask, return_stages=True)
    for x, y in zip(a.merged, b.merged, strict=True):
        assert_accurate("merged", x, y, roundings=64)
    with pytest.raises(TypeError, match="first_stage: expected a torch.nn.Module, got function"):
        LocalGlobalRefinement(lambda image, mask: image)


@pytest.mark.parametrize("kind", ["lgnet", "x_lg"])
def test_the_first_stages_alone(kind):
    """The pictures of the stages that run are those of the whole cascade."""
    torch.manual_seed(0)
    lgnet = LGNet(coarse_channels=4, local_channels=4, global_channels=4, backend="eager")
    x_lg = LocalGlobalRefinement(_Mean(), local_channels=4, global_channels=4, backend="eager")
    model = {"lgnet": lgnet, "x_lg": x_lg}[kind].eval()
    image, mask = torch.rand(1, 3, 256, 256) * 2 - 1, torch.zeros(1, 1, 256, 256)
    mask[:, :, 60:120, 80:200] = 1
    with torch.no_grad():
        whole = model(image, mask, return_stages=True)
        for until in (1, 2, 3):
            part = model(image, mask, return_stages=True, until=until)
            assert len(part.raw) == len(part.merged) == until
            assert all(torch.equal(a, b) for a, b in zip(part.merged, whole.merged))
            assert torch.equal(model(image, mask, until=until), whole.merged[until - 1])
            assert [part.coarse, part.local, part.refined].count(None) == 3 - until
    for wrong in (0, 4, 2.0, True):
        with pytest.raises(ValueError, match=f"until: expected 1 to 3, the model's stages, got {wrong}"):
            model(image, mask, until=wrong)


class _Mean(nn.Module):
    """A first stage that fills with the mean colour."""

    def forward(self, image, mask):
        return image.mean(dim=(2, 3), keepdim=True).expand_as(image)


def test_what_lies_under_the_mask_does_not_matter():
    model = narrow()
    image, mask = case("gen256", 1, 256, 256, torch.float32)
    torch.manual_seed(0)
    noise = torch.where(mask.bool(), torch.rand_like(image) * 2 - 1, image)
    with torch.no_grad():
        assert torch.equal(model(image, mask), model(noise, mask))


def test_samples_of_a_batch_do_not_touch_each_other():
    model = narrow().double()
    image, mask = case("gen512", 3, 256, 512)
    with torch.no_grad():
        together = model(image, mask)
        alone = torch.cat([model(image[i : i + 1], mask[i : i + 1]) for i in range(3)])
    assert_accurate("batch", together, alone)
    assert model(image[:0], mask[:0]).shape == (0, 3, 256, 512)


@pytest.mark.parametrize(
    ("image", "mask", "error", "message"),
    [
        ([1], torch.zeros(1, 1, 256, 256), TypeError, "image: expected a torch.Tensor, got list"),
        (torch.zeros(1, 3, 256, 256), None, TypeError, "mask: expected a torch.Tensor, got NoneType"),
        (torch.zeros(1, 3, 256, 256).byte(), torch.zeros(1, 1, 256, 256), TypeError, "image: expected a floating"),
        (torch.zeros(1, 3, 256, 256), torch.zeros(1, 1, 256, 256).bool(), TypeError, "mask: expected a floating"),
        (torch.zeros(3, 256, 256), torch.zeros(1, 1, 256, 256), ValueError, r"image: expected \[B, 3, H, W\]"),
        (torch.zeros(1, 4, 256, 256), torch.zeros(1, 1, 256, 256), ValueError, r"got \[1, 4, 256, 256\]"),
        (torch.zeros(2, 3, 256, 256), torch.zeros(1, 1, 256, 256), ValueError, r"mask: expected \[2, 1, 256, 256\]"),
        (torch.zeros(1, 3, 256, 255), torch.zeros(1, 1, 256, 255), ValueError, "multiples of 256, got .256, 255."),
        (torch.zeros(1, 3, 0, 256), torch.zeros(1, 1, 0, 256), ValueError, "positive multiples of 256"),
        (torch.zeros(1, 3, 256, 256), torch.zeros(1, 1, 256, 256).double(), TypeError, "mask: expected dtype"),
        (
            torch.zeros(1, 3, 256, 256).double(),
            torch.zeros(1, 1, 256, 256).double(),
            TypeError,
            "image: expected torch.float32 as the model's weights, got torch.float64",
        ),
        (
            torch.zeros(1, 3, 256, 256),
            torch.zeros(1, 1, 256, 256, device="meta"),
            ValueError,
            "mask: expected device cpu as image, got meta",
        ),
    ],
)
def test_bad_input_is_named(image, mask, error, message):
    with pytest.raises(error, match=message):
        narrow("C")(image, mask)


def test_constructor_checks():
    for arguments, message in [
        ({"stages": "L"}, "stages: expected one of"),
        ({"variant": "nips"}, "variant: expected one of"),
        ({"local_channels": 0}, "local_channels: expected a positive integer, got 0"),
        ({"coarse_channels": True}, "^coarse_channels: expected a positive integer, got True$"),
        ({"local_channels": False}, "^local_channels: expected a positive integer, got False$"),
        ({"global_channels": True}, "^global_channels: expected a positive integer, got True$"),
        ({"max_channels": True}, "^max_channels: expected a positive integer or None, got True$"),
        ({"share_coarse": "yes"}, "^share_coarse: expected a bool, got 'yes'$"),
        ({"share_coarse": 1}, "^share_coarse: expected a bool, got 1$"),
        ({"stages": "C", "share_coarse": True}, "share_coarse: needs a G_att stage"),
        ({"backend": "cuda"}, "backend: expected one of"),
    ]:
        with pytest.raises(ValueError, match=message):
            LGNet(**(NARROW | arguments))


def test_explicit_backend_that_cannot_run_raises_with_the_reason():
    model = narrow("C", backend="triton")
    image, mask = case("gen256", 1, 256, 256, torch.float32)
    with pytest.raises(BackendError, match="backend='triton' cannot run merge_concat: "):
        model(image, mask)


def test_copies_are_independent_and_keep_the_backend():
    model = narrow(backend="eager")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        next(twin.parameters()).zero_()
    assert next(model.parameters()).abs().sum() > 0
    assert twin.backend == "eager"


def test_initialisation_is_the_papers():
    torch.manual_seed(0)
    model = create_model("lgnet_demo")
    conv = model.net_g.encoder["e5"].conv.weight
    assert abs(conv.mean()) < 5e-4
    assert abs(conv.std() - 0.02) < 2e-4
    norms = torch.cat([m.weight for m in model.modules() if isinstance(m, nn.BatchNorm2d)])
    assert abs(norms.mean() - 1) < 2e-3
    assert abs(norms.std() - 0.02) < 2e-3
    assert all((m.bias == 0).all() for m in model.modules() if getattr(m, "bias", None) is not None)


def test_local_network_keeps_size_and_is_shift_equivariant():
    """A fully convolutional network with stride 4: a picture moved by 4 pixels gives a result moved by 4."""
    torch.manual_seed(0)
    net = LocalNet(4).double().eval()
    x = torch.randn(1, 4, 192, 192, dtype=torch.float64)
    with torch.no_grad():
        y, moved = net(x), net(torch.roll(x, (4, 4), (2, 3)))
    inner = slice(64, 128)
    assert_accurate("moved", moved[..., inner, inner], y[..., 60:124, 60:124])


@pytest.mark.once
def test_eager_model_exports_to_onnx(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model = narrow(backend="eager")
    image, mask = case("gen256", 1, 256, 256, torch.float32)
    file = tmp_path / "lgnet.onnx"
    torch.onnx.export(model, (image, mask), str(file), opset_version=17, dynamo=False, input_names=["image", "mask"])
    (got,) = onnxruntime.InferenceSession(str(file)).run(None, {"image": image.numpy(), "mask": mask.numpy()})
    with torch.no_grad():
        expected = model(image, mask)
    assert_accurate("ONNX Runtime", torch.from_numpy(got), expected, roundings=2**13)
    assert (expected - image).abs().max() > 0.1


def test_compiled_model_has_no_graph_break():
    model = narrow()
    image, mask = case("gen256", 1, 256, 256, torch.float32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_accurate("compiled", compiled(image, mask), model(image, mask), roundings=128)


@pytest.mark.once
def test_import_is_quick_and_light():
    """Importing adds at most a quarter to PyTorch's own import, and loads nothing that only some users need."""
    program = (
        "import sys, time; clock = time.process_time;"
        "a = clock(); import torch; b = clock(); import lgnet_fast; print((clock() - b) / (b - a));"
        "heavy = ('PIL', 'huggingface_hub', 'typer', 'lgnet_fast._C', 'onnx', 'triton');"
        "print([m for m in heavy if m in sys.modules])"
    )
    shares = []
    for _ in range(3):
        share, loaded = subprocess.run(
            [sys.executable, "-c", program], check=True, capture_output=True, text=True
        ).stdout.splitlines()
        assert loaded == "[]"
        shares.append(float(share))
    assert min(shares) < 0.25


@pytest.mark.once
def test_import_and_networks_work_without_triton_and_the_extension():
    program = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton" or name == "lgnet_fast._C":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Refuse())
import torch, lgnet_fast
model = lgnet_fast.create_model("lgnet_demo").eval()
with torch.no_grad():
    out = model(torch.zeros(1, 3, 256, 256), torch.ones(1, 1, 256, 256))
assert out.shape == (1, 3, 256, 256)
assert {backend for _, backend in lgnet_fast.ops.calls()} == {"eager"}
print("fine")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "fine\n", done.stderr


class Adapted(nn.Module):
    """A convolution with a low-rank update, which shows the weight of the convolution alone, as LoRA's layers do."""

    def __init__(self, base: nn.Conv2d) -> None:
        super().__init__()
        self.base, self.weight, self.bias, self.out_channels = base, base.weight, base.bias, base.out_channels
        self.down = nn.Conv2d(base.in_channels, 2, 1, bias=False)
        self.up = nn.Conv2d(2, base.out_channels, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))

    def merged(self) -> torch.Tensor:
        return self.weight + (self.up.weight[..., 0, 0] @ self.down.weight[..., 0, 0])[..., None, None]


def adapted(block: nn.Module) -> torch.Tensor:
    block.combiner = Adapted(block.combiner)
    return block.combiner.merged()


def hooked(block: nn.Module) -> torch.Tensor:
    nn.init.zeros_(block.combiner.bias)
    block.combiner.register_forward_hook(lambda module, inputs, output: 2 * output)
    return 2 * block.combiner.weight


def replaced_forward(block: nn.Module) -> torch.Tensor:
    nn.init.zeros_(block.combiner.bias)
    forward = block.combiner.forward
    block.combiner.forward = lambda x: 2 * forward(x)
    return 2 * block.combiner.weight


def pruned(block: nn.Module) -> torch.Tensor:
    """The hook computes `weight` from values that were loaded after the pruning."""
    prune.random_unstructured(block.combiner, "weight", 0.5)
    block.combiner.weight_orig.data.neg_()
    return block.combiner.weight_orig * block.combiner.weight_mask


def without_bias(block: nn.Module) -> torch.Tensor:
    block.combiner.bias = None
    return block.combiner.weight


@pytest.mark.parametrize("variant", ["released", "paper"])
@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("change", [adapted, hooked, replaced_forward, pruned, without_bias])
@torch.no_grad()
def test_a_changed_combiner_is_called(change, backend, variant):
    """Not only its weight and bias are read, as for the fused operator."""
    net = narrow("C+G_att", variant=variant, backend=backend).net_g
    block = net.attention["d4"]
    weight = change(block)
    channels = block.combiner.out_channels
    features = torch.randn(2, channels, 6, 5)
    bias = torch.zeros(channels) if block.combiner.bias is None else block.combiner.bias
    exact = attention_block(features.double(), weight.double(), bias.double(), variant)
    eager = attention_block(features, weight, bias, variant)
    assert_accurate("combined", block(features), exact, eager)


@pytest.mark.parametrize("variant", VARIANTS)
def test_keys_of_tiny_features_have_unit_norm(variant):
    _, key, _ = query_key_value(torch.full((1, 4, 2, 3), 1e-9, dtype=torch.float64), variant)
    assert torch.allclose(key, torch.full_like(key, 0.5), rtol=1e-12)


def test_autocast_takes_pictures_in_16_bit():
    image, mask = case("gen256", 1, 256, 256, torch.bfloat16)
    model = narrow("C")
    with pytest.raises(TypeError, match="image: expected torch.float32 as the model's weights, got torch.bfloat16"):
        model(image, mask)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert torch.equal(torch.where(mask > 0, image, model(image, mask)), image)


@pytest.mark.parametrize(("hook", "gradients"), [("full_backward_pre_hook", 1), ("full_backward_hook", 2)])
def test_backward_hooks_of_a_combiner_run(hook, gradients):
    block = narrow("C+G_att").net_g.attention["d4"]
    seen = []
    getattr(block.combiner, f"register_{hook}")(lambda module, *found: seen.append(len(found)))
    block(torch.randn(2, block.combiner.out_channels, 6, 5, requires_grad=True)).sum().backward()
    assert seen == [gradients]


def test_gradients_reach_what_a_combiner_is_computed_from():
    """Each step computes the pruned weight anew; a stale one belongs to the graph of an earlier step."""
    block = narrow("C+G_att").net_g.attention["d4"]
    prune.random_unstructured(block.combiner, "weight", 0.5)
    features = torch.randn(2, block.combiner.out_channels, 6, 5)
    for _ in range(2):
        block.combiner.weight_orig.grad = None
        block(features).sum().backward()
        assert block.combiner.weight_orig.grad.count_nonzero() > 0
