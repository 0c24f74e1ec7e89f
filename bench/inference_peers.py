"""The contestants of bench_inference.py: other ways to run LGNet.

Every peer is a function (image, mask) -> result on float32 CPU tensors. All start from the eager reference, whose
attention is in the form (box sum on the features, scaled_dot_product_attention) that these tools handle best.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from bench.timing import SMOKE
from lgnet_fast import LGNet

Peer = Callable[[Tensor, Tensor], Tensor]


def onnx_file(model: LGNet, image: Tensor, mask: Tensor, folder: Path) -> Path:
    """The eager model as ONNX, opset 17."""
    file = folder / "lgnet.onnx"
    torch.onnx.export(model, (image, mask), str(file), opset_version=17, dynamo=False, input_names=["image", "mask"])
    return file


def openvino(file: Path, precision: str, threads: int) -> Peer:
    """OpenVINO, latency mode; precision "f32" or "bf16"."""
    import openvino as ov

    core = ov.Core()
    compiled = core.compile_model(
        core.read_model(file),
        "CPU",
        {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads},
    )
    request = compiled.create_infer_request()

    def run(image: Tensor, mask: Tensor) -> Tensor:
        result = request.infer({"image": image.numpy(), "mask": mask.numpy()}, share_inputs=True)
        return torch.from_numpy(result[compiled.output(0)])

    return run


def onnxruntime(file: Path, threads: int) -> Peer:
    """ONNX Runtime on its CPU provider, all graph optimisations."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

    def run(image: Tensor, mask: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"image": image.numpy(), "mask": mask.numpy()})[0])

    return run


def compiled(model: LGNet, dtype: torch.dtype, freezing: bool) -> Peer:
    """torch.compile, max-autotune, or with weights frozen (which max-autotune mode switches off again); under
    autocast for bfloat16."""
    import torch._inductor.config as inductor

    fast = torch.compile(model, mode="default" if freezing else "max-autotune")

    def run(image: Tensor, mask: Tensor) -> Tensor:
        lowered = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
        with inductor.patch(freezing=freezing), torch.no_grad(), lowered:
            return fast(image, mask)

    return run


def eager(model: LGNet) -> Peer:
    """The reference itself."""

    def run(image: Tensor, mask: Tensor) -> Tensor:
        with torch.no_grad():
            return model(image, mask)

    return run


def peers(model: LGNet, image: Tensor, mask: Tensor, dtype: torch.dtype, compile: bool = True) -> dict[str, Peer]:
    """Every peer that computes in `dtype`, with or without torch.compile; `model` must have backend "eager"."""
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as name:
        file = onnx_file(model, image, mask, Path(name))
        if SMOKE:  # compiling takes longer than everything else
            return {"onnxruntime": onnxruntime(file, threads), "eager": eager(model)}
        # A model compiles once: the frozen form gets a copy.
        both = {}
        if compile:
            both["compiled"] = compiled(model, dtype, freezing=False)
            both["compiled_frozen"] = compiled(copy.deepcopy(model), dtype, freezing=True)
        if dtype == torch.bfloat16:
            return {"openvino": openvino(file, "bf16", threads), **both}
        return {
            "openvino": openvino(file, "f32", threads),
            "onnxruntime": onnxruntime(file, threads),
            "eager": eager(model),
            **both,
        }
