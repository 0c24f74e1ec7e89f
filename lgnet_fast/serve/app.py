"""The application: routes, the guard middleware, and the form of errors."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from ..errors import LGNetError
from ..version import __version__
from . import a1111, iopaint, kserve, openai, page, pictures
from .errors import error_body, status_of
from .guard import Guard
from .state import State

logger = logging.getLogger("lgnet_fast")


def create_app(state: State) -> FastAPI:
    """The ASGI application for the state of one server.

        from lgnet_fast.serve import ServeOptions, State, create_app
        app = create_app(State(ServeOptions(), {"lgnet": None}))  # for uvicorn, or another ASGI server

    Its lifespan warms the models up and, at its end, closes the state: a State serves one application, once. Address
    and port of the options are the server's matter.

    Args:
        state: of this application alone.

    Returns:
        The application, with all routes and the checks of host, origin, token and size.

    Raises:
        MissingExtraError: a package of the extra `[serve]` is not installed; the import of this function raises it.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        warm = asyncio.create_task(asyncio.to_thread(state.warm_up))
        warm.add_done_callback(_log_failure)
        closing = asyncio.create_task(_close_idle(state))
        yield
        closing.cancel()
        await asyncio.to_thread(state.close)

    app = FastAPI(
        title="lgnet_fast",
        version=__version__,
        description="Fills holes in pictures. Clients of IOPaint, lama-cleaner, OpenAI and A1111 work unchanged.",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    app.state.server = state
    app.include_router(page.static_routes())
    for group in (page, pictures, iopaint, openai, a1111, kserve):
        app.include_router(group.router)

    async def refuse(request: Request, error: Exception) -> JSONResponse:
        if isinstance(error, RequestValidationError):
            problems = [
                f"{'.'.join(str(part) for part in one['loc'][1:]) or 'body'}: {one['msg']}" for one in error.errors()
            ]
            return answer(request, error, 422, "; ".join(problems[:8]))
        if isinstance(error, HTTPException):  # unknown paths, wrong methods, broken forms
            return answer(request, error, error.status_code, str(error.detail), error.headers)
        if isinstance(error, ClientDisconnect):
            return answer(request, error, 499, "the client has left")
        status = status_of(error)
        if status is None:
            logger.error("%s %s", request.method, request.url.path, exc_info=error)
            return answer(request, error, 500, f"a fault of the server: {type(error).__name__}; its log has more")
        retry = getattr(error, "retry_after", None)
        return answer(request, error, status, str(error), None if retry is None else {"Retry-After": str(retry)})

    for kind in (LGNetError, RequestValidationError, HTTPException, ClientDisconnect, Exception):
        app.add_exception_handler(kind, refuse)
    app.add_middleware(Guard, options=state.options, metrics=state.metrics)
    return app


def answer(request: Request, error: Exception, status: int, text: str, headers: Any = None) -> JSONResponse:
    """An error in the form that clients of the path expect."""
    return JSONResponse(error_body(request.url.path, error, status, text), status, headers)


async def _close_idle(state: State) -> None:
    """Close idle pictures also while nobody asks for another one."""
    while True:
        await asyncio.sleep(min(60.0, state.options.session_idle / 2))
        state.store.close_idle()


def _log_failure(task: asyncio.Task[float]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("the models could not be warmed up", exc_info=error)
