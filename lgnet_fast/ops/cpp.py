"""Launchers of the C++ kernels in ``lgnet_fast._C`` (sources in csrc/), for tensors on the CPU.

They allocate, pass addresses, sizes and strides, and call; no registration, no autograd, no dispatch (that is
``lgnet_fast.ops``). Inputs may have any strides and are never modified; results are contiguous, or channels_last
where the features (the image) are. The formulas stand at the top of csrc/attention.cpp and csrc/merge_concat.cpp.

Shapes: features [B, C, H, W]; weight [C, 2C, 1, 1] with input columns (attended, F) for ``variant="released"`` and
(F, attended) for ``"paper"``; bias [C]; stats [2, B, H*W], see ``attention_forward``; image and output [B, 3, H, W];
mask [B, 1, H, W], 1 = hole. Every launcher raises TypeError or ValueError with the reason where ``can_run_*`` gives
one.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from .. import forks

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2, torch.float16: 3}
_ABSENT = (0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
_VARIANTS = ("released", "paper")

_lock = forks.Lock()
_module: ModuleType | None = None
_reason: str | None = None


def _load() -> ModuleType | None:
    global _module, _reason
    if _module is not None or _reason is not None:
        return _module
    with _lock:
        if _module is None and _reason is None:
            try:
                module = importlib.import_module("lgnet_fast._C")
            except ImportError as error:
                note = Path(__file__).resolve().parent.parent / "_C_unavailable.txt"
                why = note.read_text(encoding="utf-8").strip() if note.is_file() else str(error)
                _reason = f"the C++ extension lgnet_fast._C is not installed: {why}"
            else:
                if forks.forked():
                    module.mark_forked()  # a loaded one notices forks by itself
                _module = module
    return _module


def unavailable_reason() -> str | None:
    """Why the C++ kernels cannot be used at all, in one sentence; None where they can."""
    return None if _load() is not None else _reason


def _library() -> ModuleType:
    module = _load()
    if module is None:
        raise RuntimeError(_reason)
    return module


def isa_name() -> str:
    """The instruction set in use: "portable", "avx2", "avx512" or "avx512_bf16"."""
    return _library().isa_name()


def _arg(tensor: Tensor | None) -> tuple[int, ...]:
    if tensor is None:
        return _ABSENT
    return (tensor.data_ptr(), _DTYPES[tensor.dtype], *tensor.shape, *tensor.stride())


def _check_tensor(name: str, tensor: object, shape: tuple[int, ...] | None = None) -> str | None:
    if not isinstance(tensor, Tensor):
        return f"{name}: expected a torch.Tensor, got {type(tensor).__name__}"
    if tensor.device.type != "cpu":
        return f"{name}: expected a tensor on the CPU, got one on {tensor.device}"
    if tensor.layout != torch.strided:
        return f"{name}: expected a dense (strided) tensor, got layout {tensor.layout}"
    if tensor.dtype not in _DTYPES:
        return f"{name}: expected float32, bfloat16 or float64, got {tensor.dtype}"
    if tensor.is_conj() or tensor.is_neg():
        return f"{name}: expected plain values, got a lazy conjugate or negative view"
    if shape is not None and tuple(tensor.shape) != shape:
        return f"{name}: expected shape {list(shape)}, got {list(tensor.shape)}"
    return None


def can_run_attention(
    features: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, variant: str = "released"
) -> str | None:
    """None where the C++ attention can take these arguments, else one sentence saying why not."""
    if (reason := unavailable_reason()) is not None:
        return reason
    if variant not in _VARIANTS:
        return f"variant: expected 'released' or 'paper', got {variant!r}"
    if (reason := _check_tensor("features", features)) is not None:
        return reason
    if features.dim() != 4 or 0 in features.shape[1:]:
        return f"features: expected [B, C, H, W] with C, H, W >= 1, got {list(features.shape)}"
    if features.dtype == torch.float16:
        return "features: expected float32, bfloat16 or float64, got float16 (scores overflow its range)"
    channels = features.shape[1]
    if weight is not None:
        if (reason := _check_tensor("weight", weight, (channels, 2 * channels, 1, 1))) is not None:
            return reason
        if weight.dtype != features.dtype:
            return f"weight: expected {features.dtype}, got {weight.dtype}"
    if bias is not None:
        if (reason := _check_tensor("bias", bias, (channels,))) is not None:
            return reason
        if bias.dtype != features.dtype:
            return f"bias: expected {features.dtype}, got {bias.dtype}"
    return None


def _require(reason: str | None) -> None:
    if reason is not None:
        if unavailable_reason() is not None:
            raise RuntimeError(reason)
        raise (TypeError if "torch.Tensor" in reason else ValueError)(reason)


def _empty_like(tensor: Tensor, channels: int | None = None) -> Tensor:
    """Dense; channels_last where ``tensor`` is that and not also contiguous."""
    batch, own, height, width = tensor.shape
    last = not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)
    return torch.empty(
        (batch, own if channels is None else channels, height, width),
        dtype=tensor.dtype,
        memory_format=torch.channels_last if last else torch.contiguous_format,
        device="cpu",
    )


def _result(out: Tensor | None, like: Tensor, channels: int | None = None) -> Tensor:
    if out is None:
        return _empty_like(like, channels)
    shape = (like.shape[0], like.shape[1] if channels is None else channels, *like.shape[2:])
    if (reason := _check_tensor("out", out, shape)) is not None:
        raise ValueError(reason)
    if out.dtype != like.dtype:
        raise ValueError(f"out: expected {like.dtype}, got {out.dtype}")
    return out


def _stats_shape(features: Tensor) -> tuple[int, int, int]:
    return (2, features.shape[0], features.shape[2] * features.shape[3])


def _forward(
    features: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    variant: str,
    out: Tensor | None,
    attended: Tensor | None,
) -> Tensor:
    dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
    stats = torch.empty(_stats_shape(features), dtype=dtype, device="cpu")
    weight_arg = _ABSENT if weight is None else _arg(weight.detach()[None, None, :, :, 0, 0])
    bias_arg = _ABSENT if bias is None else _arg(bias.detach()[None, None, None])
    _library().attention_forward(
        _arg(features),
        weight_arg,
        bias_arg,
        variant == "released",
        _arg(out),
        _arg(attended),
        _arg(stats[None]),
        forks.kernel_threads(),
    )
    return stats


def attention_forward(features: Tensor, variant: str, *, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Attended features [B, C, H, W] in the features' dtype, and stats, the softmax's row statistics.

    Stats are [2, B, H*W], float32 (float64 for float64). With the scores S in units of log 2: m, which is their
    maximum or at most 8 less (0 in the paper's variant), and the sum of exp2(S - m).
    """
    _require(can_run_attention(features, variant=variant))
    attended = _result(out, features)
    return attended, _forward(features, None, None, variant, None, attended)


def attention_backward(
    grad_attended: Tensor, features: Tensor, attended: Tensor, stats: Tensor, variant: str
) -> Tensor:
    """Gradient of the features, from that of ``attended`` and what ``attention_forward`` returned."""
    _require(can_run_attention(features, variant=variant))
    for name, tensor in (("grad_attended", grad_attended), ("attended", attended)):
        _require(_check_tensor(name, tensor, tuple(features.shape)))
    _require(_check_tensor("stats", stats, _stats_shape(features)))
    grad = _empty_like(features)
    _library().attention_backward(
        _arg(grad_attended),
        _arg(features),
        _arg(attended),
        _arg(stats.contiguous()[None]),
        variant == "released",
        _arg(grad),
        forks.kernel_threads(),
    )
    return grad


def attention_block_forward(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    variant: str,
    *,
    out: Tensor | None = None,
    save_attended: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Block output [B, C, H, W], the attended features if ``save_attended`` (for the backward), and stats."""
    _require(can_run_attention(features, weight, bias, variant))
    result = _result(out, features)
    attended = _empty_like(features) if save_attended else None
    return result, attended, _forward(features, weight, bias, variant, result, attended)


def attention_block_backward(
    grad_out: Tensor,
    features: Tensor,
    attended: Tensor | None,
    stats: Tensor,
    weight: Tensor,
    variant: str,
    *,
    needs: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of features, weight and bias (those in ``needs``). Recomputes ``attended`` where it is None."""
    _require(can_run_attention(features, weight, None, variant))
    _require(_check_tensor("grad_out", grad_out, tuple(features.shape)))
    batch, channels, height, width = features.shape
    rows = attended
    if rows is None:
        # Unused where only the bias's gradient is wanted.
        rows, stats = attention_forward(features, variant) if needs[0] or needs[1] else (features, stats)
    # The 1x1 convolution's own gradients are plain matrix products: torch's are as good as they get.
    grad = grad_out.reshape(batch, channels, height * width)
    flat_weight = weight.detach().reshape(channels, 2 * channels)
    weight_a, weight_f = flat_weight.split(channels, dim=1)
    if variant == "paper":
        weight_a, weight_f = weight_f, weight_a
    grad_features = grad_weight = grad_bias = None
    if needs[0]:
        grad_attended = torch.matmul(weight_a.t(), grad).view(features.shape)
        grad_features = attention_backward(grad_attended, features, rows, stats, variant)
        grad_features += torch.matmul(weight_f.t(), grad).view(features.shape)
    if needs[1]:

        def columns(tensor: Tensor) -> Tensor:
            return tensor.transpose(0, 1).reshape(channels, batch * height * width)

        grad_columns = columns(grad_out)
        parts = [grad_columns @ columns(rows).t(), grad_columns @ columns(features).t()]
        if variant == "paper":
            parts.reverse()
        grad_weight = torch.cat(parts, dim=1).view(weight.shape)
    if needs[2]:
        grad_bias = grad.sum(dim=(0, 2))
    return grad_features, grad_weight, grad_bias


def can_run_merge(image: Tensor, output: Tensor, mask: Tensor) -> str | None:
    """None where the C++ merge can take these arguments, else one sentence saying why not."""
    if (reason := unavailable_reason()) is not None:
        return reason
    if (reason := _check_tensor("image", image)) is not None:
        return reason
    if image.dim() != 4 or image.shape[1] != 3:
        return f"image: expected [B, 3, H, W], got {list(image.shape)}"
    batch, _, height, width = image.shape
    if (reason := _check_tensor("output", output, (batch, 3, height, width))) is not None:
        return reason
    if (reason := _check_tensor("mask", mask, (batch, 1, height, width))) is not None:
        return reason
    for name, tensor in (("output", output), ("mask", mask)):
        if tensor.dtype != image.dtype:
            return f"{name}: expected {image.dtype}, got {tensor.dtype}"
    return None


def _merge_forward(
    image: Tensor, output: Tensor, mask: Tensor, concat: bool, tanh: bool, out: Tensor | None
) -> Tensor:
    _require(can_run_merge(image, output, mask))
    result = _result(out, image, 4 if concat else 3)
    _library().merge_forward(
        _arg(image), _arg(output), _arg(mask), concat, tanh, _arg(result), forks.kernel_threads()
    )
    return result


def _merge_backward(
    grad: Tensor,
    image: Tensor,
    output: Tensor,
    mask: Tensor,
    concat: bool,
    tanh: bool,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    _require(can_run_merge(image, output, mask))
    shape = (image.shape[0], 4 if concat else 3, *image.shape[2:])
    _require(_check_tensor("grad", grad, shape))
    grads = [_empty_like(tensor) if need else None for tensor, need in zip((image, output, mask), needs, strict=True)]
    _library().merge_backward(
        _arg(grad),
        _arg(image),
        _arg(output),
        _arg(mask),
        concat,
        tanh,
        *(_arg(tensor) for tensor in grads),
        forks.kernel_threads(),
    )
    return grads[0], grads[1], grads[2]


def merge_concat_forward(
    image: Tensor, output: Tensor, mask: Tensor, *, tanh: bool = False, out: Tensor | None = None
) -> Tensor:
    """``cat(image * (1 - mask) + o * mask, mask)`` [B, 4, H, W], o = output or tanh(output)."""
    return _merge_forward(image, output, mask, True, tanh, out)


def merge_concat_backward(
    grad: Tensor,
    image: Tensor,
    output: Tensor,
    mask: Tensor,
    *,
    tanh: bool = False,
    needs: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of image, output and mask (those in ``needs``) from that of the four channels."""
    return _merge_backward(grad, image, output, mask, True, tanh, needs)


def merge_forward(
    image: Tensor, output: Tensor, mask: Tensor, *, tanh: bool = False, out: Tensor | None = None
) -> Tensor:
    """``image * (1 - mask) + o * mask`` [B, 3, H, W], o = output or tanh(output)."""
    return _merge_forward(image, output, mask, False, tanh, out)


def merge_backward(
    grad: Tensor,
    image: Tensor,
    output: Tensor,
    mask: Tensor,
    *,
    tanh: bool = False,
    needs: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of image, output and mask (those in ``needs``) from that of the three channels."""
    return _merge_backward(grad, image, output, mask, False, tanh, needs)
