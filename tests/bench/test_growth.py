"""The benchmark of what one batch more costs: it runs, and its parts are there."""

import json
from typing import Any

import pytest


def test_prints_a_row_a_batch_and_what_compaction_gains(
    bench: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    bench("bench.editing.growth").main(batches=3, edits=2, gate="keyed", as_json=True)
    document = json.loads(capsys.readouterr().out)
    assert [row["edits"] for row in document["batches"]] == [2, 4, 6]
    for row in document["batches"]:
        assert row["hooks_s"] > 0
        assert row["save_s"] > 0
        assert row["rss_mb"] > 0
    assert document["fresh"].keys() >= {"load_s", "compact_s", "compacted_attach_s", "folder_mb"}
