"""Facts of one subject share a row, whatever is edited, refused, corrected and switched."""

from pathlib import Path
from typing import Any

import pytest
import torch

from coachhook import EditRequest, Verdict
from tests.support.memory_readout import FACTS, GATE, WRITES, editor_of
from tests.support.tiny import TARGETS

SECOND = EditRequest("The name of {} was", FACTS[0].subject, TARGETS[3])
THIRD = EditRequest("They went to {}", FACTS[0].subject, TARGETS[1])
CORRECTED = EditRequest("They moved to {}", FACTS[0].subject, TARGETS[2])


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COACHHOOK_CACHE", str(tmp_path / "cache"))


def test_facts_of_one_subject_share_a_row_and_are_switched_with_it() -> None:
    editor = editor_of()
    editor.edit([FACTS[0]])
    other = EditRequest("The name of {} was", FACTS[0].subject, TARGETS[3])
    editor.edit([other])
    first, second = editor.hooks.edits
    assert (first.shares, second.shares) == ((), (0,))
    assert editor.hooks.journal.served().tolist() == [1, 1]
    editor.hooks.disable(1)
    assert editor.hooks.journal.served().tolist() == [0, -1]
    editor.hooks.enable(1)
    editor.hooks.disable(0)
    assert editor.hooks.journal.served().tolist() == [-1, -1]
    editor.hooks.enable(0)
    # A correction replaces its own fact, and the row still says the other.
    corrected = EditRequest("They moved to {}", FACTS[0].subject, TARGETS[2])
    editor.edit([corrected])
    assert editor.hooks.edits[2].shares == (1,)
    assert editor.hooks.journal.served().tolist() == [-1, 2, 2]
    rows = editor.hooks.journal.rows(GATE, len(WRITES), editor.model.config.hidden_size)
    assert not torch.equal(rows[1], rows[2])


def test_two_facts_of_one_subject_in_one_batch_have_one_row() -> None:
    editor = editor_of()
    other = EditRequest("The name of {} was", FACTS[0].subject, TARGETS[3])
    editor.edit([FACTS[0], FACTS[1], other])
    rows = editor.hooks.journal.rows(GATE, len(WRITES), editor.model.config.hidden_size)
    assert torch.equal(rows[0], rows[2])
    assert not torch.equal(rows[0], rows[1])
    assert [edit.shares for edit in editor.hooks.edits] == [(2,), (), (0,)]


@pytest.mark.parametrize("why", ["unlikely", "common"])
def test_a_row_does_not_say_what_is_refused(why: str, monkeypatch: Any) -> None:
    """The correction is refused: the row is the one that its batch has without it."""
    without = editor_of()
    without.edit([FACTS[0]])
    without.edit([SECOND])
    editor = editor_of()
    editor.edit([FACTS[0]])
    writing: Any = editor._writing
    refuse = getattr(writing, f"_refuse_{why}")

    def and_the_correction(edits: Any, *given: Any) -> None:
        refuse(edits, *given)
        for edit in edits:
            if edit.request == CORRECTED:
                edit.verdict, edit.reason = Verdict.REFUSED, "by this test"

    monkeypatch.setattr(writing, f"_refuse_{why}", and_the_correction)
    editor.edit([CORRECTED, SECOND, FACTS[1]])
    first, refused, second, other = editor.hooks.edits
    assert refused.verdict is Verdict.REFUSED
    assert (first.shares, second.shares, other.shares) == ((), (0,), ())
    assert editor.hooks.journal.served().tolist() == [2, -1, 2, 3]
    d = editor.model.config.hidden_size
    rows = editor.hooks.journal.rows(GATE, len(WRITES), d).float()
    wanted = without.hooks.journal.rows(GATE, len(WRITES), d).float()
    torch.testing.assert_close(rows[2], wanted[1], rtol=0.02, atol=1e-3)
    assert not rows[1].any()


def test_what_no_row_says_any_more_is_told(caplog: pytest.LogCaptureFixture) -> None:
    editor = editor_of()
    editor.edit([FACTS[0]])
    editor.edit([SECOND, FACTS[1]])
    hooks = editor.hooks
    assert hooks.readout.unsaid() == []
    hooks.disable(0)
    assert [edit.id for edit in hooks.readout.unsaid()] == [1]
    assert "edit 1 ('The name of France was') is not said" in caplog.text
    hooks.enable(0)
    assert hooks.readout.unsaid() == []


def test_of_two_rows_of_a_subject_the_later_one_is_in_force(
    caplog: pytest.LogCaptureFixture,
) -> None:
    editor = editor_of()
    editor.edit([FACTS[0]])
    editor.edit([SECOND])
    editor.hooks.disable(0)
    editor.edit([THIRD])
    assert editor.hooks.edits[2].shares == (1,)
    assert editor.hooks.journal.served().tolist() == [-1, 2, 2]
    editor.hooks.enable(0)
    assert editor.hooks.journal.served().tolist() == [-1, 2, 2]
    assert [edit.id for edit in editor.hooks.readout.unsaid()] == [0]
    assert "edit 0 ('They moved to France') is not said" in caplog.text
    # Edited again, it is in a row with the others.
    editor.edit([FACTS[0]])
    assert editor.hooks.journal.served().tolist() == [-1, 3, 3, 3]
