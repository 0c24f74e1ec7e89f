"""Routes that KServe's probes and clients call: health and the model's metadata."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Response

from ..version import __version__
from .routing import ServerState

router = APIRouter()


@router.get("/v2/health/live", tags=["KServe"], response_class=Response)
async def live() -> Response:
    """200 while the process answers."""
    return Response(status_code=200)


@router.get("/v2/health/ready", tags=["KServe"], response_class=Response)
@router.get("/v2/models/lgnet/ready", tags=["KServe"], response_class=Response)
async def ready(state: ServerState) -> Response:
    """200 while new work is taken, else 503."""
    return Response(status_code=200 if state.ready else 503)


@router.get("/v2/models/lgnet", tags=["KServe"])
async def model_metadata() -> dict[str, Any]:
    """The model's name and the pictures that it takes; tensors are not served, see the ONNX export."""
    return {
        "name": "lgnet",
        "versions": [__version__],
        "platform": "lgnet_fast",
        "inputs": [
            {"name": "image", "datatype": "FP32", "shape": [-1, 3, -1, -1]},
            {"name": "mask", "datatype": "FP32", "shape": [-1, 1, -1, -1]},
        ],
        "outputs": [{"name": "merged", "datatype": "FP32", "shape": [-1, 3, -1, -1]}],
    }
