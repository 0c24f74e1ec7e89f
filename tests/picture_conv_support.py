"""What the tests of the convolutions from and to the picture share: the steps, tiles, operands. Needs Triton."""

from __future__ import annotations

import torch
from lgnet_fast.kernels import picture_conv
from lgnet_fast.kernels.compiled_checks import exact_convolution
from lgnet_fast.kernels.conv import Conv
from lgnet_fast.kernels.picture_conv import PictureTile
from torch import Tensor

from .compiled_kernels import integers

STEM = Conv(4, 64, 7, 1, 3, False, True, False)
E1 = Conv(4, 64, 4, 2, 1, False, False, False)
OUT = Conv(64, 3, 7, 1, 3, False, True, True)
D1 = Conv(128, 3, 4, 2, 1, True, False, True)
FROM = {STEM: PictureTile(4, 32), E1: PictureTile(4, 32)}
TO = {OUT: PictureTile(3, 32), D1: PictureTile(2, 32)}
CPU = torch.device("cpu")


def operands(
    conv: Conv, batch: int, size: tuple[int, int], dtype: torch.dtype = torch.float16
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Input, packed weights, bias, and the sums in float64, [B, H, W, C]."""
    source = integers(batch, *size, conv.in_channels, dtype=dtype)
    first, second = (conv.in_channels, conv.out_channels)[:: 1 if conv.transposed else -1]
    weight, bias = integers(first, second, conv.kernel, conv.kernel, dtype=dtype), integers(conv.out_channels).float()
    return source, picture_conv.pack(conv, weight), bias, exact_convolution(conv, source, weight, bias)


def plan_convs() -> dict[str, Conv]:
    """Every step of LGNet that the kernels can compute: name -> Conv."""
    from lgnet_fast import create_model
    from lgnet_fast.engine.build import build_plan, plan_stages
    from lgnet_fast.engine.cuda.weights import conv_of
    from lgnet_fast.engine.plan import ConvStep

    with torch.device("meta"):
        model = create_model("lgnet").eval()
    plan = build_plan(plan_stages(model), 1, 256, 256)
    convs = {step.name: conv_of(step) for step in plan.steps if isinstance(step, ConvStep)}
    return {name: conv for name, conv in convs.items() if picture_conv.unsupported(conv) is None}
