"""How sure an answer is: how often answers that the model gave with such a probability were right when it was measured.

    confidence = read_confidence(folder, report)      None where nothing was measured
    confidence.of(probability)                         Sure(right=0.62, ci_low=0.48, ci_high=0.74, answers=48, …)

A model's own probability is no chance of being right; a report of `bench` says what it is worth, in bins of equal width
(`bench/calibration.py`). A bin with few answers is read together with its neighbours. What was measured holds for
questions and pictures like those of the report, and for greedy answers alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ldrt_edge import artifact
from ldrt_edge.bundle.evidence import REPORT
from ldrt_edge.bundle.open import bundle_of
from ldrt_edge.errors import ArtifactError
from ldrt_edge.front_config import read_json

BINS, LEAST_ANSWERS = 15, 20
"""Bins of a report; answers that a statement rests on at least, if so many were measured."""
_Z = 1.96  # a 95% interval


@dataclass(frozen=True)
class Sure:
    """Of `answers` measured answers of like probability the share `right` was right, with Wilson's 95% interval.

    probability: the model's own, of the whole answer. dataset: what it was asked about.
    """

    probability: float
    right: float
    ci_low: float
    ci_high: float
    answers: int
    dataset: str

    @property
    def told(self) -> str:
        """In one line."""
        return (
            f"how sure: {self.probability:.0%}; of {self.answers} measured answers that were about as sure, "
            f"{self.right:.0%} were right (95% interval {self.ci_low:.0%} to {self.ci_high:.0%}; {self.dataset})"
        )


class Confidence:
    """What a report says of a model's probabilities; rights, counts: right answers and all of them in each bin."""

    def __init__(self, dataset: str, rights: Sequence[float], counts: Sequence[int]) -> None:
        self._dataset, self._rights, self._counts = dataset, rights, counts

    def of(self, probability: float) -> Sure:
        """How often answers of about this probability (0 to 1) were right."""
        low = high = _bin(probability)
        while sum(self._counts[low : high + 1]) < LEAST_ANSWERS and (low > 0 or high < BINS - 1):
            low, high = max(low - 1, 0), min(high + 1, BINS - 1)
        n, right = sum(self._counts[low : high + 1]), sum(self._rights[low : high + 1])
        ends = _wilson(right, n)
        return Sure(probability, right / n, *ends, n, self._dataset)


def read_confidence(model: Path, report: Path | None = None) -> Confidence | None:
    """What `report` measured of a model folder, or the report in the bundle that it lies in; None without either.

    Raises:
        ArtifactError: the report was changed, is about another model, or measured no confidence.
    """
    bundle = bundle_of(model)
    folder = report or (bundle / "report" if bundle else None)
    if folder is None:
        return None
    if report:
        artifact.verify(folder, "report")  # a bundle's was held against its statement
    data = read_json(folder / REPORT)
    try:
        if data["subject"]["manifest_sha256"] != artifact.read(model).sha256:
            raise ArtifactError(f"{folder} is about {data['subject']['name']}, not about this model: bench it")
        found = data.get("calibration")
        if not found and report:
            raise ArtifactError(f"{folder}: how sure the model was is not in it: bench the model again")
        return _confidence(data["dataset"]["name"], found["bins"]) if found else None
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{folder / REPORT}: not a report that this version reads ({error!r})") from error


def _confidence(dataset: str, bins: Sequence[dict[str, float]]) -> Confidence:
    rights, counts = [0.0] * BINS, [0] * BINS
    for one in bins:
        rights[_bin(one["confidence"])] += one["accuracy"] * one["n"]
        counts[_bin(one["confidence"])] += int(one["n"])
    if not sum(counts) or not all(0 <= right <= count for right, count in zip(rights, counts, strict=True)):
        raise ValueError("bins")
    return Confidence(dataset, rights, counts)


def _bin(probability: float) -> int:
    return min(max(math.ceil(probability * BINS) - 1, 0), BINS - 1)


def _wilson(right: float, n: int) -> tuple[float, float]:
    """Source: Wilson, "Probable inference", JASA 1927."""
    centre, spread = right + _Z**2 / 2, _Z * math.sqrt(right * (n - right) / n + _Z**2 / 4)
    return max((centre - spread) / (n + _Z**2), 0.0), min((centre + spread) / (n + _Z**2), 1.0)
