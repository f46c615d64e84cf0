"""Key statistics that were interrupted go on from their last shard, to the same bits."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from coachhook.statistics.cache import divide
from coachhook.statistics.measure import KeyStatistics
from coachhook.statistics.source import StatisticsSource
from coachhook.statistics.sums import KeySums
from tests.support.measuring import LAYERS, SAMPLED, Stopped, measure, stop_at

pytestmark = pytest.mark.usefixtures("small_shards")


def leftovers(tmp_path: Path) -> list[str]:
    """What the cache holds beside finished files and locks."""
    folder = tmp_path / "cache" / "statistics"
    return [f.name for f in folder.iterdir() if f.suffix not in (".safetensors", ".lock")]


class TestInterruption:
    def test_goes_on_from_its_last_shard_to_the_same_bits(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stop_at(monkeypatch, 3)
        with pytest.raises(Stopped):
            measure()
        assert len(leftovers(tmp_path)) == 1
        read = stop_at(monkeypatch, None)
        resumed = measure()
        assert len(read) < 5
        assert 4 in read
        assert leftovers(tmp_path) == []
        monkeypatch.setenv("COACHHOOK_CACHE", str(tmp_path / "another"))
        whole = measure()
        for layer in LAYERS:
            assert torch.equal(resumed[layer].moment, whole[layer].moment)
            assert torch.equal(resumed[layer].background, whole[layer].background)
        assert resumed[1].n_tokens == whole[1].n_tokens == SAMPLED.n_tokens

    def test_another_recipe_does_not_go_on_from_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stop_at(monkeypatch, 3)
        with pytest.raises(Stopped):
            measure()
        read = stop_at(monkeypatch, None)
        measure(StatisticsSource(n_tokens=SAMPLED.n_tokens, seed=1))
        assert read == [0, 1, 2, 3, 4]
        assert len(leftovers(tmp_path)) == 1

    @pytest.mark.parametrize("keep", [0, 40, -7])
    def test_a_broken_partial_file_is_removed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: int
    ) -> None:
        stop_at(monkeypatch, 1)
        with pytest.raises(Stopped):
            measure()
        (name,) = leftovers(tmp_path)
        partial = tmp_path / "cache" / "statistics" / name
        partial.write_bytes(partial.read_bytes()[:keep])
        # What a process killed while it wrote leaves behind.
        (partial.parent / f".writing-{name.split('.')[0]}-abc").write_text("half")
        read = stop_at(monkeypatch, None)
        measure()
        assert read == [0, 1, 2, 3, 4]
        assert leftovers(tmp_path) == []

    def test_no_shard_is_taken_up_twice(self) -> None:
        listings = [{"a": [0, 1], "b": [0, 1, 2], "d": [5]}, {"a": [0, 1], "c": [3, 4], "d": [5]}]
        taken = divide(listings)
        assert taken == [["b", "d"], ["c"]] or taken == [["b"], ["c", "d"]]

    def test_a_second_process_waits_and_finds_it_done(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        is_measuring, may_go_on = threading.Event(), threading.Event()
        read = stop_at(monkeypatch, None)
        watched = KeySums.add

        def held(self: KeySums, *args: Any) -> None:
            is_measuring.set()
            assert may_go_on.wait(30)
            watched(self, *args)

        monkeypatch.setattr(KeySums, "add", held)
        found: list[KeyStatistics] = []
        threads = [threading.Thread(target=lambda: found.append(measure())) for _ in range(2)]
        threads[0].start()
        assert is_measuring.wait(30)
        threads[1].start()
        while "waiting for it" not in caplog.text:
            assert threads[1].is_alive()
            time.sleep(0.01)
        may_go_on.set()
        for thread in threads:
            thread.join(30)
        assert read == [0, 1, 2, 3, 4]
        assert torch.equal(found[0][1].moment, found[1][1].moment)
