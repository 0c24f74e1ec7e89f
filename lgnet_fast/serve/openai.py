"""The route that clients of OpenAI's image edits call."""

from __future__ import annotations

import base64
import json
import re
import time
from typing import Any

from fastapi import APIRouter, Request, Response

from ..errors import InvalidMaskError
from ..pipeline.formats import FORMATS
from ..pipeline.reading import upright
from .bodies import FillFields, checked, mask_picture
from .errors import RequestError
from .routing import FILE, IMAGE_RESPONSES, ServerState, body_of, form_fields
from .session import Session
from .state import named
from .work import Job

_FORM = {
    "type": "object",
    "required": ["image"],
    "properties": {
        "image": FILE,
        "mask": FILE,
        "prompt": {"type": "string"},
        "n": {"type": "integer"},
        "size": {"type": "string"},
        "response_format": {"type": "string", "enum": ["b64_json"]},
        "output_format": {"type": "string", "enum": ["png", "jpeg", "webp"]},
        "output_compression": {"type": "integer", "minimum": 0, "maximum": 100},
    },
}

router = APIRouter()


@router.post(
    "/v1/images/edits",
    tags=["OpenAI"],
    responses=IMAGE_RESPONSES | {200: {"description": "`data[0].b64_json`"}},
    openapi_extra=body_of(("multipart/form-data", _FORM)),
)
async def edit(request: Request, state: ServerState) -> Response:
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
    if str(found.get("stream", "false")).lower() != "false":
        raise RequestError("stream: expected false, the answer comes as a whole")
    format = str(found.get("output_format", "png"))
    if format not in ("png", "jpeg", "webp"):
        raise RequestError("output_format: expected png, jpeg or webp")
    quality = None if format == "png" else _quality(found.get("output_compression"))

    def work(job: Job) -> tuple[bytes, tuple[int, int]]:
        asked = {"mask_channel": "inverse_alpha", "mask_threshold": 0.0, "format": format, "quality": quality}
        fields = checked(asked, FillFields)
        mask = found.get("mask")
        own = mask_picture(image if mask is None else mask, state.options.max_pixels)
        turned, _ = upright(own, InvalidMaskError, "mask")
        if turned.convert("RGBA").getchannel("A").getextrema()[0] != 0:
            raise InvalidMaskError("mask: no pixel is transparent; alpha 0 is the hole")
        size = f"{turned.width}x{turned.height}"  # of the picture too: the fill checks that
        if str(found.get("size", "auto")) not in ("auto", size):
            raise RequestError(f"size: expected auto or the picture's {size}")
        if mask is None:
            session = Session(turned.convert("RGB"), state.model(state.chosen))
            with named("format:", "output_format:"):
                session.check_format(FORMATS[format])
            job.phase("decode")
            session.fill(turned, confirm=job.check, **fields.fill_options())
            job.phase("fill")
        else:
            with named("format:", "output_format:"):
                session, _ = state.fill_once(job, image, mask, fields)
        height, width = session.size
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


def _quality(compression: Any) -> int | None:
    """The quality of OpenAI's `output_compression`. Raises RequestError 422."""
    if compression in (None, ""):
        return None
    if not isinstance(compression, str) or not re.fullmatch("[0-9]{1,3}", compression) or int(compression) > 100:
        raise RequestError(
            f"output_compression: expected a whole number from 0 to 100, got {str(compression)[:40]!r}", status=422
        )
    return max(1, int(compression))  # encoders begin at 1
