"""The route that clients of A1111's inpainting call."""

from __future__ import annotations

import base64
import json

from fastapi import APIRouter, Request, Response

from .bodies import FillFields, Img2ImgRequest, checked, from_base64, mask_picture, read_json
from .routing import IMAGE_RESPONSES, ServerState, body_of
from .state import named
from .work import Job

router = APIRouter()


@router.post(
    "/sdapi/v1/img2img",
    tags=["A1111"],
    responses=IMAGE_RESPONSES | {200: {"description": "`images[0]` in base64"}},
    openapi_extra=body_of(("application/json", Img2ImgRequest)),
)
async def img2img(request: Request, state: ServerState) -> Response:
    """A1111's inpainting: one picture and its mask; prompts, samplers and sizes are ignored."""
    body = await request.body()

    def work(job: Job) -> bytes:
        asked = read_json(body, Img2ImgRequest)
        fields = checked({"feather": asked.mask_blur, "invert_mask": bool(asked.inpainting_mask_invert)}, FillFields)
        image, mask = from_base64(asked.init_images[0], "init_images"), from_base64(asked.mask, "mask")
        channel = _channel(mask, state.options.max_pixels)
        with named("image", "init_images"):
            session, patch = state.fill_once(job, image, mask, fields, mask_channel=channel)
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


def _channel(mask: bytes, max_pixels: int) -> str:
    """As A1111 reads a mask: its alpha where a part of it is transparent, else its brightness."""
    picture = mask_picture(mask, max_pixels)
    try:
        return "alpha" if picture.mode == "RGBA" and picture.getchannel("A").getextrema() != (255, 255) else "luma"
    except OSError:  # a damaged file, which the fill names
        return "luma"
