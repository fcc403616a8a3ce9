"""What every phantom picture is made of: a canvas, big type, and the facts that are known about it.

Pictures are drawn on a canvas of 448 × 448 and brought down once, so that lines are smooth; type and lines are sized to
survive at 224 pixels, which is 16 × 16 patches of the starter's vision tower.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFont

CANVAS = 448
PlateKind = Literal["dose map", "DVH", "table"]
Colour = tuple[int, int, int]
Field = NDArray[np.float32]
"""One float32 value for each pixel of a square grid, (rows, columns)."""


@dataclass(frozen=True)
class Fact:
    """A question kind and its exact answer: a number as digits, or a term that `phantom_text` translates.

    `words` are terms that the question names ("the {a} curve").
    """

    task: str
    answer: str
    words: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Plate:
    """One drawn picture (RGB, CANVAS × CANVAS), what can be asked about it, and which `THINGS` it shows."""

    image: Image.Image
    facts: tuple[Fact, ...]
    present: tuple[str, ...] = ()


def yes(truth: bool) -> str:
    """The term for a closed answer."""
    return "yes" if truth else "no"


@functools.cache
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's built-in scalable face: the same everywhere, no font file to find."""
    return ImageFont.load_default(size)
