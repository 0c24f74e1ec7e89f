"""Which kernel runs each step on a CPU: the least time, by a model or as measured, within a limit on bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

import torch

from ...native import largest_tile, library, multiplies
from ..plan import ConvStep, Plan, Step
from .kernels import NARROW, TILES, Choice, Products, candidates, jobs_of


class Rates(NamedTuple):
    """Of one core, a second: multiply-accumulates, bytes of weights, and bytes of V and M (csrc/conv.h).

    Only their ratios matter, and those differ little between CPUs. Weights count a little more than reading them
    takes, as memory has its price.
    """

    macs: float = 1.1e11
    weight_bytes: float = 1.5e10
    scratch_bytes: float = 2.5e10


RATES = Rates()
# Multiply-accumulates beside those in float32: by vectors of pairs, and three products of matrix tiles for one.
_SPEED: dict[Products, float] = {"float32": 1, "bf16": 2, "bf16x3": 3}
# Packed weights may take this many times the bytes of the network's own in float32 (LGNet then stays within 1.3 times
# its weights and 150 MB, everything included), or this many bytes more, which small networks may as well have.
_WEIGHT_BUDGET = 1.44
_WEIGHT_SLACK_BYTES = 128 << 20


class Cost(NamedTuple):
    """Of one step with one kernel: seconds of a run, bytes of its packed weights."""

    seconds: float
    weight_bytes: int


def wants_ieee() -> bool:
    """Whether the program has set PyTorch to float32 products of full precision on the CPU.

    By ``torch.backends.mkldnn.fp32_precision``, ``torch.backends.mkldnn.conv.fp32_precision`` or
    ``torch.backends.fp32_precision``, which PyTorch has from 2.9 on; they are "none" unless a program sets them.
    """
    mkldnn = torch.backends.mkldnn
    settings = (torch.backends, mkldnn, mkldnn.conv) if hasattr(mkldnn, "conv") else ()
    return any(place.fp32_precision == "ieee" for place in settings)


def products_for(dtype: torch.dtype) -> Products:
    """What an engine of this dtype multiplies, by the instruction set in use.

    bfloat16: pairs of bf16 where it has such products. float32: bf16x3 where the instruction set has matrix tiles,
    unless the program :func:`wants_ieee`.
    """
    if dtype == torch.bfloat16:
        return "bf16" if multiplies("bf16") else "float32"
    return "bf16x3" if multiplies("bf16x3") and not wants_ieee() else "float32"


def kernels_for(step: Step, products: Products) -> list[str]:
    """Kernels that can run a step with such products, the plainest first."""
    largest = largest_tile(products)
    return [kernel for kernel in candidates(step) if TILES.get(kernel, 1) <= largest]


def choice_of(step: Step, kernel: str, products: Products) -> str:
    """How a kernel runs a step. A stage's last step has products of bf16 only where matrix tiles multiply them: by
    vectors it gains nothing, for its weights are few."""
    if kernel == NARROW and not (library().multiplies_by_tiles() and step.source.channels % 2 == 0):
        products = "float32"
    return str(Choice(kernel, products))


def weight_bytes(step: ConvStep, kernel: str, products: Products) -> int:
    """Bytes of a convolution's weights as packed for `kernel`, vectors' padding left out."""
    if kernel == NARROW:
        total = 3 * step.geometry.kernel**2 * step.source.channels
        return total * (2 if products == "bf16" else 4)
    m = TILES[kernel]
    total = 0
    for job in jobs_of(step.geometry, m):
        for group in job.groups:
            total += group.points(m) * len(group.starts) * step.source.channels * step.out_channels
    return total * (2 if products == "bf16" else 4)


def modelled(step: ConvStep, kernel: str, products: Products, batch: int, height: int, width: int) -> Cost:
    """Estimated cost of a convolution with `kernel` for outputs [batch, height, width]."""
    m = TILES[kernel]
    out_step = step.geometry.out_step
    tiles = batch * -(-height // (out_step * m)) * -(-width // (out_step * m))
    bytes_each = 2 if products == "bf16" else 4
    seconds, packed = 0.0, weight_bytes(step, kernel, products)
    for job in jobs_of(step.geometry, m):
        for group in job.groups:
            points, depth = group.points(m), len(group.starts) * step.source.channels
            seconds += points * tiles * depth * step.out_channels / (RATES.macs * _SPEED[products])
            # V and M are written and read once each.
            seconds += 2 * points * tiles * (bytes_each * depth + 4 * step.out_channels) / RATES.scratch_bytes
    return Cost(seconds + packed / RATES.weight_bytes, packed)


def modelled_costs(plan: Plan, dtype: torch.dtype) -> dict[str, dict[str, Cost]]:
    """Step's name -> choice -> cost, of every step that has several and weights of its own."""
    products = products_for(dtype)
    costs: dict[str, dict[str, Cost]] = {}
    for step in plan.steps:
        kernels = kernels_for(step, products)
        if step.weights_of == step.name and isinstance(step, ConvStep) and len(kernels) > 1:
            size = plan.target(step).size
            costs[step.name] = {
                choice_of(step, k, products): modelled(step, k, products, plan.batch, *size) for k in kernels
            }
    return costs


def plain_choice(step: Step, products: Products) -> str:
    """The plainest way to run a step."""
    return choice_of(step, kernels_for(step, products)[0], products)


def choose_kernels(
    plan: Plan, dtype: torch.dtype, costs: Mapping[str, Mapping[str, Cost]] | None = None
) -> dict[str, str]:
    """How every step runs, as :class:`.kernels.Choice` writes it: the least time whose packed weights keep to
    the budget.

    Args:
        plan: dense.
        dtype: float32 or bfloat16.
        costs: as :func:`modelled_costs` gives them, which is taken where there are none.
    """
    options = modelled_costs(plan, dtype) if costs is None else costs
    products = products_for(dtype)
    users = Counter(step.weights_of for step in plan.steps)
    owners = {step.name: step for step in plan.steps if step.weights_of == step.name}
    chosen = {name: plain_choice(step, products) for name, step in owners.items()}
    for name, by_choice in options.items():
        chosen[name] = min(by_choice, key=lambda c: by_choice[c].seconds)
    # Too many bytes: change the kernel that loses the least time a byte, until they fit.
    plain = sum(4 * owners[name].weight.numel() for name in options)
    excess = sum(by_choice[chosen[name]].weight_bytes for name, by_choice in options.items())
    excess -= max(round(_WEIGHT_BUDGET * plain), plain + _WEIGHT_SLACK_BYTES)
    while excess > 0:
        changes = []
        for name, by_choice in options.items():
            now = by_choice[chosen[name]]
            for choice, cost in by_choice.items():
                if (saved := now.weight_bytes - cost.weight_bytes) > 0:
                    changes.append((users[name] * (cost.seconds - now.seconds) / saved, name, choice, saved))
        if not changes:
            break
        _, name, choice, saved = min(changes)
        chosen[name] = choice
        excess -= saved
    return {step.name: chosen[step.weights_of] for step in plan.steps}
