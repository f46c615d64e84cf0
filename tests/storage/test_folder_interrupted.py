"""Saves that fail or are killed, at any point: the folder holds its former state or the next."""

import errno
import multiprocessing
import os
import random
import resource
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from coachhook.errors import FolderError, SaveError
from coachhook.storage.folder import load, locked, save
from tests.support.journals import assert_same, batch, contents, files

FORK = multiprocessing.get_context("fork")
NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


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
