"""Dataclasses of settings from the mappings of YAML and JSON files, checked: the one builder of configurations.

A field's type is its check; `Annotated[int, Range(1)]` says which numbers it takes. What depends on several fields is
checked by the class itself, in `__post_init__`, with `require`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from services.common.errors import InvalidInput

T = TypeVar("T")


@dataclass(frozen=True)
class Range:
    """The numbers that a field takes, NaN never among them: an annotation of its type."""

    least: float
    most: float = math.inf
    above: bool = False
    """The least itself is outside."""

    def holds(self, value: float) -> bool:
        return (self.least < value if self.above else self.least <= value) and value <= self.most

    def __str__(self) -> str:
        if self.most == math.inf:
            return f"above {self.least}" if self.above else f"{self.least} or more"
        return f"{'(' if self.above else '['}{self.least}, {self.most}]"


Count = Annotated[int, Range(1)]
"""A whole number, 1 or more."""
Natural = Annotated[int, Range(0)]
"""A whole number, 0 or more."""
Amount = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1, above=True)]
"""A share that is not nothing: (0, 1]."""


def build_settings(cls: type[T], raw: Mapping[str, Any] | None, prefix: str = "", *, over: T | None = None) -> T:
    """A dataclass from a mapping; nested dataclasses from nested mappings, tuples from lists. Numbers stay as they are.

    over: what has the fields that the mapping leaves out, at any depth; else they take their defaults.

    Raises:
        InvalidInput: an unknown or missing field, a value of the wrong type or that the class refuses; with its path.
    """
    raw = {} if raw is None else raw
    if not isinstance(raw, Mapping):
        raise InvalidInput(f"is {raw!r}, expected a mapping", field=prefix.rstrip(".") or cls.__name__)
    hints = _hints(cls)  # type: ignore[arg-type]
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


def check_settings(settings: object, prefix: str = "") -> None:
    """Checks types and ranges of a dataclass made by hand or not. Raises InvalidInput as `build_settings`."""
    for name, hint in _hints(type(settings)).items():  # type: ignore[arg-type]
        _convert(getattr(settings, name), hint, f"{prefix}{name}")


def require(condition: bool, field: str, value: object, expected: str) -> None:
    """For `__post_init__`: raises InvalidInput naming the field, its value and what was expected."""
    if not condition:
        raise InvalidInput(f"is {value!r}, expected {expected}", field=field)


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    """Types of a dataclass's fields, with their annotations."""
    names = {field.name for field in dataclasses.fields(cls)}
    return {name: hint for name, hint in get_type_hints(cls, include_extras=True).items() if name in names}


def _convert(value: Any, hint: Any, path: str, over: Any = None) -> Any:
    """The value as its type hint has it. Raises InvalidInput with the path of what does not fit."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        if isinstance(value, int | float) and not isinstance(value, bool):
            for rule in parts[1:]:
                require(rule.holds(value), path, value, str(rule))
        return _convert(value, parts[0], path, over)
    if origin in (Union, types.UnionType):  # of one type and None
        if value is None and type(None) in parts:
            return None
        return _convert(value, next(part for part in parts if part is not type(None)), path, over)
    if origin is Literal:
        require(value in parts, path, value, f"one of {', '.join(map(str, parts))}")
        return value
    if origin is tuple:
        require(isinstance(value, list | tuple), path, value, "a list")
        of_each = parts[:1] * len(value) if parts[-1] is Ellipsis else parts
        require(len(value) == len(of_each), path, value, f"a list of {len(of_each)}")
        pairs = enumerate(zip(value, of_each, strict=True))
        return tuple(_convert(one, part, f"{path}[{index}]") for index, (one, part) in pairs)
    if origin is dict:
        require(isinstance(value, Mapping), path, value, "a mapping")
        return {**(over or {}), **{key: _convert(one, parts[1], f"{path}.{key}") for key, one in value.items()}}
    if dataclasses.is_dataclass(hint):
        if isinstance(value, hint):  # type: ignore[arg-type]
            return value
        require(value is not None, path, value, "a mapping")
        return build_settings(hint, value, f"{path}.", over=over)  # type: ignore[arg-type]
    if hint is Any:
        return value
    if hint is float:
        fits = isinstance(value, int | float) and abs(value) <= sys.float_info.max  # false for NaN
        require(fits and not isinstance(value, bool), path, value, "float")
    else:
        require(isinstance(value, hint) and (hint is bool or not isinstance(value, bool)), path, value, hint.__name__)
    return value
