"""The journal keeps what it derives, and forgets it when batches go; factors stay on disk."""

import gc
import random
import weakref
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coachhook.errors import CorruptFolderError
from coachhook.journal.journal import EditRecord, Journal, Verdict
from coachhook.storage.folder import load, save
from coachhook_kernels import Delta
from tests.support.journals import LAYERS, SKETCH, batch, contents, file_like, grow_and_shrink

LAYER, SHAPE = 1, LAYERS[1]


def superseded(edits: list[EditRecord]) -> dict[int, int]:
    """By looking at every pair."""
    written = [e for e in edits if e.verdict is not Verdict.REFUSED]
    later = {
        e.id: [o.id for o in written if o.id > e.id and o.request.fact == e.request.fact]
        for e in written
    }
    return {i: min(ids) for i, ids in later.items() if ids}


def dense(delta: Delta) -> Tensor:
    return delta.down if delta.up is None else delta.up @ delta.down


def same(left: Delta, right: Delta) -> bool:
    pairs = zip(left, right, strict=True)
    return all(a is b is None or (a is not None and torch.equal(a, b)) for a, b in pairs)


@settings(max_examples=60)
@given(seed=st.integers(0, 2**30), steps=st.integers(1, 12))
def test_all_that_is_derived_equals_what_a_new_journal_derives(seed: int, steps: int) -> None:
    rng, journal = random.Random(seed), Journal()
    for _ in range(steps):
        grow_and_shrink(journal, rng)
        edits = journal.edits()
        replaced = superseded(edits)
        assert journal.superseded() == replaced
        standing = [e for e in edits if e.verdict is not Verdict.REFUSED and e.id not in replaced]
        assert journal.standing() == standing
        assert journal.live() == [e for e in standing if e.enabled]
        assert journal.in_force().nonzero().squeeze(-1).tolist() == [e.id for e in journal.live()]
        fresh = Journal(list(journal.batches))
        disabled = [e.id for e in edits if not e.enabled]
        for without in ([], disabled):
            assert same(journal.delta(LAYER, SHAPE, without), fresh.delta(LAYER, SHAPE, without))
        for ours, theirs in zip(
            journal.fingerprints(LAYER, SKETCH), fresh.fingerprints(LAYER, SKETCH), strict=True
        ):
            assert torch.equal(ours, theirs)


def test_disabled_shares_are_not_in_delta() -> None:
    journal = Journal([batch(n) for n in range(3)])
    want = torch.zeros(SHAPE[1], SHAPE[0])
    for b in journal.batches:
        for i, edit in enumerate(b.edits):
            if edit.id not in (1, 4):
                want += torch.outer(b.layers[LAYER].residuals[i], b.layers[LAYER].solutions[i])
    found = dense(journal.delta(LAYER, SHAPE, [1, 4]))
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)


class TestStored:
    def test_factors_leave_the_memory_once_they_are_stored(self, tmp_path: Path) -> None:
        held = contents(2)
        gone = [
            weakref.ref(tensor)
            for b in held.journal.batches
            for factors in b.layers.values()
            for tensor in (factors.residuals, factors.solutions, factors.keys)
        ]
        save(tmp_path, held)
        gc.collect()
        assert [ref() for ref in gone] == [None] * 12

    def test_a_batch_more_needs_no_file_of_the_others(self, tmp_path: Path) -> None:
        """And a batch that fails goes back, bit for bit, without one."""
        held = contents(3)
        before = held.journal.delta(LAYER, SHAPE)
        save(tmp_path, held)
        for file in tmp_path.glob("batch-*"):
            file.unlink()
        held.journal.batches.append(batch(3))
        after = held.journal.delta(LAYER, SHAPE)
        held.journal.batches.pop()
        assert same(held.journal.delta(LAYER, SHAPE), before)
        held.journal.batches.append(batch(3))
        assert same(held.journal.delta(LAYER, SHAPE), after)
        assert same(after, Journal([batch(n) for n in range(4)]).delta(LAYER, SHAPE))

    @pytest.mark.parametrize("damage", ["missing", "changed", "truncated"])
    def test_a_file_that_changes_under_a_running_editor(self, tmp_path: Path, damage: str) -> None:
        save(tmp_path, contents(2))
        held = load(tmp_path)
        want = held.journal.batches[0].layers[LAYER].keys
        path = file_like(tmp_path, "batch-0001-*")
        data = path.read_bytes()
        path.unlink()
        if damage != "missing":
            path.write_bytes(data[:-8] + b"otherway" if damage == "changed" else data[:-8])
        with pytest.raises(CorruptFolderError, match=path.name):
            held.journal.delta(LAYER, SHAPE)
        with pytest.raises(CorruptFolderError, match=path.name):
            list(held.journal.keys(LAYER))
        path.write_bytes(data)
        assert torch.equal(next(held.journal.keys(LAYER)), want)

    def test_a_loaded_folder_gives_the_same_bits(self, tmp_path: Path) -> None:
        given = contents(6)
        want = given.journal.delta(LAYER, SHAPE)
        save(tmp_path, given)
        assert same(load(tmp_path).journal.delta(LAYER, SHAPE), want)

    def test_a_folder_that_is_named_relatively_is_found_from_anywhere(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        save(tmp_path / "hooks", contents(1))
        monkeypatch.chdir(tmp_path)
        held = load(Path("hooks"))
        monkeypatch.chdir("/")
        assert held.journal.batches[0].layers[LAYER].keys.shape == (3, 12)
