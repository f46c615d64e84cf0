"""Confidence intervals by the bootstrap over records."""

from collections.abc import Callable, Sequence
from statistics import harmonic_mean
from typing import Any, TypeVar

import numpy as np

Record = dict[str, Any]
T = TypeVar("T")
METRICS = ("reliability", "generality", "locality")


def harmonic(records: Sequence[Record], form: str, locality: str | None = None) -> float | None:
    """Harmonic mean of the three metrics' means in `form`, of locality's in the form `locality` if
    given; None where no record has one of the metrics."""
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
    """95 % bootstrap interval of `figure` over the records; None where `figure` has no value, and
    for fewer than two records, which resampling cannot vary."""
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
    """95 % bootstrap interval of the paired difference of harmonic means, `ours` minus `others`.

    Both answered the same requests in the same order. Pairs are resampled, so that a record's
    difficulty for both does not widen the interval. None as for `interval`.
    """

    def difference(pairs: Sequence[tuple[Record, Record]]) -> float | None:
        ahead = harmonic([pair[0] for pair in pairs], form, locality)
        behind = harmonic([pair[1] for pair in pairs], form, locality)
        return None if ahead is None or behind is None else ahead - behind

    return interval(list(zip(ours, others, strict=True)), difference)
