"""The state that the routes share: models, the queue, open pictures, counters."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import contextmanager
from typing import Any

from PIL import Image

from .. import limits
from ..errors import LGNetError, WeightsError
from ..pipeline.formats import FORMATS
from .bodies import FillFields, checked_format, mask_picture, picture_file
from .errors import RequestError
from .metrics import Metrics
from .options import ServeOptions
from .session import Patch, Session
from .store import Store
from .work import DeviceWorker, Job, SharedInpainter, WorkQueue

MEDIA_TYPES = {
    "PNG": "image/png",
    "JPEG": "image/jpeg",
    "WEBP": "image/webp",
    "TIFF": "image/tiff",
    "BMP": "image/bmp",
    "GIF": "image/gif",
    "AVIF": "image/avif",
    "HEIF": "image/heif",
    "JPEG2000": "image/jp2",
    "PPM": "image/x-portable-pixmap",
    "TGA": "image/x-tga",
}


class State:
    """One server: what its routes share.

    The constructor loads the models and starts the thread that runs the network; :meth:`close` ends it. Threads of
    requests start with the first ones. Pillow's limit of pixels (`PIL.Image.MAX_IMAGE_PIXELS`) is raised to
    `options.max_pixels` for the whole process, if it is lower.

    Args:
        options: address, access and limits.
        models: {name: folder or hub id, None = the bundled one}; the first is the default, see :meth:`choose`.
        inpainter: device, dtype, backend, window, memory_limit, as for `Inpainter.from_pretrained`, for all models.

    Raises:
        WeightsError: no model is given, or its weights are missing or malformed.
        BackendError, TypeError, ValueError: as of `Inpainter.from_pretrained`.
    """

    def __init__(self, options: ServeOptions, models: Mapping[str, str | None], **inpainter: Any) -> None:
        if not models:
            raise WeightsError("model: expected at least one, got none")
        self.options = options
        if Image.MAX_IMAGE_PIXELS is not None:  # Pillow rejects more than twice its own limit
            Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, options.max_pixels)
        self.metrics = Metrics()
        self.worker = DeviceWorker(options.batch, self.metrics.run)
        try:
            over = SharedInpainter.over
            self.models = {name: over(self.worker, model, **inpainter) for name, model in models.items()}
        except BaseException:
            self.worker.close()  # nobody could end its thread
            raise
        self.queue = WorkQueue(options.threads, options.queue, options.timeout, self.metrics.phases)
        room = limits.memory()  # with the models loaded
        kept = options.session_bytes if room is None else min(options.session_bytes, room // 2)
        self.store = Store(options.max_sessions, kept, options.session_idle)
        self.chosen = self.default
        self.ready = self.closed = False
        self._end: float | None = None
        self.metrics.watch(lambda: self.queue.depth, self.store.usage)
        for name, model in self.models.items():
            self.metrics.model.labels(name, model.backend).set(1)

    @property
    def default(self) -> str:
        """The first model's name."""
        return next(iter(self.models))

    def model(self, name: str | None) -> SharedInpainter:
        """A model by its name, None = the default. Raises RequestError."""
        if name is not None and name not in self.models:
            raise RequestError(f"model: expected one of {', '.join(self.models)}, got {name[:80]!r}")
        return self.models[name or self.default]

    def choose(self, name: str) -> None:
        """Make a model the one of the API's calls, which name none, for all clients; the page names its own.

        Raises RequestError: there is no such model; 403 where there is one model only.
        """
        if len(self.models) == 1 and name != self.default:
            raise RequestError("model: it is chosen when the server starts (--model)", status=403)
        self.model(name)
        self.chosen = name

    def warm_up(self) -> float:
        """Run every model once and report readiness; returns the seconds it took."""
        seconds = sum(model.warmup() for model in self.models.values())
        self.ready = self._end is None
        return seconds

    def drain(self) -> None:
        """Accept no new work; running work continues for at most `options.shutdown` seconds, see `remaining`."""
        self.ready = False
        if self._end is None:
            self._end = time.monotonic() + self.options.shutdown
        self.queue.drain()

    @property
    def remaining(self) -> float:
        """Seconds that running work still has after `drain`; infinite before it."""
        return math.inf if self._end is None else max(0.0, self._end - time.monotonic())

    def give_up(self) -> None:
        """Answer running work 503 now; its threads end at their next check."""
        self._end = time.monotonic()
        self.ready = False
        self.queue.give_up()

    def close(self) -> bool:
        """Give up running work and end the threads, in the seconds that remain. Returns whether all have ended: a run
        of the network cannot be stopped."""
        self.drain()
        self.queue.give_up()
        idle = self.worker.close(self.remaining)  # first, because requests wait for it
        self.closed = self.queue.close(self.remaining) and idle
        return self.closed

    def fill_once(
        self, job: Job, image: bytes, mask: bytes, fields: FillFields, **more: Any
    ) -> tuple[Session, Patch]:
        """A picture and mask as files, decoded and filled; a format that cannot hold the result is refused before."""
        options = {**fields.fill_options(), **more}
        file = picture_file(image, "image", self.options.max_pixels)
        with named("picture", "image"):
            session = Session(file, self.model(self.chosen))
        if fields.format:
            session.check_format(FORMATS[checked_format(fields.format)], convert=True)
        own = mask_picture(mask, self.options.max_pixels)
        job.phase("decode")
        patch = session.fill(own, confirm=job.check, **options)
        job.phase("fill")
        return session, patch

    def encode(
        self, job: Job, session: Session, format: str | None, quality: int | None, position: int | None = None
    ) -> tuple[bytes, str]:
        """The result as a file and its media type. `format`: a short name, None = the picture's own. CMYK becomes RGB
        for a format that does not hold it, because clients choose PNG and WebP for every picture."""
        data, own = session.encoded(format and FORMATS[format], quality, position, convert=True)
        job.phase("encode")
        return data, MEDIA_TYPES[own]


@contextmanager
def named(before: str, after: str) -> Any:
    """Errors whose texts begin with a field's name begin with the client's name for it."""
    try:
        yield
    except LGNetError as error:
        if str(error).startswith(before):
            raise type(error)(after + str(error)[len(before) :]) from error.__cause__
        raise
