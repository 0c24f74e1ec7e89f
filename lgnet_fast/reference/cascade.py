"""Running first stage, local stage and global stage one after another (docs/model.md)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import forks
from .attention import AttentionBlock
from .backends import functions
from .merge import MergeFn, merge, merge_concat
from .networks import LEVELS


class Stages(NamedTuple):
    """Every stage's picture, [B, 3, H, W] in [-1, 1] each.

    `coarse`, `local` and `refined` are raw network outputs (None where an ablation lacks the stage, or `until` ends
    before it; `refined` is the last global network's). Of an X_LG, `coarse` is the picture of its first stage.
    `raw` and `merged` list all stages in order; `merged[-1]` is the result.

    An engine has no raw pictures where its run was restricted to holes or the mask was empty: `coarse`, `local` and
    `refined` are then None and `raw` is (), while `merged` is complete.
    """

    coarse: Tensor | None
    local: Tensor | None
    refined: Tensor | None
    raw: tuple[Tensor, ...]
    merged: tuple[Tensor, ...]

    @classmethod
    def of(cls, names: Sequence[str], raw: Sequence[Tensor], merged: Sequence[Tensor]) -> Stages:
        """From the pictures of the stages `names`, in order: a first one, then any of "L", "G" and "G_att"."""
        by_name = dict(zip(names[1:], raw[1:], strict=True))
        refined = by_name.get("G_att", by_name.get("G"))
        return cls(raw[0], by_name.get("L"), refined, tuple(raw), tuple(merged))


class Cascade(nn.Module):
    """Base of LGNet and of X_LG: input checks, merging between stages, choice of backend."""

    size_multiple = 2**LEVELS
    """H and W must be multiples of this."""

    def __init__(self) -> None:
        super().__init__()
        self._merge: MergeFn = merge
        self._merge_concat: MergeFn = merge_concat
        self.backend = "eager"

    def set_backend(self, backend: str) -> Cascade:
        """Choose the backend of attention and merging.

        Args:
            backend: "auto" (the fastest that can run for each input), "eager" (plain PyTorch), "triton" or "cpp".
                With an explicit choice, an input for which it cannot run raises BackendError.

        Returns:
            self.

        Raises:
            ValueError: no such backend.
        """
        attention, block, self._merge, self._merge_concat = functions(backend)
        for module in self.modules():
            if isinstance(module, AttentionBlock):
                module.attend, module.run = attention, block
        self.backend = backend
        return self

    @abstractmethod
    def stage_modules(self) -> list[nn.Module]:
        """The network of every stage, in order; one network may run several stages (LGNet_share).

        Each maps cat(picture, mask) [B, 4, H, W] to a picture [B, 3, H, W] in [-1, 1]; only the first stage of an
        X_LG is called with image and mask instead.
        """

    def _check(self, image: Tensor, mask: Tensor, until: int | None) -> None:
        if until is not None and (type(until) is not int or not 1 <= until <= len(self.stage_modules())):
            raise ValueError(f"until: expected 1 to {len(self.stage_modules())}, the model's stages, got {until!r}")
        forks.prepare()
        check_inputs(image, mask, self.size_multiple)
        weight = next((p for p in self.parameters() if p.is_floating_point()), None)
        if weight is not None and weight.dtype != image.dtype and not _has_autocast(image.device.type):
            raise TypeError(f"image: expected {weight.dtype} as the model's weights, got {image.dtype}")

    def _continue(
        self, image: Tensor, mask: Tensor, first: Tensor, nets: Sequence[Callable[[Tensor], Tensor]]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Run `nets` after the raw output `first`; raw and merged pictures of all stages."""
        raw, merged = [first], []
        for net in nets:
            x = self._merge_concat(image, raw[-1], mask)
            merged.append(x[:, :3])
            raw.append(net(x))
        merged.append(self._merge(image, raw[-1], mask))
        return raw, merged


def _has_autocast(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def check_inputs(image: Tensor, mask: Tensor, multiple: int) -> None:
    """Raise TypeError or ValueError, naming the argument, unless (image, mask) fits the networks.

    Reads metadata only, no values, so it does not wait for a GPU.
    """
    for name, tensor in (("image", image), ("mask", mask)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name}: expected a floating dtype, got {tensor.dtype}")
        if tensor.layout is not torch.strided:
            raise TypeError(f"{name}: expected a dense tensor, got layout {tensor.layout}")
    if torch.jit.is_tracing():
        return  # sizes are symbolic while tracing; comparing them would make them constants
    if image.dim() != 4 or image.shape[1] != 3:
        raise ValueError(f"image: expected [B, 3, H, W], got {list(image.shape)}")
    expected = [image.shape[0], 1, *image.shape[2:]]
    if list(mask.shape) != expected:
        raise ValueError(f"mask: expected {expected} to fit image, got {list(mask.shape)}")
    if image.shape[2] % multiple or image.shape[3] % multiple or 0 in image.shape[2:]:
        raise ValueError(
            f"image: expected H and W that are positive multiples of {multiple}, got {list(image.shape[2:])}; "
            "lgnet_fast.Inpainter takes any size"
        )
    if image.device != mask.device:
        raise ValueError(f"mask: expected device {image.device} as image, got {mask.device}")
    if image.dtype != mask.dtype:
        raise TypeError(f"mask: expected dtype {image.dtype} as image, got {mask.dtype}")


@torch.no_grad()
def init_weights(module: nn.Module) -> None:
    """The paper's initialisation: conv weights N(0, 0.02), BatchNorm weights N(1, 0.02), biases 0."""
    for m in module.modules():
        if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.normal_(m.weight, 0.0, 0.02)
        elif isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.weight, 1.0, 0.02)
        else:
            continue
        if m.bias is not None:
            nn.init.zeros_(m.bias)
