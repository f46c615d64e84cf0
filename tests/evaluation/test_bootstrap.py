"""Means over records, and how sure they are."""

import pytest

from coachhook.evaluation import bootstrap


def test_a_lead_is_that_of_pairs() -> None:
    hard = [float(i % 3 > 0) for i in range(90)]
    ours = [{metric: {"greedy": value} for metric in bootstrap.METRICS} for value in hard]
    # One record of ten is worse; which records are hard says nothing about the lead.
    others = [
        {metric: {"greedy": value * (i % 10 > 0)} for metric in bootstrap.METRICS}
        for i, value in enumerate(hard)
    ]
    low, high = bootstrap.lead(ours, others, "greedy")
    assert 0 < low < 6 / 90 < high < 0.15
    assert bootstrap.lead(ours, ours, "greedy") == (0, 0)


def test_intervals_hold_the_mean() -> None:
    records = [
        {m: {"greedy": float(i % 4 > 0)} for m in ("reliability", "generality", "locality")}
        for i in range(200)
    ]
    low, high = bootstrap.interval(records, lambda some: bootstrap.harmonic(some, "greedy"))
    # The third root of three equal means is that mean, of 200 with a deviation of 0.0306 each.
    assert low == pytest.approx(0.75 - 1.96 * 0.0306, abs=0.01)
    assert high == pytest.approx(0.75 + 1.96 * 0.0306, abs=0.01)
    # A single record is the same however it is drawn.
    assert bootstrap.interval(records[:1], lambda some: bootstrap.harmonic(some, "greedy")) is None
    absent = [{**record, "generality": {"greedy": None}} for record in records]
    assert bootstrap.harmonic(absent, "greedy") is None
    assert bootstrap.interval(absent, lambda some: bootstrap.harmonic(some, "greedy")) is None
