"""Parameters and operations of a model, by the paper's convention and by true count.

Several conventions are in use, and they differ by a third and more:

* **The paper's rule** gives the FLOPs that the paper prints (69.62 G for LGNet at 256x256): multiply-accumulates of
  convolutions; transposed convolutions counted on their output (four times too many at stride 2); 2 per BatchNorm
  element; nothing for products of two activations, so none for attention. The tool that it was measured with, thop
  0.0.31, also counts 1 per output of a convolution with bias, 1 per LeakyReLU element, and window + 1 per output of
  an adaptive average pool. Both sums are reported. A layer counts by its exact class, each time it is called: a
  sub-class of a convolution counts nothing, and its parameters are missed too.
* **The true cost** counts the multiply-accumulates that a forward pass does, attention's two matrix products
  included, with ``torch.utils.flop_counter``. One multiply-accumulate is two FLOP.
* **The TensorFlow profiler's rule** (``float_operation``) is the true FLOPs and one for each biased, added,
  subtracted, multiplied, divided or squared element, five for each element of a softmax, one for each summand.

Everything runs on the meta device: shapes only, no memory for weights, no arithmetic.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from .reference.attention import AttentionBlock, attention_weights, query_key_value
from .reference.cascade import Cascade
from .reference.lgnet import LGNet, LocalGlobalRefinement
from .reference.networks import LocalNet, UNet
from .reference.variants import create_model

if TYPE_CHECKING:
    from rich.table import Table

PUBLISHED = {"lgnet": (115.00, 69.62), "lgnet_share": (60.58, 69.62), "lgnet_light": (67.10, 53.73)}
"""The paper's Table IV, as printed: M parameters and G FLOPs at 256x256, batch 1."""
PUBLISHED_SIZE = (256, 256)

_TITLES = {"C": "NetC", "L": "NetL", "G": "NetG plain", "G_att": "NetG"}


@dataclass(frozen=True)
class Counts:
    """Counts of one stage or of a whole model, for one forward pass of the whole batch."""

    name: str
    parameters: int
    """Number of parameters; a total counts shared ones once."""
    thop_parameters: int
    """The parameters that thop 0.0.31 finds: those of layers whose exact class it knows."""
    paper_rule: int
    """By the paper's rule as printed: convolutions, transposed convolutions, BatchNorm."""
    thop_rule: int
    """By the paper's tool, thop 0.0.31: `paper_rule` plus biases, LeakyReLUs and adaptive average pools."""
    macs: int
    """True multiply-accumulates."""
    attention_macs: int
    """Of `macs`: the two matrix products of the attention blocks (scores, weighted sum)."""
    combiner_macs: int
    """Of `macs`: the attention blocks' 1x1 combiners."""
    elementwise: int
    """What the TensorFlow profiler adds to `flops`: biases, sums, products, softmax, element by element."""

    @property
    def flops(self) -> int:
        """True floating-point operations, two a multiply-accumulate."""
        return 2 * self.macs

    @property
    def profiler_rule(self) -> int:
        """By the TensorFlow profiler's rule."""
        return self.flops + self.elementwise

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "flops": self.flops, "profiler_rule": self.profiler_rule}


@dataclass(frozen=True)
class Report:
    """What :func:`count` found. Figures are plain counts (not G) for the whole batch."""

    model: str
    size: tuple[int, int]
    batch_size: int
    stages: tuple[Counts, ...]
    total: Counts

    @property
    def published(self) -> tuple[float, float] | None:
        """The paper's M parameters and G FLOPs, if it prints them for this model at this size."""
        return PUBLISHED.get(self.model) if (self.size, self.batch_size) == (PUBLISHED_SIZE, 1) else None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        result: dict[str, Any] = {
            "model": self.model,
            "size": list(self.size),
            "batch_size": self.batch_size,
            "stages": [stage.as_dict() for stage in self.stages],
            "total": self.total.as_dict(),
        }
        if self.published:
            parameters, flops = self.published
            result["paper"] = {
                "parameters_m": parameters,
                "flops_g": flops,
                "parameters_difference_percent": difference_percent(self.total.parameters / 1e6, parameters),
                "flops_difference_percent": difference_percent(self.total.thop_rule / 1e9, flops),
            }
        return result


def difference_percent(ours: float, published: float) -> float:
    """By how many percent our figure exceeds the printed one."""
    return 100 * (ours / published - 1)


# -- the paper's rule ----------------------------------------------------------------------------------------------


def _convolution(module: nn.Conv2d | nn.ConvTranspose2d, x: Tensor, y: Tensor) -> tuple[int, int]:
    taps = module.in_channels // module.groups * math.prod(module.kernel_size)
    return y.numel() * taps, y.numel() if module.bias is not None else 0


def _adaptive_pool(module: nn.AdaptiveAvgPool2d, x: Tensor, y: Tensor) -> tuple[int, int]:
    window = (x.shape[2] // y.shape[2]) * (x.shape[3] // y.shape[3])
    return 0, (window + 1) * y.numel()


# Exact class -> (by the rule as printed, what thop adds).
_RULES: dict[type[nn.Module], Callable[[Any, Tensor, Tensor], tuple[int, int]]] = {
    nn.Conv2d: _convolution,
    nn.ConvTranspose2d: _convolution,
    nn.BatchNorm2d: lambda module, x, y: (2 * y.numel(), 0),
    nn.LeakyReLU: lambda module, x, y: (0, y.numel()),
    nn.AdaptiveAvgPool2d: _adaptive_pool,
}


class _ProfilerExtra(TorchDispatchMode):
    """Counts what the TensorFlow profiler counts besides multiply-accumulates; other operators are free there."""

    _PER_OUTPUT = ("mul", "add", "sub", "rsub", "div", "pow", "square", "maximum", "minimum", "clamp_min")

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__.rstrip("_")
        if name == "convolution":
            self.total += out.numel() if args[2] is not None else 0
        elif name in self._PER_OUTPUT:
            self.total += out.numel()
        elif name == "_softmax":
            self.total += 5 * out.numel()
        elif name == "sum":
            self.total += args[0].numel() - out.numel()
        elif name == "mean":
            self.total += args[0].numel()
        elif name == "linalg_vector_norm":  # a square and a sum there
            self.total += 2 * args[0].numel() - out.numel()
        return out


class _Tally:
    """Counts one stage while it runs. The hooks and attention blocks of a model's copy report to it."""

    def __init__(self) -> None:
        self.printed = self.thop_extra = self.attention = self.combiner = 0
        self.parameters: dict[int, int] = {}
        self.thop_parameters: dict[int, int] = {}
        self.flops = FlopCounterMode(display=False)
        self.elementwise = _ProfilerExtra()

    def layer(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        own = {id(p): p.numel() for p in module.parameters(recurse=False)}
        self.parameters |= own
        rule = _RULES.get(type(module))
        if rule is not None:
            self.thop_parameters |= own
            printed, extra = rule(module, inputs[0], output)
            self.printed += printed
            self.thop_extra += extra

    def attention_block(self, block: AttentionBlock, features: Tensor) -> Tensor:
        """The block as plain matrix products, because a counter cannot see those of a fused kernel."""
        start = self.flops.get_total_flops()
        value = query_key_value(features, block.variant)[2].flatten(2)
        weights = attention_weights(features, block.variant)
        attended = (value @ weights.transpose(1, 2)).reshape(features.shape)
        between = self.flops.get_total_flops()
        out: Tensor = block.combiner(torch.cat((attended, features), dim=1))
        self.attention += between - start
        self.combiner += self.flops.get_total_flops() - between
        return out

    def counts(self, name: str) -> Counts:
        return Counts(
            name=name,
            parameters=sum(self.parameters.values()),
            thop_parameters=sum(self.thop_parameters.values()),
            paper_rule=self.printed,
            thop_rule=self.printed + self.thop_extra,
            macs=self.flops.get_total_flops() // 2,
            attention_macs=self.attention // 2,
            combiner_macs=self.combiner // 2,
            elementwise=self.elementwise.total,
        )


# -- running a model without weights -------------------------------------------------------------------------------


def _meta_copy(model: nn.Module) -> nn.Module:
    """A deep copy whose tensors are on the meta device: nothing is allocated, `model` is left as it is."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        empty = torch.empty_like(parameter, device="meta")
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    plain = [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    for tensor in (*model.buffers(), *plain):
        memo[id(tensor)] = torch.empty_like(tensor, device="meta")
    return copy.deepcopy(model, memo).eval()


def _stages(model: nn.Module, image: Tensor, mask: Tensor) -> dict[str, tuple[nn.Module | None, Callable[[], Any]]]:
    """Title -> (its module, or None for a part of a module; the function that runs it)."""
    if isinstance(model, LGNet):
        nets: dict[str, Callable[[Tensor], Tensor]] = {_TITLES[k]: net for k, net in model.networks().items()}
    elif isinstance(model, LocalGlobalRefinement):
        nets = {"NetL": model.net_l, "NetG": model.net_g}
    elif isinstance(model, (LocalNet, UNet)):
        nets = {type(model).__name__: model}
    else:
        nets = {}
    x = torch.cat((image, mask), dim=1)
    stages: dict[str, tuple[nn.Module | None, Callable[[], Any]]] = {
        title: (net if isinstance(net, nn.Module) else None, lambda net=net: net(x))  # type: ignore[misc]
        for title, net in nets.items()
    }
    if isinstance(model, (LGNet, LocalNet, UNet)):
        return stages
    first = model.first_stage if isinstance(model, LocalGlobalRefinement) else model
    return {type(first).__name__: (first, lambda: first(image, mask)), **stages}


def _check_size(size: tuple[int, int], batch_size: int, multiple: int) -> tuple[int, int]:
    if (
        not isinstance(size, (tuple, list))
        or len(size) != 2
        or any(isinstance(side, bool) or not isinstance(side, int) for side in size)
    ):
        raise TypeError(f"size: expected two integers (H, W), got {size!r}")
    if any(side < 1 or side % multiple for side in size):
        raise ValueError(f"size: expected positive multiples of {multiple}, got {tuple(size)}")
    if isinstance(batch_size, bool) or not isinstance(batch_size, int):
        raise TypeError(f"batch_size: expected an integer, got {batch_size!r}")
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    return size[0], size[1]


def count(model: nn.Module | str, size: tuple[int, int] = (256, 256), batch_size: int = 1) -> Report:
    """Count parameters and operations of one forward pass.

    Args:
        model: a name of :func:`lgnet_fast.list_models`, an :class:`LGNet`, an X_LG
            (:class:`LocalGlobalRefinement`), one of their networks, or any module called as
            ``model(image, mask)``, which counts as one stage. It is neither run nor changed.
        size: H and W of the picture; multiples of 256 for a name, an LGNet or an X_LG.
        batch_size: pictures per pass.

    Returns:
        Counts for each stage and the total. Merging between stages costs nothing by either convention.

    Raises:
        TypeError, ValueError: an argument that does not fit, by name.
    """
    name = model if isinstance(model, str) else type(model).__name__
    if isinstance(model, str):
        with torch.device("meta"):
            model = create_model(model, backend="eager")
    elif not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a name or a torch.nn.Module, got {type(model).__name__}")
    size = _check_size(size, batch_size, model.size_multiple if isinstance(model, Cascade) else 1)
    parameters = list(model.parameters())
    twin = _meta_copy(model)

    tally = _Tally()
    for module in twin.modules():
        module.register_forward_hook(lambda *args: tally.layer(*args))
        if isinstance(module, AttentionBlock):
            vars(module)["forward"] = lambda features, block=module: tally.attention_block(block, features)
    dtype = next((p.dtype for p in parameters if p.is_floating_point()), torch.float32)
    image = torch.empty((batch_size, 3, *size), dtype=dtype, device="meta")
    mask = torch.empty((batch_size, 1, *size), dtype=dtype, device="meta")

    stages: list[Counts] = []
    thop_parameters: dict[int, int] = {}
    for title, (owner, run) in _stages(twin, image, mask).items():
        tally = _Tally()
        with torch.no_grad(), tally.flops, tally.elementwise:
            run()
        if owner is not None:  # all parameters, also of modules that are used without being called
            tally.parameters = {id(p): p.numel() for p in owner.parameters()}
        stages.append(tally.counts(title))
        thop_parameters |= tally.thop_parameters
    sums = {
        field: sum(getattr(stage, field) for stage in stages)
        for field in ("paper_rule", "thop_rule", "macs", "attention_macs", "combiner_macs", "elementwise")
    }
    total = Counts(
        name="total",
        parameters=sum(p.numel() for p in parameters),
        thop_parameters=sum(thop_parameters.values()),
        **sums,
    )
    return Report(name, size, batch_size, tuple(stages), total)


def _short(value: float) -> str:
    return f"{value:.3f}" if value < 1000 else f"{value:.1f}"


def render(report: Report) -> Table:
    """`report` as a table for a terminal (``lgnet-fast flops``)."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    height, width = report.size
    table = Table(
        title=f"{report.model}, {height}x{width}, batch {report.batch_size}",
        caption=(
            "Paper's rule: multiply-accumulates with transposed convolutions counted on their output, 2 per "
            "BatchNorm element, no attention products. thop 0.0.31, the paper's tool, adds biases and LeakyReLU. "
            "True: multiply-accumulates really done, of which attention's products and combiners; "
            "1 GMAC = 2 GFLOP. Plain: without attention. A total counts shared parameters once."
        ),
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 0, 0, 1),
    )
    table.add_column("stage")
    for heading in ("params\nM", "paper's\nrule, G", "thop\nG", "true\nGMAC", "true\nGFLOP",
                    "attention\nGMAC", "combiners\nGMAC"):  # fmt: skip
        table.add_column(heading, justify="right")
    for row in (*report.stages, report.total):
        if row is report.total:
            table.add_section()
        giga = (row.paper_rule, row.thop_rule, row.macs, row.flops, row.attention_macs, row.combiner_macs)
        table.add_row(row.name, f"{row.parameters / 1e6:.3f}", *(_short(value / 1e9) for value in giga))
    if report.published:
        parameters, flops = report.published
        by_rule = [
            difference_percent(value / 1e9, flops) for value in (report.total.paper_rule, report.total.thop_rule)
        ]
        table.add_section()
        table.add_row("paper", f"{parameters:.2f}", *[f"{flops:.2f}"] * 2)
        table.add_row(
            "difference",
            f"{difference_percent(report.total.parameters / 1e6, parameters):+.2f} %",
            *(f"{percent:+.2f} %" for percent in by_rule),
        )
    return table
