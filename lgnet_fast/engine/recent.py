"""Values that were used recently."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Recent(Generic[T]):
    """At most `limit` values by key; beyond it the least recently used is passed to `drop`. Not thread-safe."""

    def __init__(self, limit: int, drop: Callable[[T], None] = lambda value: None) -> None:
        self.limit, self._drop = limit, drop
        self._values: OrderedDict[object, T] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def drop_oldest(self) -> None:
        """Drop the least recently used value."""
        self._drop(self._values.popitem(last=False)[1])

    def clear(self, keep: T | None = None) -> None:
        """Drop every value except `keep`, the least recently used first."""
        for key in [key for key, value in self._values.items() if value is not keep]:
            self._drop(self._values.pop(key))

    def values(self) -> list[T]:
        """The values, the least recently used first."""
        return list(self._values.values())

    def get(self, key: object, make: Callable[[], T]) -> T:
        """The value of `key`, made by `make` where there is none."""
        if key in self._values:
            self._values.move_to_end(key)
            return self._values[key]
        value = make()
        self.put(key, value)
        return value

    def put(self, key: object, value: T) -> None:
        """Replace the value of `key`."""
        self._values[key] = value
        self._values.move_to_end(key)
        if len(self._values) > self.limit:
            self.drop_oldest()
