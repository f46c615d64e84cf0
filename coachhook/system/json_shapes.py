"""What was read as JSON, held against the types that it should have: each error says where, what
was expected there and what was found.

A shape is made of Python's own types: `str`, `int`, `float` (whole numbers too), `bool`, `list[X]`,
`tuple[X, ...]` (a list, in JSON), `dict[K, X]`, `X | None`, an enumeration (by its values), `Any`,
a `TypedDict` (other fields may stand beside its own), a dataclass (they may not), and any of them
`Annotated` with limits.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass
from enum import Enum
from functools import cache
from types import UnionType
from typing import (
    Annotated,
    Any,
    NotRequired,
    Protocol,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)


class MisshapenError(ValueError):
    """What was read has another shape than what is written."""


class MissingError(MisshapenError):
    """A field is missing."""


class Limits(Protocol):
    """What a value must hold to beyond its type; as a text, what was expected."""

    def hold(self, value: Any) -> bool: ...


@dataclass(frozen=True)
class Between:
    """Limits of a number, both included."""

    least: float = -math.inf
    most: float = math.inf

    def hold(self, value: Any) -> bool:
        return bool(self.least <= value <= self.most)

    def __str__(self) -> str:
        return f"at least {self.least}" if self.most == math.inf else f"{self.least} to {self.most}"


class Digits:
    """A text of digits: how a whole number stands as a key."""

    def hold(self, value: Any) -> bool:
        return bool(value.isascii() and value.isdigit())

    def __str__(self) -> str:
        return "a text of digits"


class Some:
    """A list or an object that is not empty."""

    def hold(self, value: Any) -> bool:
        return len(value) > 0

    def __str__(self) -> str:
        return "at least one"


Count = Annotated[int, Between(0)]
Share = Annotated[float, Between(0, 1)]
Number = Annotated[str, Digits()]

_SCALARS: dict[type, tuple[str, tuple[type, ...]]] = {
    str: ("a text", (str,)),
    int: ("a whole number", (int,)),
    float: ("a number", (int, float)),
    bool: ("true or false", (bool,)),
}


def parsed(data: bytes | str) -> Any:
    """The JSON in `data`. Raises `MisshapenError` if it is not JSON."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise MisshapenError(f"no JSON ({error})") from error


def checked(value: Any, shape: Any, place: str = "") -> Any:
    """`value`, as it is, if it has `shape`. place: where in a document it stands.

    Raises `MissingError` for a field that is not there, `MisshapenError` for everything else.
    """
    origin, arguments = get_origin(shape), get_args(shape)
    if origin is Annotated:
        checked(value, arguments[0], place)
        limits: Limits
        for limits in arguments[1:]:
            if not limits.hold(value):
                raise MisshapenError(f"{_at(place)}expected {limits}, found {value!r}")
    elif origin is NotRequired:
        checked(value, arguments[0], place)
    elif origin in (Union, UnionType):
        (own,) = (argument for argument in arguments if argument is not type(None))
        if value is not None:
            checked(value, own, place)
    elif origin in (list, tuple):
        for i, item in enumerate(_of_kind(value, (list,), "a list", place)):
            checked(item, arguments[0], f"{place}[{i}]")
    elif origin is dict:
        for key, item in _of_kind(value, (dict,), "an object", place).items():
            checked(key, arguments[0], place)
            checked(item, arguments[1], _inside(place, key))
    elif is_typeddict(shape) or is_dataclass(shape):
        _check_fields(value, shape, place)
    elif isinstance(shape, type) and issubclass(shape, Enum):
        names = [member.value for member in shape]
        if value not in names:
            raise MisshapenError(f"{_at(place)}expected one of {names}, found {_found(value)}")
    elif shape is not Any:
        _of_kind(value, _SCALARS[shape][1], _SCALARS[shape][0], place)
    return value


def _check_fields(value: Any, shape: Any, place: str) -> None:
    fields = _fields(shape)
    found: Mapping[str, Any] = _of_kind(value, (dict,), "an object", place)
    required = shape.__required_keys__ if is_typeddict(shape) else fields
    for name, kind in fields.items():
        if name in found:
            checked(found[name], kind, _inside(place, name))
        elif name in required:
            raise MissingError(f"{_inside(place, name)} is missing")
    if is_dataclass(shape) and found.keys() - fields.keys():
        raise MisshapenError(f"{_at(place)}unknown fields {sorted(found.keys() - fields.keys())}")


@cache
def _fields(shape: Any) -> dict[str, Any]:
    return get_type_hints(shape, include_extras=True)


def _of_kind(value: Any, kinds: tuple[type, ...], name: str, place: str) -> Any:
    # By type, not isinstance: true and false are no numbers in JSON.
    if type(value) not in kinds:
        raise MisshapenError(f"{_at(place)}expected {name}, found {_found(value)}")
    return value


def _found(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, str):
        return f"the text {value[:40]!r}"
    names = {int: "a whole number", float: "a number", list: "a list", dict: "an object"}
    return names[type(value)]


def _inside(place: str, name: str) -> str:
    return f"{place}.{name}" if place else name


def _at(place: str) -> str:
    return f"{place}: " if place else ""
