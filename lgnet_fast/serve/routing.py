"""Shared by the groups of routes: the server's state, forms, and schemas of bodies and answers."""

from __future__ import annotations

import email.message
import sys
from typing import Annotated, Any

import python_multipart  # noqa: F401 (Starlette, which reads forms by it, misses it at the first form only)
from fastapi import Depends, Request
from pydantic import BaseModel
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from .errors import RequestError
from .guard import Message, Receive
from .state import State

FILE = {"type": "string", "format": "binary"}
"""The schema of a file's bytes."""
IMAGE_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"description": "the picture's bytes", "content": {"image/*": {"schema": FILE}}},
    400: {"description": "what is wrong with the picture, the mask or a field"},
    413: {"description": "too many bytes or pixels"},
    422: {"description": "a field of the wrong type"},
    429: {"description": "the queue is full; Retry-After says when to come again"},
    503: {"description": "the server is shutting down; Retry-After says when to come again"},
    504: {"description": "over the time limit"},
}


async def server_state(request: Request) -> State:
    """The state of the server of a request; `create_app` keeps it in its application."""
    state: State = request.app.state.server
    return state


ServerState = Annotated[State, Depends(server_state)]
"""A handler's parameter: the server's state."""


def body_of(*kinds: tuple[str, type[BaseModel] | dict[str, Any]]) -> dict[str, Any]:
    """`openapi_extra` for a body that a route reads itself: (media type, fields or schema)."""
    content = {}
    for media_type, kind in kinds:
        content[media_type] = {"schema": kind if isinstance(kind, dict) else kind.model_json_schema()}
    return {"requestBody": {"required": True, "content": content}}


def form_schema(kind: type[BaseModel], required: list[str], *files: str) -> dict[str, Any]:
    """The schema of a multipart form of some fields and files."""
    schema = kind.model_json_schema()
    schema["properties"].update({name: FILE for name in files})
    schema["required"] = required
    return schema


def has_type(request: Request, prefix: str) -> bool:
    """Whether the body's media type begins with `prefix`; media types are the same in upper and lower case."""
    return request.headers.get("content-type", "").lower().startswith(prefix)


class _FormParser(MultiPartParser):
    """Keeps files in memory: a body has a limit, and a container may have no place to write to."""

    spool_max_size = sys.maxsize


async def form_fields(request: Request, state: State, files: tuple[str, ...]) -> dict[str, Any]:
    """A multipart form: files as bytes, in `files`; other fields as texts. Raises RequestError."""
    if not has_type(request, "multipart/form-data"):
        raise RequestError("body: expected multipart/form-data", status=415)
    header = email.message.Message()
    header["content-type"] = request.headers["content-type"]
    if boundary := header.get_boundary():
        receive = _without_preamble(request.receive, boundary.encode("latin-1"))
        request = Request({**request.scope, "headers": _lower_media_type(request.scope["headers"])}, receive)
    most = state.options.max_bytes
    parser = _FormParser(request.headers, request.stream(), max_files=4, max_fields=64, max_part_size=most)
    try:
        form = await parser.parse()
    except MultiPartException as cause:
        raise RequestError(f"body: {cause.message}") from None
    found: dict[str, Any] = {}
    for name, value in form.multi_items():
        if isinstance(value, UploadFile):
            if name in files and name in found:
                raise RequestError(f"{name}: expected one file, got several")
            found[name] = await value.read()
        else:
            found.setdefault(name, value)
    return found


def _lower_media_type(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """ASGI's headers with the media type of the body in lower case, which python-multipart before 0.0.33 expects."""
    lowered = []
    for name, value in headers:
        kind, semicolon, options = value.partition(b";")
        lowered.append((name, kind.lower() + semicolon + options if name == b"content-type" else value))
    return lowered


def _without_preamble(receive: Receive, boundary: bytes) -> Receive:
    """`receive` of a multipart body without the text before the first boundary (RFC 2046, section 5.1.1), which the
    parser does not skip."""
    delimiter = b"\r\n--" + boundary
    held, found = b"\r\n", False

    async def cut() -> Message:
        nonlocal held, found
        message = await receive()
        if found or message["type"] != "http.request":
            return message
        held += message.get("body", b"")
        at = held.find(delimiter)
        found = at >= 0
        if found or not message.get("more_body", False):
            body, held = held[max(at, 0) + 2 :], b""
        else:
            body, held = b"", held[1 - len(delimiter) :]
        return {**message, "body": body}

    return cut


async def request_gone() -> bool:
    """The argument `gone` of work that is finished even if the client leaves."""
    return False
