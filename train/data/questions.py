"""Questions about medical pictures, in the words that VQA-RAD's clinicians use, with balanced answers. English only."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ldrt_edge.dataset import AnswerType
from ldrt_edge.train.data.balance import Balance

MODALITIES: dict[str, str] = {
    "MRI": "an MRI", "CT": "a CT scan", "x-ray": "an x-ray", "ultrasound": "an ultrasound",
    "nuclear medicine scan": "a nuclear medicine scan",
}
"""The answer, and the same in a question."""

MODALITY_FORMS = ("modality", "modality check", "modality choice")
_PAIR = "\t"

WORDINGS: dict[str, tuple[str, ...]] = {
    "modality": ("What imaging modality is this?", "What type of image is this?", "What imaging modality was used?",
                 "How was this image taken?", "What kind of image is this?"),
    "modality check": ("Is this {a}?", "Is the image {a}?"),
    "modality choice": ("Is this {a} or {b}?", "Was {a} or {b} used to take the above image?"),
    "plane": ("What plane is this?", "In what plane is this image?", "In what plane was this image taken?",
              "What is the plane of this image?", "Which plane is the image shown in?"),
    "plane check": ("Is this an image in the {a} plane?", "Is this {article} {a} image?", "Is this in the {a} plane?",
                    "Is this {article} {a} plane?", "Is this taken in the {a} plane?"),
    "organ": ("What organ is this image of?", "What organ is shown?", "What part of the body is being imaged?"),
    "organ check": ("Is this an image of the {a}?", "Is this a study of the {a}?", "Is the {a} shown?"),
    "presence": ("Is the {a} visible in this image?", "Can you see the {a}?", "Is the {a} seen on this slice?",
                 "Does this image include the {a}?"),
    "position": ("On which side of the image is the {a}: left or right?",
                 "Is the {a} on the left or right side of the image?"),
    "height": ("Is the {a} in the upper or lower half of the image?",
               "Does the {a} lie in the upper or the lower half?"),
    "size": ("Which is larger in this image, the {a} or the {b}?",
             "Which takes up more of the image: the {a} or the {b}?"),
    "lesion presence": ("Is there a lesion in this image?", "Is a lesion seen?", "Is there evidence of a mass?",
                        "Are there abnormal findings on this image?", "Is there a mass lesion?"),
    "lesion side": ("Which side of the brain is the lesion on?", "Is the lesion on the patient's right or left side?",
                    "What side is the lesion on?", "Is the lesion on the right or left side of the {organ}?"),
    "lesion image side": ("On which side of the image is the lesion?",
                          "Is the lesion on the left or right of the image?"),
    "lesion region": ("Where is the lesion located?", "What lobe of the brain is the lesion located in?",
                      "Where is the abnormality?", "Where is the lesion?"),
    "lesion intensity": ("Is the lesion {bright} or {dark}?", "Is the mass {bright} or {dark}?"),
    "lesion intensity check": ("Is the lesion {a}?", "Is the abnormality {a}?", "Is the mass {a}?"),
    "lesion count": ("How many lesions are present in the image?", "How many lesions are there?"),
    "lesion count check": ("Is there more than one lesion?", "Are there multiple lesions?"),
}


@dataclass(frozen=True)
class Question:
    """A question about one slice, put into words, with its exact answer."""

    task: str
    text: str
    answer: str
    answer_type: AnswerType


class Asker:
    """Collects a slice's questions, choosing wordings and balancing closed answers."""

    def __init__(self, balance: Balance, rng: random.Random) -> None:
        self.questions: list[Question] = []
        self._balance, self._rng = balance, rng

    def add(self, task: str, answer: str, answer_type: AnswerType, note: str = "", **words: str) -> None:
        """A question whose answer the slice fixes."""
        text = self._rng.choice(WORDINGS[task]).format(**words) + note
        self.questions.append(Question(task.removesuffix(" check").removesuffix(" choice"), text, answer, answer_type))

    def open(self, task: str, answer: str) -> None:
        """An open question."""
        self.add(task, answer, "open")

    def check(self, task: str, truth: str, foil: str, say: Callable[[str], str] = str) -> None:
        """A yes/no question that names the truth or a foil, whichever answer is behind."""
        subject, answer = self._balance.pick(task, [(truth, "yes"), (foil, "no")])
        self.add(task, answer, "closed", a=say(subject), article="an" if subject[0] in "aeiou" else "a")

    def modality(self, form: str, truth: str, foil: str) -> None:
        """How the picture was made, in one of `MODALITY_FORMS`: openly, yes/no, or as a choice."""
        if form == "modality":
            self.open(form, truth)
        elif form == "modality check":
            self.check(form, truth, foil, MODALITIES.__getitem__)
        else:
            a, b = self._rng.sample((truth, foil), 2)
            self.add(form, truth, "closed", a=MODALITIES[a], b=MODALITIES[b])

    def presence(self, visible: Sequence[str], absent: Sequence[str]) -> None:
        """Whether a region can be seen; the same region is asked for where it is and where it is not."""
        asked = {question.text for question in self.questions}
        candidates = [(name, "yes") for name in visible] + [(name, "no") for name in absent]
        subject, answer = self._balance.pick("presence", candidates)
        text = self._rng.choice(WORDINGS["presence"]).format(a=subject)
        if text not in asked:
            self.questions.append(Question("presence", text, answer, "closed"))

    def larger(self, pairs: Sequence[tuple[str, str]]) -> None:
        """Which of two is larger; `pairs` are (larger, smaller). Those that can fall out either way are preferred."""
        if pairs:
            subject, answer = self._balance.pick("size", [(_PAIR.join(sorted(pair)), pair[0]) for pair in pairs])
            a, b = self._rng.sample(subject.split(_PAIR), 2)
            self.add("size", answer, "closed", a=a, b=b)

    def about(self, task: str, candidates: Sequence[tuple[str, str]]) -> None:
        """A choice between two answers, about the subject whose answer is behind."""
        subject, answer = self._balance.pick(task, candidates)
        self.add(task, answer, "closed", a=subject)
