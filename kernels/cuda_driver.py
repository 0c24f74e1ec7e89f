"""Machine code of CUDA C++ kernels, loaded and launched through NVIDIA's driver API: users need no compiler.

It lies in ``machine_code/``, a file for each source of ``csrc/cuda/`` and each GPU; ``make cubin`` writes them.
Launches go to PyTorch's current stream and can be captured into a graph.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

_CLUSTER, _COOPERATIVE, _PROGRAMMATIC = 4, 2, 6  # CUlaunchAttributeID
_STATIC_SHARED, _MAX_DYNAMIC_SHARED = 1, 8  # CUfunction_attribute
_KERNEL_NODE = 0  # CUgraphNodeType
_FOLDER = Path(__file__).with_name("machine_code")


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [
        *((name, ctypes.c_uint) for name in ("gridX", "gridY", "gridZ", "blockX", "blockY", "blockZ", "sharedBytes")),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("count", ctypes.c_uint),
    ]


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute: `value` is a union of 64 bytes."""

    _fields_ = [("id", ctypes.c_int), ("padding", ctypes.c_int), ("value", ctypes.c_uint * 16)]


class _KernelNode(ctypes.Structure):
    """CUDA_KERNEL_NODE_PARAMS, version 2."""

    _fields_ = [
        ("function", ctypes.c_void_p),
        *((name, ctypes.c_uint) for name in ("gridX", "gridY", "gridZ", "blockX", "blockY", "blockZ", "sharedBytes")),
        *((name, ctypes.c_void_p) for name in ("parameters", "extra", "kernel", "context")),
    ]


@functools.cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


def call(name: str, *arguments: Any) -> None:
    """Call a function of the driver.

    Raises:
        OSError: there is no driver.
        RuntimeError: the driver reports an error.
    """
    code = getattr(_library(), name)(*arguments)
    if code:
        text = ctypes.c_char_p()
        _library().cuGetErrorString(code, ctypes.byref(text))
        raise RuntimeError(f"{name}: {(text.value or b'unknown error').decode()} ({code})")


def _make_current(device: int) -> None:
    """Set PyTorch's context in a thread that has launched nothing yet and so has none."""
    context = ctypes.c_void_p()
    call("cuCtxGetCurrent", ctypes.byref(context))
    if not context.value:
        call("cuDevicePrimaryCtxRetain", ctypes.byref(context), ctypes.c_int(device))
        call("cuCtxSetCurrent", context)


def machine_code(source: str, capability: tuple[int, int]) -> Path:
    """The file that a GPU of a compute capability loads for a source of csrc/cuda/ (its name, without ``.cu``).

    That is its own code, that of its generation's first GPU, or from 9.0 on PTX, which the driver compiles.

    Raises:
        FileNotFoundError: there is none.
    """
    major, minor = capability
    named = [f"sm_{major}{minor}a.cubin", f"sm_{major}{minor}.cubin", f"sm_{major}0.cubin"]
    if capability >= (9, 0):
        named.append("compute_90.ptx")
    for path in (_FOLDER / f"{source}.{name}" for name in named):
        if path.is_file():
            return path
    raise FileNotFoundError(f"{_FOLDER.name}: no code of {source} for compute capability {major}.{minor}")


@functools.cache
def _module(source: str, device: int) -> ctypes.c_void_p:
    module = ctypes.c_void_p()
    code = machine_code(source, torch.cuda.get_device_capability(device)).read_bytes()
    call("cuModuleLoadData", ctypes.byref(module), code)
    return module


@functools.cache
def _function(source: str, name: str, device: int) -> ctypes.c_void_p:
    function = ctypes.c_void_p()
    call("cuModuleGetFunction", ctypes.byref(function), _module(source, device), name.encode())
    _allow_all_shared(function, device)
    return function


def _allow_all_shared(function: ctypes.c_void_p, device: int) -> int:
    """Let launches of a function have as much shared memory as the GPU allows; return its static part in bytes."""
    static = ctypes.c_int()
    call("cuFuncGetAttribute", ctypes.byref(static), ctypes.c_int(_STATIC_SHARED), function)
    properties: Any = torch.cuda.get_device_properties(device)
    limit = properties.shared_memory_per_block_optin - static.value
    call("cuFuncSetAttribute", function, ctypes.c_int(_MAX_DYNAMIC_SHARED), ctypes.c_int(limit))
    return static.value


class Kernel:
    """One compiled kernel and its launch parameters. It is loaded once on each GPU that it runs on.

    Args:
        source: of csrc/cuda/, without ``.cu``.
        name: of the kernel in the source.
        threads: per thread block.
        shared_bytes: dynamic shared memory per thread block.
        cluster: thread blocks per cluster, for Hopper and newer; None: no clusters.
        cooperative: the launch fails unless all blocks fit on the GPU at once.
        overlap: start before the previous kernel ends; the kernel must wait with ``griddepcontrol.wait``.
    """

    def __init__(
        self,
        source: str,
        name: str,
        *,
        threads: int,
        shared_bytes: int = 0,
        cluster: int | None = None,
        cooperative: bool = False,
        overlap: bool = False,
    ) -> None:
        self.source, self.name = source, name
        self.threads, self.shared_bytes, self.cluster = threads, shared_bytes, cluster
        chosen: list[tuple[int, tuple[int, ...]]] = [] if cluster is None else [(_CLUSTER, (cluster, 1, 1))]
        if cooperative:
            chosen.append((_COOPERATIVE, (1,)))
        if overlap:
            chosen.append((_PROGRAMMATIC, (1,)))
        self._attributes = (_Attribute * len(chosen))()
        for attribute, (number, value) in zip(self._attributes, chosen):
            attribute.id = number
            attribute.value[: len(value)] = value

    def _config(self, grid: int, stream: int) -> _Config:
        return _Config(
            grid, 1, 1, self.threads, 1, 1, self.shared_bytes,
            stream, ctypes.addressof(self._attributes), len(self._attributes),
        )  # fmt: skip

    def load(self) -> ctypes.c_void_p:
        """The function on the current GPU. Loading cannot be captured into a graph: call this before a capture.

        Raises:
            OSError: there is no driver, or no machine code for this GPU.
            RuntimeError: the driver rejects the machine code.
        """
        device = torch.cuda.current_device()
        _make_current(device)
        return _function(self.source, self.name, device)

    def blocks_at_once(self) -> int:
        """Number of blocks that fit on the current GPU at once."""
        if self.cluster is not None and self.cluster > 1:
            return self.cluster * self.active_clusters()
        count = ctypes.c_int()
        call(
            "cuOccupancyMaxActiveBlocksPerMultiprocessor", ctypes.byref(count), self.load(),
            ctypes.c_int(self.threads), ctypes.c_size_t(self.shared_bytes),
        )  # fmt: skip
        return count.value * torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count

    def active_clusters(self) -> int:
        """Number of clusters that fit on the current GPU at once; for a kernel with clusters."""
        assert self.cluster is not None
        count = ctypes.c_int()
        config = self._config(self.cluster, 0)
        config.count = 1  # the first attribute is the cluster's size
        call("cuOccupancyMaxActiveClusters", ctypes.byref(count), self.load(), ctypes.byref(config))
        return count.value

    def launch(self, grid: int, addresses: Sequence[ctypes.c_void_p]) -> None:
        """Launch `grid` blocks on the current stream of the current GPU.

        `addresses`: of the parameters; the driver copies them before this returns.
        """
        config = self._config(grid, torch.cuda.current_stream().cuda_stream)
        parameters = (ctypes.c_void_p * len(addresses))(*addresses)
        call("cuLaunchKernelEx", ctypes.byref(config), self.load(), parameters, None)


def spread_blocks(graph: int, device: int) -> int:
    """Give kernels of a graph so much shared memory that a multiprocessor holds one of their blocks at a time.

    Where launches overlap, a kernel's blocks are placed while those of the kernel before still run, by free shared
    memory: two may get the same multiprocessor and take twice as long, while others stay idle. Changed are kernels
    without clusters that have no more blocks than the GPU has multiprocessors.

    Args:
        graph: address of a CUgraph, not instantiated yet.
        device: number of the GPU.

    Returns:
        The number of kernels that were changed.

    Raises:
        RuntimeError: the driver reports an error.
    """
    properties: Any = torch.cuda.get_device_properties(device)
    least = properties.shared_memory_per_multiprocessor // 2  # each block also has 1 kB of its own, so two do not fit
    count = ctypes.c_size_t()
    call("cuGraphGetNodes", ctypes.c_void_p(graph), None, ctypes.byref(count))
    nodes = (ctypes.c_void_p * count.value)()
    call("cuGraphGetNodes", ctypes.c_void_p(graph), nodes, ctypes.byref(count))
    changed = 0
    for address in nodes:
        node, kind = ctypes.c_void_p(address), ctypes.c_int()
        call("cuGraphNodeGetType", node, ctypes.byref(kind))
        if kind.value == _KERNEL_NODE:
            changed += _spread_kernel(node, device, properties.multi_processor_count, least)
    return changed


def _spread_kernel(node: ctypes.c_void_p, device: int, multiprocessors: int, shared_bytes: int) -> bool:
    """Raise the shared memory of one kernel's blocks to `shared_bytes`; False where it is not to be changed."""
    kernel, cluster = _KernelNode(), _Attribute()
    call("cuGraphKernelNodeGetParams_v2", node, ctypes.byref(kernel))
    if not kernel.function or kernel.gridX * kernel.gridY * kernel.gridZ > multiprocessors:
        return False
    call("cuGraphKernelNodeGetAttribute", node, ctypes.c_int(_CLUSTER), ctypes.byref(cluster.value))
    if max(cluster.value[:3]) > 1:
        return False
    dynamic = shared_bytes - _allow_all_shared(ctypes.c_void_p(kernel.function), device)
    if kernel.sharedBytes >= dynamic:
        return False
    kernel.sharedBytes = dynamic
    call("cuGraphKernelNodeSetParams_v2", node, ctypes.byref(kernel))
    return True
