"""Plans that are small enough for the interpreter, with every kind of step."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lgnet_fast.engine.build import build_plan
from lgnet_fast.engine.geometry import Geometry
from lgnet_fast.engine.plan import PICTURE, AttentionStep, Buffer, ConvStep, Plan, Step, Store, View
from lgnet_fast.reference.networks import LocalNet
from tests.interpreted.rules import normal


def small_plan(batch: int = 1, side: int = 32) -> Plan:
    """NetL, and a U-Net of two levels with attention: every kind of step of the engine, in float64."""
    torch.manual_seed(0)
    local = LocalNet(4).double().eval()
    with torch.no_grad():
        for parameter in local.parameters():
            parameter.normal_(0, 0.2)
    first = build_plan([("l", local, False)], batch, side, side)

    def tensors(name: str, inputs: int, out: int, kernel: int, transposed: bool = False) -> dict[str, Tensor]:
        pair = (inputs, out) if transposed else (out, inputs)
        seed = sum(name.encode())
        weight = normal(*pair, kernel, kernel, dtype=torch.float64, seed=seed) / (inputs * kernel) ** 0.5
        return {"weight": weight, "bias": normal(out, dtype=torch.float64, seed=seed + 1)}

    def conv(name: str, source: View, stores: tuple[Store, ...], out: int, transposed: bool = False, merges=False):
        own = tensors(name, source.channels, out, 4, transposed)
        geometry = Geometry(4, 2, 1, transposed)
        return ConvStep(name=name, source=source, stores=stores, geometry=geometry, merges=merges, **own)

    half, quarter = side // 2, side // 4
    added = {
        "u.e1": Buffer("u.e1", 6, half, half),
        "u.cat1": Buffer("u.cat1", 14, half, half),
        "u.e2": Buffer("u.e2", 20, quarter, quarter),
        "u.d2": Buffer("u.d2", 8, half, half),
        "u.raw": Buffer("u.raw", 3, side, side),
    }
    e1, e2, d2 = View("u.e1", 0, 6), View("u.e2", 0, 20), View("u.d2", 0, 8)
    skip, up, joined = View("u.cat1", 0, 6), View("u.cat1", 6, 8), View("u.cat1", 0, 14)
    two = (Store(e1, "leaky_relu"), Store(skip, "relu"))
    attention = AttentionStep(
        name="u.attention",
        source=d2,
        stores=(Store(up, "relu"),),
        variant="released",
        **tensors("u.attention", 16, 8, 1),
    )
    steps: tuple[Step, ...] = (
        conv("u.e1", View(PICTURE, 0, 4), two, 6),
        conv("u.e2", e1, (Store(e2, "relu"),), 20),
        conv("u.d2", e2, (Store(d2),), 8, True),
        attention,
        conv("u.d1", joined, (Store(View("u.raw", 0, 3), "tanh"),), 3, True, True),
    )
    buffers = {**first.buffers, **added}
    steps = tuple(replace(s, regions=(buffers[s.stores[0].view.buffer].everywhere,)) for s in steps)
    return Plan(batch, side, side, buffers, (*first.steps, *steps))


def cast(plan: Plan, dtype: torch.dtype) -> Plan:
    return replace(
        plan, steps=tuple(replace(s, weight=s.weight.to(dtype), bias=s.bias.to(dtype)) for s in plan.steps)
    )


def tiny_plan(side: int = 16) -> Plan:
    """One stage with every kind of step, in float32: the interpreter is slow."""
    whole = cast(small_plan(side=side), torch.float32)
    steps = {s.name: s for s in whole.steps if s.name.startswith("u.")}
    weight = normal(20, 20, 3, 3, seed=3) / 13
    inner = View("u.inner", 0, 20)
    residual = ConvStep(
        name="u.block", source=View("u.e2", 0, 20), stores=(Store(inner, "relu"),), weight=weight,
        bias=normal(20, seed=4), geometry=Geometry(3, 1, 1, reflect=True), residual=View("u.e2", 0, 20),
    )  # fmt: skip
    buffers = {n: b for n, b in whole.buffers.items() if n == PICTURE or n.startswith("u.")}
    buffers["u.inner"] = replace(buffers["u.e2"], name="u.inner")
    steps["u.d2"] = replace(steps["u.d2"], source=inner)
    order = [steps["u.e1"], steps["u.e2"], residual, steps["u.d2"], steps["u.attention"], steps["u.d1"]]
    order = [replace(s, regions=(buffers[s.stores[0].view.buffer].everywhere,)) for s in order]
    return Plan(1, side, side, buffers, tuple(order))


def _convolution(
    name: str,
    source: View,
    stores: tuple[Store, ...],
    out: int,
    geometry: Geometry,
    residual: View | None = None,
) -> ConvStep:
    """A convolution with noise as weights; one to three channels ends a stage."""
    pair = (source.channels, out) if geometry.transposed else (out, source.channels)
    seed = sum(name.encode())
    weight = normal(*pair, geometry.kernel, geometry.kernel, dtype=torch.float64, seed=seed)
    weight = weight / (geometry.kernel * source.channels**0.5)
    bias = normal(out, dtype=torch.float64, seed=seed + 1)
    return ConvStep(
        name=name, source=source, stores=stores, geometry=geometry, merges=out == 3, weight=weight, bias=bias,
        residual=residual,
    )  # fmt: skip


def picture_plan(batch: int = 1, side: int = 32, inner: bool = False) -> Plan:
    """The first and last layers of NetL, then of a U-Net: the steps of `kernels/picture_conv.py`, in float64.

    inner: between those of NetL, a block's layer with its residual, one of stride 2, and a transposed one, of 64
    channels: steps of `kernels/hopper.py`.
    """

    buffers = {
        PICTURE: Buffer(PICTURE, 4, side, side),
        "p.stem": Buffer("p.stem", 64, side, side),
        "p.raw": Buffer("p.raw", 3, side, side),
        "q.cat": Buffer("q.cat", 128, side // 2, side // 2),
        "q.raw": Buffer("q.raw", 3, side, side),
    }
    if inner:
        buffers |= {name: Buffer(name, 64, side, side) for name in ("p.block", "p.up")}
        buffers["p.down"] = Buffer("p.down", 64, side // 2, side // 2)
    picture, stem, cat = View(PICTURE, 0, 4), View("p.stem", 0, 64), View("q.cat", 0, 128)
    both = (Store(View("q.cat", 0, 64), "leaky_relu"), Store(View("q.cat", 64, 64), "relu"))
    wide, down, up = Geometry(7, 1, 3, reflect=True), Geometry(4, 2, 1), Geometry(4, 2, 1, True)
    block, halved, last = View("p.block", 0, 64), View("p.down", 0, 64), View("p.up" if inner else "p.stem", 0, 64)
    three = Geometry(3, 1, 1, reflect=True)
    between = (
        _convolution("p.block", stem, (Store(block, "relu"),), 64, three, stem),
        _convolution("p.down", block, (Store(halved, "relu"),), 64, down),
        _convolution("p.up", halved, (Store(last, "relu"),), 64, up),
    )
    steps = (
        _convolution("p.stem", picture, (Store(stem, "relu"),), 64, wide),
        *(between if inner else ()),
        _convolution("p.out", last, (Store(View("p.raw", 0, 3), "tanh"),), 3, wide),
        _convolution("q.e1", picture, both, 64, down),
        _convolution("q.d1", cat, (Store(View("q.raw", 0, 3), "tanh"),), 3, up),
    )
    steps = tuple(replace(s, regions=(buffers[s.stores[0].view.buffer].everywhere,)) for s in steps)
    return Plan(batch, side, side, buffers, steps)


def attention_plan(batch: int = 1, side: int = 32) -> Plan:
    """An attention block of 128 channels between two convolutions, in float64, for `kernels/hopper_attention.py`."""
    half = side // 2
    buffers = {
        PICTURE: Buffer(PICTURE, 4, side, side),
        "a.e1": Buffer("a.e1", 128, half, half),
        "a.d2": Buffer("a.d2", 128, half, half),
        "a.raw": Buffer("a.raw", 3, side, side),
    }
    encoded, attended = View("a.e1", 0, 128), View("a.d2", 0, 128)
    attention = AttentionStep(
        name="a.attention", source=encoded, stores=(Store(attended, "relu"),), variant="released",
        weight=normal(128, 256, 1, 1, dtype=torch.float64) / 16, bias=normal(128, dtype=torch.float64, seed=1),
    )  # fmt: skip
    down, up = Geometry(4, 2, 1), Geometry(4, 2, 1, True)
    steps = (
        _convolution("a.e1", View(PICTURE, 0, 4), (Store(encoded),), 128, down),
        attention,
        _convolution("a.d1", attended, (Store(View("a.raw", 0, 3), "tanh"),), 3, up),
    )
    steps = tuple(replace(s, regions=(buffers[s.stores[0].view.buffer].everywhere,)) for s in steps)
    return Plan(batch, side, side, buffers, steps)
