"""The parts of an edit, and whole runs of them: what the scripts print and when they stop."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from bench.editing import consecutive, growth, key_statistics, parts, update
from bench.harness.script import WrongResultError
from coachhook.errors import ConfigError
from tests.support.bench import called
from tests.support.tiny import TARGETS


def run(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A script as `make bench` runs it, on the packages that this test imports, without a GPU."""
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = {**os.environ, "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_update_prints_how_fast_and_how_accurate_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    update.main(d_in=130, keys=7, rounds=2, accuracy_d_in=60, batches=5, threads=None, json_to="-")
    result = json.loads(capsys.readouterr().out)
    assert (result["d_in"], result["keys"], result["rounds"]) == (130, 7, 2)
    assert result["update_speedup"] > 0
    assert 0 < result["difference"] <= 1e-9
    assert 0 < result["update_error"] <= 1e-9
    assert result["update_error"] < result["update_error_float32"] <= 1e-2


def test_update_is_not_timed_when_it_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    right = update.RecursiveInverse.solve
    monkeypatch.setattr(update.RecursiveInverse, "solve", lambda *a, **k: 1.001 * right(*a, **k))
    with pytest.raises(WrongResultError, match="differs from the direct solve"):
        update.measure(d_in=50, n_keys=3, rounds=1, accuracy_d_in=20, batches=1)


@pytest.fixture
def facts(tmp_path: Path) -> str:
    """A file of four facts."""
    records = [
        {"prompt": "They all moved to {}", "subject": subject, "target": target}
        for subject, target in zip(("France", "Rome", "Troy", "Peru"), TARGETS, strict=True)
    ]
    file = tmp_path / "facts.jsonl"
    file.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return str(file)


def test_editing_measures_its_three_parts(
    tiny_folder: Path, facts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COACHHOOK_CACHE", str(tmp_path))
    sizes = ["--d-in", "64", "--keys", "8", "--batches", "2", "--accuracy-d-in", "64"]
    few = ["--edits", "2", "--steps", "2", "--rounds", "2"]
    done = called(parts, facts, "--model", str(tiny_folder), *sizes, *few, "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result["values_speedup"] > 0
    assert result["update_speedup"] > 0
    assert result["statistics_overhead"] > 0
    rows = result["values"]["rows"]
    # The same contexts and every step: only the way of computing differs.
    ours, published = rows["ours, published prefixes, every step"], rows["published"]
    assert ours["loss"] == pytest.approx(published["loss"], rel=1e-3)


@pytest.mark.slow  # Whole runs in processes of their own.
def test_a_consecutive_run_goes_on_where_it_stopped(
    tiny_folder: Path, facts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COACHHOOK_CACHE", str(tmp_path / "cache"))
    place = ["--model", str(tiny_folder), "--run", str(tmp_path / "run"), "--readout", "delta"]
    common = [*place, "--batch-size", "1", "--json"]
    first = run("bench.editing.consecutive", facts, "--edits", "2", *common)
    assert first.returncode == 0, first.stderr
    # As if it had been killed between saving the second batch and noting it.
    notes = tmp_path / "run" / "batches.jsonl"
    notes.write_text(notes.read_text().splitlines()[0] + "\n")
    second = called(consecutive, facts, "--edits", "4", *common)
    assert second.exit_code == 0, second.output
    batches = json.loads(second.stdout)["batches"]
    assert [bool(batch) for batch in batches] == [True, False, True, True]
    assert batches[0] == json.loads(first.stdout)["batches"][0]
    # Not the batches that the folder holds: these would pass some facts over.
    other = called(consecutive, facts, "--edits", "4", *common, "--batch-size", "2")
    assert other.exit_code == 2
    assert "other facts or batches" in " ".join(other.stderr.split())
    other = called(consecutive, facts, "--edits", "4", *common, "--gate", "calibrated")
    assert isinstance(other.exception, ConfigError)
    notes.write_text("{")
    with pytest.raises(typer.BadParameter, match=r"batches\.jsonl is damaged"):
        consecutive.noted(notes)


def test_prints_a_row_a_batch_and_what_compaction_gains(capsys: pytest.CaptureFixture[str]) -> None:
    growth.main(batches=3, edits=2, gate="keyed", as_json=True)
    document = json.loads(capsys.readouterr().out)
    assert [row["edits"] for row in document["batches"]] == [2, 4, 6]
    for row in document["batches"]:
        assert row["hooks_s"] > 0
        assert row["save_s"] > 0
        assert row["rss_mb"] > 0
    assert document["fresh"].keys() >= {"load_s", "compact_s", "compacted_attach_s", "folder_mb"}


def test_key_statistics_beside_the_bare_pass(tiny_folder: Path) -> None:
    found = key_statistics.measure(str(tiny_folder), rounds=2)
    assert found["layers"] == [0, 1, 2]
    assert found["statistics_overhead"] > 0
