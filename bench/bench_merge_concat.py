"""merge_concat against eager PyTorch, torch.compile and the machine's copy bandwidth."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.timing import SMOKE
from lgnet_fast.ops.registry import OPERATORS
from lgnet_fast.reference.merge import merge_concat

# Planes of H x W numbers that merge_concat has to move: 3 + 3 + 1 read, 4 written.
PLANES = 11
SIZES = [(1, 256), (16, 1024)][: 1 if SMOKE else 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x3x{size[1]}x{size[1]}")
def test_merge_concat(size: tuple[int, int], dtype: torch.dtype, device: str, compete: Any, benchmark: Any) -> None:
    batch, side = size
    image = torch.rand(batch, 3, side, side, device=device).to(dtype)
    output = torch.rand_like(image)
    mask = (torch.rand(batch, 1, side, side, device=device) < 0.3).to(dtype)
    backend = "triton" if device == "cuda" else "cpp"

    def ours() -> torch.Tensor:
        return torch.ops.lgnet.merge_concat(image, output, mask, backend=backend)

    def ours_into() -> torch.Tensor:
        return OPERATORS["merge_concat"].launchers(backend).merge_concat_forward(image, output, mask, out=target)

    compiled = merge_concat if SMOKE else torch.compile(merge_concat)
    target = torch.empty((batch, 4, side, side), device=device, dtype=dtype)
    # A copy of as many bytes into allocated memory, like `ours_into`: the ratio of their times is the share of the
    # copy bandwidth. The others allocate their result, as operators do.
    source = torch.rand(batch * side * side * PLANES // 2, device=device).to(dtype)
    copied = torch.empty_like(source)
    for result in (ours(), ours_into(), compiled(image, output, mask)):
        assert torch.allclose(result.float(), merge_concat(image, output, mask).float(), rtol=0, atol=1e-2)
    summary = compete(
        {
            "ours": ours,
            "eager": lambda: merge_concat(image, output, mask),
            "compiled": lambda: compiled(image, output, mask),
            "ours_into": ours_into,
            "copy": lambda: copied.copy_(source),
        },
        "ours",
    )
    share = summary["median_ms"]["copy"] / summary["median_ms"]["ours_into"]
    benchmark.extra_info["share_of_copy_bandwidth"] = round(share, 3)
    print(size, dtype, summary, f"share of copy bandwidth {share:.2f}")
