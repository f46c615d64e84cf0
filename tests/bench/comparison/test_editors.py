"""Each editor against its closed form, or against what it promises."""

from pathlib import Path

import pytest
import torch
from torch import nn

from bench.comparison import editors
from bench.comparison.editors import direct, grace, hooked
from coachhook import EditConfig
from coachhook.models.loading import load_model
from tests.support.bench import FACTS
from tests.support.closed_form import (
    D_IN,
    D_OUT,
    closed_form,
    moment,
    random,
    relative_error,
    weighted,
)


class TestClosedForms:
    @pytest.mark.parametrize("name", ["memit", "accumulated"])
    def test_solves_against_what_it_preserves(self, name: str) -> None:
        rule = getattr(direct, name)(moment(), 3.0, 1.0)
        preserved = weighted(moment(), 3.0)
        for seed in (1, 2):
            keys = random(5, D_IN, seed=seed, dtype=torch.float32)
            residuals = random(5, D_OUT, seed=seed + 10, dtype=torch.float32)
            want = residuals.double().T @ closed_form(preserved, keys)
            assert relative_error(rule.update(keys, residuals).double(), want) <= 1e-5
            if name == "accumulated":
                preserved = preserved + keys.double().T @ keys.double()

    def test_alphaedit_solves_where_ordinary_text_has_little(self) -> None:
        values, vectors = torch.linalg.eigh(moment())
        free = values <= values.median()
        assert 0 < free.sum() < D_IN
        basis = vectors[:, free]
        preserved = weighted(torch.eye(basis.shape[1]) * values[free].sum() / 10, 1.0)
        rule = direct.alphaedit(moment(), 1.0, 1.0)
        for seed in (1, 2):
            keys = random(5, D_IN, seed=seed, dtype=torch.float32)
            residuals = random(5, D_OUT, seed=seed + 10, dtype=torch.float32)
            change = rule.update(keys, residuals).double()
            assert (change @ vectors[:, ~free]).norm() <= 1e-5 * change.norm()
            inside = keys.double() @ basis
            want = residuals.double().T @ closed_form(preserved, inside) @ basis.T
            assert relative_error(change, want) <= 1e-5
            preserved = preserved + inside.T @ inside

    def test_a_codebook_answers_within_its_radii(self) -> None:
        base = nn.Linear(2, 1, bias=False)
        book = grace.Codebook(base, 2)
        assert book.add(torch.tensor([0.0, 0.0]), torch.tensor([5.0]), 1.0) == 0
        inside, outside = torch.tensor([[0.9, 0.0]]), torch.tensor([[1.1, 0.0]])
        with torch.no_grad():
            assert book(inside) == 5
            assert book(outside) == base(outside)
            # A neighbour halves the distance between them with it; one far off leaves both alone.
            assert book.add(torch.tensor([1.0, 0.0]), torch.tensor([7.0]), 1.0) == 1
            assert book.add(torch.tensor([0.0, 3.0]), torch.tensor([9.0]), 1.0) == 2
            assert book.radii.tolist() == [0.5, 0.5, 1.0]
            assert book(inside) == 7
            # One with the same key takes the place of the entry that had it.
            assert book.add(torch.tensor([0.0, 0.0]), torch.tensor([6.0]), 1.0) == 0
            assert book(torch.zeros(1, 2)) == 6
            assert len(book.keys) == 3


def test_sinks_are_given_to_no_editor_that_solves_at_keys(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COACHHOOK_CACHE", str(tmp_path / "cache"))
    for name, kept in (("memit", 1), ("grace", 1), ("constrained", 2)):
        lm = load_model(str(tiny_folder))
        setting = editors.Setting.of(lm, EditConfig(readout="delta"), frozenset(FACTS[:1]))
        editor = editors.make_editor(editors.named(name), setting)
        values = torch.ones(2, lm.model.config.hidden_size)
        editor.edit(FACTS[:2], values)
        (batch,) = editor.edits.in_force()
        assert batch == FACTS[2 - kept : 2]
        # A batch of sinks alone is a batch too: the one behind it is the third.
        editor.edit(FACTS[:1], values[:1])
        editor.edit(FACTS[2:3], values[:1])
        assert [FACTS[2] in batch for batch in editor.edits.in_force()] == [False, False, True]
        assert sum(map(len, editor.edits.in_force())) == kept + 1


def test_a_codebook_forgets_a_corrected_fact(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COACHHOOK_CACHE", str(tmp_path / "cache"))
    lm = load_model(str(tiny_folder))
    editor = editors.make_editor("grace@0.01", editors.Setting.of(lm, EditConfig(readout="delta")))
    hidden = lm.model.config.hidden_size
    editor.edit(FACTS[:2], torch.ones(2, hidden))
    corrected = FACTS[3]
    editor.edit([corrected], torch.zeros(1, hidden))
    assert len(editor._codebook.keys) == 2
    assert editor._facts == [FACTS[1].fact, FACTS[0].fact]


def test_values_of_one_gradient(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shifts of one length, each against its gradient in every feature."""
    monkeypatch.setenv("COACHHOOK_CACHE", str(tmp_path / "cache"))
    lm = load_model(str(tiny_folder))
    setting = editors.Setting.of(lm, EditConfig(readout="delta"))
    editor = editors.make_editor("onegradient@0.25", setting)
    given: list[torch.Tensor] = []
    monkeypatch.setattr(
        hooked.Hooked,
        "edit",
        lambda self, requests, values: given.append(values),
    )
    seen = []
    for batch in (FACTS[:1], FACTS[1:3]):
        hidden, gradient = editor._gradients(batch)
        seen.append(gradient)
        editor.edit(batch, torch.full_like(hidden, torch.nan))
        shift = given[-1] - hidden
        torch.testing.assert_close(shift.norm(dim=-1), 0.25 * hidden.norm(dim=-1))
        scaled = -gradient / torch.cat(seen).square().mean(0).sqrt()
        assert torch.cosine_similarity(shift, scaled, dim=-1).min() > 0.9999
