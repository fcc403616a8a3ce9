"""The same question about pictures that answer it differently, so that its wording tells nothing.

A model that is trained on a few hundred pictures learns which answer a question usually has, and never looks. Here each
yes/no question is put to as many pictures where it is true as to others where it is false. What is true of a picture
is read from what the dataset itself asks about it:

- its modality and plane, from questions whose answers name one ("What plane is this?" "Axial"; "Is this a CT?" "yes")
  or that take one for granted ("Are the kidneys seen in this CT scan?");
- its region, from the kind of its rows;
- findings and structures of one region: what a picture of the chest or abdomen was said to show, a picture of the head
  does not show, and the other way round. Chest and abdomen overlap, and are not set against each other.

Where two questions disagree about a picture, nothing is asked. Only the training split is read. English only.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

from ldrt_edge import artifact
from ldrt_edge.dataset import Dataset, DatasetWriter, Row, Turn, group_by_image
from ldrt_edge.errors import DataError
from ldrt_edge.train.data.questions import MODALITIES, WORDINGS, Question
from ldrt_edge.train.data.summary import summary

REGIONS = {"HEAD": "brain", "CHEST": "chest", "ABD": "abdomen"}
"""Kinds of picture to the word that questions use."""

NAMED: dict[str, dict[str, str]] = {
    "modality": {
        "MRI": r"mri?|flair|dwi|adc|t[12]", "CT": r"ct|computed tomography",
        "x-ray": r"x[ -]?ray|radiograph|plain film|cxr", "ultrasound": r"ultrasound|sonogra\w+",
    },
    "plane": {
        "axial": r"axial|transverse", "coronal": r"coronal", "sagittal": r"sagittal|saggital",
        "PA": r"pa|postero-?anterior|posterior[- ]anterior", "AP": r"ap|antero-?posterior|anterior[- ]posterior",
    },
}
"""Value to the words that name it, for each task."""

_FILM = {"PA", "AP"}
"""Views of a film: two names of a coronal plane, so never asked against it."""

_STRUCTURES = {
    "HEAD": r"brain|skull|cerebr\w*|cerebell\w*|sulc\w+|gyr\w+|gr[ae]y|white matter|midbrain|temporal|frontal|"
            r"occipital|parietal|ventricles?|orbits?|optic|basilar|mca|calvari\w+|pituitary|sinus\w*",
    "CHEST": r"lungs?|heart|cardi\w+|pneumothora\w+|pleura\w*|trache\w+|ribs?|clavicles?|\w*diaphragms?|mediastin\w+|"
             r"hil[au]\w*|costophrenic|pulmonary|thora\w+|chest|cavitary|airspace",
    "ABD": r"liver|hepat\w+|kidneys?|renal|bowels?|spleen|splenic|pancrea\w+|gall\w+|\w*cholecyst\w+|colon|append\w+|"
           r"stomach|gastric|abdom\w+|ascites|celiac|\w*periton\w+|mesenter\w+|intestin\w+|stool|feces|aort\w+|sigmoid",
}
"""What lies in a region and cannot be in a picture of a region that it is set against."""
_APART = {"HEAD": {"CHEST", "ABD"}, "CHEST": {"HEAD"}, "ABD": {"HEAD"}}
_FINDINGS = ("presence", "abnormality", "size")
_UNSAFE = r"no|not|without|free of|normal\w*|clear|midline|intact|removed|patent|open|adequate"
"""Words of questions whose yes may be said of a picture that does not show the structure at all."""

_ASSERTION = re.compile(r"(is|was) (this|the (above )?(image|picture|film|scan))\b", re.IGNORECASE)


def contrast(data: Path, out: Path, seed: int = 0) -> Path:
    """Write a dataset artefact of balanced questions about the training pictures of `data`.

    Every question of one wording with a yes/no answer is there as often with "yes" as with "no", and every choice as
    often with either answer. Groups, kinds and licences stay; the source says that the question was derived. The same
    arguments give the same bytes.

    Raises:
        DataError: nothing is known about the pictures, or a picture cannot be read.
    """
    dataset = Dataset(data)
    by_image = group_by_image(row for row in dataset.rows("train") if row.language == "en")
    with artifact.create(out, "dataset", {"stage": "contrast"}, [data], seed=seed) as draft:
        if draft.complete:
            return out
        asked: dict[str, list[Question]] = defaultdict(list)
        rng = random.Random(f"{seed}/contrast")
        for image, question in (*_about_attributes(by_image, rng), *_about_findings(by_image, rng)):
            asked[image].append(question)
        if not asked:
            raise DataError(f"{data}: no training question tells a picture's modality, plane or region")
        rows: list[Row] = []
        with DatasetWriter(draft.path) as writer:
            for image in sorted(asked):
                first = by_image[image][0]
                path = dataset.image_path(first)
                name, digest = writer.add_image(path.read_bytes(), path.suffix)
                for index, question in enumerate(asked[image]):
                    turns = (Turn("user", question.text), Turn("assistant", question.answer))
                    rows.append(replace(
                        first, id=f"contrast-{digest[:12]}-{index}", image=name, image_sha256=digest, turns=turns,
                        task=question.task, answer_type=question.answer_type,
                        source=f"{first.source}, question derived",
                    ))
                    writer.add(rows[-1])
        draft.metrics.update(summary(rows))
    return out


def known(rows: Sequence[Row]) -> dict[str, str]:
    """What a picture's questions and answers tell of it: "modality", "plane" and "organ", where they agree."""
    found: dict[str, set[str]] = {task: {v for row in rows for v in _told(row, task)} for task in NAMED}
    if found["plane"] & _FILM:
        found["plane"].discard("coronal")
        found["modality"].add("x-ray")
    told = {task: next(iter(values)) for task, values in found.items() if len(values) == 1}
    return told | ({"organ": REGIONS[rows[0].kind]} if rows[0].kind in REGIONS else {})


def _told(row: Row, task: str) -> set[str]:
    """The values of a task that a row states: taken for granted, named by its answer, or by a "yes" to "is this …?"."""
    answer = row.answer.strip().rstrip(".").lower()
    if re.search(r"\bnot\b", row.question):
        return set()
    if row.task == task and answer not in ("yes", "no"):
        return _named(task, answer)
    if not _ASSERTION.match(row.question):
        return _named(task, row.question, before=r"(in|on|this|above) ((this|the|above|chest|abdominal|axial) )*")
    return _named(task, row.question) if row.task == task and answer == "yes" else set()


def _named(task: str, text: str, before: str = "") -> set[str]:
    """The one value that a text names, if it is one."""
    found = {v for v, words in NAMED[task].items() if re.search(rf"\b{before}({words})\b", text, re.IGNORECASE)}
    return found if len(found) == 1 else set()


def _about_attributes(by_image: Mapping[str, Sequence[Row]], rng: random.Random) -> Iterator[tuple[str, Question]]:
    """Modality, plane and region: openly, yes/no, and modality as a choice."""
    told = {image: known(rows) for image, rows in sorted(by_image.items())}
    for task in (*NAMED, "organ"):
        holders: dict[str, list[str]] = defaultdict(list)
        for image, values in told.items():
            if task in values:
                holders[values[task]].append(image)
        say = MODALITIES if task == "modality" else {value: value for value in holders}
        for value, images in sorted(holders.items()):
            for image in images:
                yield image, Question(task, rng.choice(WORDINGS[task]), value, "open")
            others = [image for other, held in holders.items() if not _same_view(value, other) for image in held]
            article = "an" if value[0].lower() in "aeiou" else "a"
            for pair in _pairs(images, others, rng):
                text = rng.choice(WORDINGS[f"{task} check"]).format(a=say[value], article=article)
                yield from _asked_of(pair, task, text, ("yes", "no"))
        for one, two in combinations(sorted(holders), 2) if task == "modality" else ():
            for pair in _pairs(holders[one], holders[two], rng):
                a, b = rng.sample((say[one], say[two]), 2)
                text = rng.choice(WORDINGS["modality choice"]).format(a=a, b=b)
                yield from _asked_of(pair, task, text, (one, two))


def _about_findings(by_image: Mapping[str, Sequence[Row]], rng: random.Random) -> Iterator[tuple[str, Question]]:
    """What was found in pictures of one region, asked of them and of pictures of a region that cannot show it."""
    kinds = {image: rows[0].kind for image, rows in sorted(by_image.items())}
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for image, rows in sorted(by_image.items()):
        for task, text in sorted({(row.task, row.question) for row in rows if _of_one_region(row)}):
            found[task, text].append(image)
    for (task, text), images in sorted(found.items()):
        apart = set.intersection(*(_APART[kinds[image]] for image in images))
        for pair in _pairs(images, [image for image, kind in kinds.items() if kind in apart], rng):
            yield from _asked_of(pair, task, text, ("yes", "no"))


def _of_one_region(row: Row) -> bool:
    text = row.question.lower()
    return (
        row.kind in _STRUCTURES
        and row.task in _FINDINGS
        and (row.answer_type, row.answer.strip().lower()) == ("closed", "yes")
        and re.search(rf"\b({_STRUCTURES[row.kind]})\b", text) is not None
        and re.search(rf"\b({_UNSAFE})\b", text) is None
    )


def _pairs(one: Sequence[str], other: Sequence[str], rng: random.Random) -> list[tuple[str, str]]:
    """Pictures of two sides, drawn in pairs until the smaller side is used up."""
    count = min(len(one), len(other))
    return list(zip(rng.sample(list(one), count), rng.sample(list(other), count), strict=True))


def _asked_of(
    pair: tuple[str, str], task: str, text: str, answers: tuple[str, str]
) -> Iterator[tuple[str, Question]]:
    """One wording to both pictures of a pair."""
    for image, answer in zip(pair, answers, strict=True):
        yield image, Question(task, text, answer, "closed")


def _same_view(one: str, two: str) -> bool:
    """Whether a picture of one plane may be said to be of the other."""
    return one == two or ("coronal" in (one, two) and bool({one, two} & _FILM))
