"""Key statistics of a tiny model over few and small shards, stopped where a test wants it."""

from pathlib import Path
from typing import Any

import pytest

from coachhook.models.architecture import Architecture
from coachhook.statistics.measure import KeyStatistics, key_statistics
from coachhook.statistics.source import StatisticsSource
from coachhook.statistics.sums import KeyReader, KeySums
from coachhook.statistics.text import Shard
from tests.support.tiny import tiny_lm, tiny_model

LAYERS = (1, 2)
LENGTH, SEQUENCES = 16, 8
# Five shards, of which the last is smaller.
SAMPLED = StatisticsSource(n_tokens=LENGTH * (4 * SEQUENCES + 3))
ADD = KeySums.add


def measure(source: StatisticsSource = SAMPLED, model: Any = None) -> KeyStatistics:
    model = model or tiny_model("llama", seed=7)
    return key_statistics(tiny_lm(model), Architecture.of(model), LAYERS, source)


class Stopped(BaseException):
    pass


def stop_at(monkeypatch: pytest.MonkeyPatch, number: int | None) -> list[int]:
    """Have a pass stop before shard `number`; the list tells which shards are read."""
    read: list[int] = []

    def watched(self: KeySums, reader: KeyReader, shard: Shard, *args: Any) -> None:
        if shard.number == number:
            raise Stopped
        read.append(shard.number)
        ADD(self, reader, shard, *args)

    monkeypatch.setattr(KeySums, "add", watched)
    return read


def write_text(place: Path) -> StatisticsSource:
    """A file of paragraphs of 2 to 90 words, in an odd number of shards."""
    words = [
        "the",
        "weather",
        "stayed",
        "dry",
        "in",
        "other",
        "news",
        "as",
        "I",
        "was",
        "told",
        "yesterday",
        "Paris",
    ]
    lengths = [2 + (37 * i) % 89 for i in range(11)]
    text = "\n\n".join(" ".join((words * 9)[:n]) for n in lengths)
    (place / "text.txt").write_text(text)
    return StatisticsSource(str(place / "text.txt"), n_tokens=100_000)
