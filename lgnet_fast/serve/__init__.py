"""`lgnet-fast serve`: a page to paint holes on and see them filled, and the HTTP calls of other tools.

:class:`Session` works without the extra `[serve]`; the application and the command need it.
"""

from __future__ import annotations

from ..lazy import attach

__getattr__, __dir__ = attach(
    __name__, {"Patch": "session", "ServeOptions": "options", "Session": "session", "create_app": "app"}
)

__all__ = ["Patch", "ServeOptions", "Session", "create_app"]
