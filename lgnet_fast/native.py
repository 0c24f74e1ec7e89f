"""The C++ extension ``lgnet_fast._C`` (sources in csrc/): loading it, and passing tensors to it.

The extension does not depend on PyTorch. A tensor is passed as ten integers, see :func:`tensor_arg`.
"""

from __future__ import annotations

import importlib
import logging
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from . import cpp_sources, forks

logger = logging.getLogger("lgnet_fast")

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2, torch.float16: 3}
"""Element types of the extension and their numbers (``DType`` in csrc/common.h)."""

ABSENT = (0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
"""The argument for an optional tensor that is not given."""

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
                note = Path(__file__).resolve().parent / "_C_unavailable.txt"
                why = note.read_text(encoding="utf-8").strip() if note.is_file() else str(error)
                _reason = f"the C++ extension lgnet_fast._C is not installed: {why}"
            else:
                _notice_other_sources(module)
                if forks.forked():
                    module.mark_forked()  # a module that was loaded before a fork detects it
                _module = module
    return _module


def _notice_other_sources(module: ModuleType) -> None:
    """Warn where an editable install has an extension of other sources: results may be those of another version."""
    root = Path(__file__).resolve().parent.parent
    digest = cpp_sources.digest(root)
    if digest is not None and getattr(module, "sources", None) != digest:
        logger.warning(
            "%s was built from other sources than %s; build it again: python setup.py build_ext --inplace",
            module.__file__,
            root / "csrc",
        )


def unavailable_reason() -> str | None:
    """Why the C++ kernels cannot be used at all, in one sentence; None where they can."""
    return None if _load() is not None else _reason


def library() -> ModuleType:
    """The extension module.

    Raises:
        RuntimeError: it is not installed; with the reason.
    """
    module = _load()
    if module is None:
        raise RuntimeError(_reason)
    return module


def isa_name() -> str:
    """The instruction set in use: a name of csrc/isa.inc, such as "portable", "avx2" or "neon"."""
    return str(library().isa_name())


def packing(products: str) -> tuple[int, int, int, int, int]:
    """The layout of packed weights for the instruction set in use.

    Args:
        products: "float32", "bf16" or "bf16x3".

    Returns:
        Lanes of a vector, columns of a panel, elements of a unit, units of a slice, parts of an element; all zero
        where the instruction set has no such products.

    Raises:
        RuntimeError: the extension is not installed.
    """
    module = library()
    lanes, panel, pair, depth, parts = module.packing(module.Products.__members__[products])
    return lanes, panel, pair, depth, parts


def multiplies(products: str) -> bool:
    """Whether the instruction set in use has these products: "float32", "bf16" or "bf16x3"."""
    return packing(products)[0] > 0


def largest_tile(products: str) -> int:
    """Outputs along a side of the largest tile that a convolution may have with such products; 0: there are none.

    Args:
        products: "float32", "bf16" or "bf16x3".
    """
    module = library()
    return int(module.largest_tile(module.Products.__members__[products]))


def reason_against(name: str, tensor: object) -> str | None:
    """Why the extension cannot read `tensor`, in one sentence that begins with `name`; None where it can."""
    if not isinstance(tensor, Tensor):
        return f"{name}: expected a torch.Tensor, got {type(tensor).__name__}"
    if not tensor.is_cpu:
        return f"{name}: expected a tensor on the CPU, got one on {tensor.device}"
    if tensor.layout is not torch.strided:
        return f"{name}: expected a dense (strided) tensor, got layout {tensor.layout}"
    if tensor.dtype not in DTYPES:
        return f"{name}: expected float32, bfloat16, float64 or float16, got {tensor.dtype}"
    if tensor.is_neg():
        return f"{name}: expected plain values, got a lazy negative view"
    return None


def tensor_arg(tensor: Tensor, name: str = "tensor") -> tuple[int, ...]:
    """A tensor as an argument of the extension: address, element type, four sizes, four strides in elements.

    The extension checks sizes; it cannot check the address.

    Args:
        tensor: at most four dimensions, any strides; missing ones are first ones of size 1. It must outlive the call.
        name: of the argument, for errors.

    Raises:
        TypeError: not a tensor.
        ValueError: a tensor that the extension cannot read.
    """
    reason = reason_against(name, tensor)
    if reason is not None:
        raise (ValueError if isinstance(tensor, Tensor) else TypeError)(reason)
    missing = 4 - tensor.dim()
    if missing < 0:
        raise ValueError(f"{name}: expected at most four dimensions, got {list(tensor.shape)}")
    sizes, strides = (1,) * missing + tensor.shape, (0,) * missing + tensor.stride()
    return (tensor.data_ptr(), DTYPES[tensor.dtype], *sizes, *strides)


def variant_arg(variant: str) -> bool:
    """A formulation of attention as the extension takes it: whether it is "released".

    Raises:
        ValueError: it is neither that nor "paper", the two that the extension computes.
    """
    if variant not in ("released", "paper"):
        raise ValueError(f"variant: expected one of released and paper, got {variant!r}")
    return variant == "released"


def optional_arg(tensor: Tensor | None, name: str = "tensor") -> tuple[int, ...]:
    """:func:`tensor_arg`, or :data:`ABSENT` for None."""
    return ABSENT if tensor is None else tensor_arg(tensor, name)
