"""Rates and paired differences with intervals that respect clusters.

Questions about one picture (or one article) stand and fall together, so the cluster is what gets resampled, never the
row: where half of the variance lies between pictures, an interval over rows that claims 95% holds the truth seven
times in ten (the simulations in tests/test_statistics.py show both).

The method is the cluster bootstrap: draw as many clusters as there are, with replacement, and take the ratio of sums.
The interval is the expanded percentile interval, which widens the percentiles by Student's t and C/(C-1) so that few
clusters do not promise too much. All draws come from the seed.

Near 0 or 1 that is not enough for a rate: nine of ten right on 15 pictures were covered 86 times in 100. So each end of
a rate's interval is the farther one of the bootstrap's and of Student's interval on the logit scale, whose standard
error is the linearised one between clusters.

Where a rate does not vary between clusters the bootstrap's interval has no width, which is no evidence of certainty.
Then the fall-back is Wilson's interval for as many independent trials as there are clusters: 0 wrong of C clusters says
"at most z²/(C+z²)", which is close to the rule of three (3.8/C against 3/C, as it is two-sided). It is on the safe
side: it counts a cluster with many rows as one trial.

Where few clusters differ the bootstrap of a difference promises too much: with one answer won among twenty and none
lost, no draw of clusters loses anything. So each end is the farther one of the bootstrap's and of Newcombe's hybrid
score interval, for clusters that lost and clusters that won as two shares of them all. They count as so many clusters
of one size as have the same second and third moments (Σd² and Σ|d|³): small ones do not make a large one small.

What moves one answer of a picture here may move all of them on a picture that was not asked about. So the upper end of
a loss (`paired_loss`), by which it is judged, lies farther yet: losses larger than any difference that was met may be
in as many clusters as Wilson's bound on none allows. Where nothing differs that is all there is, and both ends are that
far away: one lost and one won never has a lower upper end. Of exports that lose whole pictures, single answers or both,
and more than a gate allows, about one in forty passes; with the clusters' mean size, and nothing for what was not met,
it was up to one in four (the simulations in tests/test_statistics.py count).

Source: Field and Welsh, "Bootstrapping clustered data", JRSS B 69 (2007); Hesterberg, "What teachers should know about
the bootstrap", The American Statistician 69 (2015), section 5.3 (expanded percentile); Korn and Graubard, "Confidence
intervals for proportions with small expected number of positive counts", Survey Methodology 24 (1998) (logit); Wilson,
JASA 22 (1927); Newcombe, "Improved confidence intervals for the difference between binomial proportions based on paired
data", Statistics in Medicine 17 (1998).
"""

from __future__ import annotations

import math
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

    def __neg__(self) -> Difference:
        """The same the other way round."""
        return Difference(-self.value, -self.ci_high, -self.ci_low, self.n, self.clusters)


@dataclass(frozen=True)
class Ratio:
    """A ratio of two sums, 0 or more, and its 95% interval."""

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
    sums, counts = by_cluster(values, clusters)
    value, low, high = _interval(sums, counts, seed)
    if high - low < _FLAT:
        low, high = _wilson(value, len(sums))
    else:
        ends = _logit_interval(sums, counts)
        low, high = min(low, ends[0]), max(high, ends[1])
    return Rate(value, max(low, 0.0), min(high, 1.0), int(counts.sum()), len(sums))


def paired_difference(
    first: Sequence[float], second: Sequence[float], clusters: Sequence[Hashable], seed: int = 0
) -> Difference:
    """The mean of `first - second`, row by row, with a clustered interval.

    Raises:
        ValueError: no values, or the three are not equally long.
    """
    return _difference(*by_cluster(pairs(first, second), clusters), seed, 0.0)


def paired_loss(
    first: Sequence[float], second: Sequence[float], clusters: Sequence[Hashable], seed: int = 0
) -> Difference:
    """`paired_difference` where `second` lost it: the upper end allows for larger losses than any that was met.

    Raises:
        ValueError: no values, or the three are not equally long.
    """
    sums, counts = by_cluster(pairs(first, second), clusters)
    return _difference(sums, counts, seed, unseen_share(sums, counts) * _wilson(0.0, len(sums))[1])


def paired_ratio(
    first: Sequence[float], second: Sequence[float], clusters: Sequence[Hashable], seed: int = 0
) -> Ratio:
    """The sum of `first` over the sum of `second`, none of them negative, row by row, with a clustered interval.

    With ones for `second` it is a mean. Where it is the same in all clusters the interval has no width.

    Raises:
        ValueError: no values, the three are not equally long, or `second` sums to 0.
    """
    above, counts = by_cluster(first, clusters)
    below, _ = by_cluster(second, clusters)
    if not below.sum() > 0:
        raise ValueError("a ratio to a sum of 0")
    return Ratio(*_interval(above, below, seed), int(counts.sum()), len(above))


def pairs(first: Sequence[float], second: Sequence[float]) -> FloatVector:
    """`first - second`, row by row: (rows,).

    Raises:
        ValueError: not equally long.
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} values against {len(second)}: a paired difference wants pairs")
    return np.asarray(first, np.float64) - np.asarray(second, np.float64)


def by_cluster(
    values: Sequence[float] | FloatVector, clusters: Sequence[Hashable]
) -> tuple[FloatVector, FloatVector]:
    """Sum and number of the values in each cluster: two (clusters,) vectors.

    Raises:
        ValueError: no values, or not one label a value.
    """
    if not len(values) or len(values) != len(clusters):
        raise ValueError(f"{len(values)} values with {len(clusters)} cluster labels")
    number: dict[Hashable, int] = {}
    labels = np.array([number.setdefault(label, len(number)) for label in clusters])
    sums = np.bincount(labels, weights=np.asarray(values, float))
    return sums.astype(np.float64), np.bincount(labels).astype(np.float64)


def clustered_variance(sums: FloatVector, counts: FloatVector) -> float:
    """The variance of the ratio of sums, linearised, from the spread between two clusters or more."""
    clusters, value = len(sums), sums.sum() / counts.sum()
    return float(clusters / (clusters - 1) * ((sums - counts * value) ** 2).sum() / counts.sum() ** 2)


def unseen_share(sums: FloatVector, counts: FloatVector) -> float:
    """How much of a cluster no difference has reached yet: 1 where nothing differs, 0 where a whole one does."""
    return max(0.0, 1 - float(np.abs(sums).max() / counts.mean()))


def clusters_for(bound: float, spread: float = 0.0, unseen: float = 1.0) -> int:
    """How many clusters bring what may be behind the differences within `bound`.

    spread: how far sampling reaches with one cluster; it shrinks with the root of their number. unseen: see above.
    """
    from scipy.special import ndtri

    square = float(ndtri((1 + CONFIDENCE) / 2)) ** 2
    root = (spread + math.sqrt(spread**2 + 4 * bound * unseen * square)) / (2 * bound)
    return math.ceil(root**2 - square)


def joined(*columns: Sequence[Hashable]) -> list[Hashable]:
    """One cluster label a row: rows that share a label in any column, directly or through others, get the same.

    With an image and an article for each row, an image that two articles print makes one cluster of both.
    """
    parent: dict[Hashable, Hashable] = {}

    def root(node: Hashable) -> Hashable:
        while (above := parent.setdefault(node, node)) != node:
            parent[node] = parent[above]
            node = above
        return node

    rows = list(zip(*([(n, label) for label in column] for n, column in enumerate(columns)), strict=True))
    for first, *others in rows:
        for other in others:
            parent[root(other)] = root(first)
    return [root(row[0]) for row in rows]


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


def _logit_interval(sums: FloatVector, counts: FloatVector) -> tuple[float, float]:
    from scipy.special import expit, logit, stdtrit

    value = sums.sum() / counts.sum()
    half = stdtrit(len(sums) - 1, (1 + CONFIDENCE) / 2) * np.sqrt(clustered_variance(sums, counts))
    half /= value * (1 - value)  # the logit's slope
    return float(expit(logit(value) - half)), float(expit(logit(value) + half))


def _difference(sums: FloatVector, counts: FloatVector, seed: int, unseen: float) -> Difference:
    """unseen: how much more the upper end allows for, where anything differs."""
    value, low, high = _interval(sums, counts, seed)
    ends = _hybrid_interval(value, sums, counts)
    low, high = min(low, ends[0]), max(high, ends[1] + unseen * bool(np.any(sums)))
    return Difference(value, max(low, -1.0), min(high, 1.0), int(counts.sum()), len(sums))


def _hybrid_interval(value: float, sums: FloatVector, counts: FloatVector) -> tuple[float, float]:
    clusters, parts = len(sums), sums / counts.mean()
    squares = float((parts**2).sum())
    if not squares:
        bound = _wilson(0.0, clusters)[1]
        return value - bound, value + bound
    size = float((np.abs(parts) ** 3).sum()) / squares
    above, below = (float((parts[sign * parts > 0] ** 2).sum()) / size**2 / clusters for sign in (1, -1))
    (least_above, most_above), (least_below, most_below) = _wilson(above, clusters), _wilson(below, clusters)
    low = value - size * np.hypot(above - least_above, most_below - below)
    return float(low), float(value + size * np.hypot(most_above - above, below - least_below))


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
