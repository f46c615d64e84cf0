"""What the scripts share: turns, ratios, memory."""

import mmap
import sys

import pytest
import torch

from bench.harness import memory, timing


def test_contenders_take_turns() -> None:
    called: list[str] = []
    steps = {name: (lambda name=name: called.append(name)) for name in "abc"}
    prepared: list[str] = []
    timings = timing.take_turns(steps, 3, torch.device("cpu"), prepared.append)
    assert called == list("abcbcacab")
    assert prepared == called
    assert all(len(found.seconds) == 3 for found in timings.values())


def test_a_ratio_is_the_median_within_rounds() -> None:
    # The machine slows tenfold after the first round: medians of each would say 5.5 times.
    fast, slow = timing.Timings([1.0, 10.0, 10.0]), timing.Timings([2.0, 20.0, 40.0])
    assert slow.over(fast) == (2.0, 1.0)
    assert (slow.median, slow.best) == (20.0, 2.0)
    assert slow.spread == pytest.approx(19 / 20)


@pytest.mark.skipif(sys.platform != "linux", reason="only there a process' mark can be set back")
def test_peak_memory_is_that_since_the_last_look() -> None:
    peak_memory, device = memory.peak_memory, torch.device("cpu")
    peak_memory(device)
    some = peak_memory(device)
    # Pages of its own: an allocator may have as much left over from other tests.
    with mmap.mmap(-1, 100_000_000) as large:
        for page in range(0, len(large), mmap.PAGESIZE):
            large[page] = 1
        assert peak_memory(device) > some + 0.9e8
    peak_memory(device)
    assert peak_memory(device) < some + 0.5e8
