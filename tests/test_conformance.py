"""The reference against the authors' released network: vectors computed by it in float64 (docs/model.md)."""

from __future__ import annotations

import copy
from functools import cache

import numpy as np
import pytest
import torch

from lgnet_fast.reference import LGNet, LocalNet
from lgnet_fast.reference.attention import attention_weights, cosine_attention
from lgnet_fast.reference.lgnet import Stages
from tests.support import CONFORMANCE, assert_accurate, case, released_state

CASES = {"gen256": ("generator_256.npz", (2, 256, 256)), "gen512": ("generator_512x256.npz", (1, 512, 256))}


@pytest.fixture(scope="module")
def model() -> LGNet:
    return LGNet.from_released({net: released_state(net) for net in ("G1", "G2", "G3")}, backend="eager")


@pytest.fixture(scope="module")
def run(model):
    """Stages of a case in a dtype; each is computed once. The model stays in float64, in any order of the tests."""

    @cache
    def stages(name: str, dtype: torch.dtype) -> Stages:
        image, mask = case(name, *CASES[name][1], dtype=dtype)
        own = model if dtype == torch.float64 else copy.deepcopy(model).to(dtype)
        with torch.no_grad():
            return own(image, mask, return_stages=True)

    return stages


def check(pictures: dict[str, torch.Tensor], vectors: np.lib.npyio.NpzFile) -> None:
    for name, picture in pictures.items():
        p = picture.double()
        views = {"strided": p[..., 1::4, 2::4], "patch": p[..., 96:128, 96:128]}
        views |= {"mean": p.mean((2, 3)), "std": p.std((2, 3), correction=0)}
        for view, value in views.items():
            expected = torch.from_numpy(vectors[f"{name}.{view}"])
            # Samples are stored in float32. A network of 40 layers in float32 loses 10 bits, on some processors more.
            dtype = expected.dtype if picture.dtype == torch.float64 else picture.dtype
            assert_accurate(f"{name}.{view}", value.to(dtype), expected, roundings=ALLOWED[picture.dtype, dtype])


ALLOWED = {
    (torch.float64, torch.float64): 2**20,
    (torch.float64, torch.float32): 1,
    (torch.float32, torch.float32): 2**11,
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_generator_reproduces_the_released_network(run, name, dtype):
    file, shape = CASES[name]
    image, mask = case(name, *shape, dtype=dtype)
    stages = run(name, dtype)
    pictures = {"coarse": stages.coarse, "local": stages.local, "refined": stages.refined, "merged": stages.merged[2]}
    check(pictures, np.load(CONFORMANCE / file))
    assert torch.equal(torch.where(mask.bool(), image, stages.merged[2]), image)


def test_float32_error_is_as_small_as_the_specification_says(run):
    exact, single = (run("gen256", dtype).merged[-1].double() for dtype in (torch.float64, torch.float32))
    relative = ((single - exact).norm() / exact.norm()).item()
    assert 1e-8 < relative < 5e-6
    assert_accurate("picture", single.float(), exact, roundings=2**10)


def test_attention_output_weights_and_gradient():
    vectors = np.load(CONFORMANCE / "attention.npz")
    x = torch.from_numpy(vectors["x"]).requires_grad_()
    y = cosine_attention(x, "released")
    assert_accurate("attended", y.detach(), torch.from_numpy(vectors["y"]))
    (y * torch.from_numpy(vectors["w"])).sum().backward()
    assert_accurate("gradient", x.grad, torch.from_numpy(vectors["grad_x"]))
    weights = attention_weights(x[:1].detach(), "released")[0]
    assert_accurate("weights", weights, torch.from_numpy(vectors["scores"]))
    assert_accurate("sums", weights.sum(1), torch.ones(len(weights)))


def test_box_sum_on_features_equals_box_sum_on_the_score_map():
    """The algebra that all kernels use, checked against the formulation that stores the score map."""
    torch.manual_seed(0)
    f = torch.randn(2, 12, 9, 13, dtype=torch.float64)
    n = 9 * 13
    key = (f + 1e-7) / (f + 1e-7).norm(dim=1, keepdim=True)
    k = key.flatten(2)
    scores = torch.einsum("bcj,bci->bji", k, f.flatten(2)).reshape(2, n, 9, 13)  # a map over queries per key
    box = torch.nn.functional.conv2d(
        scores.reshape(2 * n, 1, 9, 13), torch.ones(1, 1, 3, 3, dtype=torch.float64), padding=1
    )
    weights = box.reshape(2, n, n).softmax(dim=1)
    y = torch.einsum("bcj,bji->bci", k, weights).reshape(f.shape)
    assert_accurate("attended", cosine_attention(f, "released"), y)


def test_paper_attention_is_equation_10():
    torch.manual_seed(1)
    f = torch.randn(1, 6, 4, 5, dtype=torch.float64)
    rows = f[0].flatten(1).T.numpy()
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    cosine = unit @ unit.T
    weights = np.exp(cosine) / np.exp(cosine).sum(1, keepdims=True)
    expected = (weights @ rows).T.reshape(6, 4, 5)
    assert_accurate("attended", cosine_attention(f, "paper")[0], torch.from_numpy(expected))


def test_receptive_field_of_the_local_network():
    """89x89 at the widest output phase, by gradient support (the paper prints 109x109)."""
    torch.manual_seed(0)
    net = LocalNet(4).double().eval()
    x = torch.randn(1, 4, 256, 256, dtype=torch.float64, requires_grad=True)
    y = net(x)
    widths = []
    for phase in range(4):
        (gradient,) = torch.autograd.grad(y[0, :, 128 + phase, 128 + phase].sum(), x, retain_graph=True)
        rows = gradient.abs().sum((0, 1, 3)).nonzero()
        columns = gradient.abs().sum((0, 1, 2)).nonzero()
        assert len(rows) == len(columns)
        widths.append(int(rows.max() - rows.min()) + 1)
    assert max(widths) == 89
