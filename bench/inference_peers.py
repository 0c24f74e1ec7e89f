"""The contestants of bench_inference.py: other ways to run LGNet.

Every peer is a function (image, mask) -> result on float32 CPU tensors. All start from the eager reference, whose
attention is in the form (box sum on the features, scaled_dot_product_attention) that these tools handle best.
"""

from __future__ import annotations

import copy
import subprocess
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.timing import SMOKE
from lgnet_fast import LGNet
from lgnet_fast.ops.torch_state import has_fast_bfloat16

Peer = Callable[[Tensor, Tensor], Tensor]


OUTPUT = "result"


def onnx_file(model: LGNet, image: Tensor, mask: Tensor, folder: Path) -> Path:
    """The eager model as ONNX, opset 17."""
    file = folder / "lgnet.onnx"
    torch.onnx.export(
        model, (image, mask), str(file), opset_version=17, dynamo=False,
        input_names=["image", "mask"], output_names=[OUTPUT],
    )  # fmt: skip
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


def mnn(file: Path, threads: int) -> Peer:
    """MNN's static module on its CPU backend, in float32."""
    # Not MNN.tools.mnnconvert: importing that installs a package and reports to its makers.
    import _tools as converter
    import MNN
    from MNN import expr

    converted = str(file.with_suffix(".mnn"))
    converter.mnnconvert(["", "-f", "ONNX", "--modelFile", str(file), "--MNNModel", converted, "--bizCode", "bench"])
    runtime = MNN.nn.create_runtime_manager(({"backend": "CPU", "numThread": threads, "precision": "high"},))
    names = ["image", "mask"]
    network = MNN.nn.load_module_from_file(converted, names, [OUTPUT], runtime_manager=runtime, dynamic=False)

    def run(image: Tensor, mask: Tensor) -> Tensor:
        given = [expr.const(x.numpy(), list(x.shape), expr.NCHW) for x in (image, mask)]
        result = expr.convert(network.forward(given)[0], expr.NCHW)
        return torch.from_numpy(np.array(result.read())).view(image.shape)

    return run


def ncnn(file: Path, threads: int, bf16: bool) -> Peer:
    """ncnn, converted by pnnx; `bf16`: maps are kept in bfloat16. One picture a call, as ncnn has no batches."""
    import ncnn as library
    import pnnx

    shapes = "[1,3,256,256],[1,1,256,256]"
    command = [pnnx.EXEC_PATH, str(file), f"inputshape={shapes}"]
    subprocess.run(command, cwd=file.parent, check=True, capture_output=True)
    network = library.Net()
    network.opt.num_threads = threads
    network.opt.use_bf16_storage = bf16
    for part, load in ((".ncnn.param", network.load_param), (".ncnn.bin", network.load_model)):
        if load(str(file.with_suffix(part))) != 0:
            raise RuntimeError(f"ncnn cannot load {file.with_suffix(part)}")

    def run(image: Tensor, mask: Tensor) -> Tensor:
        given: list[Any] = [library.Mat(x[0].numpy()).clone() for x in (image, mask)]
        with network.create_extractor() as extractor:
            extractor.input("in0", given[0])
            extractor.input("in1", given[1])
            return torch.from_numpy(np.array(extractor.extract("out0")[1]))[None]

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
    """Every peer that computes in `dtype`, with or without torch.compile; `model` must have backend "eager".

    Without PyTorch in bfloat16 where it takes more than a hundred times as long as in float32.
    """
    bf16 = dtype == torch.bfloat16
    compile = compile and (has_fast_bfloat16() or not bf16)
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as name:
        file = onnx_file(model, image, mask, Path(name))
        if SMOKE:  # compiling takes longer than everything else
            return {"onnxruntime": onnxruntime(file, threads), "eager": eager(model)}
        others = {}  # a model compiles once: the frozen form gets a copy
        if compile:
            others["compiled"] = compiled(model, dtype, freezing=False)
            others["compiled_frozen"] = compiled(copy.deepcopy(model), dtype, freezing=True)
        if find_spec("ncnn") and find_spec("pnnx"):
            others["ncnn"] = ncnn(file, threads, bf16)
        if bf16:
            return {"openvino": openvino(file, "bf16", threads), **others}
        if find_spec("MNN"):
            others["mnn"] = mnn(file, threads)
        return {
            "openvino": openvino(file, "f32", threads),
            "onnxruntime": onnxruntime(file, threads),
            "eager": eager(model),
            **others,
        }
