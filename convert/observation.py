"""What a loaded model makes of the probes, and how far two models' observations are apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ldrt_edge.convert.probes import Probe
from ldrt_edge.fidelity import KERNELS_APART, compare_logits, half_precision
from ldrt_edge.runtimes.base import FloatArray, Prompt, Runtime, Sampling

ANSWER_TOKENS = 16
"""Length of the greedy answers."""


def compare(reference: Runtime, subject: Runtime, wanted: Sequence[Probe]) -> Fidelity:
    """Hold one loaded model against another."""
    return difference(observe(reference, wanted), observe(subject, wanted))


@dataclass(frozen=True)
class Fidelity:
    """How close one model's numbers are to another's, on the same tokens behind pictures.

    mean_kld, top1_agreement, undecided: over answer tokens; see `ldrt_edge.fidelity`.
    prompt_kld: mean over the prompt's own tokens behind the picture.
    max_abs_logit_diff: over both.
    embedding_rel_error: largest over the pictures of |subject - reference| / |reference| (Frobenius).
    Of somebody else's runtime, prompt and embeddings are not seen: None.
    """

    max_abs_logit_diff: float
    mean_kld: float
    top1_agreement: float
    undecided: float
    tokens: int
    prompt_kld: float | None
    embedding_rel_error: float | None


class Observed(NamedTuple):
    """What one model made of the probes.

    prompt_logits, answer_logits: (tokens, vocab) for each probe. answers: greedy; margins: the distance of the two
    best logits at each of their tokens, and undecided: whether that is below half precision. consistent: whether
    generating, token by token, gave what reading the same answer at once ranks first.
    """

    embeddings: list[FloatArray]
    prompt_logits: list[FloatArray]
    answer_logits: list[FloatArray]
    answers: list[tuple[int, ...]]
    margins: list[tuple[float, ...]]
    undecided: list[tuple[bool, ...]]
    consistent: list[bool]


def observe(runtime: Runtime, wanted: Sequence[Probe]) -> Observed:
    """Embeddings, logits and greedy answers of one model."""
    seen = Observed([], [], [], [], [], [], [])
    for prompt, answer in wanted:
        seen.embeddings.extend(runtime.encode(image) for image in prompt.images)
        pictures, rest = _behind_pictures(prompt)
        logits = runtime.score(pictures, (*rest, *answer))
        seen.prompt_logits.append(logits[: len(rest)])
        seen.answer_logits.append(logits[len(rest) :])
        given = tuple(token.id for token in runtime.generate(prompt, Sampling(max_tokens=ANSWER_TOKENS)))
        again = runtime.score(prompt, given) if given else np.empty((0, 2), np.float32)
        second, first = np.partition(again, -2, axis=1)[:, -2:].T
        seen.answers.append(given)
        seen.margins.append(tuple((first - second).tolist()))
        seen.undecided.append(tuple((first - second < half_precision(again)).tolist()))
        seen.consistent.append(bool(((again.argmax(axis=1) == given) | (first - second < KERNELS_APART)).all()))
    return seen


def _behind_pictures(prompt: Prompt) -> tuple[Prompt, tuple[int, ...]]:
    """The prompt up to its last picture (or its first token), and the tokens behind."""
    places = [i for i, token in enumerate(prompt.ids) if token == prompt.image_token_id]
    end = places[-1] + 1 if places else 1
    return Prompt(prompt.ids[:end], prompt.images, prompt.image_token_id, prompt.stop_ids), prompt.ids[end:]


def difference(reference: Observed, subject: Observed) -> Fidelity:
    """How far the subject's numbers are from the reference's."""
    answer, prompt = (
        [compare_logits(expected, found) for expected, found in zip(wanted, given, strict=True)]
        for wanted, given in (
            (reference.answer_logits, subject.answer_logits), (reference.prompt_logits, subject.prompt_logits),
        )
    )
    errors = map(_relative_error, reference.embeddings, subject.embeddings)
    return Fidelity(
        max_abs_logit_diff=float(np.max([part.max_abs_logit_diff for part in [*answer, *prompt]])),
        mean_kld=float(np.concatenate([part.kld for part in answer]).mean()),
        top1_agreement=float(np.concatenate([part.top1 for part in answer]).mean()),
        undecided=float(np.concatenate([part.undecided for part in answer]).mean()),
        tokens=sum(len(part.kld) for part in answer),
        prompt_kld=float(np.concatenate([part.kld for part in prompt]).mean()),
        embedding_rel_error=float(np.max([*errors, 0.0])),
    )


def _relative_error(expected: FloatArray, found: FloatArray) -> float:
    if expected.shape != found.shape:
        return math.inf
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def equal_answers(reference: Observed, answers: Sequence[tuple[int, ...]]) -> int:
    """How many greedy answers are the reference's, up to where it could itself have gone either way."""
    return sum(map(_same_answer, reference.answers, answers, reference.undecided))


def _same_answer(wanted: tuple[int, ...], found: tuple[int, ...], undecided: tuple[bool, ...]) -> bool:
    for right, given, either in zip(wanted, found, undecided, strict=False):
        if right != given:
            return either
    return len(wanted) == len(found)
