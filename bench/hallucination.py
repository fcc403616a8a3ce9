"""How much a model makes up: what its answers to the probes add up to, and how it hedges, which is another matter.

The paper counts the word "appears" and calls fewer of them fewer hallucinations. That measures style: a model can make
up without hedging, and hedge about what is there. So hedging words are counted here too, and named style; what is made
up is measured by questions whose answers are known.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ldrt_edge.bench.calibration import Calibration, calibration
from ldrt_edge.bench.probes import ABSENT, Probe, Said
from ldrt_edge.bench.statistics import Difference, Rate, joined, paired_difference, rate
from ldrt_edge.bench.vqa import Sample, answers
from ldrt_edge.bench.wordings import base, wordings


@dataclass(frozen=True)
class Presence:
    """Is it there? Over the structures that are, and those absent ones that were chosen in one way.

    invented: yes to an absent one. yes: of all answers. unclear: neither yes nor no, which counts as wrong.
    precision, recall, f1: of yes; None where nothing was said or nothing is there.
    """

    accuracy: Rate
    invented: Rate
    yes: Rate
    unclear: Rate
    precision: float | None
    recall: float | None
    f1: float | None


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
    """Style, not truth: hedging words in so many answers, each word's count, and how many stand in 100 answers."""

    answers: int
    words: Mapping[str, int]
    per_100_answers: float


def summarise(probes: Sequence[Probe], samples: Sequence[Sample], seed: int) -> Hallucination:
    """Sum up the probes of one model, beside its answers to the dataset's own questions."""
    labels = joined([p.image_sha256 for p in probes], [p.group for p in probes])
    clusters: dict[int, Hashable] = {id(p): label for p, label in zip(probes, labels, strict=True)}

    def share(found: Iterable[tuple[Probe, bool]]) -> Rate | None:
        listed = list(found)
        return rate([yes for _, yes in listed], [clusters[id(p)] for p, _ in listed], seed) if listed else None

    presence = [p for p in probes if p.sort == "presence"]
    asked = [(p, _present(p.right)) for p in presence]
    own = [p for p in probes if p.sort == "own"]
    unanswerable = [(p, _present(p.right).abstains) for p in probes if p.sort == "unanswerable"]
    given = [(sample, wordings().abstains(sample.subject.text, sample.language)) for sample in samples]
    due = {sample.id: wordings().abstains(sample.answer, sample.language) for sample in samples}
    seen_answers = {(sample.image_sha256, sample.question): sample.subject.text for sample in samples}
    places = joined([sample.image_sha256 for sample in samples], [sample.group for sample in samples])
    sample_clusters = {sample.id: label for sample, label in zip(samples, places, strict=True)}

    def abstained(where: bool) -> Rate | None:
        chosen = [(found, sample_clusters[sample.id]) for sample, found in given if due[sample.id] == where]
        return rate([found for found, _ in chosen], [label for _, label in chosen], seed) if chosen else None

    wrong = [(p, _is_right(p, p.wrong)) for p in presence]
    found = [_is_right(p, said) for p, said in asked]
    at = [clusters[id(p)] for p in presence]
    return Hallucination(
        words=wordings().version,
        pictures=len({p.image_sha256 for p in probes}),
        probes=len(probes),
        presence=_by_foil(presence, clusters, seed) if presence else None,
        wrong_picture=share(wrong),
        seen=paired_difference(found, [right for _, right in wrong], at, seed) if presence else None,
        blank_invented=share((p, _present(p.blank).yes is True) for p in presence),
        paraphrase=_consistent(probes, "paraphrase", clusters, seed),
        translation=_consistent(probes, "translation", clusters, seed),
        unanswerable={
            language: told
            for language in ("all", *sorted({p.language for p, _ in unanswerable}))
            if (told := share((p, yes) for p, yes in unanswerable if language in ("all", p.language)))
        },
        due=abstained(True),
        undue=abstained(False),
        blank_unchanged=share((p, _present(p.blank).text == seen_answers[p.image_sha256, p.question]) for p in own
                              if (p.image_sha256, p.question) in seen_answers),
        blank_abstains=share((p, _present(p.blank).abstains) for p in own),
        calibration=calibration([said.confidence for _, said in asked], found, at, seed) if presence else None,
    )  # fmt: skip


def hedging(samples: Sequence[Sample]) -> dict[str, dict[str, Hedging]]:
    """By language: the hedging words of the keys ("key") and of each model's answers."""
    found: dict[str, dict[str, Hedging]] = {}
    for language in sorted({base(sample.language) for sample in samples}):
        spoken = [sample for sample in samples if base(sample.language) == language]
        texts: dict[str, list[str]] = {"key": [sample.answer for sample in spoken]}
        for sample in spoken:
            for who, answer in answers(sample).items():
                texts.setdefault(who, []).append(answer.text)
        found[language] = {who: _hedging(said, language) for who, said in texts.items()}
    return found


def _hedging(texts: Sequence[str], language: str) -> Hedging:
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(wordings().hedges(text, language))
    return Hedging(len(texts), dict(sorted(counts.items())), 100 * counts.total() / len(texts))


def _by_foil(presence: Sequence[Probe], clusters: Mapping[int, Hashable], seed: int) -> dict[str, Presence]:
    there = [p for p in presence if p.present]
    ways = {way: [p for p in presence if way in p.foils] for way in ABSENT}
    return {"all": _presence(presence, clusters, seed)} | {
        way: _presence([*there, *absent], clusters, seed) for way, absent in ways.items() if absent
    }


def _presence(probes: Sequence[Probe], clusters: Mapping[int, Hashable], seed: int) -> Presence:
    labels = [clusters[id(p)] for p in probes]
    said = [_present(p.right).yes for p in probes]
    absent = [(yes is True, label) for p, yes, label in zip(probes, said, labels, strict=True) if not p.present]
    hits = sum(p.present and yes is True for p, yes in zip(probes, said, strict=True))
    called, there = said.count(True), sum(p.present for p in probes)
    return Presence(
        accuracy=rate([_is_right(p, p.right) for p in probes], labels, seed),
        invented=rate([yes for yes, _ in absent], [label for _, label in absent], seed),
        yes=rate([yes is True for yes in said], labels, seed),
        unclear=rate([yes is None for yes in said], labels, seed),
        precision=hits / called if called else None,
        recall=hits / there if there else None,
        f1=2 * hits / (called + there) if called + there else None,
    )


def _consistent(probes: Sequence[Probe], sort: str, clusters: Mapping[int, Hashable], seed: int) -> Rate | None:
    """Structures of pictures whose first wording and further ones of this sort got one and the same yes or no."""
    first = {(p.image_sha256, p.structure): p for p in probes if p.sort == "presence"}
    others: dict[tuple[str, str], list[Probe]] = {}
    for p in probes:
        if p.sort == sort:
            others.setdefault((p.image_sha256, p.structure), []).append(p)
    same = [
        (len({_present(p.right).yes for p in [first[key], *again]}) == 1 and _present(first[key].right).yes is not None,
         clusters[id(first[key])])
        for key, again in others.items()
    ]  # fmt: skip
    return rate([found for found, _ in same], [label for _, label in same], seed) if same else None


def _is_right(probe: Probe, said: Said | None) -> bool:
    return _present(said).yes is probe.present


def _present(said: Said | None) -> Said:
    assert said is not None, "this sort of probe is asked so"
    return said
