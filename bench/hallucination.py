"""How much a model makes up: what its answers to the probes add up to, and how it hedges, which is another matter.

The paper counts the word "appears" and calls fewer of them fewer hallucinations. That measures style: a model can make
up without hedging, and hedge about what is there. So hedging words are counted here too, and named style; what is made
up is measured by questions whose answers are known.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

from ldrt_edge.bench.calibration import Calibration, calibration
from ldrt_edge.bench.metrics import normalise
from ldrt_edge.bench.probes import ABSENT, Probe, Said
from ldrt_edge.bench.statistics import Difference, Rate, joined, paired_difference, paired_ratio, rate
from ldrt_edge.bench.vqa import Sample, answers, cluster_labels
from ldrt_edge.bench.wordings import base, wordings


@dataclass(frozen=True)
class Presence:
    """Is it there? Over the structures that are, and those absent ones that were chosen in one way.

    invented: yes to an absent one. yes: of all answers. unclear: neither yes nor no, which counts as wrong.
    precision, recall, f1: of yes, each with the ends of its 95% interval; None where nothing was said or nothing is
        there.
    """

    accuracy: Rate
    invented: Rate
    yes: Rate
    unclear: Rate
    precision: float | None
    recall: float | None
    f1: float | None
    precision_ci: tuple[float, float] | None
    recall_ci: tuple[float, float] | None
    f1_ci: tuple[float, float] | None


@dataclass(frozen=True)
class Hallucination:
    """What the probes found; None where the dataset does not say what its pictures show, or has one language.

    words: version of the wordings. presence: by how the absent structures were chosen, and over "all".
    wrong_picture: accuracy of the same answers with a wrong picture of the same kind; seen: accuracy minus that.
    blank_invented: yes to any structure in a grey picture.
    paraphrase, translation: structures to which all wordings, and all languages, get the same answer.
    unanswerable: abstained where no picture tells, by language and over "all".
    due, undue: of the dataset's own questions: abstained where the key does, and where it does not.
    blank_unchanged: own questions that get the same answer with a grey picture; blank_abstains: abstained there.
    """

    words: int
    pictures: int
    probes: int
    presence: Mapping[str, Presence] | None
    wrong_picture: Rate | None
    seen: Difference | None
    blank_invented: Rate | None
    paraphrase: Rate | None
    translation: Rate | None
    unanswerable: Mapping[str, Rate]
    due: Rate | None
    undue: Rate | None
    blank_unchanged: Rate | None
    blank_abstains: Rate | None
    calibration: Calibration | None


@dataclass(frozen=True)
class Hedging:
    """Style, not truth: hedging words in so many answers, each word's count, and how many stand in 100 answers.

    ci_low, ci_high: of `per_100_answers`, at 95%, clustered. Where no word stands in any answer, the upper end is that
        of the share of answers with one.
    """

    answers: int
    words: Mapping[str, int]
    per_100_answers: float
    ci_low: float
    ci_high: float


def summarise(probes: Sequence[Probe], samples: Sequence[Sample], seed: int) -> Hallucination:
    """Sum up the probes of one model, beside its answers to the dataset's own questions."""
    tally, presence = _Tally(probes, seed), [p for p in probes if p.sort == "presence"]
    own = [p for p in probes if p.sort == "own"]
    unanswerable = [p for p in probes if p.sort == "unanswerable"]
    languages = ("all", *sorted({p.language for p in unanswerable})) if unanswerable else ()
    right = [_is_right(p, p.right) for p in presence]
    wrong = [_is_right(p, p.wrong) for p in presence]
    at = [tally.clusters[id(p)] for p in presence]
    return Hallucination(
        words=wordings().version,
        pictures=len({p.image_sha256 for p in probes}),
        probes=len(probes),
        presence=tally.by_foil(presence) if presence else None,
        wrong_picture=tally.share(presence, lambda p: _is_right(p, p.wrong)),
        seen=paired_difference(right, wrong, at, seed) if presence else None,
        blank_invented=tally.share(presence, lambda p: _present(p.blank).yes is True),
        paraphrase=tally.consistent("paraphrase"),
        translation=tally.consistent("translation"),
        unanswerable={
            language: found
            for language in languages
            if (found := tally.share([p for p in unanswerable if language in ("all", p.language)], _abstains))
        },
        due=_abstained(samples, True, seed),
        undue=_abstained(samples, False, seed),
        blank_unchanged=tally.share(own, _unchanged),
        blank_abstains=tally.share(own, lambda p: _present(p.blank).abstains),
        calibration=calibration([_present(p.right).confidence for p in presence], right, at, seed)
        if presence
        else None,
    )


def hedging(samples: Sequence[Sample], seed: int = 0) -> dict[str, dict[str, Hedging]]:
    """By language: the hedging words of the keys ("key") and of each model's answers; `seed` of the intervals."""
    labels = dict(zip([id(sample) for sample in samples], cluster_labels(samples), strict=True))
    found: dict[str, dict[str, Hedging]] = {}
    for language in sorted({base(sample.language) for sample in samples}):
        spoken = [sample for sample in samples if base(sample.language) == language]
        texts: dict[str, list[str]] = {"key": [sample.answer for sample in spoken]}
        for sample in spoken:
            for who, answer in answers(sample).items():
                texts.setdefault(who, []).append(answer.text)
        at = [labels[id(sample)] for sample in spoken]
        found[language] = {who: _hedging(said, language, at, seed) for who, said in texts.items()}
    return found


def _hedging(texts: Sequence[str], language: str, clusters: Sequence[Hashable], seed: int) -> Hedging:
    counted = [Counter(wordings().hedges(text, language)) for text in texts]
    counts = sum(counted, Counter[str]())
    ratio = paired_ratio([100 * found.total() for found in counted], [1] * len(texts), clusters, seed)
    most = ratio.ci_high if counts else 100 * rate([0] * len(texts), clusters, seed).ci_high
    return Hedging(len(texts), dict(sorted(counts.items())), ratio.value, ratio.ci_low, most)


class _Tally:
    """Counts over probes, clustered by picture and group; `clusters` by the probe's identity."""

    def __init__(self, probes: Sequence[Probe], seed: int) -> None:
        self._probes, self._seed = probes, seed
        labels = joined([p.image_sha256 for p in probes], [p.group for p in probes])
        self.clusters: dict[int, Hashable] = {id(p): label for p, label in zip(probes, labels, strict=True)}

    def share(self, probes: Sequence[Probe], found: Callable[[Probe], bool]) -> Rate | None:
        """Of which share something is true; None for no probes."""
        if not probes:
            return None
        return rate([found(p) for p in probes], [self.clusters[id(p)] for p in probes], self._seed)

    def by_foil(self, presence: Sequence[Probe]) -> dict[str, Presence]:
        """Over all, and with the absent structures that were chosen in one way each."""
        ways = {way: [p for p in presence if p.present or way in p.foils] for way in ABSENT}
        return {"all": self._presence(presence)} | {
            way: self._presence(found) for way, found in ways.items() if not all(p.present for p in found)
        }

    def consistent(self, sort: str) -> Rate | None:
        """Structures of pictures whose first wording and all of this sort got one and the same yes or no."""
        first = {(p.image_sha256, p.structure): p for p in self._probes if p.sort == "presence"}
        said: dict[tuple[str, str], set[bool | None]] = {}
        for p in self._probes:
            if p.sort == sort:
                said.setdefault((p.image_sha256, p.structure), set()).add(_present(p.right).yes)

        def same(p: Probe) -> bool:
            heard = said[p.image_sha256, p.structure] | {_present(p.right).yes}
            return len(heard) == 1 and None not in heard

        return self.share([first[key] for key in said], same)

    def _presence(self, probes: Sequence[Probe]) -> Presence:
        absent, there = [p for p in probes if not p.present], [p for p in probes if p.present]
        called = [p for p in probes if _says_yes(p)]
        precision, recall = self.share(called, lambda p: p.present), self.share(there, _says_yes)
        # 2 hits / (said + there): the share of hits among those said and those there, put together
        f1 = self.share([*called, *there], lambda p: p.present and _says_yes(p))
        return Presence(
            accuracy=self._rate(probes, lambda p: _is_right(p, p.right)),
            invented=self._rate(absent, _says_yes),
            yes=self._rate(probes, _says_yes),
            unclear=self._rate(probes, lambda p: _present(p.right).yes is None),
            precision=precision.value if precision else None,
            recall=recall.value if recall else None,
            f1=f1.value if f1 else None,
            precision_ci=_ends(precision),
            recall_ci=_ends(recall),
            f1_ci=_ends(f1),
        )

    def _rate(self, probes: Sequence[Probe], found: Callable[[Probe], bool]) -> Rate:
        counted = self.share(probes, found)
        assert counted is not None, "structures are asked about in pairs, one there and one absent"
        return counted


def _abstained(samples: Sequence[Sample], due: bool, seed: int) -> Rate | None:
    """How often the subject abstained, where the key does (`due`) or where it does not; None for no such questions."""
    labels = cluster_labels(samples)
    asked = [
        (wordings().abstains(sample.subject.text, sample.language), label)
        for sample, label in zip(samples, labels, strict=True)
        if wordings().abstains(sample.answer, sample.language) == due
    ]
    return rate([found for found, _ in asked], [label for _, label in asked], seed) if asked else None


def _ends(found: Rate | None) -> tuple[float, float] | None:
    return (found.ci_low, found.ci_high) if found else None


def _says_yes(probe: Probe) -> bool:
    return _present(probe.right).yes is True


def _abstains(probe: Probe) -> bool:
    return _present(probe.right).abstains


def _unchanged(probe: Probe) -> bool:
    """The same answer with the right picture and with a grey one, both cut at the same length."""
    right, blank = (normalise(_present(said).text, probe.language) for said in (probe.right, probe.blank))
    return right == blank


def _is_right(probe: Probe, said: Said | None) -> bool:
    return _present(said).yes is probe.present


def _present(said: Said | None) -> Said:
    assert said is not None, "this sort of probe is asked so"
    return said
