"""Changing a captured graph through NVIDIA's driver, on a driver that keeps nodes as C structures."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from lgnet_fast.kernels import cuda_driver
from lgnet_fast.kernels.cuda_driver import _KernelNode, spread_blocks

GRAPH = 0x6000
HALF, LIMIT = 233472 // 2, 232448
"""Bytes of shared memory on an H100: half of a multiprocessor's, and the most of a block."""


class Driver:
    """Nodes by address: `kernels` their parameters, `clusters` their blocks per cluster. `static`, `limits`: bytes of
    shared memory by function."""

    def __init__(self) -> None:
        self.kernels: dict[int, _KernelNode] = {}
        self.clusters: dict[int, int] = {}
        self.others: list[int] = []
        self.static: dict[int, int] = {}
        self.limits: dict[int, int] = {}

    def add(
        self, blocks: tuple[int, int, int], shared: int, *, cluster: int = 1, static: int = 0, own: bool = True
    ) -> int:
        """A kernel node; `own`: it has a CUfunction, as kernels of the driver's interface have."""
        node = 0x1000 + 8 * len(self.kernels)
        function = 0x2000 + node
        self.kernels[node] = _KernelNode(
            function if own else None, *blocks, 128, 1, 1, shared, 0x3000 + node, 0, 1, 2
        )
        self.clusters[node], self.static[function], self.limits[function] = cluster, static, 49152
        return node

    def cuGraphGetNodes(self, graph: Any, nodes: Any, count: Any) -> int:
        assert graph.value == GRAPH
        everything = [*self.kernels, *self.others]
        if nodes is not None:
            nodes[:] = everything
        count._obj.value = len(everything)
        return 0

    def cuGraphNodeGetType(self, node: Any, kind: Any) -> int:
        kind._obj.value = 0 if node.value in self.kernels else 1
        return 0

    def cuGraphKernelNodeGetParams_v2(self, node: Any, parameters: Any) -> int:
        ctypes.pointer(parameters._obj)[0] = self.kernels[node.value]
        return 0

    def cuGraphKernelNodeGetAttribute(self, node: Any, attribute: Any, value: Any) -> int:
        assert attribute.value == 4  # CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        value._obj[:3] = (self.clusters[node.value], 1, 1)
        return 0

    def cuFuncGetAttribute(self, value: Any, attribute: Any, function: Any) -> int:
        assert attribute.value == 1  # CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES
        value._obj.value = self.static[function.value]
        return 0

    def cuFuncSetAttribute(self, function: Any, attribute: Any, value: Any) -> int:
        assert attribute.value == 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        self.limits[function.value] = value.value
        return 0

    def cuGraphKernelNodeSetParams_v2(self, node: Any, parameters: Any) -> int:
        changed: _KernelNode = parameters._obj
        if changed.sharedBytes > self.limits[changed.function]:
            return 1
        ctypes.pointer(self.kernels[node.value])[0] = changed
        return 0

    def cuGetErrorString(self, code: int, text: Any) -> None:
        text._obj.value = b"invalid argument"


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    fake = Driver()
    monkeypatch.setattr(cuda_driver, "_library", lambda: fake)
    properties = SimpleNamespace(
        shared_memory_per_multiprocessor=2 * HALF, shared_memory_per_block_optin=LIMIT, multi_processor_count=132
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return fake


def test_the_layout_of_a_nodes_parameters() -> None:
    """Offsets of CUDA_KERNEL_NODE_PARAMS_v2 in cuda.h."""
    offsets = {name: getattr(_KernelNode, name).offset for name, _ in _KernelNode._fields_}
    assert offsets == {
        "function": 0, "gridX": 8, "gridY": 12, "gridZ": 16, "blockX": 20, "blockY": 24, "blockZ": 28,
        "sharedBytes": 32, "parameters": 40, "extra": 48, "kernel": 56, "context": 64,
    }  # fmt: skip
    assert ctypes.sizeof(_KernelNode) == 72


def test_kernels_whose_blocks_fit_one_to_a_multiprocessor_are_changed(driver: Driver) -> None:
    changed = {
        driver.add((128, 1, 1), 51200): HALF,
        driver.add((33, 2, 2), 0, static=2048): HALF - 2048,
        driver.add((1, 1, 1), HALF - 1): HALF,
    }
    kept = {
        driver.add((133, 1, 1), 51200): 51200,  # two of some multiprocessor
        driver.add((64, 2, 2), 1024): 1024,
        driver.add((128, 1, 1), HALF): HALF,  # two do not fit as it is
        driver.add((120, 1, 1), 1024, cluster=8): 1024,
        driver.add((1, 1, 1), 0, own=False): 0,  # PyTorch's
    }
    driver.others.append(0x5000)  # a copy
    before = {node: bytes(kernel) for node, kernel in driver.kernels.items()}
    assert spread_blocks(GRAPH, 0) == len(changed)
    assert {node: kernel.sharedBytes for node, kernel in driver.kernels.items()} == {**changed, **kept}
    for node, kernel in driver.kernels.items():
        kernel.sharedBytes = _KernelNode.from_buffer_copy(before[node]).sharedBytes
        assert bytes(kernel) == before[node]
    for node in changed:
        function = driver.kernels[node].function
        assert driver.limits[function] == LIMIT - driver.static[function]


def test_the_drivers_refusal_is_raised(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    node = driver.add((128, 1, 1), 51200)
    monkeypatch.setattr(driver, "cuFuncSetAttribute", lambda *arguments: 0)
    with pytest.raises(RuntimeError, match=r"cuGraphKernelNodeSetParams_v2: invalid argument \(1\)"):
        spread_blocks(GRAPH, 0)
    assert driver.kernels[node].sharedBytes == 51200
