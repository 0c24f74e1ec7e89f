"""merge_concat against eager PyTorch, torch.compile and the machine's copy bandwidth."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lgnet_fast.reference.merge import merge_concat

# Planes of H x W numbers that merge_concat has to move: 3 + 3 + 1 read, 4 written.
PLANES = 11


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("size", [(1, 256), (16, 1024)], ids=["1x3x256x256", "16x3x1024x1024"])
def test_merge_concat(size: tuple[int, int], dtype: torch.dtype, device: str, compete: Any, benchmark: Any) -> None:
    batch, side = size
    image = torch.rand(batch, 3, side, side, device=device).to(dtype)
    output = torch.rand_like(image)
    mask = (torch.rand(batch, 1, side, side, device=device) < 0.3).to(dtype)
    backend = "triton" if device == "cuda" else "cpp"

    def ours() -> torch.Tensor:
        return torch.ops.lgnet.merge_concat(image, output, mask, backend=backend)

    compiled = torch.compile(merge_concat)
    # A copy of as many bytes, so that the ratio of times is the share of the copy bandwidth.
    source = torch.rand(batch * side * side * PLANES // 2, device=device).to(dtype)
    target = torch.empty_like(source)
    assert torch.allclose(ours().float(), merge_concat(image, output, mask).float(), rtol=0, atol=1e-2)
    assert torch.equal(ours(), merge_concat(image, output, mask)) or dtype == torch.bfloat16
    summary = compete(
        {
            "ours": ours,
            "eager": lambda: merge_concat(image, output, mask),
            "compiled": lambda: compiled(image, output, mask),
            "copy": lambda: target.copy_(source),
        },
        "ours",
    )
    share = summary["times_slower_than_ours"]["copy"]
    benchmark.extra_info["share_of_copy_bandwidth"] = share
    print(size, dtype, summary, f"share of copy bandwidth {share:.2f}")
