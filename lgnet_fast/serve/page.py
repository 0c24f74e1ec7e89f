"""Routes of the page: its files, its choices, its bundled photographs; and the metrics of the server."""

from __future__ import annotations

from importlib.resources import files as resource_files
from typing import Any

from fastapi import APIRouter, Response
from PIL import Image

from ..pipeline.formats import FORMATS
from ..pipeline.strategies import STRATEGIES
from ..samples import sample_paths
from .display import photo
from .errors import RequestError
from .pictures import PREVIEW, sample_path
from .routing import IMAGE_RESPONSES, ServerState, request_gone
from .work import Job

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
}
_STATIC = (
    "app.css",
    "api.js",
    "comparing.js",
    "docs.html",
    "docs.js",
    "editor.js",
    "icon.svg",
    "index.html",
    "input.js",
    "main.js",
    "mask.js",
    "opening.js",
    "page.js",
    "saving.js",
    "settings.js",
    "text.js",
    "view.js",
    "vendor/LICENSES.txt",
    "vendor/client-zip.js",
    "vendor/img-comparison-slider.js",
    "vendor/konva.min.js",
)

router = APIRouter()


def _static_files() -> dict[str, tuple[bytes, str]]:
    """The files of the page, from a fixed table: a path of a request is never joined to a folder."""
    folder = resource_files(__package__) / "static"
    return {name: (folder.joinpath(name).read_bytes(), _TYPES[name[name.rindex(".") :]]) for name in _STATIC}


def static_routes() -> APIRouter:
    """The files of the page, read once."""
    router = APIRouter()
    static = _static_files()

    def file_of(name: str) -> Response:
        data, media_type = static[name]
        return Response(data, media_type=media_type, headers={"Cache-Control": "no-cache"})

    @router.get("/", include_in_schema=False)
    async def index() -> Response:
        return file_of("index.html")

    @router.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return file_of("docs.html")

    @router.get("/favicon.ico", include_in_schema=False)
    async def icon() -> Response:
        return file_of("icon.svg")

    @router.get("/static/{name:path}", include_in_schema=False)
    async def static_file(name: str) -> Response:
        if name not in static:
            raise RequestError("static: no such file", status=404)
        return file_of(name)

    return router


@router.get("/metrics", tags=["server"], response_class=Response)
async def metrics(state: ServerState) -> Response:
    """Counters in Prometheus' text format."""
    return Response(state.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


@router.get("/api/v1/page", tags=["page"])
async def page(state: ServerState) -> dict[str, Any]:
    """What the page offers: models, strategies, formats, samples, limits."""
    return {
        "models": [{"name": name, "backend": model.backend} for name, model in state.models.items()],
        "strategies": STRATEGIES,
        "formats": list(FORMATS),
        "samples": list(sample_paths()),
        "preview": PREVIEW,
        "max_bytes": state.options.max_bytes,
        "max_pixels": state.options.max_pixels,
    }


@router.get("/api/v1/samples/{name}", tags=["page"], response_class=Response, responses=IMAGE_RESPONSES)
async def sample(state: ServerState, name: str) -> Response:
    """A bundled photograph's thumbnail."""
    path = sample_path(name)

    def work(job: Job) -> bytes:
        with Image.open(path) as opened:
            small = opened.convert("RGB")
        small.thumbnail((480, 480))
        return photo(small, 85)[0]

    data, _ = await state.queue.run(work, request_gone)
    return Response(data, media_type="image/jpeg", headers={"Cache-Control": "max-age=3600"})
