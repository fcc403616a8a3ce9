"""Ask a model every question of a test set, with the right picture and with a wrong one, beside its reference model.

The answers are greedy. One teacher-forced pass over the reference answer tells whether the greedy answer equals it
(then its argmax is that answer, token for token, and nowhere a near tie that kernels may turn); only where it does not,
the model generates. The same pass gives the logits for fidelity, which are reduced to one divergence a token before the
next picture, so nothing large is kept. All questions about a picture go to the runtime together, which asks them side
by side where it can.

An answer ends where the model ends it, or at a limit: closed questions have a short one, open ones that of the run. It
is the same for all of them, so it tells nothing of the reference answer. Which answers it cut is kept (`truncated`).

**The blind control.** A model can score well without looking: "yes" is often right. So each question is asked once
more with a picture that does not belong to it, and the rate with the right picture counts only by what it gains over
that. There are two controls, each a seeded derangement (every picture is used once, none stays in its place, and where
possible none is replaced by one of its own group):

- `blind`: a wrong picture of the same kind (dose map for dose map, chest for chest). It takes away what this picture
  says and leaves what its kind says. Kinds of one picture take theirs from the other control.
- `blind_any`: any other picture. Against `blind`, it tells how much is known from the kind of picture alone.

A wrong picture may by chance have the same answer, so even a model that sees everything scores above zero.

Rows are asked picture by picture, so that the runtime's prefix cache holds the picture for all its questions. With a
journal, each picture's answers are on disk before the next one is asked, and a killed run continues there.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ldrt_edge import console
from ldrt_edge.bench.metrics import chrf, correct, normalise, overlap_installed, rouge_l, token_f1
from ldrt_edge.bench.similarity import similarity, similarity_installed
from ldrt_edge.bench.statistics import joined
from ldrt_edge.dataset import Dataset, Row, group_by_image
from ldrt_edge.errors import DataError
from ldrt_edge.fidelity import compare_logits
from ldrt_edge.front import Front, conversation
from ldrt_edge.image import read_image
from ldrt_edge.runtimes.base import (
    FloatArray,
    FrontImage,
    Prompt,
    Runtime,
    Sampling,
    Token,
    check_room,
    log_softmax,
)
from ldrt_edge.runtimes.branches import GAPS_APART

ANSWER_TOKENS = 256
"""Of an answer to an open question, at most, unless the run has another limit."""
_CLOSED_TOKENS = 24

Flip = Literal["worse", "better", "other"]


@dataclass(frozen=True, eq=False)
class Model:
    """A loaded runtime with the front end of the same artefact."""

    runtime: Runtime
    front: Front


@dataclass(frozen=True)
class Answer:
    """What a model said to one question, seeing the picture with this sha256 (of the dataset's file).

    rouge_l, chrf: None where the extra `bench` was not installed.
    confidence: the probability that the model gives its answer's tokens, all together.
    similarity: of sentence embeddings, where the reference answer is long (`bench.similarity`).
    truncated: it was cut at the limit of its tokens, or at the end of the context.
    """

    text: str
    correct: bool
    token_f1: float
    image_sha256: str
    rouge_l: float | None = None
    chrf: float | None = None
    confidence: float | None = None
    similarity: float | None = None
    truncated: bool = False


@dataclass(frozen=True)
class Sample:
    """One question with all that was answered to it; a line of `samples.jsonl`.

    flip: the subject's answer differs from the reference model's: from right to wrong ("worse"), from wrong to right
        ("better"), or neither ("other"); None where they agree or there is no reference model.
    kld, top1: per token of the reference answer, given the right picture: Kullback-Leibler divergence of the subject
        from the reference model in nats, and whether both rank the same token first.
    others: what further models answered, by their names (`bench.ladder`).
    """

    id: str
    image_sha256: str
    group: str
    kind: str
    language: str
    task: str
    answer_type: str
    question: str
    answer: str
    subject: Answer
    blind: Answer | None
    blind_any: Answer | None
    reference: Answer | None
    flip: Flip | None
    kld: tuple[float, ...] | None
    top1: tuple[bool, ...] | None
    source: str = ""
    others: Mapping[str, Answer] = field(default_factory=dict)


@dataclass(frozen=True)
class Controls:
    """For each picture (its path in the dataset) the wrong one that is shown instead."""

    same_kind: Mapping[str, str]
    any_kind: Mapping[str, str]


@dataclass(frozen=True, eq=False)
class _Reply:
    """A greedy answer with its probability, and the logits (tokens, vocab) on the reference answer's tokens."""

    text: str
    confidence: float
    truncated: bool
    target: tuple[int, ...]
    logits: FloatArray


def answer_rows(
    subject: Model,
    dataset: Dataset,
    rows: Sequence[Row],
    controls: Controls | None = None,
    reference: Model | None = None,
    journal: Path | None = None,
    answer_tokens: int = ANSWER_TOKENS,
) -> list[Sample]:
    """Ask `subject` (and `reference`) every row's last question; samples in the order of their pictures.

    answer_tokens: of an answer to an open question, at most; closed ones get a few, and no more than that.

    Raises:
        DataError: a picture cannot be read, or a question is longer than the context.
    """
    by_image = group_by_image(rows)
    first = {image: members[0] for image, members in by_image.items()}
    done = _read_journal(journal, by_image) if journal else {}
    samples = [sample for image in by_image for sample in done.get(image, ())]
    waiting = {image: members for image, members in by_image.items() if image not in done}
    right = sum(sample.subject.correct for sample in samples)
    with console.bar("asking", sum(map(len, waiting.values()))) as shown:
        for image, members in waiting.items():
            wrong = controls.same_kind[image] if controls else None
            other = controls.any_kind[image] if controls else None
            nobody = [None] * len(members)
            replies = _ask(subject, dataset, members, first[image], answer_tokens)
            blind = _answers(subject, dataset, members, first[wrong], answer_tokens) if wrong else nobody
            if other == wrong:
                blind_any = blind
            else:
                blind_any = _answers(subject, dataset, members, first[other], answer_tokens) if other else nobody
            expected = _ask(reference, dataset, members, first[image], answer_tokens) if reference else nobody
            new = [_sample(*column) for column in zip(members, replies, blind, blind_any, expected, strict=True)]
            if journal:
                _append(journal, new)
            samples.extend(new)
            right += sum(sample.subject.correct for sample in new)
            shown.advance(len(new), f"{right / len(samples):.0%} right")
    return samples


def draw_controls(rows: Sequence[Row], seed: int) -> Controls:
    """Draw both blind controls over the pictures of `rows`.

    Raises:
        DataError: there is only one picture.
    """
    first = {image: members[0] for image, members in group_by_image(rows).items()}
    if len(first) < 2:
        raise DataError("the blind control needs at least two pictures: give a larger dataset or a higher --limit")
    any_kind = _derange(list(first.values()), seed)
    same_kind = dict(any_kind)
    for kind in sorted({row.kind for row in first.values()}):
        members = [row for row in first.values() if row.kind == kind]
        if len(members) > 1:
            same_kind.update(_derange(members, seed))
    return Controls(same_kind, any_kind)


def answers(sample: Sample) -> dict[str, Answer]:
    """What each model said, given the right picture: "subject", "reference" if there is one, and others by name."""
    reference = {"reference": sample.reference} if sample.reference else {}
    return {"subject": sample.subject, **reference, **sample.others}


def flip(language: str, subject: Answer, reference: Answer) -> Flip | None:
    """How an answer differs from the reference model's; None where it does not."""
    if normalise(subject.text, language) == normalise(reference.text, language):
        return None
    if subject.correct == reference.correct:
        return "other"
    return "better" if subject.correct else "worse"


def cluster_labels(samples: Sequence[Sample]) -> list[Hashable]:
    """What stands and falls together: questions about one picture or of one group (article, study)."""
    return joined([sample.image_sha256 for sample in samples], [sample.group for sample in samples])


def read_samples(path: Path) -> list[Sample]:
    """Samples of a `samples.jsonl`, up to the first line that a killed run left unfinished."""
    samples = []
    for line in path.read_bytes().splitlines(keepends=True):
        if not line.endswith(b"\n"):
            break
        samples.append(_parse(json.loads(line)))
    return samples


def _derange(members: Sequence[Row], seed: int) -> dict[str, str]:
    """Another picture for each: shuffled group by group, then shifted by the largest group."""
    rng = np.random.default_rng(seed)
    by_group: dict[str, list[str]] = {}
    for row in sorted(members, key=lambda row: row.image):
        by_group.setdefault(row.group, []).append(row.image)
    groups = [by_group[name] for name in rng.permutation(sorted(by_group))]
    order = [str(image) for group in groups for image in rng.permutation(group)]
    shift = max(map(len, groups))
    if shift == len(order):
        shift = 1  # all of one group: another picture of it must do
    return {image: order[(place + shift) % len(order)] for place, image in enumerate(order)}


def _ask(model: Model, dataset: Dataset, rows: Sequence[Row], shown: Row, answer_tokens: int) -> list[_Reply]:
    """Greedy replies to the last question of each row, with the picture of the row `shown`."""
    image = model.front.image(read_image(dataset.image_path(shown)).rgb)
    prompts, targets, limits = zip(*(_prompt(model, row, image, answer_tokens) for row in rows), strict=True)
    scored = model.runtime.score_all(prompts, targets)
    said = {n: tokens for n, logits in enumerate(scored) if (tokens := _as_expected(targets[n], logits)) is not None}
    for limit in sorted(set(limits)):
        places = [n for n in range(len(rows)) if n not in said and limits[n] == limit]
        if places:
            given = model.runtime.generate_all([prompts[n] for n in places], Sampling(max_tokens=limit))
            said.update(zip(places, given, strict=True))
    return [
        _reply(model, said[n][: limits[n]], len(said[n]) >= limits[n], targets[n], scored[n]) for n in range(len(rows))
    ]


def _reply(
    model: Model, tokens: Sequence[Token], truncated: bool, target: tuple[int, ...], logits: FloatArray
) -> _Reply:
    text = model.front.decode([token.id for token in tokens]).strip()
    return _Reply(text, math.exp(sum(token.logprob for token in tokens)), truncated, target, logits)


def _prompt(model: Model, row: Row, image: FrontImage, answer_tokens: int) -> tuple[Prompt, tuple[int, ...], int]:
    """A row's prompt, its reference answer's tokens, and how many an answer may have."""
    try:
        messages = conversation(row.turns[:-1], image)
        prompt, target = model.front.prompt(messages), model.front.answer_ids(messages, row.answer)
        room = check_room(prompt, len(target), model.runtime.context_length)
    except DataError as error:
        raise DataError(f"row {row.id}: {error}") from error
    limit = min(answer_tokens, _CLOSED_TOKENS) if row.answer_type == "closed" else answer_tokens
    return prompt, target, min(limit, room)


def _as_expected(target: Sequence[int], logits: FloatArray) -> list[Token] | None:
    """The reference answer as what the model surely generates, without its stop token.

    None where it generates another, or where two tokens are so near each other that only generating tells.
    """
    second, first = np.partition(logits, -2, axis=1)[:, -2:].T
    if not (logits.argmax(axis=1) == target).all() or (first - second < GAPS_APART).any():
        return None
    told = log_softmax(logits)
    return [Token(token, float(told[place, token])) for place, token in enumerate(target[:-1])]


def _answers(
    model: Model, dataset: Dataset, rows: Sequence[Row], shown: Row, answer_tokens: int
) -> list[Answer | None]:
    replies = _ask(model, dataset, rows, shown, answer_tokens)
    return [_judge(row, reply, shown) for row, reply in zip(rows, replies, strict=True)]


def _judge(row: Row, reply: _Reply, shown: Row) -> Answer:
    text, graded = reply.text, overlap_installed()
    return Answer(
        text, correct(row, text), token_f1(row, text), shown.image_sha256,
        rouge_l=rouge_l(row, text) if graded else None, chrf=chrf(row, text) if graded else None,
        confidence=reply.confidence, similarity=similarity(row, text) if similarity_installed() else None,
        truncated=reply.truncated,
    )  # fmt: skip


def _sample(row: Row, reply: _Reply, blind: Answer | None, blind_any: Answer | None, expected: _Reply | None) -> Sample:
    subject = _judge(row, reply, row)
    reference = _judge(row, expected, row) if expected else None
    flipped = flip(row.language, subject, reference) if reference else None
    kld = top1 = None
    if expected and expected.target == reply.target:
        tokens = compare_logits(expected.logits, reply.logits)
        kld, top1 = tuple(tokens.kld.tolist()), tuple(tokens.top1.tolist())
    return Sample(
        id=row.id, image_sha256=row.image_sha256, group=row.group, kind=row.kind, language=row.language, task=row.task,
        answer_type=row.answer_type, question=row.question, answer=row.answer, subject=subject, blind=blind,
        blind_any=blind_any, reference=reference, flip=flipped, kld=kld, top1=top1,
        source=row.source,
    )


def _read_journal(path: Path, by_image: Mapping[str, Sequence[Row]]) -> dict[str, list[Sample]]:
    """Pictures whose questions were all answered by an earlier run; the journal is cut back to these."""
    if not path.is_file():
        return {}
    answered = {sample.id: sample for sample in read_samples(path)}
    done = {
        image: [answered[row.id] for row in members]
        for image, members in by_image.items()
        if all(row.id in answered for row in members)
    }
    write_samples(path, [sample for samples in done.values() for sample in samples])
    return done


def write_samples(path: Path, samples: Sequence[Sample]) -> None:
    """Replace a `samples.jsonl`, so that a run that is killed here finds the old or the new one."""
    new = path.with_suffix(".new")
    new.unlink(missing_ok=True)
    _append(new, samples)
    new.replace(path)


def _append(path: Path, samples: Sequence[Sample]) -> None:
    with path.open("a", encoding="utf-8") as stream:
        stream.writelines(json.dumps(asdict(sample), ensure_ascii=False) + "\n" for sample in samples)
        stream.flush()
        os.fsync(stream.fileno())


def _parse(data: dict[str, Any]) -> Sample:
    for name in ("subject", "blind", "blind_any", "reference"):
        data[name] = Answer(**data[name]) if data[name] else None
    for name in ("kld", "top1"):
        data[name] = tuple(data[name]) if data[name] is not None else None
    data["others"] = {name: Answer(**given) for name, given in data.get("others", {}).items()}
    return Sample(**data)
