"""Each test of statistics has a cache of its own; and shards as small as its text, if it asks."""

from pathlib import Path

import pytest

from coachhook.statistics import text as corpus
from tests.support.measuring import LENGTH, SEQUENCES


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COACHHOOK_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "SEQUENCE_LENGTH", LENGTH)
    monkeypatch.setattr(corpus, "SHARD_SEQUENCES", SEQUENCES)
