"""`report.json`: its typed, versioned schema, and how the numbers come out of the samples.

Every aggregate is computed from the samples that lie beside it in `samples.jsonl`, so that a reader can repeat it. The
schema grows; nothing in it is renamed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ldrt_edge.artifact import Input
from ldrt_edge.bench.calibration import Calibration
from ldrt_edge.bench.fidelity import Fidelity
from ldrt_edge.bench.hallucination import Hallucination, Hedging
from ldrt_edge.bench.latency import Latency
from ldrt_edge.bench.metrics import RULES, normalise
from ldrt_edge.bench.significance import McNemar, NonInferiority, Power, holm, mcnemar, non_inferiority, power
from ldrt_edge.bench.statistics import Difference, Rate, paired_difference, paired_loss, rate
from ldrt_edge.bench.vqa import Answer, Flip, Sample, cluster_labels
from ldrt_edge.dataset import AnswerType, Row

if TYPE_CHECKING:
    from ldrt_edge.bench.ladder import Rung

SCHEMA = "ldrt-edge/report/1"
ONE_POINT = 0.01
FIELDS: Mapping[str, Callable[[Sample], str]] = {
    "task": lambda sample: sample.task,
    "language": lambda sample: sample.language,
    "answer_type": lambda sample: sample.answer_type,
    "kind": lambda sample: sample.kind,
    "source": lambda sample: sample.source,
}
"""What the questions are sliced by; `kind` is the kind of picture, or its modality."""
Prior = Mapping[tuple[str, str], str]
"""The most frequent answer, normalised, by (task, language)."""


@dataclass(frozen=True)
class ModelIdentity:
    """Which artefact was measured: `manifest_sha256` identifies it, the rest is for reading.

    made_from: the kinds and manifests of what it was made from, as its own manifest says.
    """

    name: str
    kind: str
    manifest_sha256: str
    version: str
    git_commit: str | None
    weights: Mapping[str, int]
    """Weight files and their bytes."""
    made_from: tuple[Input, ...] = ()


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
    """Where and with what it was measured; `load_average` (1, 5, 15 minutes) at the start, null if nothing is timed.

    command: what was typed for the report. replay: further commands that repeat a part of it, by what they repeat.
    """

    created: str
    platform: str
    processor: str
    cores_physical: int
    cores_logical: int
    memory_bytes: int
    load_average: tuple[float, float, float] | None
    threads: int | None
    seed: int
    limit: int | None
    version: str
    git_commit: str | None
    libraries: Mapping[str, str]
    command: str
    replay: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Score:
    """How good the answers are; `bench.metrics` says how they are graded.

    accuracy: exact match over all questions; closed_accuracy and exact_match over the closed and over the open ones.
    token_f1, rouge_l, chrf: over the open ones. None where there are no such questions, nothing to grade (a prior), or
        for lack of the extra `bench` (rouge_l, chrf).
    similarity: over those with long reference answers; None where there are none.
    truncated: answers that were cut at the limit of their tokens, over all questions.
    """

    accuracy: Rate
    closed_accuracy: Rate | None = None
    exact_match: Rate | None = None
    token_f1: Rate | None = None
    rouge_l: Rate | None = None
    chrf: Rate | None = None
    similarity: Rate | None = None
    truncated: Rate | None = None


@dataclass(frozen=True, kw_only=True)
class Slice(Score):
    """The questions of one task, language, answer type, kind of picture or source.

    Its fields are those of `Vqa`; the tests' `p_holm` is corrected over all slices of the report that are not the
    whole again.
    """

    blind: Score
    prior: Score
    image_gain: Difference
    image_gain_test: McNemar
    reference: Score | None
    loss: Difference | None
    loss_test: McNemar | None


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

    rules: `bench.metrics.RULES`, by which the answers were judged.
    blind, blind_any: with a wrong picture of the same kind, with any wrong picture (`bench.vqa` says how drawn).
    prior: a guesser that knows the commonest answer to each (task, language) and no picture; `prior_from` says whether
        it learnt them on the training rows or, for lack of these, on the very questions (which flatters it).
    image_gain: accuracy with the right picture minus that with the wrong one, paired.
    loss: the reference model's accuracy minus the subject's, paired; positive means that something was lost.
    image_gain_test, loss_test: whether these differ from nothing. image_gain_power, loss_power: how many questions it
        takes to see one point of them; None where nothing varies. non_inferiority: the loss held against the margin.
    """

    rules: int
    overall: Score
    blind: Score
    blind_any: Score
    prior: Score
    prior_from: str
    image_gain: Difference
    image_gain_test: McNemar
    image_gain_power: Power | None
    by: Mapping[str, Mapping[str, Slice]]
    reference: Score | None
    loss: Difference | None
    loss_test: McNemar | None
    loss_power: Power | None
    non_inferiority: NonInferiority | None
    flips: Flips | None


@dataclass(frozen=True)
class Report:
    """Everything in `report.json`, in its order.

    calibration: of the subject's answers. hallucination: what the subject made up, if it was probed. hedging: by
    language and by who speaks. ladder: all models of the run, the subject and its reference among them.
    """

    schema: str
    subject: ModelIdentity
    reference: ModelIdentity | None
    dataset: DatasetIdentity
    environment: Environment
    vqa: Vqa
    fidelity: Fidelity | None
    latency: Latency | None
    calibration: Calibration | None
    hallucination: Hallucination | None
    hedging: Mapping[str, Mapping[str, Hedging]]
    ladder: tuple[Rung, ...]


def summarise(samples: Sequence[Sample], training: Iterable[Row], seed: int, margin: float) -> Vqa:
    """All answer rates of a run; `training` teaches the blind guesser its prior, `margin` is a share."""
    prior = learn_prior((row.task, row.language, row.answer) for row in training)
    own = learn_prior((sample.task, sample.language, sample.answer) for sample in samples)
    known = sum((sample.task, sample.language) in prior for sample in samples)
    sources = (["training rows"] if known else []) + (["these questions"] if known < len(samples) else [])
    clusters = dict(zip([sample.id for sample in samples], cluster_labels(samples), strict=True))
    total = _slice(samples, clusters, own | prior, seed)
    by = {
        name: {
            value: _slice([sample for sample in samples if of(sample) == value], clusters, own | prior, seed)
            for value in sorted({of(sample) for sample in samples})
        }
        for name, of in FIELDS.items()
    }
    labels = list(clusters.values())
    given, blind = _right(samples, _subject), _right(samples, _blind)
    expected = _right(samples, _reference) if total.reference else None
    return Vqa(
        rules=RULES,
        overall=score(samples, _subject, clusters, seed),
        blind=total.blind,
        blind_any=score(samples, _blind_any, clusters, seed),
        prior=total.prior,
        prior_from=" and ".join(sources),
        image_gain=total.image_gain,
        image_gain_test=total.image_gain_test,
        image_gain_power=power(given, blind, labels, ONE_POINT),
        by=_corrected(by),
        reference=total.reference,
        loss=total.loss,
        loss_test=total.loss_test,
        loss_power=power(expected, given, labels, ONE_POINT) if expected else None,
        non_inferiority=non_inferiority(total.loss, margin) if total.loss else None,
        flips=count_flips([sample.flip for sample in samples], labels, seed) if total.reference else None,
    )


def learn_prior(answers: Iterable[tuple[str, str, str]]) -> dict[tuple[str, str], str]:
    """The commonest normalised answer of each (task, language), from (task, language, answer)."""
    counts: dict[tuple[str, str], Counter[str]] = {}
    for task, language, answer in answers:
        counts.setdefault((task, language), Counter())[normalise(answer, language)] += 1
    return {key: min(found.items(), key=lambda item: (-item[1], item[0]))[0] for key, found in counts.items()}


def score(
    samples: Sequence[Sample], of: Callable[[Sample], Answer], clusters: Mapping[str, Hashable], seed: int
) -> Score:
    """Grade one answer to each sample; `clusters` by the sample's id."""
    answers = [of(sample) for sample in samples]

    def over(values: Sequence[float | None], answer_type: AnswerType) -> Rate | None:
        return _rate(samples, values, clusters, seed, answer_type)

    right = [answer.correct for answer in answers]
    whole = _rate(samples, right, clusters, seed)
    assert whole is not None, "no samples"
    return Score(
        accuracy=whole,
        closed_accuracy=over(right, "closed"),
        exact_match=over(right, "open"),
        token_f1=over([answer.token_f1 for answer in answers], "open"),
        rouge_l=over([answer.rouge_l for answer in answers], "open"),
        chrf=over([answer.chrf for answer in answers], "open"),
        similarity=_similarity(samples, answers, clusters, seed),
        truncated=_rate(samples, [answer.truncated for answer in answers], clusters, seed),
    )


def _similarity(
    samples: Sequence[Sample], answers: Sequence[Answer], clusters: Mapping[str, Hashable], seed: int
) -> Rate | None:
    """Over the answers that have one: which they are is a matter of the questions alone."""
    found = [(a.similarity, clusters[s.id]) for s, a in zip(samples, answers, strict=True) if a.similarity is not None]
    return rate([value for value, _ in found], [label for _, label in found], seed) if found else None


def _rate(
    samples: Sequence[Sample], values: Sequence[float | None], clusters: Mapping[str, Hashable], seed: int,
    answer_type: AnswerType | None = None,
) -> Rate | None:
    """Over the samples of one answer type; None where there are none, or one has no value."""
    chosen = [
        (value, clusters[sample.id])
        for sample, value in zip(samples, values, strict=True)
        if answer_type in (None, sample.answer_type)
    ]
    known = [value for value, _ in chosen if value is not None]
    return rate(known, [label for _, label in chosen], seed) if chosen and len(known) == len(chosen) else None


def _slice(samples: Sequence[Sample], clusters: Mapping[str, Hashable], prior: Prior, seed: int) -> Slice:
    labels = [clusters[sample.id] for sample in samples]
    given, blind = _right(samples, _subject), _right(samples, _blind)
    expected = _right(samples, _reference) if any(sample.reference for sample in samples) else None
    return Slice(
        **vars(score(samples, _subject, clusters, seed)),
        blind=score(samples, _blind, clusters, seed),
        prior=_prior_score(samples, clusters, prior, seed),
        image_gain=paired_difference(given, blind, labels, seed),
        image_gain_test=mcnemar(given, blind, labels),
        reference=score(samples, _reference, clusters, seed) if expected else None,
        loss=paired_loss(expected, given, labels, seed) if expected else None,
        loss_test=mcnemar(expected, given, labels) if expected else None,
    )


def _corrected(by: Mapping[str, Mapping[str, Slice]]) -> dict[str, dict[str, Slice]]:
    """The slices with Holm's correction over all of them, for each of the two tests.

    A field with one value only is the whole again, and no further test.
    """
    parts = [part for values in by.values() if len(values) > 1 for part in values.values()]
    gains = iter(holm([part.image_gain_test for part in parts]))
    losses = iter(holm([part.loss_test for part in parts if part.loss_test]))

    def corrected(part: Slice) -> Slice:
        return replace(part, image_gain_test=next(gains), loss_test=next(losses) if part.loss_test else None)

    return {
        name: {value: corrected(part) if len(values) > 1 else part for value, part in values.items()}
        for name, values in by.items()
    }


def _prior_score(samples: Sequence[Sample], clusters: Mapping[str, Hashable], prior: Prior, seed: int) -> Score:
    guessed = [
        normalise(sample.answer, sample.language) == prior[sample.task, sample.language] for sample in samples
    ]
    whole = _rate(samples, guessed, clusters, seed)
    assert whole is not None, "no samples"
    closed, opened = (_rate(samples, guessed, clusters, seed, kind) for kind in ("closed", "open"))
    return Score(whole, closed, opened)


def count_flips(flips: Sequence[Flip | None], labels: Sequence[Hashable], seed: int) -> Flips:
    """Sum up how answers differ from another model's."""
    counts = Counter(flips)
    flipped = rate([flip is not None for flip in flips], labels, seed)
    return Flips(
        flipped.value, flipped.ci_low, flipped.ci_high, counts["worse"], counts["better"], counts["other"]
    )


def _right(samples: Sequence[Sample], of: Callable[[Sample], Answer]) -> list[bool]:
    return [of(sample).correct for sample in samples]


def _subject(sample: Sample) -> Answer:
    return sample.subject


def _blind(sample: Sample) -> Answer:
    return _present(sample.blind)


def _blind_any(sample: Sample) -> Answer:
    return _present(sample.blind_any)


def _reference(sample: Sample) -> Answer:
    return _present(sample.reference)


def _present(answer: Answer | None) -> Answer:
    assert answer is not None, "a report needs both blind controls, and the reference on all rows or on none"
    return answer
