"""The folder on disk: what it gives back, how it grows, and whose edits it takes."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from coachhook.errors import CorruptFolderError, FolderError
from coachhook.hookset import HookSet
from coachhook.storage.folder import CONFIG_NAME, Contents, load, save
from tests.support.journals import assert_same, batch, contents, file_like, files


class TestRoundTrip:
    @pytest.mark.parametrize("n_batches", [0, 1, 3])
    def test_load_gives_what_save_was_given(self, tmp_path: Path, n_batches: int) -> None:
        save(tmp_path / "new" / "folder", contents(n_batches))
        assert_same(load(tmp_path / "new" / "folder"), contents(n_batches))

    def test_disabled_edits_stay_disabled(self, tmp_path: Path) -> None:
        save(tmp_path, contents(2))
        changed = load(tmp_path)
        changed.journal.edits()[1].enabled = False
        save(tmp_path, changed)
        enabled = [edit.enabled for edit in load(tmp_path).journal.edits()]
        assert enabled == [True, False, True, True]

    def test_tensors_need_not_be_contiguous(self, tmp_path: Path) -> None:
        given = contents(1)
        turned = {k: (p.T.contiguous().T, o) for k, (p, o) in given.sketches.items()}
        save(tmp_path, Contents(given.base, given.config, turned, given.journal))
        assert_same(load(tmp_path), contents(1))

    def test_two_folders_of_one_journal_are_both_whole(self, tmp_path: Path) -> None:
        given = contents(2)
        save(tmp_path / "a", given)
        save(tmp_path / "b", given)
        assert_same(load(tmp_path / "a"), given)
        assert_same(load(tmp_path / "b"), given)

    def test_saving_again_writes_the_same_bytes(self, tmp_path: Path) -> None:
        save(tmp_path, contents(2))
        before = files(tmp_path)
        save(tmp_path, load(tmp_path))
        assert files(tmp_path) == before


class TestGrowing:
    def test_a_longer_journal_adds_one_file_and_leaves_the_others_alone(
        self, tmp_path: Path
    ) -> None:
        save(tmp_path, contents(2))
        before = {f.name: f.stat() for f in tmp_path.glob("*.safetensors")}
        held = load(tmp_path)
        held.journal.batches.append(batch(2))
        save(tmp_path, held)
        after = {f.name: f.stat() for f in tmp_path.glob("*.safetensors")}
        assert len(after) == len(before) + 1
        for name, stat in before.items():
            assert after[name].st_ino == stat.st_ino
            assert after[name].st_mtime_ns == stat.st_mtime_ns
        assert_same(load(tmp_path), contents(3))

    def test_a_rolled_back_journal_removes_the_later_files(self, tmp_path: Path) -> None:
        save(tmp_path, contents(3))
        held = load(tmp_path)
        del held.journal.batches[1:]
        save(tmp_path, held)
        assert_same(load(tmp_path), contents(1))
        assert len(list(tmp_path.glob("*.safetensors"))) == 2
        held.journal.batches.append(batch(1, subject="Bern"))
        save(tmp_path, held)
        assert load(tmp_path).journal.edits()[-1].request.subject == "Bern 1/1"

    def test_files_of_others_are_left_alone(self, tmp_path: Path) -> None:
        """A model and its hooks may share a folder."""
        tmp_path.joinpath("model.safetensors").write_bytes(b"weights")
        tmp_path.joinpath("notes.txt").write_text("mine")
        save(tmp_path, contents(2))
        held = load(tmp_path)
        del held.journal.batches[1:]
        save(tmp_path, held)
        assert tmp_path.joinpath("model.safetensors").read_bytes() == b"weights"
        assert tmp_path.joinpath("notes.txt").read_text() == "mine"

    def test_leftovers_of_a_killed_process_do_not_pile_up(self, tmp_path: Path) -> None:
        save(tmp_path, contents(1))
        tmp_path.joinpath(".writing-999999999-batch-0002").write_bytes(b"half")
        held = load(tmp_path)
        held.journal.batches.append(batch(1))
        save(tmp_path, held)
        assert not list(tmp_path.glob(".writing-*"))

    def test_saving_makes_good_a_truncated_file(self, tmp_path: Path) -> None:
        held = contents(2)
        save(tmp_path, held)
        path = file_like(tmp_path, "sketches-*")
        path.write_bytes(path.read_bytes()[:-7])
        save(tmp_path, held)
        assert_same(load(tmp_path), held)

    def test_saving_does_not_build_on_a_truncated_batch(self, tmp_path: Path) -> None:
        """Its factors were nowhere else."""
        held = contents(2)
        save(tmp_path, held)
        path = file_like(tmp_path, "batch-0001-*")
        path.write_bytes(path.read_bytes()[:-7])
        held.journal.batches.append(batch(2))
        before = files(tmp_path)
        with pytest.raises(CorruptFolderError, match=path.name):
            save(tmp_path, held)
        assert files(tmp_path) == before

    def test_the_configuration_gains_a_name_a_batch_and_no_more(self, tmp_path: Path) -> None:
        """What a batch costs must not depend on how many there are."""
        sizes = []
        held = contents(0)
        for number in range(4):
            held.journal.batches.append(batch(number, subject="a long subject " * 100))
            save(tmp_path, held)
            sizes.append((tmp_path / CONFIG_NAME).stat().st_size)
        assert max(b - a for a, b in pairwise(sizes)) < 120


class TestOtherEdits:
    def assert_refused(self, folder: Path, attempt: Callable[[], None]) -> None:
        before = files(folder)
        with pytest.raises(FolderError) as caught:
            attempt()
        assert str(folder) in str(caught.value)
        assert {k: v for k, v in files(folder).items() if k in before} == before
        assert_same(load(folder), contents(3))

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        save(tmp_path, contents(3))
        return tmp_path

    @pytest.mark.parametrize("n_batches", [1, 3, 4])
    def test_of_other_facts(self, folder: Path, n_batches: int) -> None:
        self.assert_refused(folder, lambda: save(folder, contents(n_batches, subject="Bern")))

    def test_of_another_model(self, folder: Path) -> None:
        given = contents(3)
        other = {k: (2 * p, o) for k, (p, o) in given.sketches.items()}
        self.assert_refused(
            folder, lambda: save(folder, Contents(given.base, given.config, other, given.journal))
        )

    def test_of_a_new_set_that_never_saw_the_folder(self, folder: Path) -> None:
        """No edits at all are not a rollback of somebody else's."""
        new = contents(0)
        hooks = HookSet(new.base, new.config, new.sketches)
        self.assert_refused(folder, lambda: hooks.save_pretrained(folder))

    def test_of_a_set_that_another_process_has_overtaken(self, tmp_path: Path) -> None:
        save(tmp_path, contents(2))
        hooks = HookSet.from_pretrained(tmp_path)
        other = load(tmp_path)
        other.journal.batches.append(batch(2))
        save(tmp_path, other)
        hooks.edits[0].enabled = False
        self.assert_refused(tmp_path, lambda: hooks.save_pretrained(tmp_path))

    def test_but_a_rollback_may_go_to_nothing(self, folder: Path) -> None:
        hooks = HookSet.from_pretrained(folder)
        hooks.journal.batches.clear()
        hooks.save_pretrained(folder)
        assert_same(load(folder), contents(0))
