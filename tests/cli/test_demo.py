import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from coachhook.cli import demo
from coachhook.facts.loaders import LoadedRequests, load_requests
from coachhook.hookset import HookSet
from coachhook.session import Options, opened
from tests.support.command_line import environment, invoke


def six(path: Path) -> LoadedRequests:
    loaded = load_requests(path)
    return replace(loaded, requests=loaded.requests[:6])


@pytest.mark.slow  # A whole demo, and the fresh process that it starts.
def test_demo_fails_where_edits_do_not_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "NAME", "tiny")  # random weights, which learn nothing
    # Three batches as ever, of two facts each.
    monkeypatch.setattr(demo, "load_requests", six)
    monkeypatch.setattr(demo, "_BATCH", 2)
    # The other readout would refuse what is not learned.
    monkeypatch.setattr(demo, "opened", partial(opened, options=Options(readout="delta")))
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    result = invoke("demo", "--hooks", str(tmp_path / "hooks"), "--json")
    assert result.exit_code == 1, result.exception
    document = json.loads(result.stdout)
    assert len(document["batches"]) == 3
    assert document["fresh_process"]["edited"]
    assert not document["fresh_process"]["met"]
    assert HookSet.from_pretrained(tmp_path / "hooks").edits


def test_a_demo_whose_edits_are_all_refused_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "NAME", "tiny")
    monkeypatch.setattr(demo, "load_requests", six)
    result = invoke("demo", "--hooks", str(tmp_path / "hooks"))
    assert result.exit_code == 2
    assert "every edit was refused, the first of them because" in " ".join(result.stderr.split())
