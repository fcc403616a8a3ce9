"""Whether a model knows when it is right: the probability that it gives its answer, held against being right.

The expected calibration error is the mean distance between confidence and accuracy over fifteen bins of equal width.
Few answers in a bin are off by chance, so the error of a model that is calibrated comes out above 0, and that of drawn
clusters of its answers higher still: no percentile of these reaches 0. So the lower end of its interval is the error
less what drawing moves all bins together, which by the triangle inequality is on the safe side; the upper end is the
percentile (tests/test_hallucination.py counts how often both hold). Of two models' answers to the same questions the
same clusters are drawn, and each end of the difference is the farther one of the percentile's and the basic interval's.

Selective accuracy answers what a user can do with a confidence: keep the surest answers only, and how many of those are
right. The area under the risk-coverage curve sums that up: the mean share of wrong answers over all cut-offs.

Source: Guo et al., "On calibration of modern neural networks", ICML 2017; Geifman and El-Yaniv, "Selective
classification for deep neural networks", NeurIPS 2017; Davison and Hinkley, "Bootstrap Methods and their Application"
(1997), section 5.2 (basic interval).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ldrt_edge.bench.statistics import CONFIDENCE, DRAWS, Difference, Rate, by_cluster, rate

BINS = 15
COVERAGES = (1.0, 0.8, 0.5, 0.2)
_FLAT = 1e-12
_TAILS = ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2)


@dataclass(frozen=True)
class Bin:
    """Answers of about one confidence: its mean, the share that is right, and how many."""

    confidence: float
    accuracy: float
    n: int


@dataclass(frozen=True)
class Selective:
    """The surest `coverage` of all answers: how many are right, and the least confidence among them."""

    coverage: float
    accuracy: Rate
    threshold: float


@dataclass(frozen=True)
class Calibration:
    """How far a model's confidences can be trusted.

    ece: expected calibration error, ece_low and ece_high the ends of its 95% interval, clustered. risk: area under the
        risk-coverage curve; a sure model's is near 0.
    """

    ece: float
    mean_confidence: float
    accuracy: float
    risk: float
    bins: tuple[Bin, ...]
    selective: tuple[Selective, ...]
    ece_low: float
    ece_high: float


def calibration(
    confidence: Sequence[float], right: Sequence[bool], clusters: Sequence[Hashable], seed: int = 0
) -> Calibration:
    """Hold confidences (0 to 1) against answers, right or wrong.

    Raises:
        ValueError: no answers, or the three are not equally long.
    """
    sums, counts = _surplus(confidence, right, clusters)
    sure, correct = np.asarray(confidence, float), np.asarray(right, float)
    number = _bins(sure)
    bins = tuple(
        Bin(float(sure[inside].mean()), float(correct[inside].mean()), int(inside.sum()))
        for inside in (number == n for n in range(BINS))
        if inside.any()
    )
    value, low, high = _interval(sums, counts, seed)
    if high - low < _FLAT:  # the same in all clusters, which is no evidence of certainty
        flat = rate([min(value, 1.0)] * len(sure), clusters, seed)
        low, high = flat.ci_low, flat.ci_high
    order = np.argsort(-sure, kind="stable")
    return Calibration(
        ece=value,
        mean_confidence=float(sure.mean()),
        accuracy=float(correct.mean()),
        risk=float((1 - np.cumsum(correct[order]) / np.arange(1, len(sure) + 1)).mean()),
        bins=bins,
        selective=tuple(_selective(coverage, order, sure, right, clusters, seed) for coverage in COVERAGES),
        ece_low=low,
        ece_high=high,
    )


def ece_difference(
    first: tuple[Sequence[float], Sequence[bool]], second: tuple[Sequence[float], Sequence[bool]],
    clusters: Sequence[Hashable], seed: int = 0,
) -> Difference:
    """The expected calibration error of `first` minus that of `second`: confidences and whether right, row by row.

    Where just one of the two is calibrated, chance raises its error more than the other's: up to one in seven such
    intervals then lies above the difference. Of one cluster it has no width.

    Raises:
        ValueError: no answers, or not as many of all.
    """
    (ours, counts), (theirs, _) = (_surplus(*given, clusters) for given in (first, second))
    one, two = (np.abs(found).sum(axis=1) for found in _draw([ours, theirs], counts, seed))
    value, *drawn = (one - two).tolist()
    low, high = np.quantile(drawn, _TAILS)
    low, high = min(low, 2 * value - high, value), max(high, 2 * value - low, value)
    return Difference(value, max(low, -1.0), min(high, 1.0), int(counts.sum()), len(counts))


def _interval(sums: NDArray[np.float64], counts: NDArray[np.float64], seed: int) -> tuple[float, float, float]:
    """The calibration error with its interval, from what `_surplus` gives."""
    (surplus,) = _draw([sums], counts, seed)
    value, *drawn = np.abs(surplus).sum(axis=1).tolist()
    reach = np.quantile(np.abs(surplus[1:] - surplus[0]).sum(axis=1), _TAILS[1])
    high = float(np.quantile(drawn, _TAILS[1]))
    return value, max(value - float(reach), 0.0), min(max(high, value), 1.0)


def _surplus(
    confidence: Sequence[float], right: Sequence[bool], clusters: Sequence[Hashable]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Confidence minus right ones, summed by cluster and bin: (clusters, BINS); and answers: (clusters,)."""
    if not len(confidence) or not len(confidence) == len(right) == len(clusters):
        raise ValueError(f"{len(confidence)} confidences of {len(right)} answers with {len(clusters)} cluster labels")
    sure = np.asarray(confidence, float)
    over, number = sure - np.asarray(right, float), _bins(sure)
    columns = [by_cluster(np.where(number == n, over, 0.0), clusters) for n in range(BINS)]
    return np.stack([sums for sums, _ in columns], axis=1), columns[0][1]


def _bins(sure: NDArray[np.float64]) -> NDArray[np.int_]:
    return np.asarray(np.clip(np.ceil(sure * BINS) - 1, 0, BINS - 1), np.int_)


def _draw(
    models: Sequence[NDArray[np.float64]], counts: NDArray[np.float64], seed: int
) -> list[NDArray[np.float64]]:
    """Each model's mean surplus by bin: in the first row as it is, then in draws of clusters; (1 + DRAWS, BINS)."""
    clusters, rng = len(counts), np.random.default_rng(seed)
    rows: list[list[NDArray[np.float64]]] = [[] for _ in models]
    for drawn in [np.arange(clusters), *(rng.integers(clusters, size=clusters) for _ in range(DRAWS))]:
        times = np.bincount(drawn, minlength=clusters).astype(np.float64)
        for found, sums in zip(rows, models, strict=True):
            found.append(times @ sums / (times @ counts))
    return [np.stack(found) for found in rows]


def _selective(
    coverage: float, order: NDArray[np.intp], sure: NDArray[np.float64], right: Sequence[bool],
    clusters: Sequence[Hashable], seed: int,
) -> Selective:
    kept = order[: max(1, round(coverage * len(order)))].tolist()
    found = rate([right[place] for place in kept], [clusters[place] for place in kept], seed)
    return Selective(coverage, found, float(sure[kept[-1]]))
