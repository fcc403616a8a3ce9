"""Whether a difference between two models is one: McNemar's test, Holm's correction, non-inferiority and power.

Both models answer the same questions, so only the questions that one of them gets right tell anything (McNemar). The
exact test asks how often fair coins would split these as unevenly. It takes the questions for independent, and those
about one picture are not: with half of the variance between pictures it finds a difference between one in five pairs
of equal models, where it promises one in twenty (the simulations in tests/test_statistics.py count).

The clustered test throws one coin a cluster instead: if the models are equal, then in each cluster either could have
been the other, so the cluster's surplus (right with the first alone, less right with the second alone) is as likely
with the other sign. The probability of a sum of surpluses at least as far from zero is computed, not drawn. It is exact
for any number of clusters, and with one question a cluster it is McNemar's exact test. For many clusters it tends to
Obuchowski's statistic, (Σ d)² / Σ d² over the clusters' surpluses d; Durkalski's divides each by its cluster's size
first, so that clusters count equally, where here questions do, as in the rates beside it.

Source: McNemar, Psychometrika 12 (1947); Obuchowski, Statistics in Medicine 17 (1998); Durkalski et al., Statistics in
Medicine 22 (2003); Holm, Scandinavian Journal of Statistics 6 (1979); Kish, "Survey Sampling" (1965), on the design
effect.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ldrt_edge.bench.statistics import CONFIDENCE, Difference, by_cluster, clustered_variance, pairs

POWER = 0.8


@dataclass(frozen=True)
class McNemar:
    """Two sets of answers to the same questions, and how likely so uneven a split is if neither is better.

    first_only, second_only: questions that one alone got right.
    p_exact: as if every question stood for itself; p_clustered: by cluster. Both two-sided.
    p_holm: p_clustered corrected for all the slices that were tested beside this one; None for the whole.
    """

    first_only: int
    second_only: int
    p_exact: float
    p_clustered: float
    p_holm: float | None = None


def mcnemar(first: Sequence[bool], second: Sequence[bool], clusters: Sequence[Hashable]) -> McNemar:
    """Test whether `first` and `second`, right or wrong on the same rows, differ.

    Raises:
        ValueError: no rows, or the three are not equally long.
    """
    surplus = pairs(first, second).astype(int)
    sums = by_cluster(surplus, clusters)[0].astype(int)
    total = int(surplus.sum())
    return McNemar(
        first_only=int((surplus > 0).sum()),
        second_only=int((surplus < 0).sum()),
        p_exact=_sign_flip(abs(surplus), total),
        p_clustered=_sign_flip(abs(sums), total),
    )


def holm(tests: Sequence[McNemar]) -> list[McNemar]:
    """The same tests with `p_holm`: the chance of any false finding among them stays below the level."""
    ranks = np.argsort([test.p_clustered for test in tests], kind="stable")
    corrected = [min(1.0, (len(tests) - place) * tests[rank].p_clustered) for place, rank in enumerate(ranks)]
    adjusted = dict(zip(ranks.tolist(), np.maximum.accumulate(corrected).tolist(), strict=True)) if tests else {}
    return [replace(test, p_holm=adjusted[place]) for place, test in enumerate(tests)]


@dataclass(frozen=True)
class NonInferiority:
    """Whether a loss is below a margin (a share, 0.01 for a point), by its 95% interval.

    "non-inferior": the upper end is within the margin, which is a one-sided test at 2.5%. "inferior": even the lower
    end is beyond it. "undecided": too few questions to tell.
    """

    margin: float
    verdict: Literal["non-inferior", "inferior", "undecided"]


def non_inferiority(loss: Difference, margin: float) -> NonInferiority:
    """Hold a loss (reference minus subject) against a margin."""
    if loss.ci_high <= margin:
        return NonInferiority(margin, "non-inferior")
    return NonInferiority(margin, "inferior" if loss.ci_low > margin else "undecided")


@dataclass(frozen=True)
class Power:
    """How many questions it takes to see a difference.

    difference: to be seen, as a share, with probability `power` in a two-sided test at 5%.
    design_effect: the variance of the difference as measured, over that of as many independent questions.
    questions, clusters: that there are. questions_needed, clusters_needed: that it takes, in clusters of that size.
    detectable: the difference that those there are would show with the same probability.
    """

    difference: float
    power: float
    design_effect: float
    questions: int
    clusters: int
    questions_needed: int
    clusters_needed: int
    detectable: float


def power(
    first: Sequence[float], second: Sequence[float], clusters: Sequence[Hashable], difference: float
) -> Power | None:
    """What it takes to see `difference` between two sets of answers, by the spread that they show.

    A design effect below 1 counts as 1: it is a chance of few clusters. None where there is no spread to go by: one
    cluster, or no answer that differs.

    Raises:
        ValueError: no rows, or the three are not equally long.
    """
    differences = pairs(first, second)
    sums, counts = by_cluster(differences, clusters)
    rows, groups = len(differences), len(sums)
    if groups < 2 or not differences.any():
        return None
    independent = float(differences.var(ddof=1)) / rows
    effect = max(1.0, clustered_variance(sums, counts) / independent) if independent else 1.0
    per_row = independent * rows * effect
    if not per_row:
        return None
    reach = _quantile((1 + CONFIDENCE) / 2) + _quantile(POWER)
    needed = math.ceil(per_row * (reach / difference) ** 2)
    return Power(
        difference=difference,
        power=POWER,
        design_effect=effect,
        questions=rows,
        clusters=groups,
        questions_needed=needed,
        clusters_needed=math.ceil(needed * groups / rows),
        detectable=reach * math.sqrt(per_row / rows),
    )


def _sign_flip(sizes: NDArray[np.int_], total: int) -> float:
    """The chance that the sum of `sizes`, each with a fair coin's sign, is at least as far from zero as `total`."""
    sizes = sizes[sizes > 0]
    chances = np.ones(1)  # of each sum of those that came up positive, 0, 1, …
    for size in sizes:
        grown = np.zeros(len(chances) + size)
        grown[: len(chances)] += chances / 2
        grown[size:] += chances / 2
        chances = grown
    reached = 2 * np.arange(len(chances)) - int(sizes.sum())
    return min(1.0, float(chances[abs(reached) >= abs(total)].sum()))


def _quantile(probability: float) -> float:
    from scipy.special import ndtri

    return float(ndtri(probability))
