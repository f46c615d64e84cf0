"""One process at a time writes to a folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from coachhook.errors import FolderLockedError
from coachhook.storage.folder import load, locked, save
from tests.support.journals import assert_same, contents


class TestLock:
    def test_another_process_is_kept_out(self, tmp_path: Path) -> None:
        save(tmp_path, contents(1))
        holder = subprocess.Popen(
            [
                sys.executable,
                "-c",
                "import sys\nfrom pathlib import Path\n"
                "from coachhook.storage.folder import locked\n"
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
