"""Routes that other tools' clients call: IOPaint, lama-cleaner, OpenAI, A1111, KServe."""

from __future__ import annotations

import base64
import json
import re
import time
from typing import Any

import numpy as np
from fastapi import APIRouter, Request, Response
from PIL import Image
from pydantic import BaseModel
from starlette.datastructures import UploadFile

from ..errors import InvalidMaskError
from ..pipeline.files import upright
from ..pipeline.masks import read_hole, soft_edge
from ..version import __version__
from .bodies import (
    AdjustMaskRequest,
    FillFields,
    Img2ImgRequest,
    InpaintFields,
    InpaintRequest,
    ModelRequest,
    checked,
    from_base64,
    mask_picture,
    read_json,
)
from .display import Display, png
from .errors import RequestError
from .session import Session
from .state import State
from .work import Job

_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])")
_MASK_COLOUR = (255, 203, 0, 186)  # IOPaint's brush
_PICTURE = {"schema": {"type": "string", "format": "binary"}}
IMAGE_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"description": "the picture's bytes", "content": {"image/*": _PICTURE}},
    400: {"description": "what is wrong with the picture, the mask or a field"},
    413: {"description": "too many bytes or pixels"},
    422: {"description": "a field of the wrong type"},
    429: {"description": "the queue is full; Retry-After says when to come again"},
    503: {"description": "shutting down, or over the time limit"},
}


def body_of(*kinds: tuple[str, type[BaseModel] | dict[str, Any]]) -> dict[str, Any]:
    """`openapi_extra` for a body that a route reads itself: (media type, fields or schema)."""
    content = {}
    for media_type, kind in kinds:
        content[media_type] = {"schema": kind if isinstance(kind, dict) else kind.model_json_schema()}
    return {"requestBody": {"required": True, "content": content}}


def form_schema(kind: type[BaseModel], required: list[str], *files: str) -> dict[str, Any]:
    """The schema of a multipart form of some fields and files."""
    schema = kind.model_json_schema()
    schema["properties"].update({name: {"type": "string", "format": "binary"} for name in files})
    schema["required"] = required
    return schema


async def form_fields(request: Request, state: State, files: tuple[str, ...]) -> dict[str, Any]:
    """A multipart form: files as bytes, in `files`; other fields as texts. Raises RequestError."""
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise RequestError("body: expected multipart/form-data", status=415)
    found: dict[str, Any] = {}
    async with request.form(max_files=4, max_fields=64, max_part_size=state.options.max_bytes) as form:
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                if name in files and name in found:
                    raise RequestError(f"{name}: expected one file, got several")
                found[name] = await value.read()
            else:
                found.setdefault(name, value)
    return found


def routes(state: State) -> APIRouter:
    """All of them, over one server's state."""
    router = APIRouter()

    async def answer_inpaint(request: Request, parse: Any, wants_json: bool) -> Response:
        def work(job: Job) -> tuple[bytes, str, dict[str, Any], InpaintFields]:
            image, mask, fields = parse()
            session, patch = state.fill_once(job, image, mask, fields)
            data, media_type = state.encode(job, session, fields.format, fields.quality)
            told: dict[str, Any] = {"strategy": patch.strategy, "passes": patch.passes}
            if wants_json and fields.stages:
                box, stages = session.stages()
                display = Display.of(session, session.result())
                told["stages"] = [_data_url(png(display.picture(one, box)), "image/png") for one in stages]
                told["box"] = [box.left, box.top, box.right - box.left, box.bottom - box.top]
            return data, media_type, told, fields

        (data, media_type, told, fields), job = await state.queue.run(work, request.is_disconnected)
        backend = state.model(None).backend
        headers = {
            "X-Seed": str(fields.sd_seed),
            "X-Strategy": told["strategy"],
            "X-Backend": backend,
            "Server-Timing": job.server_timing,
        }
        if not wants_json:
            return Response(data, media_type=media_type, headers=headers)
        body = {"image": _data_url(data, media_type), "timings": job.seconds, "backend": backend, **told}
        return Response(json.dumps(body), media_type="application/json", headers=headers)

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
    async def inpaint(request: Request) -> Response:
        """Fills the hole of a picture; the answer is the picture's bytes, in its own format unless `format` is
        given. With `Accept: application/json` it is JSON with a data URL, timings and backend."""
        wants_json = "application/json" in request.headers.get("accept", "")
        if request.headers.get("content-type", "").startswith("multipart/"):
            found = await form_fields(request, state, ("image", "mask"))
            return await answer_inpaint(request, lambda: _of_form(found), wants_json)
        body = await request.body()

        def parse() -> tuple[bytes, bytes, InpaintFields]:
            asked = read_json(body, InpaintRequest)
            return from_base64(asked.image, "image"), from_base64(asked.mask, "mask"), asked

        return await answer_inpaint(request, parse, wants_json)

    @router.post(
        "/inpaint",
        tags=["IOPaint"],
        response_class=Response,
        responses=IMAGE_RESPONSES,
        openapi_extra=body_of(
            ("multipart/form-data", form_schema(InpaintFields, ["image", "mask"], "image", "mask"))
        ),
    )
    async def inpaint_form(request: Request) -> Response:
        """The same as lama-cleaner had it: a form, all fields but the two files optional."""
        found = await form_fields(request, state, ("image", "mask"))
        return await answer_inpaint(request, lambda: _of_form(found), False)

    @router.get("/api/v1/server-config", tags=["IOPaint"])
    async def server_config() -> dict[str, Any]:
        """What this server can do, in IOPaint's keys."""
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
            "disableModelSwitch": True,
            "isDesktop": False,
            "samplers": [],
        }

    @router.get("/api/v1/model", tags=["IOPaint"])
    async def current_model() -> dict[str, Any]:
        """The model that fills where a request names none."""
        return _model_info(state.default)

    @router.post(
        "/api/v1/model",
        tags=["IOPaint"],
        responses={403: {"description": "models are chosen when the server starts"}, 422: IMAGE_RESPONSES[422]},
        openapi_extra=body_of(("application/json", ModelRequest)),
    )
    async def switch_model(request: Request) -> dict[str, Any]:
        """Answers for the model that is the default already; another one is chosen when the server starts."""
        asked = read_json(await request.body(), ModelRequest)
        if asked.name != state.default:
            raise RequestError("model: it is chosen when the server starts (--model)", status=403)
        return _model_info(state.default)

    @router.post(
        "/api/v1/adjust_mask",
        tags=["IOPaint"],
        response_class=Response,
        responses=IMAGE_RESPONSES,
        openapi_extra=body_of(("application/json", AdjustMaskRequest)),
    )
    async def adjust_mask(request: Request) -> Response:
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

    @router.post(
        "/v1/images/edits",
        tags=["OpenAI"],
        responses=IMAGE_RESPONSES | {200: {"description": "`data[0].b64_json`"}},
        openapi_extra=body_of(
            (
                "multipart/form-data",
                {
                    "type": "object",
                    "required": ["image"],
                    "properties": {
                        "image": {"type": "string", "format": "binary"},
                        "mask": {"type": "string", "format": "binary"},
                        "prompt": {"type": "string"},
                        "n": {"type": "integer"},
                        "size": {"type": "string"},
                        "response_format": {"type": "string", "enum": ["b64_json"]},
                        "output_format": {"type": "string", "enum": ["png", "jpeg", "webp"]},
                        "output_compression": {"type": "integer", "minimum": 0, "maximum": 100},
                    },
                },
            )
        ),
    )
    async def edit(request: Request) -> Response:
        """OpenAI's image edit: where the mask (or, without one, the picture) has alpha 0 is the hole."""
        found = await form_fields(request, state, ("image", "image[]", "mask"))
        image = found.get("image[]", found.get("image"))
        if not isinstance(image, bytes) or ("image[]" in found and "image" in found):
            raise RequestError("image: expected one picture file")
        if not isinstance(found.get("mask", b""), bytes):
            raise RequestError("mask: expected a picture file")
        if str(found.get("n", "1")) != "1":
            raise RequestError("n: expected 1, the model has no randomness")
        if str(found.get("response_format", "b64_json")) != "b64_json":
            raise RequestError("response_format: expected b64_json, no files are kept to link to")
        format = str(found.get("output_format", "png"))
        if format not in ("png", "jpeg", "webp"):
            raise RequestError("output_format: expected png, jpeg or webp")
        quality = None if format == "png" or "output_compression" not in found else found["output_compression"]

        def work(job: Job) -> tuple[bytes, tuple[int, int]]:
            fields = checked({"mask_channel": "inverse_alpha", "mask_threshold": 0.0, "quality": quality}, FillFields)
            mask = found.get("mask")
            own = mask_picture(image if mask is None else mask, state.options.max_pixels)
            turned, _ = upright(own, InvalidMaskError, "mask")
            if turned.convert("RGBA").getchannel("A").getextrema()[0] != 0:
                raise InvalidMaskError("mask: no pixel is transparent; alpha 0 is the hole")
            if mask is None:
                session = Session(turned.convert("RGB"), state.model(None))
                job.phase("decode")
                session.fill(turned, confirm=job.check, **fields.fill_options())
                job.phase("fill")
            else:
                session, _ = state.fill_once(job, image, mask, fields)
            height, width = session.size
            if str(found.get("size", "auto")) not in ("auto", f"{width}x{height}"):
                raise RequestError(f"size: expected auto or the picture's {width}x{height}")
            return state.encode(job, session, format, fields.quality)[0], (width, height)

        (data, (width, height)), job = await state.queue.run(work, request.is_disconnected)
        answer = {
            "created": int(time.time()),
            "data": [{"b64_json": base64.b64encode(data).decode()}],
            "output_format": format,
            "size": f"{width}x{height}",
        }
        headers = {"Server-Timing": job.server_timing}
        if found.get("prompt"):
            headers["X-Ignored"] = "prompt"
        return Response(json.dumps(answer), media_type="application/json", headers=headers)

    @router.post(
        "/sdapi/v1/img2img",
        tags=["A1111"],
        responses=IMAGE_RESPONSES | {200: {"description": "`images[0]` in base64"}},
        openapi_extra=body_of(("application/json", Img2ImgRequest)),
    )
    async def img2img(request: Request) -> Response:
        """A1111's inpainting: one picture and its mask; prompts, samplers and sizes are ignored."""
        body = await request.body()

        def work(job: Job) -> bytes:
            asked = read_json(body, Img2ImgRequest)
            fields = checked(
                {"feather": asked.mask_blur, "invert_mask": bool(asked.inpainting_mask_invert)}, FillFields
            )
            image, mask = from_base64(asked.init_images[0], "init_images"), from_base64(asked.mask, "mask")
            session, patch = state.fill_once(job, image, mask, fields)
            data, _ = state.encode(job, session, "png", None)
            height, width = session.size
            parameters = asked.model_dump(exclude={"init_images", "mask"})
            told = {"width": width, "height": height, "strategy": patch.strategy, "seed": -1, "infotexts": [""]}
            told["all_seeds"], told["all_prompts"] = [-1], [""]
            if asked.include_init_images:
                parameters |= {"init_images": asked.init_images, "mask": asked.mask}
            encoded = base64.b64encode(data).decode()
            return json.dumps({"images": [encoded], "parameters": parameters, "info": json.dumps(told)}).encode()

        data, job = await state.queue.run(work, request.is_disconnected)
        return Response(data, media_type="application/json", headers={"Server-Timing": job.server_timing})

    @router.get("/v2/health/live", tags=["KServe"], response_class=Response)
    async def live() -> Response:
        """200 while the process answers."""
        return Response(status_code=200)

    @router.get("/v2/health/ready", tags=["KServe"], response_class=Response)
    @router.get("/v2/models/lgnet/ready", tags=["KServe"], response_class=Response)
    async def ready() -> Response:
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

    return router


def _of_form(found: dict[str, Any]) -> tuple[bytes, bytes, InpaintFields]:
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
