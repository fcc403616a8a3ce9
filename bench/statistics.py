"""Rates and paired differences with intervals that respect clusters.

Questions about one picture (or one article) stand and fall together, so the cluster is what gets resampled, never the
row: where half of the variance lies between pictures, an interval over rows that claims 95% holds the truth two times
in three (the coverage test in tests/test_bench.py shows both).

The method is the cluster bootstrap: draw as many clusters as there are, with replacement, and take the ratio of sums.
The interval is the expanded percentile interval, which widens the percentiles by Student's t and C/(C-1) so that few
clusters do not promise too much. All draws come from the seed.

Where nothing varies between clusters the bootstrap's interval has no width, which is no evidence of certainty. Then
the fall-back is Wilson's interval for as many independent trials as there are clusters: 0 wrong of C clusters says "at
most z²/(C+z²)", which is close to the rule of three (3.8/C against 3/C, as it is two-sided). For a difference that is
the same everywhere (no answer changed), the interval is ± that bound. It is on the safe side: it counts a cluster with
many rows as one trial.

Source: Field and Welsh, "Bootstrapping clustered data", JRSS B 69 (2007); Hesterberg, "What teachers should know about
the bootstrap", The American Statistician 69 (2015), section 5.3 (expanded percentile); Wilson, JASA 22 (1927).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

DRAWS = 2000
CONFIDENCE = 0.95
_CELLS = 4_000_000  # of the (draws, clusters) table at a time
_FLAT = 1e-12

FloatVector = NDArray[np.float64]


@dataclass(frozen=True)
class Rate:
    """A mean between 0 and 1 and its 95% interval, over `n` rows in `clusters` clusters."""

    value: float
    ci_low: float
    ci_high: float
    n: int
    clusters: int


@dataclass(frozen=True)
class Difference:
    """A paired mean difference between -1 and 1 and its 95% interval."""

    value: float
    ci_low: float
    ci_high: float
    n: int
    clusters: int


def rate(values: Sequence[float], clusters: Sequence[Hashable], seed: int = 0) -> Rate:
    """The mean of `values` (each 0 to 1) with an interval clustered by `clusters` (one label a value).

    Raises:
        ValueError: no values, or not one label a value.
    """
    sums, counts = _by_cluster(values, clusters)
    value, low, high = _interval(sums, counts, seed)
    if high - low < _FLAT:
        low, high = _wilson(value, len(sums))
    return Rate(value, max(low, 0.0), min(high, 1.0), int(counts.sum()), len(sums))


def paired_difference(
    first: Sequence[float], second: Sequence[float], clusters: Sequence[Hashable], seed: int = 0
) -> Difference:
    """The mean of `first - second`, row by row, with a clustered interval.

    Raises:
        ValueError: no values, or the three are not equally long.
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} values against {len(second)}: a paired difference wants pairs")
    sums, counts = _by_cluster((np.asarray(first, float) - np.asarray(second, float)).tolist(), clusters)
    value, low, high = _interval(sums, counts, seed)
    if high - low < _FLAT:
        bound = _wilson(0.0, len(sums))[1]
        low, high = value - bound, value + bound
    return Difference(value, max(low, -1.0), min(high, 1.0), int(counts.sum()), len(sums))


def _by_cluster(values: Sequence[float], clusters: Sequence[Hashable]) -> tuple[FloatVector, FloatVector]:
    """Sum and number of the values in each cluster: two (clusters,) vectors."""
    if not len(values) or len(values) != len(clusters):
        raise ValueError(f"{len(values)} values with {len(clusters)} cluster labels")
    number: dict[Hashable, int] = {}
    labels = np.array([number.setdefault(label, len(number)) for label in clusters])
    sums = np.bincount(labels, weights=np.asarray(values, float))
    return sums.astype(np.float64), np.bincount(labels).astype(np.float64)


def _interval(sums: FloatVector, counts: FloatVector, seed: int) -> tuple[float, float, float]:
    """Ratio of sums with its expanded percentile interval; no width where there is one cluster only."""
    clusters = len(sums)
    value = float(sums.sum() / counts.sum())
    if clusters == 1:
        return value, value, value
    rng = np.random.default_rng(seed)
    means = []
    for start in range(0, DRAWS, step := max(1, _CELLS // clusters)):
        drawn = rng.integers(clusters, size=(min(step, DRAWS - start), clusters))
        means.append(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1))
    tail = _expanded_tail(clusters)
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return value, float(min(low, value)), float(max(high, value))


def _expanded_tail(clusters: int) -> float:
    """The tail probability that a percentile interval must take so that few clusters are covered too."""
    from scipy.special import ndtr, stdtrit

    outer = float(stdtrit(clusters - 1, (1 + CONFIDENCE) / 2))
    return float(ndtr(-outer * np.sqrt(clusters / (clusters - 1))))


def _wilson(value: float, trials: int) -> tuple[float, float]:
    from scipy.special import ndtri

    square = float(ndtri((1 + CONFIDENCE) / 2)) ** 2
    centre = (value + square / (2 * trials)) / (1 + square / trials)
    half = np.sqrt(square * (value * (1 - value) / trials + square / (4 * trials**2))) / (1 + square / trials)
    return float(min(centre - half, value)), float(max(centre + half, value))
