"""What was read as JSON, held against the types that it should have."""

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any, NotRequired

import pytest
from pydantic import Field
from typing_extensions import TypedDict

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


class Outer(TypedDict):
    name: str
    counts: dict[Number, Count]
    inner: list[Inner]
    some: Annotated[list[float], Field(min_length=1)]
    anything: Any
    flag: bool


@dataclass
class Part:
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        raise AssertionError("made")


@dataclass
class Whole:
    part: Part
    path: str = ""


def good() -> dict[str, Any]:
    return {
        "name": "n",
        "counts": {"1": 2},
        "inner": [{"kind": "one", "share": 1, "more": []}, {"kind": "one"}],
        "some": [1, 0.5, float("nan"), float("inf"), float("-inf")],
        "anything": {"at": ["all"]},
        "flag": True,
    }


def test_what_has_the_shape_comes_back_as_it_is() -> None:
    document = good()
    assert checked(document, Outer) is document
    document["inner"][0]["share"] = None
    assert checked(document, Outer) is document
    assert document["inner"][0]["more"] == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(name=3), "name: Input should be a valid string, found 3"),
        (lambda d: d.update(name=None), "name: Input should be a valid string, found None"),
        (lambda d: d.update(flag=1), "flag: Input should be a valid boolean, found 1"),
        (lambda d: d.update(counts=[]), "counts: Input should be an object, found []"),
        (lambda d: d.update(counts={"a": 1}), "counts.a.[key]: String should match pattern '^[0-"),
        (lambda d: d.update(counts={"1": -1}), "counts.1: Input should be greater than or equal"),
        (lambda d: d.update(counts={"1": True}), "counts.1: Input should be a valid integer, fou"),
        (lambda d: d.update(counts={"1": 1.0}), "counts.1: Input should be a valid integer, foun"),
        (lambda d: d.update(counts={"1": "1"}), "counts.1: Input should be a valid integer, foun"),
        (lambda d: d.update(inner={}), "inner: Input should be a valid array, found {}"),
        (lambda d: d["inner"].append(None), "inner[2]: Input should be an object, found None"),
        (lambda d: d["inner"][1].update(kind=[]), "inner[1].kind: Input should be 'one', found []"),
        (lambda d: d["inner"][1].update(share=2), "inner[1].share: Input should be less than or"),
        (lambda d: d["inner"][1].update(share=float("nan")), "equal to 1, found nan"),
        (lambda d: d.update(some=[]), "some: List should have at least 1 item"),
        (lambda d: d.update(some=[True]), "some[0]: Input should be a valid number, found True"),
        (lambda d: d.update(some=["1"]), "some[0]: Input should be a valid number, found '1'"),
        (lambda d: d.update(flag="x" * 1000), "found 'xxxxxxxxxxxx...xxxxxxxxxxxxx'"),
        (lambda d: d.update(flag=list(range(1000))), "found [0, 1, 2, 3, 4, 5, ...]"),
    ],
)
def test_anything_else_is_told_with_its_place(change: Any, message: str) -> None:
    document = good()
    change(document)
    with pytest.raises(MisshapenError, match=re.escape(message)) as caught:
        checked(document, Outer)
    assert "\n" not in str(caught.value)


def test_what_is_missing_is_named() -> None:
    document = good()
    del document["inner"][0]["kind"]
    with pytest.raises(MissingError, match=re.escape("of.inner[0].kind is missing")):
        checked(document, Outer, "of")
    del document["inner"]
    with pytest.raises(MissingError, match=r"^inner is missing$"):
        checked(document, Outer)


def test_a_document_itself() -> None:
    with pytest.raises(MisshapenError, match=r"^the document: .+ an object, found \[\]$"):
        checked([], Outer)


@pytest.mark.parametrize("layers", [None, [], [1, 2]])
def test_a_dataclass_is_an_object_and_is_not_made(layers: Any) -> None:
    document = {"part": {"layers": layers}, "path": ""}
    assert checked(document, Whole) is document


@pytest.mark.parametrize(
    ("document", "error", "message"),
    [
        ({"part": {"layers": []}}, MissingError, "of.path is missing"),
        ({"part": {}, "path": ""}, MissingError, "of.part.layers is missing"),
        ({"part": {"layers": ["x"]}, "path": ""}, MisshapenError, "of.part.layers[0]: Input"),
        ({"part": {"layers": [], "a": 1}, "path": ""}, MisshapenError, "of.part.a: Extra"),
        ({"part": {"layers": []}, "path": "", "a": 1}, MisshapenError, "of.a: Extra"),
    ],
)
def test_a_dataclass_has_all_its_fields_and_no_others(
    document: Any, error: type[MisshapenError], message: str
) -> None:
    with pytest.raises(error, match="^" + re.escape(message)):
        checked(document, Whole, "of")


def test_texts_that_are_no_unicode() -> None:
    document = {"\udce9": "caf\udce9"}
    assert checked(document, dict[str, str]) is document
    assert document == {"\udce9": "caf\udce9"}


@pytest.mark.parametrize("depth", [300, 100_000])
def test_what_is_nested_too_deeply(depth: int) -> None:
    document: Any = []
    for _ in range(depth):
        document = [document]
    with pytest.raises(MisshapenError, match=r"recursion limit|nested too deeply"):
        checked(document, list[Any])


def test_what_json_cannot_hold_is_an_error_of_our_own() -> None:
    with pytest.raises(TypeError):
        checked({"a": object()}, dict[str, Any])


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b"[" * 100_000])
def test_what_is_no_json(data: bytes) -> None:
    with pytest.raises(MisshapenError, match="no JSON"):
        parsed(data)
