"""What two models are asked when one is held against the other: fixed pictures, questions and long answers.

Pictures are drawn, so that nothing needs to be at hand, and of several shapes, so that tiling and packing are met. The
same front end always gets the same probes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ldrt_edge.front import Front, Message
from ldrt_edge.runtimes.base import Prompt

_SEED = 20250115
ALL = 5
"""Enough to see every shape of picture; making prompts of them needs no model."""
_PROBES = 4
"""About 300 answer tokens."""
_BIG_WEIGHTS = 2_000_000_000
"""A model with more is asked one question, about 75 answer tokens: on a CPU each takes minutes."""
_SIZES = ((180, 320), (224, 224), (400, 150), (97, 96), (600, 450))  # height, width
_QUESTIONS_AND_ANSWERS = (
    (
        "What does this picture show?",
        "The picture shows a transverse slice through a treatment plan. The target lies near the middle, drawn as a "
        "red contour, and the coloured area around it is the dose. Away from the target the dose falls off quickly, so "
        "that the skin and the bone marrow receive only a small part of it.",
    ),
    (
        "Describe the dose distribution in detail.",
        "Two opposed beams enter from the left and from the right side of the joint. Where they overlap, the dose is "
        "nearly uniform and reaches the prescribed value. The isodose lines at 95, 80 and 50 percent run close "
        "together at the edges, which means a steep gradient, and the penumbra is about five millimetres wide.",
    ),
    (
        "¿Qué se ve en la imagen?",
        "La imagen muestra una radiografía de la rodilla izquierda en dos proyecciones. El espacio articular está "
        "reducido en el lado interno y hay pequeños osteofitos. El tratamiento propuesto es una serie de seis sesiones "
        "con una dosis baja, y el control se hace después de tres meses.",
    ),
    (
        "Which organs at risk are close to the target?",
        "The spinal cord and the thyroid are drawn as organs at risk. Both lie outside the 20 percent isodose line. "
        "According to the table, the largest dose to the cord is 0.31 Gy and the mean dose to the thyroid is 0.08 Gy, "
        "so that no limit is reached or even approached.",
    ),
    (
        "How many fractions are planned, and with which dose?",
        "Six fractions of 0.5 Gy are planned, two in a week, which makes a total dose of 3.0 Gy in three weeks. After "
        "twelve weeks the patient is seen again. If the pain has not improved enough by then, a second series with the "
        "same total dose can be given.",
    ),
)

Probe = tuple[Prompt, tuple[int, ...]]
"""A prompt, and the answer to score behind it."""


def probes(front: Front, count: int = _PROBES) -> list[Probe]:
    """Prompts with a drawn picture each, and their answers."""
    made = []
    for picture, (question, answer) in zip(pictures(count), questions(count), strict=True):
        messages = [Message("user", question, (front.image(picture),))]
        made.append((front.prompt(messages), front.answer_ids(messages, answer)))
    return made


def probe_count(weights: int) -> int:
    """How many probes a model of so many weights is asked."""
    return 1 if weights > _BIG_WEIGHTS else _PROBES


def text_probes(front: Front, count: int = _PROBES) -> list[Probe]:
    """The same questions and answers without pictures."""
    made = []
    for question, answer in questions(count):
        messages = [Message("user", question)]
        made.append((front.prompt(messages), front.answer_ids(messages, answer)))
    return made


def questions(count: int) -> list[tuple[str, str]]:
    """The first `count` questions, over and over, each with its answer."""
    return [_QUESTIONS_AND_ANSWERS[i % len(_QUESTIONS_AND_ANSWERS)] for i in range(count)]


def pictures(count: int) -> list[NDArray[np.uint8]]:
    """The first `count` drawn pictures, (height, width, 3) RGB."""
    return [_draw(np.random.default_rng(_SEED + i), _SIZES[i % len(_SIZES)]) for i in range(count)]


def _draw(rng: np.random.Generator, size: tuple[int, int]) -> NDArray[np.uint8]:
    """A picture of (height, width): soft colours with hard-edged boxes on them."""
    height, width = size
    coarse = rng.integers(0, 256, (height // 32 + 2, width // 32 + 2, 3), dtype=np.uint8)
    picture = np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    for _ in range(4):
        top, left = int(rng.integers(height - 8)), int(rng.integers(width - 8))
        picture[top : top + height // 4, left : left + width // 4] = rng.integers(0, 256, 3)
    return picture
