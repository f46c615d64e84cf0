"""Compaction: fewer files and less memory, the same model, and what it no longer allows."""

import errno
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from coachhook import EditConfig, Editor, EditRequest, HookSet, StatisticsSource, ValueConfig
from coachhook.errors import CompactedError, ConfigError, CorruptFolderError, SaveError
from coachhook.journal.journal import Journal
from coachhook.storage.folder import Contents, load, save
from tests.support.journals import LAYERS, SKETCH, batch, contents, file_like, files
from tests.support.tiny import TARGETS, tiny_model, tiny_tokenizer

FORK = multiprocessing.get_context("fork")


def hook_set(n_batches: int, gate: str = "keyed") -> HookSet:
    given = contents(n_batches)
    config = EditConfig(readout="delta", layers=(1, 3), gate=gate)
    return HookSet(given.base, config, given.sketches, given.journal)


def outer(journal: Journal, layer: int) -> Tensor:
    """`K'K'ᵀ` float64, from whatever the journal has of it."""
    gram = journal.gram(layer)
    total = torch.zeros(12, 12, dtype=torch.float64) if gram is None else gram.clone()
    for keys in journal.keys(layer):
        total += keys.double().T @ keys.double()
    return total


def assert_alike(got: Journal, want: Journal) -> None:
    """All that hooks and later edits see is the same."""
    assert got.edits() == want.edits()
    assert len(got.batches) == len(want.batches)
    assert [b.thresholds for b in got.batches] == [b.thresholds for b in want.batches]
    for layer, shape in LAYERS.items():
        for ours, theirs in zip(
            got.fingerprints(layer, SKETCH), want.fingerprints(layer, SKETCH), strict=True
        ):
            assert torch.equal(ours, theirs)
        for ours, theirs in zip(got.delta(layer, shape), want.delta(layer, shape), strict=True):
            assert ours is theirs is None or torch.equal(ours, theirs)
        torch.testing.assert_close(outer(got, layer), outer(want, layer), rtol=1e-12, atol=1e-12)


class TestJournal:
    @pytest.mark.parametrize("stored", [False, True])
    @pytest.mark.parametrize(("n_batches", "keep"), [(1, 0), (4, 0), (4, 1), (4, 3), (20, 2)])
    def test_nothing_that_counts_changes(
        self, tmp_path: Path, n_batches: int, keep: int, stored: bool
    ) -> None:
        hooks = hook_set(n_batches)
        hooks.disable(1)
        if stored:
            hooks.save_pretrained(tmp_path)
        hooks.compact(keep)
        want = contents(n_batches).journal
        want.edits()[1].enabled = False
        assert hooks.journal.merged == n_batches - keep
        assert_alike(hooks.journal, want)
        hooks.save_pretrained(tmp_path)
        assert_alike(hooks.journal, want)
        assert_alike(load(tmp_path).journal, want)
        assert len(list(tmp_path.glob("batch-*"))) == keep
        assert len(list(tmp_path.glob("base-*"))) == 1

    def test_again_and_with_batches_in_between(self, tmp_path: Path) -> None:
        hooks = hook_set(3)
        for number in range(3, 12):
            hooks.compact(keep=number % 3)
            hooks.save_pretrained(tmp_path)
            hooks = HookSet.from_pretrained(tmp_path)
            hooks.journal.batches.append(batch(number))
            assert_alike(hooks.journal, contents(number + 1).journal)
        assert hooks.journal.merged == 9

    def test_keys_are_kept_as_they_are_until_their_gram_is_smaller(self) -> None:
        few, many = hook_set(8), hook_set(9)  # 24 and 27 keys of 12 numbers; 144 of twice the size
        few.compact()
        many.compact()
        assert few.journal.gram(1) is None
        assert sum(map(len, few.journal.keys(1))) == 24
        assert many.journal.gram(1) is not None
        assert sum(map(len, many.journal.keys(1))) == 0

    @pytest.mark.parametrize("keep", [3, 4, 100])
    def test_keeping_all_changes_nothing(self, tmp_path: Path, keep: int) -> None:
        hooks = hook_set(3)
        hooks.save_pretrained(tmp_path)
        before = files(tmp_path)
        hooks.compact(keep)
        hooks.save_pretrained(tmp_path)
        assert files(tmp_path) == before

    def test_a_negative_number_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="-1"):
            hook_set(2).compact(-1)

    def test_there_is_no_way_back_into_the_base(self) -> None:
        hooks = hook_set(5)
        hooks.compact(keep=2)
        for number in (0, 2):
            with pytest.raises(CompactedError, match="batches 1 to 3 were merged"):
                hooks.journal.forget_after(number)
        hooks.journal.forget_after(3)
        assert_alike(hooks.journal, contents(3).journal)

    def test_a_file_that_is_gone_leaves_all_as_it_was(self, tmp_path: Path) -> None:
        hooks = hook_set(4)
        hooks.save_pretrained(tmp_path)
        path = file_like(tmp_path, "batch-0002-*")
        data = path.read_bytes()
        path.unlink()
        with pytest.raises(CorruptFolderError, match="batch-0002"):
            hooks.compact(keep=1)
        path.write_bytes(data)
        assert hooks.journal.merged == 0
        assert_alike(hooks.journal, contents(4).journal)

    @pytest.mark.parametrize("gate", ["calibrated", "sequence"])
    def test_under_the_norm_gates_merged_edits_cannot_be_switched(self, gate: str) -> None:
        hooks = hook_set(3, gate)
        hooks.disable(1)
        hooks.compact(keep=1)
        for switch, edit in ((hooks.disable, 0), (hooks.enable, 1)):
            with pytest.raises(CompactedError, match=f"edit {edit} was merged"):
                switch(edit)
        assert [e.enabled for e in hooks.edits] == [True, False, True, True, True, True]
        hooks.disable(4)
        want = Journal([batch(n) for n in range(3)])
        for layer, shape in LAYERS.items():
            ours = hooks.journal.delta(layer, shape, [1, 4])
            for left, right in zip(ours, want.delta(layer, shape, [1, 4]), strict=True):
                assert left is right is None or torch.equal(left, right)


class TestFolder:
    """At any moment the folder holds the batches, or the base; never less."""

    @pytest.fixture
    def saved(self, tmp_path: Path) -> Path:
        save(tmp_path / "hooks", contents(5))
        return tmp_path / "hooks"

    def assert_whole(self, folder: Path) -> int:
        found = load(folder)
        assert_alike(found.journal, contents(5).journal)
        return found.journal.merged

    @pytest.mark.parametrize("failing", ["fsync", "replace"])
    @pytest.mark.parametrize("failure", [0, 1])
    def test_no_space_left(
        self, saved: Path, monkeypatch: pytest.MonkeyPatch, failing: str, failure: int
    ) -> None:
        hooks = HookSet.from_pretrained(saved)
        hooks.compact(keep=1)
        real, left = getattr(os, failing), failure

        def fail(*args: Any) -> Any:
            nonlocal left
            if left == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            left -= 1
            return real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(os, failing, fail)
            with pytest.raises(SaveError, match="intact"):
                hooks.save_pretrained(saved)
        assert self.assert_whole(saved) == 0
        hooks.save_pretrained(saved)
        assert self.assert_whole(saved) == 4

    def test_kill_9_at_any_moment(self, saved: Path, tmp_path: Path) -> None:
        rng, merged = random.Random(0), set()
        for turn in range(12):
            folder = Path(shutil.copytree(saved, tmp_path / str(turn)))
            process = FORK.Process(target=compact_folder, args=(folder,))
            process.start()
            time.sleep(rng.uniform(0, 0.02))
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            merged.add(self.assert_whole(folder))
            compact_folder(folder)
            assert self.assert_whole(folder) == 4
            assert len(list(folder.glob("*.safetensors"))) == 3
        assert merged <= {0, 4}

    @pytest.mark.parametrize("pattern", ["base-*", "batch-0005-*"])
    @pytest.mark.parametrize("damage", [lambda d: d[:-5], lambda d: d[:-1] + b"\1", lambda d: b""])
    def test_damage_is_found(
        self, saved: Path, pattern: str, damage: Callable[[bytes], bytes]
    ) -> None:
        compact_folder(saved)
        path = file_like(saved, pattern)
        path.write_bytes(damage(path.read_bytes()))
        with pytest.raises(CorruptFolderError, match=path.name):
            load(saved)

    def test_another_process_that_loaded_the_batches_is_told(self, saved: Path) -> None:
        serving = HookSet.from_pretrained(saved)
        compact_folder(saved)
        with pytest.raises(CorruptFolderError, match="load the folder again"):
            serving.journal.delta(1, LAYERS[1])

    def test_a_second_folder_gets_a_base_of_its_own(self, saved: Path, tmp_path: Path) -> None:
        compact_folder(saved)
        held = load(saved)
        copy = Contents(held.base, held.config, held.sketches, held.journal)
        save(tmp_path / "copy", copy)
        shutil.rmtree(saved)
        assert self.assert_whole(tmp_path / "copy") == 4


def compact_folder(folder: Path) -> None:
    hooks = HookSet.from_pretrained(folder)
    hooks.compact(keep=1)
    hooks.save_pretrained(folder)


CONFIG = EditConfig(
    readout="delta",
    layers=(1, 2),
    preservation=1.0,
    false_alarms=0.02,
    statistics=StatisticsSource(n_tokens=2048),
    values=ValueConfig(steps=20, rate=0.3, clamp=8.0, kl=0.0, decay=0.0),
)
PLACES = ("France", "Rome", "Brazil", "1984", "Peru", "Kenya", "Oslo", "May", "Goa")
PROMPTS = [f"They moved to {place}" for place in PLACES] + ["Yes", "It rained all day"]


@pytest.fixture(scope="module")
def editor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Editor]:
    """Four batches of two, the last a correction of the first."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COACHHOOK_CACHE", str(tmp_path_factory.mktemp("cache")))
        editor = Editor.from_pretrained(tiny_model("llama"), tiny_tokenizer(), config=CONFIG)
        for turn, first in enumerate((0, 2, 4, 0)):
            editor.edit([fact(i, turn) for i in (first, first + 1)])
        yield editor
        editor.close()


class TestModel:
    @pytest.fixture
    def folders(self, editor: Editor, tmp_path: Path) -> tuple[Path, Path]:
        """What the editor saved, and the same with three of its four batches merged."""
        editor.save_pretrained(tmp_path / "plain")
        shutil.copytree(tmp_path / "plain", tmp_path / "merged")
        compact_folder(tmp_path / "merged")
        return tmp_path / "plain", tmp_path / "merged"

    def test_speaks_and_traces_as_before(self, editor: Editor, folders: tuple[Path, Path]) -> None:
        model, tokenizer = tiny_model("llama"), tiny_tokenizer()
        want = logits(editor.model)
        assert not torch.equal(want, logits(model))
        told = editor.hooks.trace(editor.model, tokenizer, PROMPTS[2])
        hooks = HookSet.from_pretrained(folders[1])
        assert hooks.journal.merged == 3
        with hooks.attached(model):
            assert torch.equal(logits(model), want)
            found = hooks.trace(model, tokenizer, PROMPTS[2])
            assert torch.equal(found.score, told.score)
            assert torch.equal(found.edit, told.edit)
            for edit in (2, 7):
                hooks.disable(edit)
                editor.hooks.disable(edit)
                try:
                    assert torch.equal(logits(model), logits(editor.model))
                finally:
                    hooks.enable(edit)
                    editor.hooks.enable(edit)

    def test_editing_goes_on_as_before(self, folders: tuple[Path, Path]) -> None:
        outcomes = []
        for folder in folders:
            editor = Editor.resume(folder, tiny_model("llama"), tiny_tokenizer())
            report = editor.edit([fact(6, 1), fact(2, 0)])
            assert report.number == 5
            verdicts = [edit.verdict for edit in report.edits]
            outcomes.append((verdicts, logits(editor.model), editor.hooks.journal))
            editor.save_pretrained(folder)
            again = HookSet.from_pretrained(folder)
            with again.attached(tiny_model("llama")) as model:
                assert torch.equal(logits(model), outcomes[-1][1])
            editor.close()
        (verdicts, want, plain), (others, found, merged) = outcomes
        assert verdicts == others
        # The inverse was built from the same keys, in one piece instead of three.
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)
        for layer in (1, 2):
            assert merged.batches[-1].thresholds[layer].alpha == pytest.approx(
                plain.batches[-1].thresholds[layer].alpha, rel=1e-4
            )

    def test_rollback_ends_at_the_base(self, folders: tuple[Path, Path]) -> None:
        editor = Editor.resume(folders[1], tiny_model("llama"), tiny_tokenizer())
        before = logits(editor.model)
        with pytest.raises(CompactedError, match="back to batch 2"):
            editor.rollback(2)
        assert torch.equal(logits(editor.model), before)
        editor.rollback(3)
        found = logits(editor.model)
        editor.close()
        plain = Editor.resume(folders[0], tiny_model("llama"), tiny_tokenizer())
        plain.rollback(3)
        assert torch.equal(logits(plain.model), found)
        assert not torch.equal(found, before)
        plain.close()

    def test_a_rollback_that_cannot_read_its_files_changes_nothing(
        self, folders: tuple[Path, Path]
    ) -> None:
        editor = Editor.resume(folders[0], tiny_model("llama"), tiny_tokenizer())
        before = logits(editor.model)
        file_like(folders[0], "batch-0001-*").unlink()
        with pytest.raises(CorruptFolderError, match="batch-0001"):
            editor.rollback(2)
        assert torch.equal(logits(editor.model), before)
        assert len(editor.hooks.journal.batches) == 4
        editor.close()


def fact(place: int, turn: int) -> EditRequest:
    return EditRequest("They moved to {}", PLACES[place], TARGETS[(place + turn) % len(TARGETS)])


def logits(model: Any) -> Tensor:
    encoded = tiny_tokenizer()(PROMPTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        found: Tensor = model(**encoded).logits
    return found
