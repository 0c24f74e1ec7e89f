"""What the tests of saved weights share: a small model, and when two models are the same."""

from __future__ import annotations

import torch

from lgnet_fast import LGNet, create_model


def demo_model() -> LGNet:
    """A small model whose three networks differ in width."""
    torch.manual_seed(0)
    return create_model("lgnet_demo", coarse_channels=8, local_channels=4, global_channels=12).eval()


def same(a: LGNet, b: LGNet) -> bool:
    """Whether names, values and dtypes of all weights are equal."""
    sa, sb = a.state_dict(), b.state_dict()
    return sa.keys() == sb.keys() and all(torch.equal(sa[k], sb[k]) and sa[k].dtype == sb[k].dtype for k in sa)
