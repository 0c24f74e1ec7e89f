"""Checks the kernels for Hopper on a GPU: convolution, chains of them, attention. Locates errors.

    python bench/hopper_contact.py RESULTS [--sections known,steps,chain,clocks,attention]

Each figure is written to RESULTS/hopper_contact.jsonl at once, one JSON object per line. Every part runs in a
separate process, so that a kernel that crashes or hangs affects that part only.

========  ===========================================================================================================
known     one-hot weights over inputs that hold the number of their pixel or channel: an output shows which input
          it read. Zero and reflected borders, stride 2, tiles, clusters; then dense weights on a small map
steps     every step of LGNet that the kernel supports, on noise, beside float64 and the Triton kernel; batches,
          rectangles, bfloat16, both stores, tiles
chain     groups of convolutions in one launch, NetL's blocks in every tile: each beside float64, the bits of repeated
          launches, the time beside eight launches, where the blocks spend it; two such launches on two streams
clocks    where the blocks of NetL's block convolution spend their time, by warpgroups, clusters, split depth
attention queries that each choose one key: which key's value came; then LGNet's three blocks, batch 1 and 16, in
          every tile: beside float64, the bits of repeated launches, the time of the block beside Triton's kernels
========  ===========================================================================================================
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from gpu_contact import Log, graph_of, median_us, model_and_plan, sections_of

LIMITS = {"known": 45, "steps": 90, "chain": 60, "clocks": 45, "attention": 90}
"""Time limit of each part, in seconds."""
KNOWN = ((3, 1, False, 1, 16), (3, 1, True, 1, 16), (3, 1, False, 4, 8), (3, 1, True, 2, 4), (3, 1, False, 2, 32),
         (4, 2, False, 1, 16), (4, 2, False, 2, 4))  # fmt: skip
"""Known answers: taps along an axis, stride, whether borders reflect, blocks of a cluster, rows of a tile."""
RANDOM = tuple(itertools.product(("stride 1", "stride 2", "transposed"), (4, 16), (1, 2, 4, 8)))
"""Dense weights: the kind of step, rows of a tile, blocks of a cluster."""
HEIGHT, WIDTH = 32, 24
"""Of the map with known answers."""


# -- known answers ------------------------------------------------------------------------------------------------


def log_wrong(log: Log, out: torch.Tensor, exact: torch.Tensor, wrong: torch.Tensor, **case: Any) -> None:
    """Log where results [1, H, W, C] are wrong, and some of the values."""
    places = wrong.nonzero()[:, 1:]
    first = [
        {"y": y, "x": x, "channel": c, "expected": exact[0, y, x, c].item(), "got": out[0, y, x, c].item()}
        for y, x, c in places[:: max(1, len(places) // 8)].tolist()[:8]
    ]
    log(
        "known",
        **case,
        wrong=len(places),
        of=wrong.numel(),
        wrong_rows=wrong.any(3).any(2)[0].nonzero().flatten().tolist(),
        wrong_columns=wrong.any(3).any(1)[0].nonzero().flatten().tolist(),
        wrong_channels=wrong.any(2).any(1)[0].nonzero().flatten().tolist()[:64],
        first=first,
        # one tile row of pixels by channel 0, and one pixel's channels
        row1_channel0=[int(v) for v in out[0, 1, :16, 0].float().nan_to_num(-1).tolist()],
        pixel11_channels=[int(v) for v in out[0, 1, 1].float().nan_to_num(-1).tolist()],
    )


def known(log: Log) -> None:
    """Every known answer, then dense weights where all are right."""
    from lgnet_fast.kernels import hopper
    from lgnet_fast.kernels.conv import Conv
    from lgnet_fast.kernels.hopper_shapes import HopperTile
    from lgnet_fast.kernels.results import Store

    right = True
    for taps, stride, reflect, cluster, tile_h in KNOWN:
        tile = HopperTile(tile_h, cluster, 6, 2)
        conv = Conv(64, 64, taps, stride, 1, False, reflect, False)
        size = (HEIGHT // stride, WIDTH // stride)
        # pixels are numbered from 1 (0 is what lies outside), channels from 1
        number = torch.arange(1, HEIGHT * WIDTH + 1, device="cuda", dtype=torch.float16).view(1, HEIGHT, WIDTH, 1)
        inputs = {
            "pixel": number.expand(1, HEIGHT, WIDTH, 64).contiguous(),
            "channel": torch.arange(1, 65, device="cuda", dtype=torch.float16)
            .expand(1, HEIGHT, WIDTH, 64)
            .contiguous(),
        }
        bias = torch.zeros(64, device="cuda")
        wrong_taps = 0
        for tap in range(taps**2):
            weight = torch.zeros(64, 64, taps, taps, device="cuda", dtype=torch.float16)
            weight[torch.arange(64), torch.arange(64), tap // taps, tap % taps] = 1
            packed = conv.pack(weight).contiguous()
            for what, x in inputs.items():
                out = torch.full((1, *size, 64), float("nan"), device="cuda", dtype=torch.float16)
                hopper.hopper_forward(conv, x, packed, bias, (Store(out, "none"),), tile, size=size)
                torch.cuda.synchronize()
                planes = F.pad(x.permute(0, 3, 1, 2).float(), [1] * 4, mode="reflect" if reflect else "constant")
                exact = F.conv2d(planes, weight.float(), stride=stride).permute(0, 2, 3, 1)
                wrong = (out.float() - exact).abs().nan_to_num(1e9) > 0.1
                if not wrong.any():
                    continue
                wrong_taps += 1
                if wrong_taps > 4:
                    continue
                case = {"tile": list(tile), "conv": list(conv), "tap": [tap // taps, tap % taps], "input": what}
                log_wrong(log, out, exact, wrong, **case)
        log(
            "known",
            tile=list(tile),
            conv=list(conv),
            right=wrong_taps == 0,
            wrong_cases=wrong_taps,
        )
        right &= wrong_taps == 0
    if right:
        random_weights(log)


def random_weights(log: Log) -> None:
    """Dense weights on a small map, so that an error of the weights' own descriptor shows."""
    from lgnet_fast.kernels import hopper
    from lgnet_fast.kernels.conv import Conv
    from lgnet_fast.kernels.hopper_shapes import HopperTile

    generator = torch.Generator("cpu").manual_seed(1)
    device = torch.device("cuda")
    convs = {
        "stride 1": Conv(128, 128, 3, 1, 1, False, True, False),
        "stride 2": Conv(64, 128, 4, 2, 1, False, False, False),
        "transposed": Conv(64, 128, 4, 2, 1, True, False, False),
    }
    for kind, tile_h, cluster in RANDOM:
        conv = convs[kind]
        tile = HopperTile(tile_h, cluster, 6, 2)
        error = hopper._error(conv, tile, (2, 32, 16), torch.float16, device, generator)
        log("known", tile=list(tile), conv=list(conv), relative_error=error, right=error < 1e-3)


# -- steps --------------------------------------------------------------------------------------------------------


def step_operands(step: Any, batch: int, size: tuple[int, int], dtype: torch.dtype) -> dict[str, Any]:
    """Noise for a step, and its result in float64 before activation."""
    from lgnet_fast.engine.cuda.weights import conv_of

    conv = conv_of(step)
    generator = torch.Generator("cuda").manual_seed(3)
    noise = functools.partial(torch.randn, generator=generator, device="cuda")
    x = noise(batch, *size, conv.in_channels).to(dtype)
    weight = (noise(step.weight.shape) * (2 / (conv.in_channels * conv.kernel**2)) ** 0.5).to(dtype)
    bias = noise(conv.out_channels)
    planes = x.permute(0, 3, 1, 2).double()
    if conv.transposed:
        value = F.conv_transpose2d(
            planes, weight.double(), bias.double(), conv.stride, conv.padding, step.geometry.output_padding
        )
    elif conv.reflect:
        value = F.conv2d(F.pad(planes, [conv.padding] * 4, mode="reflect"), weight.double(), bias.double())
    else:
        value = F.conv2d(planes, weight.double(), bias.double(), conv.stride, conv.padding)
    value = value.permute(0, 2, 3, 1).contiguous()
    residual = None
    if step.residual is not None:
        residual = noise(value.shape).to(dtype)
        value = value + residual.double()
    return {"conv": conv, "x": x, "weight": conv.pack(weight).contiguous(), "bias": bias, "residual": residual,
            "value": value}  # fmt: skip


def supported(plan: Any) -> Iterator[tuple[int, Any, tuple[int, int]]]:
    """Number, step and input size of the distinct steps that the kernel computes."""
    from lgnet_fast.kernels.hopper_shapes import unsupported

    from lgnet_fast.engine.cuda.weights import conv_of
    from lgnet_fast.engine.plan import ConvStep

    seen = set()
    for number, step in enumerate(plan.steps):
        if not isinstance(step, ConvStep) or unsupported(conv_of(step)) is not None:
            continue
        buffer = plan.source(step)
        key = conv_of(step), buffer.height, step.residual is not None, len(step.stores), step.stores[0].activation
        if key not in seen:
            seen.add(key)
            yield number, step, (buffer.height, buffer.width)


def check_steps(log: Log) -> None:
    """Errors of all distinct steps."""
    from lgnet_fast.kernels import hopper
    from lgnet_fast.kernels.conv import conv_forward
    from lgnet_fast.kernels.conv_configs import pick_tile
    from lgnet_fast.kernels.hopper_shapes import HopperTile
    from lgnet_fast.kernels.results import Store

    _, plan = model_and_plan("lgnet", 1)
    for _, step, size in supported(plan):
        for dtype, batch, rect, tile in (
            (torch.float16, 1, None, HopperTile(16, 4, 12, 2)),
            (torch.float16, 1, None, HopperTile(16, 2, 12, 2, 2)),
            (torch.float16, 1, None, HopperTile(16, 2, 12, 2, 1, True)),
            (torch.bfloat16, 2, None, HopperTile(8, 4, 12, 2, 2, True)),
            (torch.float16, 1, None, HopperTile(4, 2, 12, 2)),
            (torch.float16, 2, None, HopperTile(8, 8, 12, 2, 2)),
            (torch.float16, 16, None, HopperTile(16, 2, groups=2)),  # several tiles a block
            (torch.bfloat16, 1, None, HopperTile(16, 4, 12, 2, 2)),
            (torch.float16, 1, (1, 5, 2, 9), HopperTile(4, 1, 12, 2)),
        ):
            operands = step_operands(step, batch, size, dtype)
            conv, value = operands["conv"], operands["value"]
            out_size = tuple(value.shape[1:3])
            if rect is not None and (out_size[0] < 8 or out_size[1] < 16):
                continue
            wide = torch.full((*value.shape[:3], 2 * conv.out_channels), float("nan"), device="cuda", dtype=dtype)
            stores = (Store(wide[..., conv.out_channels :], "relu"), Store(torch.full_like(wide, float("nan"))[
                ..., : conv.out_channels], "leaky_relu"))  # fmt: skip
            arguments = (conv, operands["x"], operands["weight"], operands["bias"])
            figures: dict[str, Any] = {}
            try:
                hopper.hopper_forward(
                    *arguments, stores, tile, size=out_size, rect=rect, residual=operands["residual"]
                )
                torch.cuda.synchronize()
            except ValueError as refusal:
                log("steps", step=step.name, tile=list(tile), refused=str(refusal)[:200])
                continue
            top, bottom, left, right = rect or (0, out_size[0], 0, out_size[1])
            inside = (slice(None), slice(top, bottom), slice(left, right))
            errors = []
            for store, activation in zip(stores, (F.relu, lambda v: F.leaky_relu(v, 0.2))):
                exact = activation(value)[inside]
                distance = (store.view[inside].double() - exact).abs().nan_to_num(1e9)
                errors.append((distance.norm() / exact.norm()).item())
                outside = store.view.isfinite().sum().item() - store.view[inside].isfinite().sum().item()
                if not errors[-1] < 8 * torch.finfo(dtype).eps or outside:
                    worst = (distance > 32 * torch.finfo(dtype).eps * exact.abs().max()).nonzero()
                    figures["wrong"] = [*figures.get("wrong", []), len(worst), outside, worst[:6].tolist()]
            if dtype == torch.float16 and rect is None and batch == 1:
                own = torch.full_like(wide, float("nan"))[..., conv.out_channels :]
                work = conv.work(batch, size, out_size, (0, out_size[0], 0, out_size[1]))
                triton_tile = pick_tile(work, "half", "sm_90", 132)
                if triton_tile.splits == 1:
                    conv_forward(*arguments, (Store(own, "relu"),), triton_tile, size=out_size,
                                 residual=operands["residual"])  # fmt: skip
                    figures["triton_error"] = ((own.double() - F.relu(value)).norm() / F.relu(value).norm()).item()
                    figures["equal_to_triton"] = (own == stores[0].view).float().mean().item()
            log("steps", step=step.name, dtype=str(dtype), batch=batch, rect=rect, tile=list(tile), errors=errors,
                right="wrong" not in figures, **figures)  # fmt: skip


# -- chains -------------------------------------------------------------------------------------------------------


class ChainCase(NamedTuple):
    """A group of convolutions on noise, each in a rectangle and in tiles of its own."""

    plan: Any
    numbers: range
    weights: Any
    maps: dict[str, torch.Tensor]
    rects: Any
    tiles: Any

    def view(self, view: Any) -> torch.Tensor:
        """[1, H, W, channels] of a step."""
        return self.maps[view.buffer][..., view.offset : view.offset + view.channels]

    def chain(self, clocks: torch.Tensor | None = None) -> Any:
        """All of them in one launch."""
        from lgnet_fast.engine.cuda.chains import make_chain

        return make_chain(self.plan, self.numbers, self.weights.steps, self.view, self.rects, self.tiles, clocks)

    def errors_and_launches(self) -> Iterator[tuple[float, Callable[[], None]]]:
        """Of each step: the error of what is stored, relative to float64, and its launch by itself."""
        from lgnet_fast.kernels.compiled_checks import exact_convolution
        from lgnet_fast.kernels.hopper import hopper_forward
        from lgnet_fast.kernels.results import Store

        from lgnet_fast.engine.cuda.weights import conv_of
        from lgnet_fast.engine.torch_executor import ACTIVATIONS

        for number, rect, tile in zip(self.numbers, self.rects, self.tiles):
            step, (top, bottom, left, right) = self.plan.steps[number], rect
            conv, source, own = conv_of(step), self.view(step.source), self.weights.steps[step.name]
            residual = None if step.residual is None else self.view(step.residual)
            stores = tuple(Store(self.view(s.view), s.activation) for s in step.stores)
            value = exact_convolution(conv, source, step.weight.to(source.dtype), own.bias)
            value = value if residual is None else value + residual.double()
            errors = []
            for store in stores:
                exact, found = (
                    one[:, top:bottom, left:right]
                    for one in (ACTIVATIONS[store.activation](value), store.view.double())
                )
                errors.append(((found - exact).norm() / exact.norm()).item())
            yield max(errors), functools.partial(
                hopper_forward, conv, source, own.packed, own.bias, stores, tile,
                size=self.plan.target(step).size, rect=tuple(rect), residual=residual,
            )  # fmt: skip


def check_chains(log: Log) -> None:
    """Every group in the engine's tiles, dense and in a hole; NetL's blocks in every tile."""
    from lgnet_fast.kernels import hopper_chain
    from lgnet_fast.kernels.cards import card_with

    from lgnet_fast.engine.cuda import chains
    from lgnet_fast.engine.cuda.executor import CudaExecutor
    from lgnet_fast.engine.cuda.grouped import noise_maps
    from lgnet_fast.engine.cuda.weights import CudaWeights
    from lgnet_fast.engine.regions import Rect

    _, plan = model_and_plan("lgnet", 1)
    card = card_with("sm_90", torch.cuda.get_device_properties(0).multi_processor_count)
    weights = {dtype: CudaWeights.pack(plan, dtype) for dtype in (torch.float16, torch.bfloat16)}
    hole = [step.regions for step in CudaExecutor.restricted(plan, [Rect(96, 160, 96, 160)]).steps]

    def case(numbers: range, dtype: torch.dtype, rects: Any, tiles: Any) -> ChainCase:
        maps = noise_maps(plan, [plan.steps[n] for n in numbers], dtype, torch.device("cuda"))
        return ChainCase(plan, numbers, weights[dtype], maps, rects, tiles)

    groups = chains.runs(plan, card)
    blocks = max(groups, key=len)
    for numbers in groups:
        for dtype, regions in ((torch.float16, None), (torch.bfloat16, None), (torch.float16, hole)):
            rects = chains.rectangles(plan, numbers, regions)
            every = [len(numbers) * (tile,) for tile in hopper_chain.TILES] if numbers == blocks else []
            found = [tiles for tiles, _ in chains.tiles(plan, numbers, rects, card)] if rects else []
            for tiles in dict.fromkeys([*found, *every]):
                check_chain(log, case(numbers, dtype, rects, tiles))
    rects = chains.rectangles(plan, blocks, None)
    pair = [case(blocks, torch.float16, rects, len(blocks) * hopper_chain.TILES[:1]) for _ in range(2)]
    check_two_streams(log, *pair)


def check_two_streams(log: Log, first: ChainCase, second: ChainCase) -> None:
    """Whether launches that need nearly all multiprocessors each end, with the bits that they give alone."""
    cases = first, second
    launches = [case.chain() for case in cases]
    if not all(chain.fits() for chain in launches):
        log("chains on two streams", refused=f"{launches[0].description.grid} blocks")
        return
    for chain in launches:
        chain.launch()
    torch.cuda.synchronize()
    alone = [{key: one.clone() for key, one in case.maps.items()} for case in cases]
    streams = [torch.cuda.Stream() for _ in cases]
    for _ in range(200):
        for stream, chain in zip(streams, launches):
            with torch.cuda.stream(stream):
                chain.launch()
    torch.cuda.synchronize()
    equal = [all(torch.equal(one, kept[key]) for key, one in case.maps.items()) for case, kept in zip(cases, alone)]
    log("chains on two streams", equal=equal, right=all(equal))


def check_chain(log: Log, case: ChainCase) -> None:
    """Errors and repeated bits of one chain; its time, and that of its steps one by one; clocks."""
    chain = case.chain()
    first = case.plan.steps[case.numbers.start]
    tiles, rects = [list(tile) for tile in case.tiles], [list(rect) for rect in case.rects]
    name = {"step": first.name, "dtype": str(chain.dtype), "rects": rects, "tiles": tiles}
    if not chain.fits():
        log("chain", **name, refused=f"{chain.description.grid} blocks")
        return
    before = {key: one.clone() for key, one in case.maps.items()}
    chain.launch()
    stored = {key: one.clone() for key, one in case.maps.items()}
    equal = 0
    for _ in range(50):
        for key, one in case.maps.items():
            one.copy_(before[key])
        chain.launch()
        equal += all(torch.equal(one, stored[key]) for key, one in case.maps.items())
    errors, single = zip(*case.errors_and_launches())
    chain_us, single_us = (median_us(graph_of(functools.partial(run_each, one)).replay)
                           for one in ([chain.launch], single))  # fmt: skip
    limit = 8 * torch.finfo(chain.dtype).eps
    log("chain", **name, errors=errors, equal=equal, chain_us=chain_us, single_us=single_us,
        right=equal == 50 and max(errors) < limit)  # fmt: skip
    if chain.dtype == torch.float16:
        chain_clocks(log, case, chain.description.grid, name)


def run_each(launches: Sequence[Callable[[], Any]]) -> None:
    """Make the launches in order."""
    for launch in launches:
        launch()


def chain_clocks(log: Log, case: ChainCase, blocks: int, name: dict[str, Any]) -> None:
    """Medians over the blocks, of each layer of a chain, since the first layer's start."""
    from lgnet_fast.kernels.hopper import CLOCKS

    clocks = torch.zeros(len(case.numbers), blocks, len(CLOCKS), dtype=torch.int64, device="cuda")
    chain = case.chain(clocks)
    for _ in range(20):
        chain.launch()
    torch.cuda.synchronize()
    since = (clocks[..., :6] - clocks[:1, :, :1]).double().median(1).values.tolist()
    waited = clocks[..., 6:].double().median(1).values.tolist()
    log("chain clocks", **name, names=CLOCKS, since_start=since, waited=waited)


# -- clocks -------------------------------------------------------------------------------------------------------


def block_clocks(log: Log) -> None:
    """Medians over the blocks of NetL's block convolution, of the last of some launches."""
    from lgnet_fast.kernels import hopper
    from lgnet_fast.kernels.hopper_shapes import HopperTile
    from lgnet_fast.kernels.results import Store

    _, plan = model_and_plan("lgnet", 1)
    step, size = next((step, size) for _, step, size in supported(plan) if step.name.startswith("net_l.block"))
    operands = step_operands(step, 1, size, torch.float16)
    out = torch.empty_like(operands["x"])
    for (cluster, split), groups in itertools.product(((1, False), (2, False), (4, False), (2, True)), (1, 2)):
        tile = HopperTile(16, cluster, groups=groups, split=split)
        rect = (0, size[0], 0, size[1])
        grid = hopper.describe_launch(operands["conv"], 1, size, size, rect, tile).grid
        clocks = torch.zeros(grid, len(hopper.CLOCKS), dtype=torch.int64, device="cuda")
        for _ in range(20):
            hopper.hopper_forward(
                operands["conv"], operands["x"], operands["weight"], operands["bias"], (Store(out, "relu"),), tile,
                size=size, residual=operands["residual"], clocks=clocks,
            )  # fmt: skip
        torch.cuda.synchronize()
        found = dict(zip(hopper.CLOCKS, clocks.double().T))
        since = {name: (value - found["start"]).median().item() for name, value in found.items()
                 if not name.startswith("for_")}  # fmt: skip
        waited = {name: value.median().item() for name, value in found.items() if name.startswith("for_")}
        log("clocks", tile=list(tile), since_start=since, waited=waited)


# -- attention ----------------------------------------------------------------------------------------------------


def chosen_keys(log: Log, channels: int, tile: Any) -> None:
    """Each query's score is far the greatest for one key, whose number and column are its value."""
    from lgnet_fast.kernels import hopper_attention

    positions = hopper_attention.keys_of_tile(channels, tile.queries) * max(2, tile.cluster) * 2
    number = torch.arange(positions, device="cuda")
    bits = 2 * ((number[:, None] >> torch.arange(13, device="cuda")) % 2) - 1
    chosen = torch.randperm(positions, generator=torch.Generator().manual_seed(0)).cuda()
    q, k = (torch.zeros(1, positions, channels, device="cuda", dtype=torch.float16) for _ in range(2))
    k[0, :, :13], q[0, :, :13] = bits.half(), 8 * bits[chosen].half()
    rest = torch.zeros(1, positions, channels, device="cuda")
    for what, one in (("key", number[:, None]), ("column", torch.arange(channels, device="cuda")[None])):
        v = one.expand(positions, channels).half().contiguous()[None]
        out = torch.full((1, 1, positions, channels), float("nan"), device="cuda", dtype=torch.float16)
        hopper_attention.weigh(q, k, v, rest, out.permute(0, 3, 1, 2), tile, scale=4.0)
        torch.cuda.synchronize()
        expected = v[0, chosen]
        wrong = ((out[0, 0].float() - expected.float()).abs().nan_to_num(1e9) > 0.1).nonzero()
        places = wrong[:: max(1, len(wrong) // 8)][:8].tolist()
        first = [[query, column, expected[query, column].item(), out[0, 0, query, column].item()]
                 for query, column in places]  # fmt: skip
        log("known attention", channels=channels, tile=list(tile), value=what, right=not len(wrong),
            wrong=len(wrong), query_column_expected_got=first)  # fmt: skip


def check_attention(log: Log) -> None:
    """Known answers, then LGNet's blocks in every tile."""
    from lgnet_fast.kernels import hopper_attention
    from lgnet_fast.kernels.cards import card_with

    device, properties = torch.device("cuda"), torch.cuda.get_device_properties(0)
    card = card_with("sm_90", properties.multi_processor_count)
    for channels, queries, cluster in itertools.product(
        hopper_attention.CHANNELS, hopper_attention.QUERIES, (1, 2, 4)
    ):
        chosen_keys(log, channels, hopper_attention.AttentionTile(queries, cluster))
    for channels, side in ((512, 16), (256, 32), (128, 64)):
        for dtype, tile in itertools.product((torch.float16, torch.bfloat16), hopper_attention.CANDIDATES):
            try:
                error = hopper_attention._error(channels, (2, side, side), tile, dtype, device)
            except (RuntimeError, ValueError) as refusal:
                log("attention", channels=channels, tile=list(tile), refused=str(refusal)[:200])
                continue
            right = error < 2 * torch.finfo(dtype).eps
            log("attention", channels=channels, tile=list(tile), dtype=str(dtype), error=error, right=right)
        for batch in (1, 16):
            tiles = hopper_attention.candidates(channels, side * side, batch, torch.float16, device, card)
            time_attention(log, batch, channels, side, tiles)


def time_attention(log: Log, batch: int, channels: int, side: int, tiles: Sequence[Any]) -> None:
    """Microseconds of the block by Triton's kernels (tile None) and by every tile, and whether ten launches agree."""
    from lgnet_fast.kernels.attention_inference import attention_block_inference
    from lgnet_fast.kernels.configs import override, pick_inference

    x = torch.randn(batch, channels, side, side, device="cuda", dtype=torch.float16)
    x = x.to(memory_format=torch.channels_last)
    weight = (torch.randn(channels, 2 * channels, 1, 1, device="cuda") / channels**0.5).half()
    bias, out = torch.zeros(channels, device="cuda", dtype=torch.float16), torch.empty_like(x)
    plain = pick_inference("sm_90", "half", channels, side * side, batch, 132)
    for tile in (None, *tiles):
        with override("inference", plain._replace(hopper=tile)):
            run = functools.partial(attention_block_inference, x, weight, bias, "released", out=out)
            results = [run().clone() for _ in range(10)]
            us = median_us(graph_of(functools.partial(run_each, [run] * 8)).replay) / 8
        equal = all(torch.equal(results[0], one) for one in results)
        log("attention time", batch=batch, channels=channels, tile=tile and list(tile), us=us, right=equal)


# -- parts --------------------------------------------------------------------------------------------------------

PARTS = {"known": known, "steps": check_steps, "chain": check_chains, "clocks": block_clocks,
         "attention": check_attention}  # fmt: skip


def main() -> int:
    """Run the sections of the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--sections", type=sections_of(tuple(PARTS)), default=",".join(PARTS))
    parser.add_argument("--part", choices=PARTS, help="run this part only, in this process")
    args = parser.parse_args()
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        print("no Hopper GPU here: nothing to measure")
        return 0
    path = args.results / "hopper_contact.jsonl"
    log = Log(path)
    if args.part:
        PARTS[args.part](log)
        return 0
    properties = torch.cuda.get_device_properties(0)
    log("machine", device=properties.name, multiprocessors=properties.multi_processor_count, torch=torch.__version__)
    failed = 0
    for section in args.sections.split(","):
        command = [sys.executable, __file__, str(args.results), "--part", section]
        try:
            done = subprocess.run(command, timeout=LIMITS[section], capture_output=True, text=True)
            code, tail = done.returncode, (done.stdout[-2000:] if done.returncode == 0 else done.stderr[-1500:])
        except subprocess.TimeoutExpired:
            code, tail = -1, "cut off"
        print(tail, flush=True)
        log(f"{section} part", code=code, error=None if code == 0 else tail[-1200:])
        failed += code != 0
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return 1 if failed or not all(line.get("right", True) for line in lines) else 0


if __name__ == "__main__":
    sys.exit(main())
