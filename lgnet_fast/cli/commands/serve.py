"""`lgnet-fast serve`."""

from __future__ import annotations

from pathlib import PurePath
from typing import Annotated

import typer

from ...errors import UsageError
from ..application import command
from ..models import BUNDLED, named_model
from ..options import Backend, Device, Dtype, given
from ..output import say


@command()
def serve(
    host: Annotated[str, typer.Option(help="Address to listen on; others than this machine's own need a token.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free one.")] = 8080,
    models: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            parser=given,
            help="A model folder or hub id, or NAME=MODEL ('bundled': the package's own); more than one "
            "allowed, the first is the default.",
        ),
    ] = None,
    open_page: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
    token: Annotated[
        str | None,
        typer.Option(help="What clients have to send. Default: none on 127.0.0.1, else generated and printed."),
    ] = None,
    cors: Annotated[list[str] | None, typer.Option(help="Origins whose pages may call the API.")] = None,
    allowed_hosts: Annotated[
        list[str] | None, typer.Option("--allowed-host", help="Names, without port, that this server is reached by.")
    ] = None,
    max_bytes: Annotated[int, typer.Option(min=1, help="Largest request body, in bytes.")] = 64 * 2**20,
    max_pixels: Annotated[int, typer.Option(min=1, help="Largest picture, in pixels.")] = 100_000_000,
    max_sessions: Annotated[int, typer.Option(min=1, help="Pictures open at the same time.")] = 50,
    queue: Annotated[int, typer.Option(min=1, help="Requests that may wait or run; more are told 429.")] = 32,
    timeout: Annotated[float, typer.Option(help="Seconds for one request.")] = 120.0,
    grace: Annotated[float, typer.Option(help="Seconds of 503 before the socket closes, at the end.")] = 0.5,
    shutdown: Annotated[float, typer.Option(help="Seconds that running work has to end in.")] = 30.0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    backend: Backend = "auto",
) -> None:
    """Serve a page to paint holes on and see them filled, and the API of IOPaint, OpenAI and A1111; docs/serve.md.

    SIGTERM and Ctrl-C end it after the running work.

    Exit code: 0 ended by a signal, 2 it could not start.
    """
    from ...serve.command import run
    from ...serve.options import ServeOptions

    try:
        options = ServeOptions(
            host=host,
            port=port,
            token=token,
            cors=tuple(cors or ()),
            allowed_hosts=tuple(allowed_hosts or ()),
            max_bytes=max_bytes,
            max_pixels=max_pixels,
            max_sessions=max_sessions,
            queue=queue,
            timeout=timeout,
            grace=grace,
            shutdown=shutdown,
        )
    except ValueError as error:
        raise UsageError(str(error)) from None
    run(options, models_of(models or []), say, open_page, device=device, dtype=dtype, backend=backend)


def models_of(texts: list[str]) -> dict[str, str | None]:
    """The values of ``--model``, each "MODEL", named like its folder, or "NAME=MODEL"; none: the bundled model.

    Raises UsageError: two of one name.
    """
    models: dict[str, str | None] = {}
    for text in texts or [BUNDLED]:
        name, model = named_model(text)
        if name is None:
            name = BUNDLED if model is None else PurePath(model).name
        if not name or name in models:
            raise UsageError(f"models: expected NAME=FOLDER with names that differ, got {text!r}")
        models[name] = model
    return models
