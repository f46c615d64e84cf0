"""A batch that fails half-way leaves hooks, journal and later batches as if it had never been."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from coachhook import EditConfig, Editor, EditRequest, StatisticsSource, ValueConfig
from coachhook.editing.delta_writing import DeltaWriting
from coachhook.editing.writing import Wanted
from coachhook.errors import ModelError
from coachhook.hooks.gates import Threshold
from tests.support.tiny import TARGETS, tiny_model, tiny_tokenizer

PLACES = ("France", "Rome", "Brazil", "Peru")


def fact(place: str, target: str) -> EditRequest:
    return EditRequest("They moved to {}", place, target)


FIRST = [fact(PLACES[0], TARGETS[0]), fact(PLACES[1], TARGETS[1])]
# A correction of the first batch among them: what it takes over must be given back.
FAILED = [fact(PLACES[0], TARGETS[2]), fact(PLACES[2], TARGETS[2])]
LAST = [fact(PLACES[3], TARGETS[3]), fact(PLACES[1], TARGETS[0])]


def new_editor(gate: str) -> Editor:
    config = EditConfig(
        readout="delta",
        layers=(1, 2),
        gate=gate,
        preservation=1.0,
        false_alarms=0.02,
        statistics=StatisticsSource(n_tokens=2048),
        values=ValueConfig(steps=15, rate=0.3, clamp=8.0, kl=0.0, decay=0.0),
    )
    return Editor.from_pretrained(tiny_model("llama"), tiny_tokenizer(), config=config)


def logits(editor: Editor) -> Tensor:
    prompts = [f"They moved to {place}" for place in PLACES]
    encoded = tiny_tokenizer()(prompts, padding=True, return_tensors="pt")
    with torch.no_grad():
        found: Tensor = editor.model(**encoded).logits
    return found


def stop(*_: Any) -> None:
    raise KeyboardInterrupt


def not_finite(writing: DeltaWriting, requests: list[EditRequest]) -> Wanted:
    return Wanted(torch.full(writing.shape(len(requests)), torch.nan))


FAULTS = [
    pytest.param("coachhook.editor.judge", stop, KeyboardInterrupt, id="interrupted"),
    pytest.param(
        "coachhook.editing.delta_writing.DeltaWriting.values",
        not_finite,
        ModelError,
        id="not-finite",
    ),
    pytest.param(
        "coachhook.editing.write_batch.threshold", stop, KeyboardInterrupt, id="between-layers"
    ),
]


@dataclass(frozen=True)
class Spared:
    """What an editor does that no batch fails: its outputs after each batch, and its thresholds."""

    gate: str
    logits: list[Tensor]
    thresholds: list[dict[int, Threshold]]


@pytest.fixture(scope="module", params=["keyed", "calibrated"])
def spared(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Spared]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COACHHOOK_CACHE", str(tmp_path_factory.mktemp("cache")))
        found = []
        with new_editor(request.param) as editor:
            for batch in (FIRST, LAST):
                editor.edit(batch)
                found.append(logits(editor))
            thresholds = [batch.thresholds for batch in editor.hooks.journal.batches]
        yield Spared(request.param, found, thresholds)


@pytest.mark.parametrize(("place", "fault", "error"), FAULTS)
def test_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch,
    spared: Spared,
    place: str,
    fault: Any,
    error: type[BaseException],
) -> None:
    with new_editor(spared.gate) as editor:
        editor.edit(FIRST)
        with monkeypatch.context() as patch:
            patch.setattr(place, fault)
            with pytest.raises(error):
                editor.edit(FAILED)
        assert torch.equal(logits(editor), spared.logits[0])
        assert [edit.request for edit in editor.hooks.journal.live()] == FIRST
        editor.edit(LAST)
        assert torch.equal(logits(editor), spared.logits[1])
        assert [batch.thresholds for batch in editor.hooks.journal.batches] == spared.thresholds
