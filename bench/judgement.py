"""What judges' replies add up to: scores, preferences, and how far the judges themselves can be trusted.

A preference counts only where both orders give the same winner; where the order decides, it counts as a tie, and the
share of such pairs stands beside it. A judge that always prefers the first answer shows in `first_preferred`: without a
bias it is a half. One that likes words shows in `longer_preferred` and `length_correlation`. Both look only at answers
that are equally right by the key (exact match): a good judge prefers right answers, which may well be the longer ones.
Two judges are held against each other by Cohen's kappa.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np

from ldrt_edge.bench.agreement import Agreement, cohen
from ldrt_edge.bench.rubric import MOST
from ldrt_edge.bench.statistics import Difference, Rate, paired_difference, rate

SCHEMA = "ldrt-edge/judgement/2"
Better = Literal["subject", "other", "tie"]
_BETTER: tuple[Better, ...] = ("other", "tie", "subject")


@dataclass(frozen=True)
class Graded:
    """One answer's score from one judge, None where no reply was of use.

    words: of the answer. correct: by the key. reply: as it came.
    """

    judge: str
    id: str
    contender: str
    score: int | None
    words: int
    correct: bool
    reply: str


@dataclass(frozen=True)
class Compared:
    """The subject's answer against another's, in both orders; None where no reply was of use.

    subject_first, other_first: who was found better when the subject's, and when the other's answer came first.
    longer: whose answer has more words. alike: by the key both are right, or neither is. replies: as they came, the
        subject's answer first.
    """

    judge: str
    id: str
    other: str
    subject_first: Better | None
    other_first: Better | None
    longer: Better
    alike: bool
    replies: tuple[str, str]

    @property
    def verdict(self) -> Better | None:
        """Who is better whatever the order; a tie where the order decides."""
        if self.subject_first is None or self.other_first is None:
            return None
        return self.subject_first if self.subject_first == self.other_first else "tie"


@dataclass(frozen=True)
class Grades:
    """A contender's scores, as a share of the best one; `lead`: the subject's score minus this one's, paired.

    length_correlation: Spearman's, of score and number of words, partial: among the right answers and among the wrong
        ones. None where either is always the same in both.
    """

    contender: str
    score: Rate
    lead: Difference | None
    length_correlation: float | None


@dataclass(frozen=True)
class Preference:
    """The subject against another contender.

    preferred: of the subject, ties as a half. wins, losses, ties, split: pairs; `split` are those that the order
    decided, among the ties. consistent: share of pairs with the same verdict in both orders. first_preferred: of single
    verdicts that are no ties, those for the answer shown first. longer_preferred: of decided pairs whose answers are
    alike by the key and of different lengths, those won by the longer one. None where there are no such.
    """

    other: str
    preferred: Rate
    wins: int
    losses: int
    ties: int
    split: int
    consistent: Rate
    first_preferred: Rate | None
    longer_preferred: Rate | None


@dataclass(frozen=True)
class JudgeReport:
    """One judge: who it is, how many of its replies were of use, and what it found."""

    name: str
    identity: Mapping[str, str]
    asked: int
    usable: int
    grades: tuple[Grades, ...]
    preferences: tuple[Preference, ...]


@dataclass(frozen=True)
class JudgesAgree:
    """Two judges on the same items: kappa of preferences, quadratically weighted kappa of scores."""

    first: str
    second: str
    preferences: Agreement | None
    scores: Agreement | None


@dataclass(frozen=True)
class Judgement:
    """All of `judgement.json`.

    rubrics: version and sha256 by name. questions: judged, of `questions_of` of that type in the report.
    calls: requests of the run that ended it. names: the models behind the contenders' roles, which the judges never
        saw.
    """

    schema: str
    report_sha256: str
    dataset: str
    names: Mapping[str, str]
    questions: int
    questions_of: int
    answer_type: str
    calls: int
    rubrics: Mapping[str, tuple[int, str]]
    judges: tuple[JudgeReport, ...]
    agreement: tuple[JudgesAgree, ...]


def report_judge(
    name: str, identity: Mapping[str, str], grades: Sequence[Graded], compared: Sequence[Compared],
    clusters: Mapping[str, Hashable], seed: int = 0,
) -> JudgeReport:
    """Sum up one judge; `clusters` by the question's id."""
    replies = [g.score for g in grades] + [v for c in compared for v in (c.subject_first, c.other_first)]
    contenders = dict.fromkeys(grade.contender for grade in grades)
    subject = {grade.id: grade.score for grade in grades if grade.contender == "subject" and grade.score is not None}
    found = (_grades(c, [g for g in grades if g.contender == c], subject, clusters, seed) for c in contenders)
    others = dict.fromkeys(pair.other for pair in compared)
    preferences = (_preference(o, [c for c in compared if c.other == o], clusters, seed) for o in others)
    return JudgeReport(
        name=name, identity=identity, asked=len(replies), usable=sum(reply is not None for reply in replies),
        grades=tuple(g for g in found if g), preferences=tuple(p for p in preferences if p),
    )  # fmt: skip


def agree(
    grades: Sequence[Graded], compared: Sequence[Compared], clusters: Mapping[str, Hashable], seed: int = 0
) -> tuple[JudgesAgree, ...]:
    """Every two judges, over the items that both judged."""
    judges = sorted({grade.judge for grade in grades} | {pair.judge for pair in compared})
    scores = {j: {(g.id, g.contender): g.score for g in grades if g.judge == j and g.score is not None} for j in judges}
    verdicts = {
        j: {(c.id, c.other): _BETTER.index(c.verdict) for c in compared if c.judge == j and c.verdict} for j in judges
    }
    return tuple(
        JudgesAgree(
            a, b, _agreement(verdicts[a], verdicts[b], len(_BETTER), clusters, seed, weighted=False),
            _agreement(scores[a], scores[b], MOST + 1, clusters, seed, weighted=True),
        )
        for a, b in combinations(judges, 2)
    )  # fmt: skip


def _agreement(
    first: Mapping[tuple[str, str], int], second: Mapping[tuple[str, str], int], categories: int,
    clusters: Mapping[str, Hashable], seed: int, weighted: bool,
) -> Agreement | None:
    both = [key for key in first if key in second]
    if not both:
        return None
    labels = [clusters[id] for id, _ in both]
    return cohen([first[k] for k in both], [second[k] for k in both], categories, labels, weighted, seed)


def _grades(
    contender: str, grades: Sequence[Graded], subject: Mapping[str, int], clusters: Mapping[str, Hashable], seed: int
) -> Grades | None:
    scored = [(grade, grade.score) for grade in grades if grade.score is not None]
    if not scored:
        return None
    labels = [clusters[grade.id] for grade, _ in scored]
    paired = [(subject[g.id] / MOST, score / MOST, clusters[g.id]) for g, score in scored if g.id in subject]
    lead = None
    if contender != "subject" and paired:
        ours, theirs, where = zip(*paired, strict=True)
        lead = paired_difference(ours, theirs, where, seed)
    return Grades(
        contender=contender, score=rate([score / MOST for _, score in scored], labels, seed), lead=lead,
        length_correlation=_spearman(
            [score for _, score in scored], [g.words for g, _ in scored], [g.correct for g, _ in scored]
        ),
    )  # fmt: skip


def _preference(
    other: str, compared: Sequence[Compared], clusters: Mapping[str, Hashable], seed: int
) -> Preference | None:
    whole = [pair for pair in compared if pair.verdict]
    if not whole:
        return None
    labels = [clusters[pair.id] for pair in whole]
    worth = {"subject": 1.0, "tie": 0.5, "other": 0.0}
    verdicts = [pair.verdict for pair in whole]
    same = [pair.subject_first == pair.other_first for pair in whole]
    firsts = [
        (found == shown, clusters[pair.id]) for pair in whole for shown, found in _by_order(pair) if found != "tie"
    ]
    longer = [
        (pair.verdict == pair.longer, clusters[pair.id])
        for pair in whole
        if pair.alike and pair.verdict != "tie" and pair.longer != "tie"
    ]
    return Preference(
        other=other,
        preferred=rate([worth[verdict] for verdict in verdicts if verdict], labels, seed),
        wins=verdicts.count("subject"),
        losses=verdicts.count("other"),
        ties=verdicts.count("tie"),
        split=same.count(False),
        consistent=rate(same, labels, seed),
        first_preferred=_share(firsts, seed),
        longer_preferred=_share(longer, seed),
    )


def _by_order(pair: Compared) -> Iterable[tuple[Better, Better | None]]:
    """Whose answer was shown first, and who was found better."""
    return ("subject", pair.subject_first), ("other", pair.other_first)


def _share(found: Sequence[tuple[bool, Hashable]], seed: int) -> Rate | None:
    return rate([value for value, _ in found], [label for _, label in found], seed) if found else None


def _spearman(first: Sequence[float], second: Sequence[float], given: Sequence[bool]) -> float | None:
    """Partial correlation of ranks: what is left of it within the items of which `given` says the same."""
    from scipy.stats import rankdata

    ranks = np.array([rankdata(first), rankdata(second)])
    for same in (np.array(given), ~np.array(given)):
        if same.any():
            ranks[:, same] -= ranks[:, same].mean(axis=1, keepdims=True)
    return float(np.corrcoef(ranks)[0, 1]) if ranks.std(axis=1).min() > 0 else None
