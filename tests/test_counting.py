"""Parameters and operations: the paper's printed figures, its tool's, and the true cost."""

from __future__ import annotations

import dataclasses
import io
import json
import subprocess
import sys
import time

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import lgnet_fast  # noqa: F401  (registers the operators)
from lgnet_fast.counting import Report, count, render
from lgnet_fast.reference import CASCADES, LocalGlobalRefinement, LocalNet, UNet, create_model
from tests.engine_support import needs_extension


def giga(value: int, digits: int = 3) -> float:
    return round(value / 1e9, digits)


@pytest.mark.parametrize(
    ("name", "parameters", "printed"),
    [("lgnet", 115.00, 69.62), ("lgnet_share", 60.59, 69.62), ("lgnet_light", 67.10, 53.73)],
)
def test_the_papers_table(name, parameters, printed):
    total = count(name).total
    assert round(total.parameters / 1e6, 2) == parameters
    assert giga(total.paper_rule, 2) == printed
    assert giga(total.thop_rule, 2) == printed


def test_lgnet_to_the_last_digit():
    report = count("lgnet")
    assert giga(report.total.paper_rule) == 69.618
    assert giga(report.total.thop_rule) == 69.624
    assert giga(report.total.macs, 2) == 43.03
    assert giga(report.total.flops, 2) == 86.06
    assert report.total.parameters == 115_002_185
    stages = {s.name: s for s in report.stages}
    assert list(stages) == ["NetC", "NetL", "NetG"]
    assert {name: giga(s.macs) for name, s in stages.items()} == {"NetC": 6.065, "NetL": 25.598, "NetG": 11.367}
    assert [s.parameters for s in report.stages] == [54_414_979, 5_483_203, 55_104_003]
    assert [round(s.thop_rule / 1e9, 4) for s in report.stages] == [18.1653, 32.8898, 18.5689]
    assert [round(s.flops / 1e9, 4) for s in report.stages] == [12.1299, 51.1957, 22.7331]
    assert giga(stages["NetG"].attention_macs, 2) == 4.90
    assert giga(stages["NetG"].combiner_macs, 2) == 0.40
    assert stages["NetC"].attention_macs == stages["NetL"].combiner_macs == 0


def test_attention_by_its_formula():
    """N positions, C channels: 2 N^2 C for both products, 2 N C^2 for the combiner."""
    netg = count("lgnet", size=(512, 256)).stages[2]
    blocks = [(2 * 16 * 16, 512), (2 * 32 * 32, 256), (2 * 64 * 64, 128)]
    assert netg.attention_macs == sum(2 * n * n * c for n, c in blocks)
    assert netg.combiner_macs == sum(2 * n * c * c for n, c in blocks)
    # The fused operator reports the same to flop_counter.
    formula = flop_registry[torch.ops.lgnet._attention_block]
    shapes = [(1, 512, 32, 16), (1, 256, 64, 32), (1, 128, 128, 64)]
    fused = 0
    for b, c, h, w in shapes:
        args = (torch.empty(b, c, h, w, device="meta"), torch.empty(c, 2 * c, 1, 1, device="meta"))
        fused += formula(*args, torch.empty(c, device="meta"), "released", False, "cpp",
                         out_val=(args[0], args[0], args[0]))  # fmt: skip
    assert fused == 2 * (netg.attention_macs + netg.combiner_macs)


def test_true_cost_is_what_flop_counter_sees_in_the_real_model():
    model = create_model("lgnet", coarse_channels=4, local_channels=4, global_channels=4, backend="eager").eval()
    convolutions = torch.ops.aten.convolution
    image, mask = torch.zeros(1, 3, 256, 256), torch.zeros(1, 1, 256, 256)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(image, mask)
    total = count(model).total
    assert counter.get_flop_counts()["Global"][convolutions] == 2 * (total.macs - total.attention_macs)


def test_size_and_batch_scale():
    one, tall, batch = count("lgnet"), count("lgnet", size=(512, 256)), count("lgnet", batch_size=3)
    for field in ("paper_rule", "thop_rule", "macs", "flops", "attention_macs", "combiner_macs"):
        assert getattr(batch.total, field) == 3 * getattr(one.total, field)
        factor = 4 if field == "attention_macs" else 2
        if field not in ("macs", "flops"):
            assert getattr(tall.total, field) == factor * getattr(one.total, field)
    convolutions = [r.total.macs - r.total.attention_macs for r in (one, tall)]
    assert convolutions[1] == 2 * convolutions[0]
    assert one.total.parameters == tall.total.parameters == batch.total.parameters


def test_shared_weights_count_once_in_the_total():
    share, plain = count("lgnet_share"), count("lgnet")
    assert share.total.parameters == 60_587_206
    assert [s.parameters for s in share.stages] == [s.parameters for s in plain.stages]
    assert (share.total.macs, share.total.thop_rule) == (plain.total.macs, plain.total.thop_rule)


def test_ablations_are_sums_of_stages():
    full = {s.name: s for s in count("lgnet").stages}
    for stages in CASCADES:
        report = count(stages)
        assert len(report.stages) == stages.count("+") + 1
        assert report.total.parameters == sum(s.parameters for s in report.stages)
        for stage in report.stages:
            # NetG without attention is NetC's architecture.
            twin = full["NetC" if stage.name == "NetG plain" else stage.name]
            assert (stage.macs, stage.thop_rule, stage.parameters) == (twin.macs, twin.thop_rule, twin.parameters)


def test_paper_variant_costs_the_same():
    with torch.device("meta"):
        model = create_model("lgnet", variant="paper")
    paper, released = count(model).total, count("lgnet").total
    # Their pointwise arithmetic differs a little, by the box sum.
    assert dataclasses.replace(paper, elementwise=released.elementwise) == released


class First(nn.Module):
    """A first stage that uses every rule; its sub-classed convolution counts nothing by the paper's rule."""

    class Partial(nn.Conv2d):
        pass

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, padding=1)
        self.act = nn.LeakyReLU(0.2)
        self.grouped = nn.Conv2d(6, 6, 3, padding=1, groups=3, bias=False)
        self.norm = nn.BatchNorm2d(6, affine=False)
        self.partial = self.Partial(6, 6, 1, bias=False)
        self.deconv = nn.ConvTranspose2d(6, 3, 2, stride=2, bias=False)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.quiet = nn.Sequential(nn.ReLU(), nn.InstanceNorm2d(6), nn.ELU())

    def forward(self, image, mask):
        x = self.act(self.act(self.conv(torch.cat((image, mask), 1))))  # called twice, counted twice
        x = self.quiet(self.partial(self.norm(self.grouped(x))))
        y = self.deconv(x[:, :, ::2, ::2])
        return torch.tanh(y + self.pool(y))


def test_every_rule_on_a_foreign_first_stage_and_x_lg():
    n = 256 * 256
    printed = n * 6 * 4 * 9 + n * 6 * 2 * 9 + 2 * n * 6 + n * 3 * 6 * 4
    extra = n * 6 + 2 * n * 6 + (n + 1) * 3
    macs = n * 6 * 4 * 9 + n * 6 * 2 * 9 + n * 36 + n // 4 * 6 * 3 * 4
    alone = count(First())
    assert alone.model == "First"
    assert [s.name for s in alone.stages] == ["First"]
    assert (alone.total.paper_rule, alone.total.thop_rule, alone.total.macs) == (printed, printed + extra, macs)
    assert alone.total.parameters == sum(p.numel() for p in First().parameters())
    assert alone.total.thop_parameters == alone.total.parameters - 36  # without the sub-classed convolution

    with torch.device("meta"):
        model = LocalGlobalRefinement(First())
    report = count(model)
    assert [s.name for s in report.stages] == ["First", "NetL", "NetG"]
    # PEN_LG 56.2653 and MEDFE_LG 189.3919 G are PEN's 4.8066 and MEDFE's 137.9332 with this on top.
    appended = report.total.thop_rule - alone.total.thop_rule
    assert appended / 1e9 == pytest.approx(56.2653 - 4.8066, abs=1e-4)
    assert appended / 1e9 == pytest.approx(189.3919 - 137.9332, abs=1e-4)
    assert report.total.parameters - alone.total.parameters == 70_818_744 - 10_231_538


class Elementwise(nn.Module):
    """One of each operation that the TensorFlow profiler counts, and some that it does not."""

    def __init__(self) -> None:
        super().__init__()
        self.biased = nn.Conv2d(3, 5, 1)
        self.plain = nn.Conv2d(3, 5, 1, bias=False)

    def forward(self, image, mask):
        x = self.biased(image) * torch.sigmoid(self.plain(image))  # 5 n biases, 5 n products
        x = torch.tanh(nn.functional.elu(x)) - 1 / (mask + 2)  # 5 n differences, n sums, n quotients
        x = torch.softmax(x, dim=1)  # 25 n
        x = x / x.sum(1, keepdim=True)  # 4 n summands, 5 n quotients
        return nn.functional.interpolate(x, scale_factor=2)[:, :3]


def test_the_profilers_rule():
    total = count(Elementwise(), size=(6, 7)).total
    n = 6 * 7
    assert total.flops == 2 * n * 3 * 10
    assert total.elementwise == n * (5 + 5 + 5 + 1 + 1 + 25 + 4 + 5)
    assert total.profiler_rule == total.flops + total.elementwise


def test_beside_the_papers_figures():
    report = count("lgnet_share")
    assert report.published == (60.58, 69.62)
    paper = report.as_dict()["paper"]
    assert paper["parameters_difference_percent"] == pytest.approx(100 * (60_587_206 / 60.58e6 - 1))
    assert abs(paper["parameters_difference_percent"]) < 0.015  # the paper cut 60.587 off
    assert abs(paper["flops_difference_percent"]) < 0.01
    out = io.StringIO()
    Console(file=out, width=80).print(render(report))
    (row,) = [line.split() for line in out.getvalue().splitlines() if line.split()[:1] == ["paper"]]
    assert row == ["paper", "60.58", "69.62", "69.62"]
    assert "+0.01 %" in out.getvalue()
    for other in (count("lgnet", size=(512, 256)), count("lgnet", batch_size=2), count("C+L")):
        assert other.published is None
        assert "paper" not in other.as_dict()


def test_the_model_is_left_as_it_is():
    model = create_model("lgnet_share", local_channels=2, global_channels=2, backend="auto").train()
    model.half()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    run = model.net_g.attention["d5"].run
    count(model)
    assert model.training
    assert model.backend == "auto"
    assert model.net_g.attention["d5"].run is run
    assert not any(m._forward_hooks for m in model.modules())
    assert all(torch.equal(v, before[k]) and v.device.type == "cpu" for k, v in model.state_dict().items())


def test_quick_and_without_weights():
    count("lgnet")  # the first call also imports
    start = time.process_time()
    small = count("lgnet")
    middle = time.process_time()
    report = count("lgnet", size=(2048, 2048), batch_size=64)  # scores of 100 TB, if they were computed
    assert time.process_time() - middle < 2 * (middle - start) + 1
    assert report.total.attention_macs == 64 * 64**2 * small.total.attention_macs


def test_json_and_table():
    report = count("C+G+G_att", size=(512, 256), batch_size=2)
    data = json.loads(json.dumps(report.as_dict()))
    assert (data["model"], data["size"], data["batch_size"]) == ("C+G+G_att", [512, 256], 2)
    assert data["total"]["flops"] == 2 * data["total"]["macs"] == report.total.flops
    assert [s["name"] for s in data["stages"]] == ["NetC", "NetG plain", "NetG"]

    lgnet = count("lgnet")
    assert isinstance(lgnet, Report)
    out = io.StringIO()
    Console(file=out, width=80).print(render(lgnet))
    text = out.getvalue()
    for figure in ("115.002", "69.618", "69.624", "43.029", "86.059", "4.899", "0.403", "25.598"):
        assert figure in text
    assert "paper's" in text
    assert "thop 0.0.31" in " ".join(text.split())
    assert "…" not in text


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"model": 3}, TypeError, "model: expected a name or a torch.nn.Module, got int"),
        ({"model": "resnet"}, ValueError, "name: expected one of"),
        ({"size": 256}, TypeError, r"size: expected two integers \(H, W\), got 256"),
        ({"size": (256, 256.0)}, TypeError, "size: expected two integers"),
        ({"size": (256, 300)}, ValueError, r"size: expected positive multiples of 256, got \(256, 300\)"),
        ({"size": (0, 256)}, ValueError, "size: expected positive multiples"),
        ({"batch_size": 0}, ValueError, "batch_size: expected at least 1, got 0"),
        ({"batch_size": 1.5}, TypeError, "batch_size: expected an integer"),
    ],
)
def test_wrong_arguments(arguments, error, text):
    with pytest.raises(error, match=text):
        count(**{"model": "lgnet", **arguments})


def test_any_size_for_a_foreign_module():
    assert count(First(), size=(10, 6)).size == (10, 6)


def test_tensors_that_are_no_parameters_and_no_buffers():
    """A kernel kept as an attribute, and the weight of torch.nn.utils.spectral_norm after a step of training."""

    class Blur(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel = torch.ones(4, 1, 3, 3) / 9
            self.layer = nn.utils.spectral_norm(nn.Conv2d(4, 3, 1))

        def forward(self, image, mask):
            joined = torch.cat((image, mask), dim=1)
            return self.layer(nn.functional.conv2d(joined, self.kernel, padding=1, groups=4))

    model = Blur().train()
    model(torch.zeros(1, 3, 8, 8), torch.zeros(1, 1, 8, 8))
    kernel = model.kernel
    total = count(model, size=(10, 6)).total
    assert total.macs == 10 * 6 * (4 * 9 + 4 * 3)
    assert total.parameters == 4 * 3 + 3
    assert model.kernel is kernel
    assert kernel.device.type == "cpu"


def test_one_network_alone():
    with torch.device("meta"):
        nets = {"NetC": UNet(), "NetL": LocalNet(), "NetG": UNet(attention="released")}
    for stage in count("lgnet").stages:
        alone = count(nets[stage.name]).total
        assert (alone.macs, alone.thop_rule, alone.attention_macs, alone.parameters) == (
            stage.macs,
            stage.thop_rule,
            stage.attention_macs,
            stage.parameters,
        )


COUNTED = """
import importlib.abc, sys
from importlib.machinery import PathFinder
import torch, lgnet_fast
assert "torch.utils.flop_counter" not in sys.modules

class Frozen(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    # One loader for all modules of a folder, as in programs of PyInstaller.
    def find_spec(self, name, path=None, target=None):
        spec = PathFinder.find_spec(name, path) if name.startswith("torch.utils.") else None
        if spec is not None:
            code[name] = spec.loader.get_code(name)
            spec.loader = self
        return spec

    def exec_module(self, module):
        exec(code[module.__name__], module.__dict__)

code, frozen = {}, Frozen()
if "frozen" in sys.argv:
    sys.meta_path.insert(1, frozen)
from torch.utils import flop_counter
import torch.utils.throughput_benchmark
assert all(type(finder).__name__ != "_RegisterFlopsOnImport" for finder in sys.meta_path)
assert flop_counter.__loader__ is flop_counter.__spec__.loader
assert (flop_counter.__loader__ is frozen) == ("frozen" in sys.argv)
with flop_counter.FlopCounterMode(display=False) as counter:
    torch.ops.lgnet.cosine_attention(torch.randn(1, 8, 4, 4), "released")
print(counter.get_total_flops())
"""


@needs_extension
@pytest.mark.once
@pytest.mark.parametrize("program", ["plain", "frozen"])
def test_formulas_reach_a_counter_that_is_imported_later(program):
    done = subprocess.run([sys.executable, "-c", COUNTED, program], capture_output=True, text=True)
    assert done.stdout == f"{4 * 16**2 * 8}\n", done.stderr
