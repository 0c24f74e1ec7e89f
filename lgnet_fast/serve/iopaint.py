"""Routes that clients of IOPaint and lama-cleaner call."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from fastapi import APIRouter, Request, Response
from PIL import Image

from ..pipeline.masks import read_hole, soft_edge
from .bodies import (
    AdjustMaskRequest,
    InpaintFields,
    InpaintRequest,
    ModelRequest,
    checked,
    checked_format,
    from_base64,
    mask_picture,
    read_json,
)
from .display import Display, png
from .errors import RequestError
from .routing import IMAGE_RESPONSES, ServerState, body_of, form_fields, form_schema, has_type
from .state import State
from .work import Job, SharedInpainter

_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])")
_MASK_COLOUR = (255, 203, 0, 186)  # IOPaint's brush
_Asked: TypeAlias = tuple[bytes, bytes, InpaintFields]  # the picture's file, the mask's, the other fields

router = APIRouter()


@router.post(
    "/api/v1/inpaint",
    tags=["IOPaint"],
    response_class=Response,
    responses=IMAGE_RESPONSES,
    openapi_extra=body_of(
        ("application/json", InpaintRequest),
        ("multipart/form-data", form_schema(InpaintFields, ["image", "mask"], "image", "mask")),
    ),
)
async def inpaint(request: Request, state: ServerState) -> Response:
    """Fills the hole of a picture; the answer is the picture's bytes, in its own format unless `format` is
    given. With `Accept: application/json`, without `image/` and `*/*`, it is JSON with a data URL, timings and
    backend."""
    accepted = request.headers.get("accept", "").lower()
    # Clients that take anything, such as axios with "application/json, text/plain, */*", expect IOPaint's bytes.
    wants_json = "application/json" in accepted and "*/*" not in accepted and "image/" not in accepted
    if has_type(request, "multipart/"):
        found = await form_fields(request, state, ("image", "mask"))
        return await _answer_inpaint(request, state, lambda: _of_form(found), wants_json)
    body = await request.body()

    def parse() -> _Asked:
        asked = read_json(body, InpaintRequest)
        return from_base64(asked.image, "image"), from_base64(asked.mask, "mask"), asked

    return await _answer_inpaint(request, state, parse, wants_json)


@router.post(
    "/inpaint",
    tags=["IOPaint"],
    response_class=Response,
    responses=IMAGE_RESPONSES,
    openapi_extra=body_of(("multipart/form-data", form_schema(InpaintFields, ["image", "mask"], "image", "mask"))),
)
async def inpaint_form(request: Request, state: ServerState) -> Response:
    """The same as lama-cleaner had it: a form, all fields but the two files optional."""
    found = await form_fields(request, state, ("image", "mask"))
    return await _answer_inpaint(request, state, lambda: _of_form(found), False)


@router.get("/api/v1/server-config", tags=["IOPaint"])
async def server_config(state: ServerState) -> dict[str, Any]:
    """What this server can do, under IOPaint's keys."""
    return {
        "plugins": [],
        "modelInfos": [_model_info(name) for name in state.models],
        "removeBGModel": "",
        "removeBGModels": [],
        "realesrganModel": "",
        "realesrganModels": [],
        "interactiveSegModel": "",
        "interactiveSegModels": [],
        "enableFileManager": False,
        "enableAutoSaving": False,
        "enableControlnet": False,
        "controlnetMethod": None,
        "disableModelSwitch": len(state.models) == 1,
        "isDesktop": False,
        "samplers": [],
    }


@router.get("/api/v1/model", tags=["IOPaint"])
async def current_model(state: ServerState) -> dict[str, Any]:
    """The model that fills: the first one, until another is chosen."""
    return _model_info(state.chosen)


@router.post(
    "/api/v1/model",
    tags=["IOPaint"],
    responses={
        400: {"description": "no such model"},
        403: {"description": "there is one model, which was chosen when the server started"},
        422: IMAGE_RESPONSES[422],
    },
    openapi_extra=body_of(("application/json", ModelRequest)),
)
async def switch_model(request: Request, state: ServerState) -> dict[str, Any]:
    """Of several models, chooses the one of these calls, for all clients; the page has its own choice."""
    state.choose(read_json(await request.body(), ModelRequest).name)
    return _model_info(state.chosen)


@router.post(
    "/api/v1/adjust_mask",
    tags=["IOPaint"],
    response_class=Response,
    responses=IMAGE_RESPONSES,
    openapi_extra=body_of(("application/json", AdjustMaskRequest)),
)
async def adjust_mask(request: Request, state: ServerState) -> Response:
    """A mask grown or shrunk by `kernel_size` pixels, or reversed: a PNG in the brush's colour."""
    body = await request.body()

    def work(job: Job) -> bytes:
        asked = read_json(body, AdjustMaskRequest)
        mask = mask_picture(from_base64(asked.mask, "mask"), state.options.max_pixels)
        hole = read_hole(mask, mask.height, mask.width, channel="luma")
        if asked.operate == "expand":
            hole = soft_edge(hole, asked.kernel_size) > 0
        elif asked.operate == "shrink":
            hole = ~(soft_edge(~hole, asked.kernel_size) > 0)
        elif asked.operate == "reverse":
            hole = ~hole
        else:
            raise RequestError(f"operate: expected expand, shrink or reverse, got {asked.operate[:40]!r}")
        shown = np.zeros((*hole.shape, 4), np.uint8)
        shown[hole] = _MASK_COLOUR
        return png(Image.fromarray(shown))

    data, _ = await state.queue.run(work, request.is_disconnected)
    return Response(data, media_type="image/png")


async def _answer_inpaint(request: Request, state: State, parse: Callable[[], _Asked], wants_json: bool) -> Response:
    def work(job: Job) -> tuple[bytes, str, dict[str, Any], InpaintFields]:
        image, mask, fields = parse()
        format = fields.format and checked_format(fields.format)
        session, patch = state.fill_once(job, image, mask, fields)
        data, media_type = state.encode(job, session, format, fields.quality)
        assert isinstance(patch.inpainter, SharedInpainter)  # of `state`
        told: dict[str, Any] = {
            "backend": patch.inpainter.backend,
            "strategy": patch.strategy,
            "passes": patch.passes,
        }
        if wants_json and fields.stages:
            box, stages = session.stages()
            display = Display.of(session, session.result())
            told["stages"] = [_data_url(png(display.picture(one, box)), "image/png") for one in stages]
            told["box"] = [box.left, box.top, box.right - box.left, box.bottom - box.top]
        return data, media_type, told, fields

    (data, media_type, told, fields), job = await state.queue.run(work, request.is_disconnected)
    headers = {
        "X-Seed": str(fields.sd_seed),
        "X-Strategy": told["strategy"],
        "X-Backend": told["backend"],
        "Server-Timing": job.server_timing,
    }
    if not wants_json:
        return Response(data, media_type=media_type, headers=headers)
    body = {"image": _data_url(data, media_type), "timings": job.seconds, **told}
    return Response(json.dumps(body), media_type="application/json", headers=headers)


def _of_form(found: dict[str, Any]) -> _Asked:
    for name in ("image", "mask"):
        if not isinstance(found.get(name), bytes):
            raise RequestError(f"{name}: expected a picture file", status=422)
    texts = {name: value for name, value in found.items() if isinstance(value, str) and value != ""}
    fields = {_CAMEL.sub("_", name).lower(): value for name, value in texts.items()}
    return found["image"], found["mask"], checked(fields, InpaintFields)


def _data_url(data: bytes, media_type: str) -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def _model_info(name: str) -> dict[str, Any]:
    return {
        "name": name,
        "path": name,
        "model_type": "inpaint",
        "need_prompt": False,
        "is_single_file_diffusers": False,
        "support_strength": False,
        "support_outpainting": False,
        "support_lcm_lora": False,
        "support_controlnet": False,
        "support_brushnet": False,
        "support_powerpaint_v2": False,
        "controlnets": [],
        "brushnets": [],
    }
