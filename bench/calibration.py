"""Whether a model knows when it is right: the probability that it gives its answer, held against being right.

The expected calibration error is the mean distance between confidence and accuracy over fifteen bins of equal width.
Selective accuracy answers what a user can do with a confidence: keep the surest answers only, and how many of those are
right. The area under the risk-coverage curve sums that up: the mean share of wrong answers over all cut-offs.

Source: Guo et al., "On calibration of modern neural networks", ICML 2017; Geifman and El-Yaniv, "Selective
classification for deep neural networks", NeurIPS 2017.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ldrt_edge.bench.statistics import Rate, rate

BINS = 15
COVERAGES = (1.0, 0.8, 0.5, 0.2)


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
    """ece: expected calibration error. risk: area under the risk-coverage curve; a sure model's is near 0."""

    ece: float
    mean_confidence: float
    accuracy: float
    risk: float
    bins: tuple[Bin, ...]
    selective: tuple[Selective, ...]


def calibration(
    confidence: Sequence[float], right: Sequence[bool], clusters: Sequence[Hashable], seed: int = 0
) -> Calibration:
    """Hold confidences (0 to 1) against answers, right or wrong.

    Raises:
        ValueError: no answers, or the three are not equally long.
    """
    if not len(confidence) or not len(confidence) == len(right) == len(clusters):
        raise ValueError(f"{len(confidence)} confidences of {len(right)} answers with {len(clusters)} cluster labels")
    sure, correct = np.asarray(confidence, float), np.asarray(right, float)
    number = np.clip(np.ceil(sure * BINS) - 1, 0, BINS - 1).astype(int)
    bins = tuple(
        Bin(float(sure[inside].mean()), float(correct[inside].mean()), int(inside.sum()))
        for inside in (number == n for n in range(BINS))
        if inside.any()
    )
    order = np.argsort(-sure, kind="stable")
    return Calibration(
        ece=sum(abs(found.confidence - found.accuracy) * found.n for found in bins) / len(sure),
        mean_confidence=float(sure.mean()),
        accuracy=float(correct.mean()),
        risk=float((1 - np.cumsum(correct[order]) / np.arange(1, len(sure) + 1)).mean()),
        bins=bins,
        selective=tuple(_selective(coverage, order, sure, right, clusters, seed) for coverage in COVERAGES),
    )


def _selective(
    coverage: float, order: NDArray[np.intp], sure: NDArray[np.float64], right: Sequence[bool],
    clusters: Sequence[Hashable], seed: int,
) -> Selective:
    kept = order[: max(1, round(coverage * len(order)))].tolist()
    found = rate([right[place] for place in kept], [clusters[place] for place in kept], seed)
    return Selective(coverage, found, float(sure[kept[-1]]))
