"""Intervals and tests keep their promises where questions cluster, and the plain ones do not."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from itertools import product

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import binomtest, chi2

from ldrt_edge.bench.significance import McNemar, holm, mcnemar, non_inferiority, power
from ldrt_edge.bench.statistics import Difference, joined, paired_difference, paired_loss, rate

WIDE = 1.96


@dataclass(frozen=True)
class Pairs:
    """Two models' answers, with the clusters of the questions."""

    first: list[bool]
    second: list[bool]
    clusters: list[int]


def draw(rng: np.random.Generator, clusters: int, difference: float = 0.0, changed: float = 0.4) -> Pairs:
    """Two models of which the first is better by `difference` in truth.

    A share `changed` of the questions only one gets right; in each cluster these lean to one of the models, with an
    intra-cluster correlation of a half. Clusters have 4 to 12 questions.
    """
    lean = (1 + difference / changed) / 2
    leaning = rng.beta(lean, 1 - lean, clusters)
    labels = np.repeat(np.arange(clusters), rng.integers(4, 13, clusters))
    differ, to_first = rng.random(len(labels)) < changed, rng.random(len(labels)) < leaning[labels]
    return Pairs((~differ | to_first).tolist(), (~(differ & to_first)).tolist(), labels.tolist())


def covering(repeats: int, clusters: int, truth: float, correlation: float) -> tuple[float, float]:
    """How often the clustered interval of a rate holds the truth, and how often Wald's over rows does."""
    rng = np.random.default_rng(0)
    covered = naive = 0
    size = 1 / correlation - 1  # of the beta distribution: its intra-cluster correlation is 1 / (1 + size)
    for repeat in range(repeats):
        chances = rng.beta(truth * size, (1 - truth) * size, clusters)
        labels = np.repeat(np.arange(clusters), rng.integers(2, 9, clusters))
        values = rng.random(len(labels)) < chances[labels]
        found = rate(values.tolist(), labels.tolist(), seed=repeat)
        covered += found.ci_low <= truth <= found.ci_high
        naive += abs(values.mean() - truth) <= WIDE * np.sqrt(values.mean() * (1 - values.mean()) / len(values))
    return covered / repeats, naive / repeats


def test_clustered_intervals_hold_what_they_promise() -> None:
    """Half of the variance between clusters: a clustered interval covers, one over rows does not."""
    covered, naive = covering(600, clusters=40, truth=0.7, correlation=0.5)
    assert 0.93 < covered < 0.99
    assert naive < 0.8


def test_intervals_hold_near_certainty_too() -> None:
    assert covering(600, clusters=15, truth=0.9, correlation=0.5)[0] > 0.93


@pytest.mark.slow
@pytest.mark.parametrize("clusters", [15, 40, 150])
@pytest.mark.parametrize("truth", [0.5, 0.7, 0.9])
@pytest.mark.parametrize("correlation", [0.05, 0.3, 0.5])
def test_intervals_hold_for_few_and_many_clusters(clusters: int, truth: float, correlation: float) -> None:
    covered, _ = covering(1000, clusters, truth, correlation)
    assert covered > 0.93
    assert clusters < 40 or covered < 0.985, "with clusters enough it promises no more than it says"


def simulate(repeats: int, clusters: int, difference: float) -> dict[str, float]:
    """Shares of the repeats in which an interval held the true difference, or a test rejected."""
    rng = np.random.default_rng(1)
    count = dict.fromkeys(("covered", "naive covered", "clustered", "exact", "non-inferior"), 0)
    for repeat in range(repeats):
        pairs = draw(rng, clusters, difference)
        found = paired_difference(pairs.first, pairs.second, pairs.clusters, seed=repeat)
        test = mcnemar(pairs.first, pairs.second, pairs.clusters)
        spread = np.std(np.array(pairs.first, int) - np.array(pairs.second, int)) / np.sqrt(found.n)
        count["covered"] += found.ci_low <= difference <= found.ci_high
        count["naive covered"] += abs(found.value - difference) <= WIDE * spread
        count["clustered"] += test.p_clustered <= 0.05
        count["exact"] += test.p_exact <= 0.05
        lost = paired_loss(pairs.first, pairs.second, pairs.clusters, seed=repeat)
        count["non-inferior"] += non_inferiority(lost, difference).verdict == "non-inferior"
    return {name: hits / repeats for name, hits in count.items()}


def test_paired_inference_holds_under_clustering() -> None:
    """Equal models: the clustered forms err in one of twenty cases, those over rows in one of five."""
    found = simulate(600, clusters=40, difference=0.0)
    assert 0.93 < found["covered"] < 0.985 and found["clustered"] < 0.07
    assert found["naive covered"] < 0.85 and found["exact"] > 0.13


def test_a_loss_at_the_margin_is_seldom_called_non_inferior() -> None:
    assert simulate(600, clusters=60, difference=0.05)["non-inferior"] < 0.045


@pytest.mark.parametrize(("questions", "loss", "changed"), [(20, 0.03, 0.03), (20, 0.03, 0.09), (50, 0.02, 0.06)])
def test_a_loss_that_few_answers_show_is_seldom_called_small(questions: int, loss: float, changed: float) -> None:
    """One answer won by chance and none lost is no proof: a gate of one point must not open for it."""
    rng, opened = np.random.default_rng(0), 0
    for repeat in range(400):
        drawn = rng.random(questions)
        lost, won = drawn < (changed + loss) / 2, drawn > 1 - (changed - loss) / 2
        found = paired_loss((~won).tolist(), (~lost).tolist(), range(questions), repeat)
        opened += found.ci_high <= 0.01
    assert opened / 400 < 0.025
    assert paired_difference([1.0] * 9 + [0.0], [1.0] * 10, range(10)).ci_high > 0.15, "one won, none lost"


Lost = Callable[[np.random.Generator, NDArray[np.int_], float], NDArray[np.int_]]
"""Draws how many answers each cluster loses, from the clusters' sizes and a rate."""
LOSSES: dict[str, Lost] = {
    "single answers": lambda rng, counts, share: rng.binomial(counts, share),
    "whole pictures": lambda rng, counts, share: np.where(rng.random(len(counts)) < share, counts, 0),
    "both": lambda rng, counts, share: np.where(rng.random(len(counts)) < share, counts, rng.binomial(counts, 0.01)),
}


def falls_short(repeats: int, counts: NDArray[np.int_], lost: Lost, share: float) -> float:
    """How often the upper end is below the share of answers that are lost in truth, beside as many lost as won."""
    rng, short = np.random.default_rng(0), 0
    truth = share + (0.01 * (1 - share) if lost is LOSSES["both"] else 0)
    labels = np.repeat(np.arange(len(counts)), counts)
    for repeat in range(repeats):
        moved = lost(rng, counts, share) + rng.binomial(counts, 0.005) - rng.binomial(counts, 0.005)
        first = np.repeat(np.clip(moved / counts, 0, 1), counts)
        second = np.repeat(np.clip(-moved / counts, 0, 1), counts)
        short += paired_loss(first.tolist(), second.tolist(), labels.tolist(), repeat).ci_high < truth
    return short / repeats


@pytest.mark.parametrize("lost", LOSSES)
@pytest.mark.parametrize(("pictures", "share"), [(20, 0.1), (60, 0.02), (60, 0.05)])
def test_a_loss_of_whole_pictures_is_not_taken_for_small(lost: str, pictures: int, share: float) -> None:
    """A gate at the true loss, wherever it lies, opens for one in forty: also where most pictures lose one answer."""
    assert falls_short(300, np.full(pictures, 10), LOSSES[lost], share) < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("lost", LOSSES)
@pytest.mark.parametrize("share", [0.01, 0.02, 0.04, 0.07, 0.12])
@pytest.mark.parametrize("pictures", [20, 60, 150])
def test_no_loss_is_taken_for_small(lost: str, pictures: int, share: float) -> None:
    for counts in (np.full(pictures, 7), np.random.default_rng(1).integers(1, 13, pictures)):
        assert falls_short(300, counts, LOSSES[lost], share) < 0.06


@pytest.mark.parametrize(("pictures", "each"), [(20, 7), (43, 7), (60, 10), (300, 1)])
def test_one_lost_and_one_won_shows_no_less_than_nothing_lost(pictures: int, each: int) -> None:
    labels, rows = [row // each for row in range(pictures * each)], pictures * each

    def upper(lost: int, won: int) -> float:
        moved = [1.0] * lost + [-1.0] * won  # in as many pictures
        values = [moved[row // each] if row % each == 0 and row // each < len(moved) else 0.0 for row in range(rows)]
        return paired_loss([max(v, 0) for v in values], [max(-v, 0) for v in values], labels).ci_high

    ends = [upper(n, n) for n in range(5)]
    assert ends == sorted(ends) and ends[0] == pytest.approx(WIDE**2 / (pictures + WIDE**2), rel=1e-3)
    assert ends[1] < ends[0] * 1.3 and upper(0, 1) < upper(1, 1) < upper(1, 0) < upper(5, 2)


@pytest.mark.slow
@pytest.mark.parametrize("clusters", [20, 40, 150])
@pytest.mark.parametrize("difference", [0.0, 0.05])
def test_paired_inference_holds_for_few_and_many_clusters(clusters: int, difference: float) -> None:
    found = simulate(1000, clusters, difference)
    assert 0.93 < found["covered"] < 0.98
    assert found["non-inferior"] < 0.045
    if difference == 0:
        assert 0.02 < found["clustered"] < 0.065 and found["exact"] > 0.13


def test_paired_differences_see_what_unpaired_rates_do_not() -> None:
    clusters = [i // 4 for i in range(400)]
    before = [i % 2 for i in range(400)]
    after = [0 if i % 40 == 1 else value for i, value in enumerate(before)]
    found = paired_difference(before, after, clusters)
    assert found.value == pytest.approx(0.025)
    assert 0 < found.ci_low < found.value < found.ci_high < 0.06
    assert found == paired_difference(before, after, clusters), "the seed decides"
    lost = paired_loss(before, after, clusters)
    assert (lost.value, lost.ci_low) == (found.value, found.ci_low), "what was lost may be more, and not less"
    assert found.ci_high < lost.ci_high < 0.08


def test_certainty_is_never_claimed() -> None:
    everything = rate([1.0] * 60, [i // 3 for i in range(60)])
    assert (everything.value, everything.ci_high) == (1, 1)
    assert everything.ci_low == pytest.approx(20 / (20 + 1.96**2), abs=1e-3), "Wilson with 20 clusters"
    assert rate([0.0, 1.0], ["a", "a"]).ci_high > 0.9, "one cluster says little"
    unchanged = paired_difference([1, 0, 1], [1, 0, 1], "abc")
    assert unchanged.ci_low < -0.5 and unchanged.ci_high > 0.5
    with pytest.raises(ValueError, match="0 values"):
        rate([], [])
    with pytest.raises(ValueError, match="wants pairs"):
        mcnemar([True], [True, False], [1])


def test_mcnemars_exact_test_is_the_binomial_one() -> None:
    for better, worse in ((3, 14), (7, 7), (0, 5), (40, 61)):
        first = [True] * better + [False] * worse + [True] * 30
        second = [False] * better + [True] * worse + [True] * 30
        found = mcnemar(first, second, range(len(first)))
        assert (found.first_only, found.second_only) == (better, worse)
        assert found.p_exact == pytest.approx(binomtest(better, better + worse).pvalue)
        assert found.p_clustered == pytest.approx(found.p_exact), "a question a cluster is the plain test"
    assert mcnemar([True, False], [True, False], [1, 2]).p_clustered == 1, "no answer differs"


def test_the_clustered_test_counts_every_way_the_signs_could_have_fallen() -> None:
    pairs = draw(np.random.default_rng(5), clusters=12)
    surplus = np.zeros(12, int)
    np.add.at(surplus, pairs.clusters, np.array(pairs.first, int) - np.array(pairs.second, int))
    sums = [abs(np.dot(signs, surplus)) for signs in product((-1, 1), repeat=12)]
    expected = np.mean(np.array(sums) >= abs(surplus.sum()))
    assert mcnemar(pairs.first, pairs.second, pairs.clusters).p_clustered == pytest.approx(expected)


def test_the_clustered_test_tends_to_obuchowskis() -> None:
    pairs = draw(np.random.default_rng(2), clusters=3000, difference=0.01)
    surplus = np.zeros(3000)
    np.add.at(surplus, pairs.clusters, np.array(pairs.first, float) - np.array(pairs.second, float))
    expected = chi2.sf(surplus.sum() ** 2 / (surplus**2).sum(), df=1)
    assert 1e-4 < expected < 0.5
    assert mcnemar(pairs.first, pairs.second, pairs.clusters).p_clustered == pytest.approx(expected, rel=0.05)


def test_holm_corrects_in_order() -> None:
    found = holm([McNemar(0, 0, 1.0, p) for p in (0.01, 0.04, 0.03, 0.005)])
    assert [test.p_holm for test in found] == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert [test.p_clustered for test in found] == [0.01, 0.04, 0.03, 0.005]
    assert holm([]) == []


def test_holm_keeps_one_false_finding_among_many_slices_rare() -> None:
    rng, plain, corrected, repeats = np.random.default_rng(3), 0, 0, 300
    for _ in range(repeats):
        tests = holm([mcnemar(p.first, p.second, p.clusters) for p in (draw(rng, 25) for _ in range(10))])
        plain += any(test.p_clustered <= 0.05 for test in tests)
        corrected += any((test.p_holm or 0) <= 0.05 for test in tests)
    assert corrected / repeats < 0.08 and plain / repeats > 0.25


def test_non_inferiority_reads_the_interval() -> None:
    def verdict(low: float, high: float) -> str:
        return non_inferiority(Difference((low + high) / 2, low, high, 100, 50), 0.01).verdict

    assert verdict(-0.02, 0.01) == "non-inferior"
    assert verdict(-0.02, 0.02) == verdict(0.005, 0.02) == "undecided"
    assert verdict(0.011, 0.02) == "inferior"


def reached(repeats: int, difference: float) -> float:
    """How often as many clusters as a pilot run says are enough show the difference."""
    rng = np.random.default_rng(4)
    pilot = draw(rng, 400, difference)
    wanted = power(pilot.first, pilot.second, pilot.clusters, difference)
    assert wanted is not None and wanted.design_effect > 1.5
    found = 0
    for repeat in range(repeats):
        pairs = draw(rng, wanted.clusters_needed, difference)
        found += paired_difference(pairs.first, pairs.second, pairs.clusters, seed=repeat).ci_low > 0
    return found / repeats


def test_the_questions_that_power_asks_for_are_about_enough() -> None:
    assert 0.7 < reached(200, difference=0.1) < 0.9


@pytest.mark.slow
def test_the_questions_that_power_asks_for_are_enough_to_see_a_little() -> None:
    assert 0.75 < reached(1000, difference=0.05) < 0.85


def test_power_in_numbers() -> None:
    clusters: list[Hashable] = [i // 2 for i in range(200)]
    first, second = [True] * 200, [i % 20 > 1 for i in range(200)]  # whole clusters differ: the design effect is 2
    found = power(first, second, clusters, 0.01)
    assert found is not None
    assert (found.questions, found.clusters) == (200, 100)
    assert found.design_effect == pytest.approx(2, rel=0.02)
    assert found.questions_needed == pytest.approx((1.96 + 0.8416) ** 2 * 2 * 0.09 / 0.01**2, rel=0.02)
    assert found.clusters_needed == pytest.approx(found.questions_needed / 2, abs=1)
    again = power(first, second, clusters, found.detectable)
    assert again is not None and again.questions_needed == pytest.approx(200, abs=1)
    assert power(first, first, clusters, 0.01) is None, "nothing varies"
    assert power(first, second, [0] * 200, 0.01) is None, "one cluster"


def test_clusters_join_through_what_rows_share() -> None:
    """Articles a and b print the same picture 1, so their other pictures belong together too."""
    found = joined(["1", "1", "2", "3", "4"], ["a", "b", "b", "c", "1"])
    assert found[0] == found[1] == found[2]
    assert len(set(found)) == 3, "a group may be named like a picture"
    assert joined("xyx", "pqr") == joined("xyx")
    with pytest.raises(ValueError):
        joined("ab", "a")
