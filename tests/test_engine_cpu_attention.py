"""The attention block as a step of a program."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lgnet_fast import native
from lgnet_fast.engine.cpu import weights as cpu_weights
from lgnet_fast.engine.cpu.executor import CpuExecutor
from lgnet_fast.engine.regions import Rect
from lgnet_fast.reference.attention import attention_block
from tests.support import assert_accurate

pytestmark = pytest.mark.skipif(
    CpuExecutor.unavailable_reason() is not None, reason=str(CpuExecutor.unavailable_reason())
)


class AttentionAlone:
    """A program of an attention block on (picture, mask), [2, 4, H, W], whose result becomes the picture.

    Of more or fewer than four channels: the block's features are a 1x1 convolution of (picture, mask), and its first
    three channels are the result. `scale`: of the features.
    """

    def __init__(
        self,
        variant: str,
        products: str = "float32",
        channels: int = 4,
        size: tuple[int, int] = (11, 13),
        scale: float = 1.0,
    ) -> None:
        library = native.library()
        rng = torch.Generator().manual_seed(3)
        self.size = batch, _, height, width = 2, channels, *size
        self.variant = variant
        self.image = torch.randn(batch, 3, height, width, generator=rng)
        self.mask = torch.rand(batch, 1, height, width, generator=rng)
        self.weight = torch.randn(channels, 2 * channels, 1, 1, generator=rng) / (channels / 4) ** 0.5
        self.bias = torch.randn(channels, generator=rng)
        self.expansion = torch.randn(4, channels, generator=rng) * scale if channels != 4 or scale != 1 else None
        pixels, self.packed = batch * height * width, []
        begin = 0 if self.expansion is None else 4 * pixels
        attention = library.AttentionStep()
        attention.source = library.MapSpec(begin, height, width, channels, channels, False)
        attention.released = variant == "released"
        attention.products = library.Products.__members__[products]
        weight = torch.empty(library.attention_weight_bytes(channels, attention.products), dtype=torch.uint8)
        library.pack_attention_weight(
            self.weight.data_ptr(), channels, attention.released, attention.products, weight.data_ptr()
        )
        bias = torch.cat((self.bias, torch.zeros(-channels % 8)))
        self.packed += [weight, bias]
        attention.weight, attention.bias = weight.data_ptr(), bias.data_ptr()
        end = begin + pixels * channels
        attention.targets = [library.TargetSpec(end, channels, 0, False)]
        attention.out_height, attention.out_width = height, width
        # A convolution with the identity: NaN stays in its pixel.
        steps = [attention, self.conv((end, channels), torch.eye(channels, 4), (0, 4))]
        if self.expansion is not None:
            steps.insert(0, self.conv((0, 4), self.expansion, (begin, channels)))
        self.program = library.Program(batch, height, width, end + pixels * channels, 0, steps)

    def conv(self, source: tuple[int, int], weight: Tensor, target: tuple[int, int]) -> object:
        """A step that multiplies every pixel by weight [in, out]; source, target: offset and channels."""
        library, (height, width) = native.library(), self.size[2:]
        packing = cpu_weights.Packing.of("float32")
        depth, channels = weight.shape
        packed = torch.zeros(1, 1, depth * packing.columns(channels))
        packing.pack(packed, depth, channels, lambda first, last, rows: rows[0].copy_(weight[first:last]))
        zeros = torch.zeros(packing.columns(channels) + packing.lanes)
        self.packed += [packed, zeros]
        step = library.ConvStep()
        step.source = library.MapSpec(source[0], height, width, source[1], source[1], False)
        step.targets = [library.TargetSpec(*target, 0, False)]
        step.weight, step.bias, step.out_channels = packed.data_ptr(), zeros.data_ptr(), channels
        step.jobs = [library.Job(0, 0, [library.Group(1, 1, [(0, 0)], 0)])]
        step.out_height, step.out_width = height, width
        return step

    def run(self, rects: list[tuple[Rect, int]]) -> Tensor:
        """[2, 3, H, W] with NaN where nothing was computed; rects: with their samples, -1 for both."""
        region, everywhere = native.library().Region, (0, self.size[2], 0, self.size[3])
        whole = [region(everywhere, everywhere, -1)]
        lists = [[region(tuple(r), everywhere, sample) for r, sample in rects], whole]
        if self.expansion is not None:
            lists.insert(0, whole)
        out = torch.empty_like(self.image)
        arguments = [native.tensor_arg(t) for t in (self.image, self.mask)]
        threads = torch.get_num_threads()
        self.program.run(*arguments, (0,) * 10, native.tensor_arg(out), [], lists, threads, True)
        return out

    def exact(self, dtype: torch.dtype) -> Tensor:
        features = torch.cat((self.image * (1 - self.mask) + self.mask, self.mask), 1).to(dtype)
        if self.expansion is not None:
            features = torch.einsum("bchw,cd->bdhw", features, self.expansion.to(dtype))
        return attention_block(features, self.weight.to(dtype), self.bias.to(dtype), self.variant)[:, :3]


@pytest.mark.parametrize("variant", ["released", "paper"])
def test_attention_computes_the_queries_of_the_rectangles_alone(isa, threads, variant):
    block = AttentionAlone(variant)
    dense = block.run([(Rect(0, 11, 0, 13), -1)])
    assert_accurate("dense", dense, block.exact(torch.float64), block.exact(torch.float32))
    rects = [Rect(0, 1, 4, 9), Rect(3, 7, 0, 2), Rect(6, 11, 10, 13)]  # at every border
    for pairs in ([(r, -1) for r in rects], [(rects[0], 0), (rects[1], 1), (rects[2], 1)], [(rects[2], 1)]):
        wanted = torch.zeros_like(dense, dtype=torch.bool)
        for rect, sample in pairs:
            wanted[(slice(None) if sample < 0 else sample, ..., *rect.slices)] = True
        some = block.run(pairs)
        assert torch.equal(some.isfinite(), wanted)
        assert_accurate("some", some[wanted], block.exact(torch.float64)[wanted], block.exact(torch.float32)[wanted])
        assert torch.equal(some[wanted], block.run(pairs)[wanted])
        if threads == 1:  # else keys are split by the number of queries
            assert torch.equal(some[wanted], dense[wanted])


@pytest.mark.parametrize("variant", ["released", "paper"])
@pytest.mark.parametrize(
    ("channels", "size", "scale"),
    [
        (4, (11, 13), 1.0),
        (4, (9, 7), 30.0),  # scores of hundreds
        (8, (9, 7), 1.0),
        (31, (13, 11), 0.3),
        (128, (48, 48), 0.3),  # several panels share a task
        (256, (20, 21), 3.0),
        (512, (24, 24), 0.1),
    ],
)
def test_attention_by_products_of_bf16(isa, threads, variant, channels, size, scale):
    """bf16x3 keeps to the accuracy of float32, bf16 to that of plain bf16; both run where the instruction set has
    them, and else float32."""
    whole = [(Rect(0, size[0], 0, size[1]), -1)]
    results = {}
    for products in ("float32", "bf16", "bf16x3"):
        block = AttentionAlone(variant, products, channels, size, scale)
        results[products] = block.run(whole)
        assert torch.equal(results[products], block.run(whole)), products
    exact = block.exact(torch.float64)
    assert_accurate("float32", results["float32"], exact, block.exact(torch.float32))
    assert_accurate("bf16x3", results["bf16x3"], exact, results["float32"])
    if native.multiplies("bf16"):
        assert_accurate("bf16", results["bf16"].bfloat16(), exact, block.exact(torch.bfloat16))
    assert torch.equal(results["bf16"], results["float32"]) == (not native.multiplies("bf16"))
    assert torch.equal(results["bf16x3"], results["float32"]) == (not native.multiplies("bf16x3"))
    block = AttentionAlone(variant, "bf16x3", channels, size, scale)
    rect = Rect(size[0] - 3, size[0], 2, 6)
    inside = (1, ..., *rect.slices)
    assert_accurate("region", block.run([(rect, 1)])[inside], exact[inside], results["float32"][inside])
