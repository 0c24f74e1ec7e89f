"""`lgnet-fast serve`: a page to paint holes on and see them filled, and HTTP APIs that other tools call.

The application and the command need the extra `[serve]`; :class:`Session` does not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import attach

if TYPE_CHECKING:
    from .app import create_app
    from .options import ServeOptions
    from .session import Patch, Session
    from .state import State

__getattr__, __dir__ = attach(
    __name__,
    {
        "Patch": "session",
        "ServeOptions": "options",
        "Session": "session",
        "State": "state",
        "create_app": "app",
    },
)

__all__ = ["Patch", "ServeOptions", "Session", "State", "create_app"]
