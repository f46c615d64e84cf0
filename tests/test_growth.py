"""The benchmark of what one batch more costs: it runs, and its parts are there."""

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "bench" / "growth.py"


def test_prints_a_row_a_batch_and_what_compaction_gains() -> None:
    command = [sys.executable, str(SCRIPT), "--batches", "3", "--edits", "2", "--json"]
    paths = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    document = json.loads(done.stdout)
    assert [row["edits"] for row in document["batches"]] == [2, 4, 6]
    for row in document["batches"]:
        assert row["hooks_s"] > 0
        assert row["save_s"] > 0
        assert row["rss_mb"] > 0
    assert document["fresh"].keys() >= {"load_s", "compact_s", "compacted_attach_s", "folder_mb"}
