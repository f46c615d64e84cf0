"""The folder on disk: whole or not at all, checked when read, whatever happens in between."""

import errno
import hashlib
import json
import math
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from coachhook.errors import (
    CorruptFolderError,
    FolderError,
    FolderLockedError,
    NewerFormatError,
    SaveError,
)
from coachhook.hookset import HookSet
from coachhook.journal.folder import CONFIG_NAME, FORMAT_VERSION, Contents, load, locked, save
from coachhook.journal.tensor_file import pack
from tests.support.journals import assert_same, batch, contents, file_like, files, rewrite

FORK = multiprocessing.get_context("fork")


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


class TestDamage:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        save(tmp_path, contents(2))
        return tmp_path

    @pytest.mark.parametrize("pattern", [CONFIG_NAME, "sketches-*", "batch-0001-*", "batch-0002-*"])
    @pytest.mark.parametrize(
        "damage",
        [
            pytest.param(lambda data: data[: len(data) // 2], id="truncated"),
            pytest.param(lambda data: data[:-1] if data[-1] != 10 else data[:-3], id="short"),
            pytest.param(lambda data: b"", id="emptied"),
            pytest.param(lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:], id="flipped"),
            pytest.param(lambda data: bytes(len(data)), id="zeroed"),
            pytest.param(lambda data: b"\xff\xfe" + data, id="prefixed"),
        ],
    )
    def test_is_found_and_the_file_named(
        self, folder: Path, damage: Callable[[bytes], bytes], pattern: str
    ) -> None:
        path = file_like(folder, pattern)
        path.write_bytes(damage(path.read_bytes()))
        with pytest.raises(CorruptFolderError) as caught:
            load(folder)
        assert path.name in str(caught.value)

    @pytest.mark.parametrize("pattern", ["sketches-*", "batch-0001-*", "batch-0002-*"])
    def test_a_missing_file_is_named(self, folder: Path, pattern: str) -> None:
        path = file_like(folder, pattern)
        path.unlink()
        with pytest.raises(CorruptFolderError) as caught:
            load(folder)
        assert path.name in str(caught.value)

    @pytest.mark.parametrize("made", [False, True], ids=["no-folder", "empty-folder"])
    def test_no_hooks_here(self, tmp_path: Path, made: bool) -> None:
        folder = tmp_path / "nothing"
        if made:
            folder.mkdir()
        with pytest.raises(FolderError, match=CONFIG_NAME) as caught:
            load(folder)
        assert not isinstance(caught.value, CorruptFolderError)
        assert str(folder) in str(caught.value)

    def test_every_field_of_the_configuration_is_guarded(self, folder: Path) -> None:
        path = folder / CONFIG_NAME
        original = path.read_text()
        places = list(leaves(json.loads(original)))
        assert len(places) > 35
        for place in places:
            config = json.loads(original)
            *parents, last = place
            holder = config
            for key in parents:
                holder = holder[key]
            holder[last] = other_value(holder[last])
            path.write_text(json.dumps(config))
            with pytest.raises(FolderError):
                load(folder)

    @pytest.mark.parametrize("text", ["[]", "null", '"x"', "3", "{}", "[" * 100_000, '{"a":'])
    def test_another_files_json_is_not_ours(self, folder: Path, text: str) -> None:
        folder.joinpath(CONFIG_NAME).write_text(text)
        with pytest.raises(CorruptFolderError, match=CONFIG_NAME):
            load(folder)

    @pytest.mark.parametrize(
        "key",
        ["base_model", "settings", "sketches", "base", "batches", "disabled"],
        ids=lambda key: f"no-{key}",
    )
    def test_a_configuration_without_a_part(self, folder: Path, key: str) -> None:
        rewrite(folder, lambda config: config.pop(key))
        with pytest.raises(CorruptFolderError, match=key):
            load(folder)

    @pytest.mark.parametrize(
        "change",
        [
            pytest.param(lambda c: c.update(base_model=[]), id="model-is-a-list"),
            pytest.param(lambda c: c.update(batches={"a": 1}), id="batches-are-a-map"),
            pytest.param(lambda c: c.update(batches=[3]), id="batch-is-a-number"),
            pytest.param(lambda c: c.update(sketches=None), id="no-name"),
            pytest.param(lambda c: c.update(settings="x"), id="settings-are-text"),
            pytest.param(lambda c: c["settings"].update(gate="magic"), id="unknown-gate"),
            pytest.param(lambda c: c["settings"].update(values=None), id="no-values"),
            pytest.param(lambda c: c.update(disabled=3), id="disabled-is-a-number"),
            pytest.param(lambda c: c.update(base=3), id="base-is-a-number"),
            pytest.param(lambda c: c["base_model"].update(layers={"9": [12, 8]}), id="other-layer"),
            pytest.param(lambda c: c["base_model"].update(layers={"1": [1]}), id="shape-is-short"),
        ],
    )
    def test_nonsense_with_a_valid_digest(
        self, folder: Path, change: Callable[[dict[str, Any]], None]
    ) -> None:
        rewrite(folder, change)
        with pytest.raises(CorruptFolderError, match=CONFIG_NAME):
            load(folder)

    @pytest.mark.parametrize(
        "records",
        [
            b'{"edits": [], "thresholds": {}}',
            b'{"edits": [{}], "thresholds": {}}',
            b'{"edits": 3}',
            b"[]",
            b"null",
            b'{"edits": [',
            b"\xff",
            b"",
        ],
    )
    def test_nonsense_in_the_file_of_a_batch(self, folder: Path, records: bytes) -> None:
        tensors = load_file(file_like(folder, "batch-0001-*"))
        tensors["records"] = torch.tensor(list(records), dtype=torch.uint8)
        name, data = pack("batch-0001", tensors)
        (folder / name).write_bytes(data)
        rewrite(folder, lambda config: config["batches"].__setitem__(0, name))
        with pytest.raises(CorruptFolderError, match=name):
            load(folder)

    @pytest.mark.parametrize("absolute", [False, True], ids=["relative", "absolute"])
    @pytest.mark.parametrize("which", ["sketches", "batch"])
    def test_a_name_outside_the_folder_is_refused(
        self, folder: Path, which: str, absolute: bool
    ) -> None:
        pattern = "sketches-*" if which == "sketches" else "batch-0001-*"
        path = file_like(folder, pattern)
        outside = folder.parent / path.name
        path.rename(outside)
        name = str(outside) if absolute else f"../{path.name}"

        def point_outside(config: dict[str, Any]) -> None:
            if which == "sketches":
                config["sketches"] = name
            else:
                config["batches"][0] = name

        rewrite(folder, point_outside)
        with pytest.raises(CorruptFolderError, match="outside") as caught:
            load(folder)
        assert name in str(caught.value)

    def test_a_file_that_is_no_safetensors(self, folder: Path) -> None:
        data = b"not tensors"
        name = f"batch-0001-{hashlib.sha256(data).hexdigest()}.safetensors"
        folder.joinpath(name).write_bytes(data)
        rewrite(folder, lambda config: config["batches"].__setitem__(0, name))
        with pytest.raises(CorruptFolderError, match="batch-0001"):
            load(folder)

    def test_a_file_of_another_kind_in_place_of_a_batch(self, folder: Path) -> None:
        name = file_like(folder, "sketches-*").name
        rewrite(folder, lambda config: config["batches"].__setitem__(0, name))
        with pytest.raises(CorruptFolderError):
            load(folder)

    @pytest.mark.parametrize("version", [FORMAT_VERSION + 1, 99])
    def test_a_newer_version_is_named(self, folder: Path, version: int) -> None:
        path = folder / CONFIG_NAME
        path.write_text(json.dumps({"format_version": version, "all_else": "is different"}))
        with pytest.raises(NewerFormatError) as caught:
            load(folder)
        assert str(version) in str(caught.value)
        assert f"reads {FORMAT_VERSION}" in str(caught.value)
        before = files(folder)
        with pytest.raises(NewerFormatError):
            save(folder, contents(3))
        assert {k: v for k, v in files(folder).items() if k in before} == before


def leaves(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            yield from leaves(inner, (*place, key))
    else:
        yield place


def other_value(value: Any) -> Any:
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, str):
        return value + "x"
    return 0.0 if math.isinf(value) else value + 1


class TestLock:
    def test_another_process_is_kept_out(self, tmp_path: Path) -> None:
        save(tmp_path, contents(1))
        holder = subprocess.Popen(
            [
                sys.executable,
                "-c",
                "import sys\nfrom pathlib import Path\n"
                "from coachhook.journal.folder import locked\n"
                "with locked(Path(sys.argv[1])):\n    print('held', flush=True)\n    input()\n",
                str(tmp_path),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            with pytest.raises(FolderLockedError, match="another process") as caught:
                locked(tmp_path).__enter__()
            assert str(tmp_path) in str(caught.value)
            with pytest.raises(FolderLockedError):
                save(tmp_path, contents(2))
            # Reading needs no lock.
            assert_same(load(tmp_path), contents(1))
        finally:
            holder.kill()
            holder.wait()
        with locked(tmp_path):
            pass

    def test_is_given_back_after_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(KeyError), locked(tmp_path):
            raise KeyError
        with locked(tmp_path):
            pass


NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class TestFailedWrites:
    """Every system call of a save fails in turn: the folder stays at its former state."""

    @pytest.mark.parametrize("failing", ["fsync", "replace"])
    @pytest.mark.parametrize(
        ("held", "wanted", "writes"),
        [(0, 3, 4), (1, 3, 3), (3, 1, 1)],
        ids=["from-nothing", "growing", "rolled-back"],
    )
    def test_no_space_left_at_any_point(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        held: int,
        wanted: int,
        writes: int,
        failing: str,
    ) -> None:
        real = getattr(os, failing)
        for failure in range(writes + 1):
            folder = tmp_path / str(failure)
            save(folder, contents(held))
            new = load(folder)
            new.journal.batches[:] = new.journal.batches[:wanted]
            new.journal.batches += contents(wanted).journal.batches[held:]
            left = failure

            def fail(*args: Any) -> Any:
                nonlocal left
                if left == 0:
                    raise NO_SPACE
                left -= 1
                return real(*args)

            with monkeypatch.context() as patch:
                patch.setattr(os, failing, fail)
                if failure == writes:
                    save(folder, new)
                else:
                    with pytest.raises(SaveError, match=r"No space left.*intact"):
                        save(folder, new)
            assert_same(load(folder), contents(wanted if failure == writes else held))
            assert not list(folder.glob(".writing-*"))

    def test_the_same_editor_can_save_after_space_was_made(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        save(tmp_path, contents(1))
        held = load(tmp_path)
        held.journal.batches += [batch(1), batch(2)]
        real, calls = os.replace, 0

        def fail(*args: Any) -> None:
            nonlocal calls
            calls += 1
            if calls == 2:
                raise NO_SPACE
            real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", fail)
            with pytest.raises(SaveError):
                save(tmp_path, held)
        save(tmp_path, held)
        assert_same(load(tmp_path), contents(3))
        assert len(list(tmp_path.glob("*.safetensors"))) == 4

    def test_first_save_of_a_new_folder(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: Any) -> None:
            raise NO_SPACE

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fail)
            with pytest.raises(SaveError):
                save(tmp_path / "new", contents(1))
        with pytest.raises(FolderError, match="holds no hooks"):
            load(tmp_path / "new")
        assert files(tmp_path / "new") == {}

    def test_a_real_limit_of_the_file_size(self, tmp_path: Path) -> None:
        save(tmp_path, contents(1))
        before = files(tmp_path)
        receiver, sender = FORK.Pipe(duplex=False)
        process = FORK.Process(target=save_within, args=(tmp_path, 4096, sender))
        process.start()
        process.join(60)
        assert process.exitcode == 0
        assert receiver.recv() == "SaveError"
        assert files(tmp_path) == before
        assert_same(load(tmp_path), contents(1))

    @pytest.mark.parametrize("place", ["below-a-file", "a-file"])
    def test_a_place_that_cannot_be_a_folder(self, tmp_path: Path, place: str) -> None:
        tmp_path.joinpath("file").write_text("mine")
        folder = tmp_path / "file" / ("inside" if place == "below-a-file" else "")
        for attempt in (lambda: save(folder, contents(1)), lambda: locked(folder).__enter__()):
            with pytest.raises(SaveError) as caught:
                attempt()
            assert str(tmp_path / "file") in str(caught.value)
        assert tmp_path.joinpath("file").read_text() == "mine"


def save_within(folder: Path, limit: int, sender: Connection) -> None:
    """In a child process: add a batch of over `limit` bytes where no file may be larger."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    held = load(folder)
    held.journal.batches.append(batch(1, rows=200))
    try:
        save(folder, held)
    except Exception as error:
        sender.send(type(error).__name__)
    else:
        sender.send("saved")


def grow(folder: Path, sender: Connection) -> None:
    """In a child process: add one batch after another for ever, and say how many are saved."""
    held = load(folder)
    while True:
        held.journal.batches.append(batch(len(held.journal.batches)))
        save(folder, held)
        sender.send(len(held.journal.batches))


def test_kill_9_at_any_moment_leaves_whole_batches(tmp_path: Path) -> None:
    save(tmp_path, contents(0))
    rng = random.Random(0)
    count = 0
    for _ in range(10):
        receiver, sender = FORK.Pipe(duplex=False)
        process = FORK.Process(target=grow, args=(tmp_path, sender))
        process.start()
        sender.close()
        told = receiver.recv()
        time.sleep(rng.uniform(0, 0.03))
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        while True:
            try:
                told = receiver.recv()
            except EOFError:
                break
        found = load(tmp_path)
        assert len(found.journal.batches) in (told, told + 1)
        assert told > count
        count = len(found.journal.batches)
        assert_same(found, contents(count))
