"""Rivals: names that an edited subject is not to be taken for keep the gate closed."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from coachhook import Editor, EditRequest, HookSet
from coachhook.storage.batch_file import batch_from_bytes, batch_to_bytes
from coachhook.system.json_shapes import MisshapenError
from tests.support.memory_readout import FACTS, GATE, config, logits
from tests.support.tiny import TARGETS, tiny_model, tiny_tokenizer

SUBJECT = "New France"
FACT = EditRequest("They moved to {}", SUBJECT, TARGETS[0])


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COACHHOOK_CACHE", str(tmp_path / "cache"))


def rows(editor: Editor, n: int) -> torch.Tensor:
    shape = (n, 2, editor.model.config.hidden_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def editor_of(rivals: int) -> Editor:
    made = config(rivals=rivals, contexts=("we saw {}",))
    return Editor.from_pretrained(tiny_model("llama"), tiny_tokenizer(), config=made)


@pytest.fixture
def editor() -> Iterator[Editor]:
    found = editor_of(4)
    found.edit([FACT, FACTS[1]], values=rows(found, 2))
    yield found
    found.close()


def edit_at_end(editor: Editor, text: str) -> int:
    """The edit that the last token opens, -1 for none. Every token opens some edit unless it
    resembles a rival most."""
    editor.hooks.modules(editor.model)[GATE].threshold.fill_(-1.0)
    trace = editor.hooks.trace(editor.model, editor.tokenizer, text)
    return int(trace.edit[0, -1]) if trace.is_open[0, -1] else -1


def n_rivals(editor: Editor) -> int:
    """Of those that are compared."""
    hook = editor.hooks.modules(editor.model)[GATE]
    return int((hook.enabled & (hook.edit < 0)).sum())


def rival_texts(editor: Editor) -> list[str]:
    return [f"we saw {name}" for name in editor.hooks.edits[0].rivals]


def test_what_resembles_a_rival_more_than_the_subject_stays_closed(editor: Editor) -> None:
    names = editor.hooks.edits[0].rivals
    assert names
    assert all(name.endswith(" France") and name != SUBJECT for name in names)
    assert [edit_at_end(editor, text) for text in rival_texts(editor)] == [-1] * len(names)
    assert edit_at_end(editor, FACT.prompt) == 0
    hook, keys = editor.hooks.modules(editor.model)[GATE], []
    handle = hook.site.register_forward_pre_hook(lambda _, args: keys.append(args[0][:, -1:]))
    logits(editor.model, *rival_texts(editor), FACT.prompt)
    handle.remove()
    for key, row in zip(keys, [-1] * len(names) + [0], strict=True):
        hook.watch(hook.site, (key,))
        seen = hook.passing.get()
        assert seen is not None
        assert seen[1].item() == row
    closed = editor_of(0)
    closed.edit([FACT, FACTS[1]], values=rows(closed, 2))
    assert closed.hooks.edits[0].rivals == ()
    # Without rivals all of them open: it is the rivals that kept them closed.
    assert all(edit_at_end(closed, text) >= 0 for text in rival_texts(editor))


def test_rivals_go_with_their_edit_and_come_back_with_it(editor: Editor) -> None:
    text = rival_texts(editor)[0]
    editor.hooks.disable(0)
    assert edit_at_end(editor, text) == 1
    editor.hooks.enable(0)
    assert edit_at_end(editor, text) == -1


@pytest.mark.parametrize("as_alias", [False, True])
def test_a_rival_that_is_edited_itself_opens_its_own_edit(editor: Editor, as_alias: bool) -> None:
    name = editor.hooks.edits[0].rivals[0]
    later = (
        EditRequest("They went to {}", "Lyon", TARGETS[2], aliases=(name.upper(), name))
        if as_alias
        else EditRequest("They went to {}", name, TARGETS[2])
    )
    text = rival_texts(editor)[0]
    before = n_rivals(editor)
    editor.edit([later], values=rows(editor, 1))
    assert edit_at_end(editor, text) == 2
    assert n_rivals(editor) == before - 1 + len(editor.hooks.edits[2].rivals)
    editor.hooks.disable(2)
    assert edit_at_end(editor, text) == -1
    editor.hooks.enable(2)
    editor.rollback(1)
    assert edit_at_end(editor, text) == -1


def test_of_a_subject_that_is_edited_no_rival_is_made(editor: Editor) -> None:
    editor.edit([EditRequest("They went to {}", "Old France", TARGETS[2])], values=rows(editor, 1))
    assert "New France" not in editor.hooks.edits[2].rivals


@pytest.mark.parametrize("compacted", [False, True])
def test_rivals_are_saved_and_compacted(editor: Editor, tmp_path: Path, compacted: bool) -> None:
    if compacted:
        editor.hooks.compact()
    editor.save_pretrained(tmp_path / "edits")
    editor.hooks.detach()
    text = rival_texts(editor)[0]
    again = HookSet.from_pretrained(tmp_path / "edits")
    assert again.edits[0].rivals == editor.hooks.edits[0].rivals
    again.attach(editor.model)
    hook = again.modules(editor.model)[GATE]
    hook.threshold.fill_(-1.0)
    assert not again.trace(editor.model, editor.tokenizer, text).is_open[0, -1]
    # The same tokens open without them.
    hook.enabled &= hook.edit >= 0
    assert again.trace(editor.model, editor.tokenizer, text).is_open[0, -1]
    again.detach()


@pytest.mark.parametrize("damage", ["too few", "another edit's"])
def test_rivals_that_are_not_the_records_are_damage(editor: Editor, damage: str) -> None:
    (batch,) = editor.hooks.journal.batches
    assert batch_from_bytes((GATE,), batch_to_bytes(batch)).edits == batch.edits
    factors = batch.layers[GATE]
    kept = slice(1) if damage == "too few" else slice(None)
    owner = factors.owner[kept].clone()
    owner[-1] = 1
    batch.layers[GATE] = replace(factors, fingerprints=factors.fingerprints[kept], owner=owner)
    with pytest.raises(MisshapenError, match=r"not those of the edits' \d rivals"):
        batch_from_bytes((GATE,), batch_to_bytes(batch))


def test_no_rival_is_made_for_a_refused_edit(editor: Editor, monkeypatch: Any) -> None:
    writing = editor._writing
    sketches = writing._sketches  # type: ignore[attr-defined]
    monkeypatch.setattr(
        sketches, "distinct", lambda marks, rate: torch.zeros(len(marks), dtype=torch.bool)
    )
    editor.edit([EditRequest("They saw {}", "Anna Blue", TARGETS[2])], values=rows(editor, 1))
    assert editor.hooks.edits[2].rivals == ()
    assert editor.hooks.journal.batches[1].n_rivals == 0
