"""Checking JSON values against types, with pydantic's strict mode.

A `TypedDict` allows additional fields; it must be that of typing_extensions, because pydantic takes
typing's only from Python 3.12 on. A dataclass, also a nested one, requires all its fields and
allows no others.
"""

import json
import reprlib
from dataclasses import is_dataclass
from functools import cache
from typing import Annotated, Any, get_type_hints

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, create_model

Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
# A whole number as an object key.
Number = Annotated[str, Field(pattern="^[0-9]+$")]


class MisshapenError(ValueError):
    """The value read is not JSON, or does not have the expected shape."""


class MissingError(MisshapenError):
    """A field is missing."""


def parsed(data: bytes | str) -> Any:
    """The JSON in `data`. Raises `MisshapenError` if it is not JSON."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise MisshapenError(f"no JSON ({error})") from error


def checked(value: Any, shape: Any, place: str = "") -> Any:
    """`value`, unchanged, if it has `shape`. place: its path in the document, for messages.

    Raises `MissingError` for a missing field, `MisshapenError` for any other mismatch.
    """
    adapter = _adapter(shape)
    try:
        # Only from JSON does strict pydantic accept a list for a tuple and a string for an enum.
        # But there it rejects lone surrogates, which paths and model answers may contain.
        data = json.dumps(value, ensure_ascii=False).encode(errors="replace")
        adapter.validate_json(data, strict=True)
    except RecursionError as error:
        raise MisshapenError(f"{place or 'the document'} is nested too deeply") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        steps = [f"[{step}]" if isinstance(step, int) else f".{step}" for step in first["loc"]]
        where = "".join([place, *steps]).removeprefix(".") or "the document"
        if first["type"] == "missing":
            raise MissingError(f"{where} is missing") from error
        found = reprlib.repr(first["input"])[:40]
        raise MisshapenError(f"{where}: {first['msg']}, found {found}") from error
    return value


@cache
def _adapter(shape: Any) -> TypeAdapter[Any]:
    return TypeAdapter(_entry(shape))


def _entry(shape: Any) -> Any:
    """A dataclass as a pydantic model without its defaults and checks; others unchanged."""
    if not is_dataclass(shape):
        return shape
    hints = get_type_hints(shape, include_extras=True)
    fields: dict[str, Any] = {name: (_entry(kind), ...) for name, kind in hints.items()}
    return create_model("Entry", __config__=ConfigDict(extra="forbid"), **fields)
