"""Text that is burned into a picture's pixels, where a name may stand: found so that a person can be asked.

Letters are small connected shapes of one tone, as high as their neighbours, side by side on a line, and much brighter
(or darker) than what is around them. It takes no account of what is written, and can miss text, most of all where the
background is as bright as the letters: a picture in which nothing is found is not thereby free of names.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ldrt_edge.image import Look, Window

_LETTERS = 4  # side by side, before they count as text
_LOWEST, _HIGHEST = 5, 64  # pixels of a letter's height
_SHARES = (0.35, 0.55, 0.8)  # of the full range: letters are brighter
_MOST_SHAPES = 3000  # of a letter's size: more are grain, and would take long
_MARGIN = 3  # pixels of a box around its letters
_CONTRAST = 60  # grey levels between letters and their surroundings


@dataclass(frozen=True)
class Line:
    """A line of text: its box in pixels, the end excluded, and how many letters were found."""

    top: int
    left: int
    bottom: int
    right: int
    letters: int


def text_in(look: Look, window: Window | None = None) -> list[Line]:
    """Lines of text in a frame, from the top: those that its file's own window, its full range or `window` shows.

    Raises:
        DataError: the window does not fit it.
    """
    own = look(None)
    low, high = own.levels or (0.0, 0.0)
    whole = [(low + (high - low) / 2, high - low)] if 0 < high - low < np.inf else []
    views: list[NDArray[np.uint8]] = []
    for through in (None, *whole, window):
        rgb = look(through).rgb
        if not any(np.array_equal(rgb, other) for other in views):
            views.append(rgb)
    return text_lines(*views)


def text_lines(*views: NDArray[np.uint8]) -> list[Line]:
    """Lines of text in a picture, (height, width, 3) uint8, from the top: those of several views of it as one."""
    found: list[Line] = []
    for rgb in views:
        red, green, blue = np.moveaxis(rgb, 2, 0)  # five times as fast as rgb.max(axis=2)
        brightest, darkest = np.maximum(np.maximum(red, green), blue), np.minimum(np.minimum(red, green), blue)
        for tones in (brightest, 255 - darkest):
            for share in _SHARES:
                for line in _lines(tones, share * 255):
                    found = _joined(found, line)
    return sorted(found, key=lambda line: (line.top, line.left))


def black_out(rgb: NDArray[np.uint8], lines: list[Line]) -> NDArray[np.uint8]:
    """A copy of a picture, (height, width, 3) uint8, with lines of text under black boxes."""
    covered = rgb.copy()
    for line in lines:
        top, left = max(line.top - _MARGIN, 0), max(line.left - _MARGIN, 0)
        covered[top : line.bottom + _MARGIN, left : line.right + _MARGIN] = 0
    return covered


def _lines(tones: NDArray[np.uint8], above: float) -> list[Line]:
    from scipy import ndimage

    labels, _ = ndimage.label(tones > above, np.ones((3, 3)))
    shapes = [
        (label, down, across)
        for label, (down, across) in enumerate(ndimage.find_objects(labels), 1)
        if _LOWEST <= (height := down.stop - down.start) <= _HIGHEST and across.stop - across.start <= 1.6 * height
    ]
    if len(shapes) > _MOST_SHAPES:
        return []
    letters: list[tuple[int, int, int, int]] = []
    for label, down, across in shapes:
        height, width = down.stop - down.start, across.stop - across.start
        shape = labels[down, across] == label
        around = (slice(max(down.start - 2, 0), down.stop + 2), slice(max(across.start - 2, 0), across.stop + 2))
        beside = tones[around][labels[around] != label]
        stands_out = beside.size and np.median(tones[down, across][shape]) - np.median(beside) >= _CONTRAST
        if stands_out and (shape.mean() <= 0.8 or width <= height / 2):
            letters.append((down.start, across.start, down.stop, across.stop))
    return _grouped(sorted(letters, key=lambda box: box[1]))


def _grouped(letters: list[tuple[int, int, int, int]]) -> list[Line]:
    lines: list[list[tuple[int, int, int, int]]] = []
    for box in letters:
        for line in lines:
            if _continues(line[-1], box):
                line.append(box)
                break
        else:
            lines.append([box])
    return [
        Line(min(b[0] for b in line), line[0][1], max(b[2] for b in line), max(b[3] for b in line), len(line))
        for line in lines
        if len(line) >= _LETTERS and len({(b[3] - b[1], b[2] - b[0]) for b in line}) > 1  # no ruler's ticks
    ]


def _continues(before: tuple[int, int, int, int], box: tuple[int, int, int, int]) -> bool:
    """Whether a letter stands behind another on its line: as high, on one baseline or under one top, not far off."""
    height, other = before[2] - before[0], box[2] - box[0]
    level = min(abs(before[2] - box[2]), abs(before[0] - box[0])) <= 0.15 * max(height, other)
    gap = box[1] - before[3]
    return level and 0.6 <= height / other <= 1.7 and -1 <= gap <= 1.3 * max(height, other)


def _joined(lines: list[Line], new: Line) -> list[Line]:
    """Lines and another, which becomes one with those that it overlaps: of a name, each may be a part."""
    one = [line for line in lines if _overlap(line, new)] + [new]
    whole = Line(
        min(line.top for line in one), min(line.left for line in one),
        max(line.bottom for line in one), max(line.right for line in one), max(line.letters for line in one),
    )  # fmt: skip
    return [*(line for line in lines if not _overlap(line, new)), whole]


def _overlap(one: Line, other: Line) -> bool:
    return one.top < other.bottom and other.top < one.bottom and one.left < other.right and other.left < one.right
