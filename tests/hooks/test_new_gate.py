"""A gate is one file and one line in the registry: here is one, used from editing to loading."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from coachhook import EditConfig, Editor, EditRequest, HookSet, StatisticsSource, ValueConfig
from coachhook.errors import ConfigError
from coachhook.hooks.gates import GATES, Evidence, Gate, LayerEdits, Threshold
from coachhook.hooks.gates.gate import PassWatcher
from tests.support.tiny import TARGETS, tiny_model, tiny_tokenizer


@dataclass(frozen=True)
class Reach(Threshold):
    """What this gate keeps in a folder beside the usual: the largest score of the background."""

    background: float = 0.0


class DistanceGate(Gate):
    """Opens near a fingerprint. Score: `1 - ‖f - F k‖² / 2`, of unit vectors f and `F k`."""

    name = "distance"
    tells_edits_apart = True
    threshold_type = Reach

    def __init__(self, threshold: Threshold, edits: LayerEdits) -> None:
        super().__init__(threshold)
        for name in ("projection", "offset", "fingerprints", "owner"):
            self.register_buffer(name, getattr(edits, name), persistent=False)
        self.register_buffer("switched_off", ~edits.in_force[edits.owner], persistent=False)

    @classmethod
    def build(
        cls, threshold: Threshold, edits: LayerEdits, watcher: PassWatcher | None = None
    ) -> "DistanceGate":
        return cls(threshold, edits)

    @classmethod
    def choose(cls, evidence: Evidence) -> Threshold:
        scores = evidence.nearest()
        if scores is None:
            return Reach()
        return replace(Reach.above(scores, evidence.rate), background=float(scores.max()))

    def switch(self, in_force: Tensor) -> None:
        self.switched_off.copy_(~in_force[self.owner])

    def sketch(self, keys: Tensor) -> Tensor:
        return keys.float() @ self.projection.T - self.offset

    def standardise(self, projected: Tensor, sketch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        distances = torch.cdist(normalize(sketch, dim=-1), self.fingerprints)
        distance, index = distances.masked_fill(self.switched_off, torch.inf).min(-1)
        score = 1 - distance.square() / 2
        return score, (score - self.mean) / self.std, self.owner[index]


FACTS = [
    EditRequest("They moved to {}", "France", TARGETS[0]),
    EditRequest("I was told of {}", "Rome", TARGETS[1]),
]


def logits(model: torch.nn.Module) -> Tensor:
    inputs = tiny_tokenizer()([fact.prompt for fact in FACTS], padding=True, return_tensors="pt")
    with torch.no_grad():
        found: Tensor = model(**inputs).logits
    return found


def test_edits_are_made_switched_saved_and_loaded_under_a_gate_of_ones_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("COACHHOOK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(GATES, DistanceGate.name, DistanceGate)
    config = EditConfig(
        readout="delta",
        layers=(1, 2),
        gate="distance",
        preservation=1.0,
        false_alarms=0.02,
        statistics=StatisticsSource(n_tokens=1024),
        values=ValueConfig(steps=10, rate=0.3, clamp=8.0),
    )
    model = tiny_model("llama")
    unedited = logits(model)
    editor = Editor.from_pretrained(model, tiny_tokenizer(), config=config)
    editor.edit(FACTS)
    edited = logits(model)
    trace = editor.hooks.trace(model, tiny_tokenizer(), FACTS[1].prompt)
    assert trace.is_open[:, -1].all()
    assert trace.edit[:, -1].tolist() == [1, 1]

    editor.hooks.disable(1)
    assert not editor.hooks.trace(model, tiny_tokenizer(), FACTS[1].prompt).is_open[:, -1].any()
    editor.hooks.enable(1)
    assert torch.equal(logits(model), edited)
    editor.save_pretrained(tmp_path / "edits")
    thresholds = editor.hooks.journal.batches[0].thresholds
    editor.close()
    assert torch.equal(logits(model), unedited)
    assert not torch.equal(edited, unedited)

    hooks = HookSet.from_pretrained(tmp_path / "edits")
    assert hooks.journal.batches[0].thresholds == thresholds
    assert all(type(found) is Reach and found.background > 0.1 for found in thresholds.values())
    with hooks.attached(model):
        assert type(hooks.modules(model)[1].gate) is DistanceGate
        assert torch.equal(logits(model), edited)


def test_a_gate_that_is_not_registered_is_refused() -> None:
    with pytest.raises(ConfigError, match="choose one of keyed, calibrated, sequence"):
        EditConfig(readout="delta", gate="distance")
