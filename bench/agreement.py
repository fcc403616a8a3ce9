"""Whether two judges agree more than chance would have it: Cohen's kappa, with an interval clustered by picture.

For verdicts without an order plain kappa; for scores the quadratically weighted one, which forgives a neighbouring
score and not a distant one. 1 is full agreement, 0 what two judges reach who give the same shares at random. Where one
judge says the same everywhere there is no chance to agree beyond chance: kappa is then 0, or 1 if both say the same.

Source: Cohen, Educational and Psychological Measurement 20 (1960); Cohen, Psychological Bulletin 70 (1968), weighted.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ldrt_edge.bench.statistics import CONFIDENCE, DRAWS


@dataclass(frozen=True)
class Agreement:
    """Kappa with its 95% interval; `observed`: the share of items on which both say exactly the same."""

    kappa: float
    ci_low: float
    ci_high: float
    observed: float
    n: int
    clusters: int


def cohen(
    first: Sequence[int], second: Sequence[int], categories: int, clusters: Sequence[Hashable], weighted: bool = False,
    seed: int = 0,
) -> Agreement:
    """Kappa of two judges' verdicts on the same items, each a number below `categories`.

    Raises:
        ValueError: no items, or the three are not equally long.
    """
    if not first or not len(first) == len(second) == len(clusters):
        raise ValueError(f"{len(first)} and {len(second)} verdicts with {len(clusters)} cluster labels")
    number: dict[Hashable, int] = {}
    labels = [number.setdefault(label, len(number)) for label in clusters]
    tables = np.zeros((len(number), categories, categories))
    np.add.at(tables, (labels, list(first), list(second)), 1)
    apart = np.subtract.outer(np.arange(categories), np.arange(categories))
    penalty = (apart / max(categories - 1, 1)) ** 2 if weighted else (apart != 0).astype(float)
    whole = tables.sum(axis=0)
    value = float(_kappa(whole[None], penalty)[0])
    drawn = np.random.default_rng(seed).multinomial(len(number), np.full(len(number), 1 / len(number)), size=DRAWS)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(_kappa(np.tensordot(drawn, tables, axes=1), penalty), [tail, 1 - tail])
    return Agreement(
        kappa=value, ci_low=float(min(low, value)), ci_high=float(max(high, value)),
        observed=float(np.trace(whole) / whole.sum()), n=len(labels), clusters=len(number),
    )  # fmt: skip


def _kappa(tables: NDArray[np.float64], penalty: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of each table (categories, categories) of counts: 1 - observed over expected disagreement."""
    shares = tables / tables.sum(axis=(1, 2), keepdims=True)
    observed = (shares * penalty).sum(axis=(1, 2))
    expected = np.einsum("di,dj,ij->d", shares.sum(axis=2), shares.sum(axis=1), penalty)
    same = (observed == 0).astype(float)
    return np.asarray(np.where(expected > 0, 1 - observed / np.where(expected > 0, expected, 1), same))
