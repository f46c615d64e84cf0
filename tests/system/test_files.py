"""Files that appear whole or not at all, and locks."""

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from coachhook.system.files import file_lock, remove_unwritten, replacing, write


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_file_takes_the_place_of_an_earlier_one(tmp_path: Path) -> None:
    write(tmp_path / "kept.json", b"first")
    write(tmp_path / "kept.json", b"second")
    assert (tmp_path / "kept.json").read_bytes() == b"second"
    assert names(tmp_path) == {"kept.json"}


@pytest.mark.parametrize("name", ["x" * 250, ".hidden", "two.dots.here", "no dot"])
def test_any_name(tmp_path: Path, name: str) -> None:
    write(tmp_path / name, b"data")
    assert names(tmp_path) == {name}


def make_folder(target: Path) -> None:
    with replacing(target) as staging:
        staging.mkdir()
        (staging / "weights").write_bytes(b"half")


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    make_folder(tmp_path / "model")
    assert (tmp_path / "model" / "weights").read_bytes() == b"half"
    assert names(tmp_path) == {"model"}


def be_interrupted(target: Path) -> None:
    with replacing(target) as staging:
        staging.write_bytes(b"half")
        raise KeyboardInterrupt


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_nothing_is_left_of_what_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    write(tmp_path / "kept", b"before")
    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "kept", b"after")
    with pytest.raises(OSError, match="No space left"):
        make_folder(tmp_path / "model")
    with pytest.raises(KeyboardInterrupt):
        be_interrupted(tmp_path / "kept")
    assert names(tmp_path) == {"kept"}
    assert (tmp_path / "kept").read_bytes() == b"before"


def test_what_the_killed_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys\nfrom pathlib import Path\n"
        "from coachhook.system.files import replacing\n"
        "with replacing(Path(sys.argv[1])) as staging:\n"
        "    staging.write_bytes(b'half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    for name in ("one.partial", "other.partial"):
        subprocess.run([sys.executable, "-c", script, str(tmp_path / name)], check=False)
    write(tmp_path / "one.json", b"whole")
    assert len(names(tmp_path)) == 3
    remove_unwritten(tmp_path, "one.json")
    assert len(names(tmp_path)) == 2
    remove_unwritten(tmp_path)
    assert names(tmp_path) == {"one.json"}


def test_a_lock_keeps_others_out_and_may_be_taken_again(tmp_path: Path) -> None:
    lock = tmp_path / "new" / ".lock"
    seen = []

    def other(wait: bool) -> None:
        try:
            with file_lock(lock, wait=wait):
                seen.append("held")
        except BlockingIOError:
            seen.append("refused")

    waiting = threading.Thread(target=other, args=(True,))
    with file_lock(lock), file_lock(lock):
        impatient = threading.Thread(target=other, args=(False,))
        impatient.start()
        impatient.join(30)
        assert seen == ["refused"]
        waiting.start()
    waiting.join(30)
    assert seen == ["refused", "held"]


def test_a_place_that_cannot_hold_a_lock(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match="file"), file_lock(tmp_path / "file" / ".lock"):
        pass
