"""What is compiled: the launches of the engine and of the operators, recorded on tensors without memory.

An executor or a launcher runs on meta tensors, under the assumption of a GPU's generation and number of
multiprocessors, so that it chooses the blocks that it would choose there. Nothing is launched.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lgnet_fast.engine.build import build_plan, plan_stages
from lgnet_fast.engine.cuda.executor import CudaExecutor
from lgnet_fast.engine.plan import Plan
from lgnet_fast.engine.regions import Rect
from lgnet_fast.reference.variants import create_model

from .. import attention, attention_inference, configs, merge_concat
from ..cards import Card
from ..launch import Launch, record

SIDE = 256
"""Height and width of the pictures."""
HOLE = Rect(96, 160, 96, 160)
"""The hole of the restricted runs, in pixels."""
MODELS = ("lgnet", "lgnet_light", "lgnet_demo", "lgnet_small")
DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "tf32": torch.float32,
}


class Case(NamedTuple):
    """Launches to compile: `run` calls executors or launchers on meta tensors. `dtype` is a name in DTYPES."""

    label: str
    card: Card
    dtype: str
    run: Callable[[], Any]


class _Elsewhere(CudaExecutor):
    """An executor for a GPU that this machine does not have: its launches can be recorded, not made."""

    @staticmethod
    def unavailable_reason(device: torch.device, dtype: torch.dtype = torch.float16) -> str | None:
        return None

    def _overlap_reason(self) -> str | None:
        return None

    def launch_all(self, holes: Sequence[Rect] | None) -> None:
        """Make all launches of one run, in order."""
        regions = None
        if holes is not None:
            regions = [step.regions for step in self.restricted(self.plan, holes).steps]
        with torch.no_grad():
            for launch in self._launches(self.memory, regions, painted=holes is not None):
                launch()


@functools.lru_cache(maxsize=64)
def _plan(model: str, batch: int) -> Plan:
    with torch.device("meta"):
        network = create_model(model).eval()
    return build_plan(plan_stages(network), batch, SIDE, SIDE)


def heads(model: str) -> list[tuple[int, int]]:
    """(channels, side of the map) of the model's attention blocks."""
    plan = _plan(model, 1)
    return [(s.out_channels, plan.buffers[s.source.buffer].height) for s in plan.steps if s.kind == "attention"]


def executor(model: str, dtype: str, batch: int, overlap: bool = False) -> _Elsewhere:
    """An executor on meta tensors; call it within `configs.assume_generation`."""
    plan, how = _plan(model, batch), "plain" if overlap else "none"
    return _Elsewhere.of(plan, DTYPES[dtype], device=torch.device("meta"), overlap=how)


def engine_case(card: Card, model: str, dtype: str, batch: int, restricted: bool, overlap: bool = False) -> Case:
    """All launches of a run of the engine, dense or within HOLE."""

    def run() -> None:
        executor(model, dtype, batch, overlap).launch_all([HOLE] if restricted else None)

    kind = ("restricted" if restricted else "dense") + (" overlapped" if overlap else "")
    return Case(f"{model} b{batch} {kind}", card, dtype, run)


def _meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _attention_tensors(
    batch: int, channels: int, side: int, dtype: str, channels_last: bool
) -> tuple[Tensor, Tensor, Tensor]:
    element = DTYPES[dtype]
    features = _meta(batch, channels, side, side, dtype=element)
    if channels_last:
        features = features.to(memory_format=torch.channels_last)
    return features, _meta(channels, 2 * channels, 1, 1, dtype=element), _meta(channels, dtype=element)


def attention_case(
    card: Card, dtype: str, batch: int, channels: int, side: int, variant: str, channels_last: bool = False
) -> Case:
    """The attention block on [batch, channels, side, side] in training: forward and backward."""

    def run() -> None:
        features, weight, bias = _attention_tensors(batch, channels, side, dtype, channels_last)
        out, attended, stats = attention.attention_block_forward(features, weight, bias, variant, save_attended=True)
        assert attended is not None
        assert stats is not None
        attention.attention_block_backward(out, features, attended, stats, weight, variant)

    layout = " NHWC" if channels_last else ""
    return Case(f"training {variant} C={channels} {side}x{side} b{batch}{layout}", card, dtype, run)


def inference_case(card: Card, dtype: str, batch: int, channels: int, side: int, variant: str) -> Case:
    """The attention block without gradients, as the operator calls it."""

    def run() -> None:
        features, weight, bias = _attention_tensors(batch, channels, side, dtype, False)
        attention_inference.attention_block_inference(features, weight, bias, variant)

    return Case(f"no gradient {variant} C={channels} {side}x{side} b{batch}", card, dtype, run)


def merge_case(card: Card, dtype: str, batch: int, tanh: bool) -> Case:
    """Both merges, forward and backward."""

    def run() -> None:
        image = _meta(batch, 3, SIDE, SIDE, dtype=DTYPES[dtype])
        mask = _meta(batch, 1, SIDE, SIDE, dtype=DTYPES[dtype])
        grad = merge_concat.merge_concat_forward(image, image, mask, tanh=tanh)
        merge_concat.merge_concat_backward(grad, image, image, mask, tanh=tanh)
        merge_concat.merge_forward(image, image, mask, tanh=tanh)
        merge_concat.merge_backward(image, image, image, mask, tanh=tanh)

    return Case(f"merge{' tanh' if tanh else ''} b{batch}", card, dtype, run)


def card_cases(
    card: Card,
    dtypes: Sequence[str] = tuple(DTYPES),
    models: Sequence[str] = MODELS,
    batches: Sequence[int] = (1, 16),
) -> list[Case]:
    """All cases of a GPU: the engine, dense and restricted, and the operators.

    Attention in both variants, without gradients and in training (16 bit: also in NHWC), and the merges. Overlapped
    launches (off by default) differ in the first and last instructions of the convolutions alone: LGNet's, batch 1.
    """
    cases = []
    for dtype in dtypes:
        half = DTYPES[dtype] != torch.float32
        for batch in batches:
            for model in models:
                cases += [engine_case(card, model, dtype, batch, restricted) for restricted in (False, True)]
                if card.capability >= (9, 0) and (model, batch) == (MODELS[0], 1):
                    cases.append(engine_case(card, model, dtype, batch, False, overlap=True))
                for channels, side in heads(model):
                    for variant in attention.VARIANTS:
                        cases.append(inference_case(card, dtype, batch, channels, side, variant))
                        for channels_last in (False, True) if half else (False,):
                            cases.append(attention_case(card, dtype, batch, channels, side, variant, channels_last))
            cases += [merge_case(card, dtype, batch, tanh) for tanh in (False, True)]
    return cases


def launches(case: Case) -> list[Launch]:
    """What the case launches on its card."""
    allow_tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = case.dtype == "tf32"
    try:
        with record() as recorded, configs.assume_generation(case.card.generation, case.card.num_sms):
            case.run()
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allow_tf32
    return recorded
