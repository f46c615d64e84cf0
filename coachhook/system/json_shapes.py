"""What was read as JSON, held against the types that it should have, by pydantic's strict mode.

Other fields may stand beside those of a `TypedDict` (typing_extensions': pydantic takes typing's
from Python 3.12 on). A dataclass, or one that is a field of it, is an object of all its fields and
no others.
"""

import json
import reprlib
from dataclasses import is_dataclass
from functools import cache
from typing import Annotated, Any, get_type_hints

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, create_model

Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
# How a whole number stands as a key.
Number = Annotated[str, Field(pattern="^[0-9]+$")]


class MisshapenError(ValueError):
    """What was read has another shape than what is written."""


class MissingError(MisshapenError):
    """A field is missing."""


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
    adapter = _adapter(shape)
    try:
        # In JSON alone pydantic takes a list for a tuple and a text for an enumeration. It refuses
        # halves of surrogate pairs there, which paths and answers of a model may hold.
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
    """A dataclass as a model without its defaults and checks; anything else as it is."""
    if not is_dataclass(shape):
        return shape
    hints = get_type_hints(shape, include_extras=True)
    fields: dict[str, Any] = {name: (_entry(kind), ...) for name, kind in hints.items()}
    return create_model("Entry", __config__=ConfigDict(extra="forbid"), **fields)
