"""Routes of an open picture: open, close, view, fill, save."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Query, Request, Response
from PIL import Image

from ..engine.regions import Rect
from ..errors import InvalidMaskError
from ..pipeline.formats import FORMATS
from ..pipeline.masks import CHANNELS, read_hole
from ..samples import sample_paths
from .bodies import MAX_REACH, checked_format, mask_picture, picture_file
from .display import Display, photo, png
from .errors import RequestError, TooLargeError
from .routing import FILE, IMAGE_RESPONSES, ServerState, body_of
from .session import Session
from .state import named
from .store import Open
from .work import Job

PREVIEW = 2048
"""Longest side of a view, in pixels."""

Position = Annotated[
    int | None, Query(ge=0, description="with the first so many fills; default: all that are not undone")
]
# Pillow's format -> the page's name of it; GIF and HEIF are kept where a picture has them, but not offered.
_SHORT = {long: name for name, long in FORMATS.items()} | {"GIF": "gif", "HEIF": "heif"}
_ERRORS = {status: told for status, told in IMAGE_RESPONSES.items() if status != 200}
_ERRORS[404] = {"description": "the server does not have this picture, or no longer"}

router = APIRouter()


def sample_path(name: str) -> Path:
    """A bundled photograph's file. Raises RequestError 404."""
    samples = sample_paths()
    if name not in samples:
        raise RequestError("sample: no such sample", status=404)
    return samples[name][0]


@router.post(
    "/api/v1/pictures",
    tags=["page"],
    status_code=201,
    responses=_ERRORS,
    openapi_extra=body_of(("application/octet-stream", FILE)),
)
async def open_picture(
    request: Request,
    state: ServerState,
    sample: Annotated[str | None, Query(description="a bundled photograph instead")] = None,
) -> dict[str, Any]:
    """Opens a picture: the body is the bytes of the file, with any media type. Of several `frames` (GIF, TIFF) the
    first one is opened, and saved alone."""
    body = await request.body()
    path = None if sample is None else sample_path(sample)

    def work(job: Job) -> tuple[Open, int]:
        data = body if path is None else path.read_bytes()
        file = picture_file(data, "picture", state.options.max_pixels)
        session = Session(file, state.model(None))
        rebuilt = session.result()
        if session.size[0] * session.size[1] > state.options.max_pixels:
            raise TooLargeError(f"picture: expected at most {state.options.max_pixels} pixels (--max-pixels)")
        display = Display.of(session, rebuilt)
        with file.open() as opened:  # of MPO, the others are previews and the like of a camera
            frames = 1 if opened.format == "MPO" else getattr(opened, "n_frames", 1)
        job.phase("decode")
        short = _SHORT.get(rebuilt.format or "PNG", "png")
        return state.store.add(session, display, short), frames

    (own, frames), _ = await state.queue.run(work, request.is_disconnected)
    height, width = own.session.size
    return {
        "id": own.id,
        "width": width,
        "height": height,
        "format": own.format,
        "alpha": own.display.alpha is not None,
        "depth": 8 if own.display.white == 255 else 16,
        "frames": frames,
    }


@router.delete("/api/v1/pictures/{id}", tags=["page"], status_code=204, responses=_ERRORS)
async def close_picture(state: ServerState, id: str) -> Response:
    """Closes a picture and frees its memory."""
    state.store.get(id)
    state.store.close(id)
    return Response(status_code=204)


@router.get("/api/v1/pictures/{id}/view", tags=["page"], response_class=Response, responses=IMAGE_RESPONSES | _ERRORS)
async def view(
    request: Request,
    state: ServerState,
    id: str,
    x: Annotated[int, Query(ge=0)] = 0,
    y: Annotated[int, Query(ge=0)] = 0,
    width: Annotated[int | None, Query(ge=1)] = None,
    height: Annotated[int | None, Query(ge=1)] = None,
    longest: Annotated[int, Query(ge=1, le=PREVIEW, description="pixels of the longer side, at most")] = PREVIEW,
    position: Annotated[int, Query(ge=0, description="with the first so many fills")] = 0,
) -> Response:
    """A box of the picture to look at, turned upright, in 8 bits and sRGB: JPEG, or PNG with alpha."""
    own = state.store.get(id)

    def work(job: Job) -> tuple[bytes, str]:
        high, wide = own.session.size
        box = Rect(y, min(high, y + (height or high)), x, min(wide, x + (width or wide)))
        if box.top >= box.bottom or box.left >= box.right:
            raise RequestError(f"view: expected a box inside the picture of {wide}x{high}")
        shape = box.right - box.left, box.bottom - box.top
        scale = min(1.0, longest / max(shape))
        size = max(1, round(shape[0] * scale)), max(1, round(shape[1] * scale))
        samples = own.session.region(box, position)
        return photo(own.display.picture(samples, box, None if size == shape else size))

    (data, media_type), job = await state.queue.run(work, request.is_disconnected)
    return Response(
        data, media_type=media_type, headers={"Server-Timing": job.server_timing, "Cache-Control": "no-store"}
    )


@router.post(
    "/api/v1/pictures/{id}/fill",
    tags=["page"],
    response_class=Response,
    responses=IMAGE_RESPONSES | _ERRORS,
    openapi_extra=body_of(("image/png", FILE)),
)
async def fill(
    request: Request,
    state: ServerState,
    id: str,
    x: Annotated[int, Query(ge=0, description="left edge of the mask in the picture")],
    y: Annotated[int, Query(ge=0, description="its upper edge")],
    strategy: str = "auto",
    dilate: Annotated[int, Query(ge=0, le=MAX_REACH)] = 0,
    feather: Annotated[int, Query(ge=0, le=MAX_REACH)] = 0,
    model: str | None = None,
    position: Annotated[
        int | None, Query(ge=0, description="how many fills the caller sees; later ones are dropped")
    ] = None,
) -> Response:
    """Fills a hole: the body is a mask of its bounding box, levels from 128 on are hole.

    The answer is a lossless PNG of the changed pixels, transparent elsewhere. `X-Boxes` lists the boxes
    "x,y,width,height" of the picture, separated by semicolons, that are stacked in it.
    """
    own = state.store.get(id)
    pipe = state.model(model)
    body = await request.body()

    def work(job: Job) -> tuple[bytes, dict[str, str]]:
        mask = mask_picture(body, state.options.max_pixels)
        patch = own.session.fill(
            mask,
            (y, x),
            strategy=strategy,
            dilate=dilate,
            feather=feather,
            mask_channel="luma",
            position=position,
            inpainter=pipe,
            confirm=job.check,
        )
        own.encoded.clear()
        job.phase("fill")
        data, boxes = own.display.patch(patch)
        job.phase("encode")
        told = {
            "X-Boxes": ";".join(f"{b.left},{b.top},{b.right - b.left},{b.bottom - b.top}" for b in boxes),
            "X-Strategy": patch.strategy,
            "X-Passes": str(patch.passes),
            "X-Backend": pipe.backend,
            "X-Position": str(own.session.position),
        }
        return data, told

    (data, told), job = await state.queue.run(work, request.is_disconnected, own.turn)
    return Response(data, media_type="image/png", headers={**told, "Server-Timing": job.server_timing})


@router.post(
    "/api/v1/pictures/{id}/mask",
    tags=["page"],
    response_class=Response,
    responses=IMAGE_RESPONSES | _ERRORS,
    openapi_extra=body_of(("application/octet-stream", FILE)),
)
async def read_mask(
    request: Request,
    state: ServerState,
    id: str,
    channel: Annotated[str, Query(description=f"{', '.join(CHANNELS)}: docs/masks.md")] = "auto",
) -> Response:
    """Reads a mask file of the picture's size, which must have a hole: a PNG, opaque white where its hole is,
    transparent elsewhere."""
    own = state.store.get(id)
    body = await request.body()

    def work(job: Job) -> bytes:
        mask = mask_picture(body, state.options.max_pixels)
        picture = own.session.picture
        with named("mask_channel:", "channel:"):
            hole = read_hole(mask, *own.session.size, channel=channel, picture=picture, note=picture.note)
        if not hole.any():
            raise InvalidMaskError("mask: no hole pixel; is the mask inverted?")
        grey = np.where(hole, np.uint8(255), np.uint8(0))
        return png(Image.merge("LA", [Image.fromarray(grey)] * 2))

    data, _ = await state.queue.run(work, request.is_disconnected)
    return Response(data, media_type="image/png")


@router.get("/api/v1/pictures/{id}/stages", tags=["page"], responses=_ERRORS)
async def stages(request: Request, state: ServerState, id: str, position: Position = None) -> dict[str, Any]:
    """The last fill after each stage of the network, with its surroundings, as data URLs."""
    own = state.store.get(id)

    def work(job: Job) -> dict[str, Any]:
        box, found = own.session.stages(context=48, position=position)
        shape = box.right - box.left, box.bottom - box.top
        scale = min(1.0, 1024 / max(shape))
        size = max(1, round(shape[0] * scale)), max(1, round(shape[1] * scale))
        shown = [own.display.picture(samples, box, size) for samples in found]
        names = ["masked", *("coarse", "local", "result")[-len(shown) + 1 :]]
        return {
            "box": [box.left, box.top, *shape],
            "stages": [
                {"name": name, "image": "data:image/png;base64," + base64.b64encode(png(one)).decode()}
                for name, one in zip(names, shown)
            ],
        }

    found, _ = await state.queue.run(work, request.is_disconnected, own.turn)
    return found


@router.get(
    "/api/v1/pictures/{id}/result", tags=["page"], response_class=Response, responses=IMAGE_RESPONSES | _ERRORS
)
async def result(
    request: Request,
    state: ServerState,
    id: str,
    format: Annotated[str | None, Query(description=f"{', '.join(FORMATS)}; default: the picture's")] = None,
    quality: Annotated[int | None, Query(ge=1, le=100)] = None,
    position: Position = None,
) -> Response:
    """The picture with its fills as a file with its metadata; known pixels are bitwise equal to the input."""
    own = state.store.get(id)
    name = format and checked_format(format)

    def work(job: Job) -> tuple[bytes, str]:
        key = (own.session.position if position is None else position, name, quality)
        if key not in own.encoded:
            own.encoded.clear()  # the last file is kept, because saving twice gives the same file
            own.encoded[key] = state.encode(job, own.session, name, quality, position)
        return own.encoded[key]

    (data, media_type), job = await state.queue.run(work, request.is_disconnected, own.turn)
    return Response(
        data,
        media_type=media_type,
        headers={"Server-Timing": job.server_timing, "Content-Disposition": "attachment"},
    )
