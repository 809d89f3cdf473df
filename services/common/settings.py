"""Typed settings of a deployment, built from the `args` of a Serve configuration file and checked."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from services.common.errors import InvalidInput

T = TypeVar("T")


def build_settings(cls: type[T], raw: Mapping[str, Any] | None, prefix: str = "", *, over: T | None = None) -> T:
    """A dataclass from a mapping; nested dataclasses from nested mappings.

    over: what has the fields that the mapping leaves out, at any depth; else they take their defaults.

    Raises:
        InvalidInput: an unknown or missing field, a value of the wrong type or that the class refuses; with its path.
    """
    raw = raw or {}
    if not isinstance(raw, Mapping):
        raise InvalidInput(f"is {raw!r}, expected a mapping", field=prefix.rstrip(".") or cls.__name__)
    hints = get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for name in raw:
        if name not in fields:
            raise InvalidInput(f"unknown setting; known: {', '.join(fields)}", field=f"{prefix}{name}")
    values: dict[str, Any] = {}
    for name, spec in fields.items():
        if name in raw:
            values[name] = _convert(raw[name], hints[name], f"{prefix}{name}", getattr(over, name, None))
        elif over is not None:
            values[name] = getattr(over, name)
        elif spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING:
            raise InvalidInput("is missing", field=f"{prefix}{name}")
    try:
        return cls(**values)
    except InvalidInput as error:  # from `__post_init__`, which knows the field and not where the mapping stands
        message = str(error).removeprefix(f"{error.field}: ")
        raise InvalidInput(message, field=f"{prefix}{error.field}".rstrip(".")) from None


def require(condition: bool, field: str, value: object, expected: str) -> None:
    """For `__post_init__`: raises InvalidInput naming the field, its value and what was expected."""
    if not condition:
        raise InvalidInput(f"is {value!r}, expected {expected}", field=field)


def _convert(value: Any, hint: Any, path: str, over: Any = None) -> Any:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        options = get_args(hint)
        if value is None and type(None) in options:
            return None
        return _convert(value, next(o for o in options if o is not type(None)), path, over)
    if origin is Literal:
        require(value in get_args(hint), path, value, f"one of {', '.join(map(str, get_args(hint)))}")
        return value
    if origin is tuple:  # its elements have one type, and are any number
        require(isinstance(value, list | tuple), path, value, "a list")
        return tuple(_convert(one, get_args(hint)[0], f"{path}[{index}]") for index, one in enumerate(value))
    if dataclasses.is_dataclass(hint):
        if isinstance(value, hint):  # type: ignore[arg-type]
            return value
        return build_settings(hint, value, f"{path}.", over=over)  # type: ignore[arg-type]
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise InvalidInput(f"is {value!r}, expected {hint.__name__}", field=path)
    return value
