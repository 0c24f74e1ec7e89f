"""`lgnet-fast serve`: a page to paint holes on and see them filled, and HTTP APIs that other tools call.

The application and the command need the extra `[serve]`; :class:`Session` does not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import MissingExtraError
from ..lazy import attach

if TYPE_CHECKING:
    from .app import create_app
    from .options import ServeOptions
    from .session import Patch, Session
    from .state import State

_loaded, __dir__ = attach(
    __name__,
    {
        "Patch": "session",
        "ServeOptions": "options",
        "Session": "session",
        "State": "state",
        "create_app": "app",
    },
)


def __getattr__(name: str) -> Any:
    try:
        return _loaded(name)
    except ModuleNotFoundError as cause:
        if cause.name is None or cause.name.startswith("lgnet_fast"):
            raise
        raise MissingExtraError(f"serve: {cause.name} is missing: pip install 'lgnet-fast[serve]'") from cause


__all__ = ["Patch", "ServeOptions", "Session", "State", "create_app"]
