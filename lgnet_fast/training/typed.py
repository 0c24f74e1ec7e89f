"""Dataclasses from plain values, such as a YAML file's, by their annotations."""

from __future__ import annotations

import dataclasses
import json
import os
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from ..errors import ConfigError

T = TypeVar("T")


def build(cls: type[T], mapping: Any, where: str) -> T:
    """A dataclass from a mapping; what is missing gets its default.

    Args:
        cls: its annotations are str, bool, int, float, dict[str, Any], Literal, X | None, tuples of one type, or
            dataclasses.
        mapping: name -> value. A number may be given as a text, a single value for a tuple.
        where: what stands before a name in an error, e.g. "optim.".

    Raises:
        ConfigError: an unknown name, or a value of the wrong kind.
    """
    if not isinstance(mapping, Mapping):
        raise ConfigError(f"{where.rstrip('.') or 'config'}: expected a mapping, got {mapping!r}")
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for name in mapping:
        if name not in names:
            raise ConfigError(f"{where}{name}: no such setting; there are {', '.join(names)}")
    return cls(**{name: _value(hints[name], value, where + name) for name, value in mapping.items()})


def _value(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        # A section without settings, or with all of them in comments, is None in YAML.
        return build(hint, {} if value is None else value, where + ".")  # type: ignore[arg-type]
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _value(next(a for a in arguments if a is not type(None)), value, where)
    if origin is Literal:
        if isinstance(value, bool):
            value = "yes" if value else "no"  # YAML 1.1 takes no for a boolean
        if value not in arguments:
            raise ConfigError(f"{where}: expected one of {', '.join(map(str, arguments))}, got {value!r}")
        return value
    if origin is tuple:
        values = [value] if isinstance(value, (str, int, float)) else value
        if not isinstance(values, (list, tuple)):
            raise ConfigError(f"{where}: expected a list, got {value!r}")
        return tuple(_value(arguments[0], v, f"{where}[{i}]") for i, v in enumerate(values))
    kind = dict if origin is dict else hint
    if kind is dict and isinstance(value, dict):
        try:
            json.dumps(value)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{where}: expected texts, numbers, lists and mappings, got {value!r}") from error
    if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML 1.1 takes 2e-4 for a text
        except (ValueError, OverflowError):
            pass
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ConfigError(f"{where}: expected {kind.__name__}, got {value!r}")
    # No shell has read the value, so a home folder is still to be put in.
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~") else value
