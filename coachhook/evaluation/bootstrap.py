"""Confidence intervals by the bootstrap over records."""

from collections.abc import Callable, Sequence
from statistics import harmonic_mean
from typing import Any, TypeVar

import numpy as np

Record = dict[str, Any]
T = TypeVar("T")
METRICS = ("reliability", "generality", "locality")


def harmonic(records: Sequence[Record], form: str, locality: str | None = None) -> float | None:
    """Harmonic mean of the three metrics' means; None where no record has one of them. locality:
    another form for that one."""
    forms = (form, form, locality or form)
    means = [mean_of(records, metric, f) for metric, f in zip(METRICS, forms, strict=True)]
    return harmonic_of(means)


def harmonic_of(values: Sequence[float | None]) -> float | None:
    """Harmonic mean; None where one of the values is missing."""
    given = [value for value in values if value is not None]
    return harmonic_mean(given) if len(given) == len(values) else None


def mean_of(records: Sequence[Record], metric: str, form: str) -> float | None:
    values = [r[metric][form] for r in records if r[metric][form] is not None]
    return float(np.mean(values)) if values else None


def interval(
    records: Sequence[T],
    figure: Callable[[Sequence[T]], float | None],
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, float] | None:
    """The middle 95 % of `figure` over resampled records; None where it is absent, and of a single
    record, which is the same however it is drawn."""
    if len(records) < 2:
        return None
    random = np.random.default_rng(seed)
    found = []
    for _ in range(resamples):
        value = figure([records[i] for i in random.integers(0, len(records), len(records))])
        if value is not None:
            found.append(value)
    if not found:
        return None
    low, high = np.percentile(found, [2.5, 97.5])
    return float(low), float(high)


def lead(
    ours: Sequence[Record], others: Sequence[Record], form: str, locality: str | None = None
) -> tuple[float, float] | None:
    """The middle 95 % of what the harmonic mean of `ours` is above that of `others`, who answered
    the same requests in the same order: pairs are resampled, so that what makes a record hard for
    both does not count."""

    def difference(pairs: Sequence[tuple[Record, Record]]) -> float | None:
        ahead = harmonic([pair[0] for pair in pairs], form, locality)
        behind = harmonic([pair[1] for pair in pairs], form, locality)
        return None if ahead is None or behind is None else ahead - behind

    return interval(list(zip(ours, others, strict=True)), difference)
