"""What was read as JSON, held against the types that it should have."""

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NotRequired, TypedDict

import pytest

from coachhook.system.json_shapes import (
    Count,
    MisshapenError,
    MissingError,
    Number,
    Share,
    checked,
    parsed,
)


class Kind(StrEnum):
    ONE = "one"


class Inner(TypedDict):
    kind: Kind
    share: NotRequired[Share | None]


@dataclass
class Strict:
    layers: tuple[int, ...] | None


class Outer(TypedDict):
    name: str
    counts: dict[Number, Count]
    inner: list[Inner]
    strict: Strict
    anything: Any
    flag: bool


def good() -> dict[str, Any]:
    return {
        "name": "n",
        "counts": {"1": 2},
        "inner": [{"kind": "one", "share": 1, "more": []}, {"kind": "one"}],
        "strict": {"layers": [1, 2]},
        "anything": {"at": ["all"]},
        "flag": True,
    }


def test_what_has_the_shape_comes_back_as_it_is() -> None:
    document = good()
    assert checked(document, Outer) is document
    document["strict"]["layers"] = None
    document["inner"][0]["share"] = None
    assert checked(document, Outer) is document


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(name=3), "name: expected a text, found a whole number"),
        (lambda d: d.update(name=None), "name: expected a text, found null"),
        (lambda d: d.update(flag=1), "flag: expected true or false, found a whole number"),
        (lambda d: d.update(counts=[]), "counts: expected an object, found a list"),
        (lambda d: d.update(counts={"a": 1}), "counts: expected a text of digits, found 'a'"),
        (lambda d: d.update(counts={"1": -1}), "counts.1: expected at least 0, found -1"),
        (lambda d: d.update(counts={"1": True}), "counts.1: expected a whole number, found true"),
        (lambda d: d.update(counts={"1": 1.0}), "counts.1: expected a whole number, found a nu"),
        (lambda d: d.update(inner={}), "inner: expected a list, found an object"),
        (lambda d: d["inner"].append(None), "inner[2]: expected an object, found null"),
        (lambda d: d["inner"][1].update(kind=[]), "inner[1].kind: expected one of ['one'], found"),
        (lambda d: d["inner"][1].update(share=2), "inner[1].share: expected 0 to 1, found 2"),
        (lambda d: d["inner"][1].update(share=float("nan")), "expected 0 to 1, found nan"),
        (lambda d: d["strict"].update(more=1), "strict: unknown fields ['more']"),
        (lambda d: d["strict"].update(layers=["x"]), "strict.layers[0]: expected a whole number"),
    ],
)
def test_anything_else_is_told_with_its_place(change: Any, message: str) -> None:
    document = good()
    change(document)
    with pytest.raises(MisshapenError, match=re.escape(message)):
        checked(document, Outer)


def test_what_is_missing_is_named() -> None:
    document = good()
    del document["inner"][0]["kind"]
    with pytest.raises(MissingError, match=re.escape("inner[0].kind is missing")):
        checked(document, Outer)
    del document["strict"]["layers"]
    document["inner"] = []
    with pytest.raises(MissingError, match=re.escape("strict.layers is missing")):
        checked(document, Outer)


def test_a_document_itself() -> None:
    with pytest.raises(MisshapenError, match=r"^expected an object, found a list$"):
        checked([], Outer)


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b"[" * 100_000])
def test_what_is_no_json(data: bytes) -> None:
    with pytest.raises(MisshapenError, match="no JSON"):
        parsed(data)
