"""`report.json`: its typed, versioned schema, and how the numbers come out of the samples.

Every aggregate is computed from the samples that lie beside it in `samples.jsonl`, so that a reader can repeat it. The
schema grows; nothing in it is renamed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ldrt_edge.bench.fidelity import Fidelity
from ldrt_edge.bench.latency import Latency
from ldrt_edge.bench.metrics import normalise
from ldrt_edge.bench.statistics import Difference, Rate, paired_difference, rate
from ldrt_edge.bench.vqa import Answer, Sample
from ldrt_edge.dataset import Row

SCHEMA = "ldrt-edge/report/1"
Prior = Mapping[tuple[str, str], str]
"""The most frequent answer, normalised, by (task, language)."""


@dataclass(frozen=True)
class ModelIdentity:
    """Which artefact was measured: `manifest_sha256` identifies it, the rest is for reading."""

    name: str
    kind: str
    manifest_sha256: str
    version: str
    git_commit: str | None
    weights: Mapping[str, int]
    """Weight files and their bytes."""


@dataclass(frozen=True)
class DatasetIdentity:
    """Which questions were asked."""

    name: str
    manifest_sha256: str
    split: str
    questions: int
    images: int
    groups: int
    sources: tuple[str, ...]
    licences: tuple[str, ...]


@dataclass(frozen=True)
class Environment:
    """Where and with what it was measured; `load_average` (1, 5, 15 minutes) at the start."""

    created: str
    platform: str
    processor: str
    cores_physical: int
    cores_logical: int
    memory_bytes: int
    load_average: tuple[float, float, float]
    threads: int | None
    seed: int
    limit: int | None
    version: str
    git_commit: str | None
    libraries: Mapping[str, str]
    command: str


@dataclass(frozen=True)
class Score:
    """Exact match over all questions, and token F1 over the open ones (None without any)."""

    accuracy: Rate
    token_f1: Rate | None


@dataclass(frozen=True)
class Slice:
    """The questions of one task, language or answer type."""

    accuracy: Rate
    token_f1: Rate | None
    blind: Score
    prior: Score
    image_gain: Difference
    reference: Score | None
    loss: Difference | None


@dataclass(frozen=True)
class Flips:
    """Answers that differ from the reference model's: their rate, and how many went wrong, right, or neither."""

    rate: float
    ci_low: float
    ci_high: float
    worse: int
    better: int
    other: int


@dataclass(frozen=True)
class Vqa:
    """Answers to the questions.

    blind, blind_any: with a wrong picture of the same kind, with any wrong picture (`bench.vqa` says how drawn).
    prior: a guesser that knows the commonest answer to each (task, language) and no picture; `prior_from` says whether
        it learnt them on the training rows or, for lack of these, on the very questions (which flatters it).
    image_gain: accuracy with the right picture minus that with the wrong one, paired.
    loss: the reference model's accuracy minus the subject's, paired; positive means that something was lost.
    """

    overall: Score
    blind: Score
    blind_any: Score
    prior: Score
    prior_from: str
    image_gain: Difference
    by: Mapping[str, Mapping[str, Slice]]
    reference: Score | None
    loss: Difference | None
    flips: Flips | None


@dataclass(frozen=True)
class Report:
    """Everything in `report.json`, in its order."""

    schema: str
    subject: ModelIdentity
    reference: ModelIdentity | None
    dataset: DatasetIdentity
    environment: Environment
    vqa: Vqa
    fidelity: Fidelity | None
    latency: Latency | None


def summarise(samples: Sequence[Sample], training: Iterable[Row], seed: int) -> Vqa:
    """All answer rates of a run; `training` teaches the blind guesser its prior."""
    prior = learn_prior((row.task, row.language, row.answer) for row in training)
    own = learn_prior((sample.task, sample.language, sample.answer) for sample in samples)
    known = sum((sample.task, sample.language) in prior for sample in samples)
    sources = (["training rows"] if known else []) + (["these questions"] if known < len(samples) else [])
    total = _slice(samples, own | prior, seed)
    fields: dict[str, Callable[[Sample], str]] = {
        "task": lambda sample: sample.task,
        "language": lambda sample: sample.language,
        "answer_type": lambda sample: sample.answer_type,
        "kind": lambda sample: sample.kind,
    }
    by = {
        name: {
            value: _slice([sample for sample in samples if of(sample) == value], own | prior, seed)
            for value in sorted({of(sample) for sample in samples})
        }
        for name, of in fields.items()
    }
    return Vqa(
        overall=Score(total.accuracy, total.token_f1),
        blind=total.blind,
        blind_any=_score(samples, lambda sample: sample.blind_any, seed),
        prior=total.prior,
        prior_from=" and ".join(sources),
        image_gain=total.image_gain,
        by=by,
        reference=total.reference,
        loss=total.loss,
        flips=_flips(samples, seed) if total.reference else None,
    )


def learn_prior(answers: Iterable[tuple[str, str, str]]) -> dict[tuple[str, str], str]:
    """The commonest normalised answer of each (task, language), from (task, language, answer)."""
    counts: dict[tuple[str, str], Counter[str]] = {}
    for task, language, answer in answers:
        counts.setdefault((task, language), Counter())[normalise(answer, language)] += 1
    return {key: min(found.items(), key=lambda item: (-item[1], item[0]))[0] for key, found in counts.items()}


def _slice(samples: Sequence[Sample], prior: Prior, seed: int) -> Slice:
    own = _score(samples, lambda sample: sample.subject, seed)
    clusters = [sample.group for sample in samples]
    given = [sample.subject.correct for sample in samples]
    blind = [_present(sample.blind).correct for sample in samples]
    expected = [sample.reference.correct for sample in samples if sample.reference]
    return Slice(
        accuracy=own.accuracy,
        token_f1=own.token_f1,
        blind=_score(samples, lambda sample: sample.blind, seed),
        prior=_prior_score(samples, prior, seed),
        image_gain=paired_difference(given, blind, clusters, seed),
        reference=_score(samples, lambda sample: sample.reference, seed) if expected else None,
        loss=paired_difference(expected, given, clusters, seed) if expected else None,
    )


def _score(samples: Sequence[Sample], of: Callable[[Sample], Answer | None], seed: int) -> Score:
    opened = [sample for sample in samples if sample.answer_type == "open"]
    return Score(
        rate([_present(of(sample)).correct for sample in samples], [sample.group for sample in samples], seed),
        rate([_present(of(sample)).token_f1 for sample in opened], [sample.group for sample in opened], seed)
        if opened else None,
    )


def _prior_score(samples: Sequence[Sample], prior: Prior, seed: int) -> Score:
    guessed = [
        normalise(sample.answer, sample.language) == prior[sample.task, sample.language] for sample in samples
    ]
    return Score(rate(guessed, [sample.group for sample in samples], seed), None)


def _flips(samples: Sequence[Sample], seed: int) -> Flips:
    counts = Counter(sample.flip for sample in samples)
    flipped = rate([sample.flip is not None for sample in samples], [sample.group for sample in samples], seed)
    return Flips(
        flipped.value, flipped.ci_low, flipped.ci_high, counts["worse"], counts["better"], counts["other"]
    )


def _present(answer: Answer | None) -> Answer:
    assert answer is not None, "a report needs both blind controls, and the reference on all rows or on none"
    return answer
