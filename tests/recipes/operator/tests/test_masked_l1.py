"""`lgnet::masked_l1`: values and gradients against float64, the operator as PyTorch sees it, refusals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lgnet_fast import BackendError, ops
from lgnet_fast.ops.cpu import masked_l1 as cpu
from lgnet_fast.reference.losses import masked_l1
from tests.support import assert_accurate

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
VIEWS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "sliced": lambda x: torch.cat([x, x], dim=3)[..., : x.shape[3]],
    "expanded": lambda x: x[:1].expand(x.shape),
}


def inputs(shape: tuple[int, int, int, int] = (2, 3, 37, 41), dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    batch, channels, height, width = shape
    shapes = ((batch, channels, height, width), (batch, channels, height, width), (batch, 1, height, width))
    output, target, weight = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return [output.to(dtype), target.to(dtype), (weight > 0).to(dtype)]


def results(function, operands: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The loss and the gradients of all operands."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in operands]
    loss = function(*leaves)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def check(operands: list[Tensor]) -> None:
    dtype = operands[0].dtype
    fused = results(lambda *a: torch.ops.lgnet.masked_l1(*a, backend="cpp"), operands, dtype)
    exact, eager = results(masked_l1, operands, torch.float64), results(masked_l1, operands, dtype)
    for name, actual, truth, plain in zip(("loss", "d_output", "d_target", "d_weight"), fused, exact, eager):
        assert_accurate(name, actual, truth, plain)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 37, 41), (3, 3, 70, 16)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loss_and_gradients_within_the_rule(dtype, shape):
    check(inputs(shape, dtype))


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_views(which, view):
    operands = inputs()
    operands[which] = VIEWS[view](operands[which])
    check(operands)


def test_a_hand_made_value():
    output, target = torch.zeros(1, 2, 1, 2), torch.tensor([[[[1.0, 5.0]], [[3.0, 5.0]]]])
    weight = torch.tensor([[[[1.0, 0.0]]]])
    assert float(torch.ops.lgnet.masked_l1(output, target, weight, backend="cpp")) == 2.0  # (1 + 3) / (2 * 1)


def test_all_or_nothing_weighted():
    for weight in (0.0, 1.0):
        output, target, _ = inputs()
        check([output, target, torch.full((2, 1, 37, 41), weight)])


def test_threads_do_not_change_bits():
    operands = inputs((2, 3, 200, 130))
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(cpu.masked_l1_forward(*operands)[1])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


def test_what_pytorch_asks_for():
    operands = [t.requires_grad_() for t in inputs((2, 3, 5, 7), torch.float64)]
    torch.library.opcheck(torch.ops.lgnet.masked_l1, tuple(operands))
    torch.library.opcheck(torch.ops.lgnet._masked_l1, (*operands, True, "cpp"))
    assert torch.autograd.gradcheck(lambda *a: torch.ops.lgnet.masked_l1(*a, backend="cpp"), operands, atol=1e-7)
    mapped = torch.vmap(torch.ops.lgnet.masked_l1)(*(torch.stack([t.detach()] * 3) for t in operands))
    assert mapped.shape == (3,)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.ops.lgnet.masked_l1(*inputs()).dtype == torch.float32


def test_which_backend_ran_and_errors():
    operands = inputs()
    ops.reset_calls()
    torch.ops.lgnet.masked_l1(*operands)
    torch.ops.lgnet.masked_l1(*operands, backend="eager")
    assert ops.calls() == {("masked_l1", "cpp"): 1, ("masked_l1", "eager"): 1}
    with pytest.raises(ValueError, match=r"weight: expected \[2, 1, 37, 41\] to fit output"):
        torch.ops.lgnet.masked_l1(operands[0], operands[1], operands[0])
    with pytest.raises(BackendError, match="several dtypes"):
        torch.ops.lgnet.masked_l1(operands[0], operands[1].double(), operands[2], backend="cpp")
    with pytest.raises(ValueError, match=r"target: expected shape \[2, 3, 37, 41\]"):
        cpu.masked_l1_forward(operands[0], operands[1][:1], operands[2])
