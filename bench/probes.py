"""Questions that catch a model making things up, apart from how well it words its answers.

Presence: "Is the thalamus visible in this image?", for structures that are surely in a picture and as many that surely
are not, where the dataset's rows tell (`Row.present`, `Row.absent`). The absent ones are chosen in three ways: at
random, the most frequent ones of the dataset, and those that most often stand beside what is there. Each is asked with
the right picture, with a wrong one of the same kind, and with a grey one; two of them in other words and in the
dataset's other languages too.

Unanswerable: what no picture tells. And the dataset's own questions with the grey picture: what stays the same answer
was not read off the picture.

Source: Li et al., "Evaluating Object Hallucination in Large Vision-Language Models", EMNLP 2023 (POPE).
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Literal

import numpy as np

from ldrt_edge import console
from ldrt_edge.artifact import Json
from ldrt_edge.bench.metrics import RULES, polarity
from ldrt_edge.bench.steps import Journal
from ldrt_edge.bench.vqa import Controls, Model
from ldrt_edge.bench.wordings import PRIMARY, base, wordings
from ldrt_edge.dataset import Dataset, Row, Turn, group_by_image
from ldrt_edge.front import conversation
from ldrt_edge.image import read_image
from ldrt_edge.runtimes.base import FrontImage, Sampling

Foil = Literal["random", "popular", "adversarial"]
ABSENT: tuple[Foil, ...] = ("random", "popular", "adversarial")
EACH = 2
"""Structures of each sort that are asked about in a picture."""
_TOKENS, _GREY = 24, 127

Sort = Literal["presence", "paraphrase", "translation", "unanswerable", "own"]


@dataclass(frozen=True)
class Said:
    """An answer and the probability of its tokens; `yes` is None where it is neither yes nor no."""

    text: str
    confidence: float
    yes: bool | None
    abstains: bool


@dataclass(frozen=True)
class Probe:
    """A question about one picture and what was answered.

    structure, present, foils: what is asked about, whether it is there, and how it was chosen if not.
    wrong, blank: the answer with a wrong picture of the same kind and with a grey one, where it was asked so. For the
        dataset's own questions (`own`), `right` is with the right picture.
    """

    image_sha256: str
    group: str
    sort: Sort
    language: str
    question: str
    structure: str
    present: bool
    foils: tuple[str, ...]
    right: Said | None
    wrong: Said | None
    blank: Said | None


@dataclass(frozen=True)
class _Question:
    sort: Sort
    language: str
    turns: tuple[Turn, ...]
    structure: str = ""
    present: bool = False
    foils: tuple[str, ...] = ()


def probe(
    model: Model, dataset: Dataset, rows: Sequence[Row], controls: Controls, pictures: int, seed: int, journal: Path
) -> list[Probe]:
    """Probe `model` with the first `pictures` pictures of `rows`; a picture's answers are on disk before the next one.

    Raises:
        DataError: a picture cannot be read.
    """
    by_image = group_by_image(rows)
    first = {image: members[0] for image, members in by_image.items()}
    chosen = _spread(by_image, pictures)
    languages = _languages(rows)
    known = _Known(dataset)
    kept = Journal(journal)
    found: list[Probe] = []
    for image in console.track(chosen, "probing"):
        row, wrong = first[image], first[controls.same_kind[image]]
        asked = _questions(row, by_image[image], known, languages, random.Random(f"{seed}/{row.image_sha256}"))
        key = {
            "image": row.image_sha256, "wrong": wrong.image_sha256, "words": wordings().version, "rules": RULES,
            "questions": [question.turns[-1].text for question in asked],
        }  # fmt: skip
        given = kept.once(key, partial(_ask, model, dataset, row, wrong, asked))
        found += [_parse(one) for one in given]
    return found


class _Known:
    """What a dataset's pictures show: how often each structure is there, and how often two are together."""

    def __init__(self, dataset: Dataset) -> None:
        shown = {row.image_sha256: row.present for row in dataset}
        self.counts = Counter(name for names in shown.values() for name in names)
        self.together = Counter(pair for names in shown.values() for pair in combinations(sorted(names), 2))

    def absent(self, row: Row, count: int, rng: random.Random) -> dict[str, tuple[str, ...]]:
        """Absent structures with the ways in which they were chosen, `count` for each way."""
        candidates = rng.sample(row.absent, len(row.absent))  # ties fall at random

        def beside(name: str) -> int:
            return sum(self.together[min(name, other), max(name, other)] for other in row.present)

        ranked: dict[Foil, list[str]] = {
            "random": candidates,
            "popular": sorted(candidates, key=lambda name: -self.counts[name]),
            "adversarial": sorted(candidates, key=lambda name: -beside(name)),
        }
        picked = {way: names[:count] for way, names in ranked.items()}
        names = dict.fromkeys(name for way in ABSENT for name in picked[way])
        return {name: tuple(way for way in ABSENT if name in picked[way]) for name in names}


def _spread(by_image: Mapping[str, Sequence[Row]], pictures: int) -> list[str]:
    """Pictures evenly over all, those with known structures first."""
    known = [image for image, members in by_image.items() if members[0].present and members[0].absent]
    order = [*known, *(image for image in by_image if image not in set(known))] if len(known) < pictures else known
    return [order[place] for place in np.unique(np.linspace(0, len(order) - 1, min(pictures, len(order))).astype(int))]


def _languages(rows: Sequence[Row]) -> list[str]:
    """The dataset's languages that there are words for, English or else the commonest first."""
    counts = Counter(base(row.language) for row in rows)
    languages = [language for language, _ in counts.most_common() if language in wordings().presence]
    return sorted(languages, key=lambda language: language != PRIMARY) or [PRIMARY]


def _questions(
    row: Row, own: Sequence[Row], known: _Known, languages: Sequence[str], rng: random.Random
) -> list[_Question]:
    words, primary = wordings(), languages[0]
    named = [name for name in row.present if words.name(name, primary)]
    count = min(EACH, len(named), len(row.absent))
    present: dict[str, tuple[str, ...]] = {name: () for name in rng.sample(named, count)}
    structures = {**present, **known.absent(row, count, rng)}
    asked: list[_Question] = []

    def add(sort: Sort, name: str, language: str, wording: int) -> None:
        called = words.name(name, language)
        if called:
            text = words.presence[language][wording].format(a=called)
            there = name in row.present
            asked.append(_Question(sort, language, (Turn("user", text),), name, there, structures[name]))

    for name in structures:
        add("presence", name, primary, 0)
    again = [*list(present)[:1], *[name for name, ways in structures.items() if "adversarial" in ways][:1]]
    for name in again:
        for wording in range(1, len(words.presence[primary])):
            add("paraphrase", name, primary, wording)
        for language in languages[1:]:
            add("translation", name, language, 0)
    for language in languages:
        asked.append(_Question("unanswerable", language, (Turn("user", rng.choice(words.unanswerable[language])),)))
    return asked + [_Question("own", member.language, member.turns[:-1]) for member in own]


def _ask(model: Model, dataset: Dataset, row: Row, wrong: Row, asked: Sequence[_Question]) -> list[Json]:
    rgb = read_image(dataset.image_path(row)).rgb
    shown = {
        "right": (rgb, asked),
        "wrong": (read_image(dataset.image_path(wrong)).rgb, [q for q in asked if q.sort == "presence"]),
        "blank": (np.full_like(rgb, _GREY), [q for q in asked if q.sort in ("presence", "own")]),
    }
    said = {
        name: dict(zip(questions, _answers(model, model.front.image(pixels), questions), strict=True))
        for name, (pixels, questions) in shown.items()
    }
    found = [
        Probe(
            row.image_sha256, row.group, question.sort, question.language, question.turns[-1].text, question.structure,
            question.present, question.foils, *(said[name].get(question) for name in ("right", "wrong", "blank")),
        )
        for question in asked
    ]
    return [asdict(one) for one in found]


def _answers(model: Model, image: FrontImage, questions: Sequence[_Question]) -> list[Said]:
    if not questions:
        return []
    prompts = [model.front.prompt(conversation(question.turns, image)) for question in questions]
    given = model.runtime.generate_all(prompts, Sampling(max_tokens=_TOKENS))
    said = []
    for question, tokens in zip(questions, given, strict=True):
        text = model.front.decode([token.id for token in tokens]).strip()
        meant = polarity(text, question.language)
        said.append(Said(
            text, math.exp(sum(token.logprob for token in tokens)), meant == "yes" if meant else None,
            wordings().abstains(text, question.language),
        ))  # fmt: skip
    return said


def _parse(data: Json) -> Probe:
    said = {name: Said(**data[name]) if data[name] else None for name in ("right", "wrong", "blank")}
    return Probe(**(data | said | {"foils": tuple(data["foils"])}))
