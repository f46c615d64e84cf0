"""The parts of a run's JSON that a report reads; a run may hold more.

`coachhook.evaluation` and `bench.comparison.quality` write them.
"""

import sys
from collections.abc import Mapping
from typing import Annotated, Any, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from coachhook.system.json_shapes import Count, MisshapenError, Number, Share, checked

# Figures draw the outermost ones, the third from each end, and the median.
_QUANTILES = 5
Positive = Annotated[float, Field(ge=sys.float_info.min)]


class Forms(TypedDict):
    teacher_forced: Share | None
    greedy: Share | None
    exact: Share | None


class Record(TypedDict):
    prompt: str
    target: str
    batch: int | None
    verdict: str | None
    answer_before: str
    answer: str
    before: Share
    reliability: Forms
    generality: Forms
    locality: Forms


class Layer(TypedDict):
    """z: quantiles by population."""

    layer: int
    alpha: float | None
    z: dict[str, list[float] | None]


class Sample(TypedDict):
    kind: str
    tokens: list[str]
    n_open: list[Count]


class Gate(TypedDict):
    gate: NotRequired[str]
    recall: Share
    paraphrase_recall: Share | None
    precision: Share | None
    ordinary: Share
    locality: Share | None
    layers: list[Layer]
    samples: list[Sample]


class Population(TypedDict):
    """cosines: quantiles."""

    kind: str
    n: Count
    cosines: list[float]
    opens: Share


class Close(TypedDict):
    """A text that names an edit's subject, or comes close to it."""

    kind: str
    text: str
    cosine: float
    opens: bool


class Entry(TypedDict):
    """One edit of a memory."""

    edit: Count
    prompt: str
    subject: str
    enabled: bool
    forms: list[Close]
    nearest: Close | None


class Memory(TypedDict):
    block: Count
    threshold: float
    own: list[Population]
    beside: list[Population]
    entries: list[Entry]


class Point(TypedDict):
    """The edits of one editor, evaluated after `edits` of them."""

    edits: Count
    reliability: Forms
    generality: Forms
    locality: Forms
    harmonic_mean: Share | None
    preferences: dict[str, Share | None]
    before_preferences: dict[str, Share | None]
    before_reliability: Share
    already_true: Count
    gate: Gate | None
    memory: NotRequired[Memory | None]
    perplexity_before: Positive
    perplexity_after: float
    divergence: float
    retention: dict[Number, Share]
    records: list[Record]


class Overhead(TypedDict):
    first_token_ratio: float
    tokens_per_second_ratio: float


class Result(TypedDict):
    """The result of one editor. failure: why it stopped early, or None."""

    failure: str | None
    points: list[Point]
    seconds_per_edit: NotRequired[float | None]
    bytes_held: NotRequired[float | None]
    peak_bytes: NotRequired[float | None]
    overhead: NotRequired[Overhead | None]


def check_results(editors: Mapping[str, Any]) -> None:
    """Raise `MisshapenError` unless each of `editors` is a `Result` that can be shown; if a key is
    missing, `MissingError`."""
    results: dict[str, Result] = checked(dict(editors), dict[str, Result])
    for name, result in results.items():
        if not result["points"] and not result["failure"]:
            raise MisshapenError(f"{name} has no points, and no reason for it")
        gates = [point["gate"] for point in result["points"]]
        for gate in gates:
            _check_gate(name, gate, gates[-1])
        for point in result["points"]:
            _check_memory(name, point.get("memory"))


def _check_gate(name: str, gate: Gate | None, last: Gate | None) -> None:
    if gate is None or last is None:
        if gate is not last:
            raise MisshapenError(f"{name} has gates at some points and none at others")
        return
    layers = [layer["layer"] for layer in gate["layers"]]
    if not layers or layers != [layer["layer"] for layer in last["layers"]]:
        raise MisshapenError(f"the gates of {name} are not of the same layers at every point")
    if any(
        z is not None and len(z) < _QUANTILES
        for layer in gate["layers"]
        for z in layer["z"].values()
    ):
        raise MisshapenError(f"the gates of {name} tell too few quantiles")
    if any(len(sample["tokens"]) != len(sample["n_open"]) for sample in gate["samples"]):
        raise MisshapenError(f"the samples of {name} do not count every token")


def _check_memory(name: str, memory: Memory | None) -> None:
    if memory is None:
        return
    kinds = [*memory["own"], *memory["beside"]]
    if any(len(found["cosines"]) < _QUANTILES for found in kinds):
        raise MisshapenError(f"the memory of {name} tells too few quantiles")
    if any(not entry["forms"] for entry in memory["entries"]):
        raise MisshapenError(f"an edit in the memory of {name} has no form")
