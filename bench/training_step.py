"""One training step of LGNet in the forms that bench_training.py compares: the two optimiser steps of docs/model.md.

python -m bench.training_step FORM DTYPE BATCH     # peak memory of one step, in a process of its own
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bench.attention_forms import score_map
from bench.one_device import OneDevice
from lgnet_fast import create_model
from lgnet_fast.reference.attention import AttentionBlock
from lgnet_fast.reference.discriminator import Discriminator
from lgnet_fast.reference.losses import LossWeights, discriminator_loss, generator_loss
from lgnet_fast.reference.vgg import VGG16Features
from lgnet_fast.training.graphed import GraphedStep
from lgnet_fast.training.steps import Objective, Trained

FORMS = ("released", "sdpa", "compiled", "ours")
"""Eager with the attention as released; with SDPA's; that compiled; the fused operators and lean losses."""

GRAPHS = "ours, CUDA graphs"
"""On a GPU also: "ours" by :class:`lgnet_fast.training.graphed.GraphedStep`."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SIZE = 256


class Step(NamedTuple):
    """Runs one step and returns its loss terms; `network`: the generator. `graphed`: of :data:`GRAPHS`."""

    run: Callable[[], dict[str, Tensor]]
    network: nn.Module
    graphed: GraphedStep | None = None


def make_step(form: str, dtype: torch.dtype, batch: int, device: str = "cpu") -> Step:
    """A training step on one fixed random batch.

    Args:
        form: of :data:`FORMS`, or :data:`GRAPHS`.
        dtype: float32, or bfloat16 for autocast.
        batch: pictures per step.
    """
    if form not in (*FORMS, GRAPHS):
        raise ValueError(f"form: expected one of {(*FORMS, GRAPHS)}, got {form!r}")
    torch.manual_seed(0)
    ours = form in ("ours", GRAPHS)
    network = create_model("lgnet", backend="auto" if ours else "eager").to(device).train()
    if form == "released":
        for module in network.modules():
            if isinstance(module, AttentionBlock):
                module.run = lambda features, weight, bias, variant: score_map(features, weight, bias)
    model = torch.compile(network) if form == "compiled" else network
    discriminator, vgg = Discriminator().to(device).train(), VGG16Features().to(device)
    generator_optimiser = torch.optim.Adam(network.parameters(), lr=2e-4, betas=(0.5, 0.999))
    discriminator_optimiser = torch.optim.Adam(discriminator.parameters(), lr=2e-4, betas=(0.5, 0.999))
    image = torch.rand(batch, 3, SIZE, SIZE, device=device) * 2 - 1
    mask = torch.zeros(batch, 1, SIZE, SIZE, device=device)
    mask[..., 64:160, 64:160] = 1

    def autocast() -> torch.autocast:
        return torch.autocast(device, dtype, enabled=dtype != torch.float32)

    if form == GRAPHS:
        nets = Trained(network, discriminator, network, discriminator, network)
        objective = Objective(LossWeights(), features=vgg)
        graphed = GraphedStep(nets, (generator_optimiser, discriminator_optimiser), objective, OneDevice(autocast))
        return Step(lambda: graphed([(image, mask)]) or {}, network, graphed)

    def run() -> dict[str, Tensor]:
        with autocast():
            stages = model(image, mask, return_stages=True)
            judged = discriminator_loss(discriminator(stages.merged[0].detach()), discriminator(image))
        discriminator_optimiser.zero_grad(set_to_none=False)
        judged["D"].backward()
        discriminator_optimiser.step()
        with autocast():
            terms = generator_loss(stages, image, mask, discriminator(stages.merged[0]), vgg, lean=ours)
        generator_optimiser.zero_grad(set_to_none=False)  # the same memory in every step, for equal peaks
        terms["G"].backward()
        generator_optimiser.step()
        return {name: term.detach() for name, term in (terms | judged).items()}

    return Step(run, network)


def _resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


class Memory(NamedTuple):
    """Bytes of parameters, gradients and optimiser state between steps (on a CPU of the whole process), and the peak
    of a step beyond them."""

    standing: int
    step: int


def memory_of(form: str, dtype: torch.dtype, batch: int, device: str = "cpu") -> Memory:
    """Memory of a training step in one of :data:`FORMS`. On a CPU it is measured for the whole process (Linux):
    call it once per process."""
    step = make_step(form, dtype, batch, device)
    step.run()  # gradients and optimiser state exist from here on
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step.run()
        return Memory(before, torch.cuda.max_memory_allocated() - before)
    ctypes.CDLL(None).malloc_trim(0)
    before = _resident("VmRSS")
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        peak = "VmHWM"
    except OSError:
        peak = ""
    step.run()
    highest = _resident(peak) if peak else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return Memory(before, highest - before)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("form", choices=(*FORMS, GRAPHS))
    parser.add_argument("dtype", choices=tuple(DTYPES))
    parser.add_argument("batch", type=int)
    args = parser.parse_args()
    print(json.dumps(memory_of(args.form, DTYPES[args.dtype], args.batch)._asdict()))
